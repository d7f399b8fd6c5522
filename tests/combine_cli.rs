//! `loratool combine` as people and scripts use it: recipes, refusals with their exit codes, what is printed.
#![cfg(feature = "cli")]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::fixture;
use serde_json::Value;

fn run(folder: &Path, arguments: &str) -> Output {
    let root = fixture("adapters").display().to_string();
    let words = arguments.split_whitespace().map(|word| word.replace('@', &root));
    Command::new(env!("CARGO_BIN_EXE_loratool")).args(words).current_dir(folder).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_recipe_gives_the_same_bytes_again() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    for (i, how) in [
        "--method linear --weight layers.0=0.5 --weight 2:q_proj=-1",
        "--method dare-ties --density 0.4 --seed 9 --rank 5 --dtype bf16",
        "--method della --epsilon 0.3",
        "--method svd --error 0.2 --split b",
        "--compat peft:ties_svd --density 0.5 --majority-sign frequency",
        "--method breadcrumbs --outliers 0.02 --parts average",
        "--budget 5000",
    ]
    .iter()
    .enumerate()
    {
        let made = run(here, &format!("combine @/llama-qv-r8:0.7 @/llama-all-r4:-0.3 {how} -o one{i} --save-recipe r{i}.toml"));
        assert!(made.status.success(), "{how}: {}", text(&made.stderr));
        let again = run(here, &format!("combine --recipe r{i}.toml -o two{i}"));
        assert!(again.status.success(), "{how}: {}", text(&again.stderr));
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            let read = |name: &str| std::fs::read(here.join(format!("{name}{i}")).join(file)).unwrap();
            assert!(read("one") == read("two"), "{how}: {file}");
        }
    }
    let recipe = std::fs::read_to_string(here.join("r1.toml")).unwrap();
    for part in ["method = \"dare-ties\"", "density = 0.4", "seed = 9", "rank = 5", "dtype = \"bf16\"", "content = \""] {
        assert!(recipe.contains(part), "{recipe}");
    }
    let lineage = run(here, "inspect one1 --json");
    let report: Value = serde_json::from_slice(&lineage.stdout).unwrap();
    assert!(report["report"].to_string().contains("combine"), "{report}");
    // Another adapter under the same name is not the one of the recipe.
    let other = recipe.replace("llama-qv-r8", "llama-bf16");
    std::fs::write(here.join("other.toml"), other).unwrap();
    let refused = run(here, "combine --recipe other.toml -o three");
    assert!(refused.status.code() == Some(9) && text(&refused.stderr).contains("[C-038]"), "{}", text(&refused.stderr));
    assert!(!here.join("three").exists());
}

#[test]
fn what_cannot_be_done_ends_with_its_exit_code_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    std::fs::write(here.join("bad.toml"), "method = \"ties\"\ndensity = 0.2\nrnak = 4\n[[adapter]]\npath = \"a\"\n").unwrap();
    for (arguments, code, told) in [
        ("combine -o out", 2, "ADAPTER"),
        ("combine @/llama-qv-r8", 2, "--output"),
        ("combine @/llama-qv-r8:x @/llama-r1 -o out", 2, "weight"),
        ("combine @/llama-qv-r8:nan -o out", 2, "finite"),
        ("combine @/nothing -o out", 6, "no such file"),
        ("combine @/llama-qv-r8 -o out --method mean", 2, "ties"),
        ("combine @/llama-qv-r8 -o out --method ties --density 3", 2, "density"),
        ("combine @/llama-qv-r8 -o out --density 0.3", 2, "does not take a density"),
        ("combine @/llama-qv-r8 -o out --seed 3", 2, "does not take a seed"),
        ("combine @/llama-qv-r8 -o out --compat peft:ties", 2, "no default"),
        ("combine @/llama-qv-r8 -o out --compat peft:mean", 2, "peft:"),
        ("combine @/llama-qv-r8 -o out --method ties --compat peft:ties", 2, "cannot be used with"),
        ("combine @/llama-qv-r8 -o out --weight q_proj", 2, "no \"=\""),
        ("combine @/llama-qv-r8 -o out --weight 3:q_proj=1", 2, "adapter 3"),
        ("combine @/llama-qv-r8 -o out --weight mlp=1", 2, "matches no target"),
        ("combine @/llama-qv-r8 -o out --rank 4 --error 0.1", 2, "cannot be used with"),
        ("combine @/llama-qv-r8 -o out --for vllm", 2, "--rank"),
        ("combine @/llama-qv-r8 -o @/llama-qv-r8 --overwrite", 2, "[U-003]"),
        ("combine @/bert-seqcls @/bert-qv -o out", 4, "[A-020]"),
        ("combine @/bert-seqcls:0.5 -o out", 4, "--parts first"),
        ("combine --recipe bad.toml -o out", 2, "rnak"),
        ("combine --recipe none.toml -o out", 6, "none.toml"),
        ("combine --recipe bad.toml --rank 3 -o out", 2, "cannot be used with"),
    ] {
        let out = run(here, arguments);
        let said = text(&out.stderr);
        assert!(out.status.code() == Some(code) && said.contains(told), "{arguments}: {:?} {said}", out.status.code());
        assert_eq!(std::fs::read_dir(here).unwrap().count(), 1, "{arguments}");
    }
}

#[test]
fn what_is_lost_is_said_before_it_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let dry = run(here, "combine @/llama-qv-r8 @/llama-all-r4 --rank 2 --dry-run");
    assert!(dry.status.success() && text(&dry.stdout).contains("nothing is written"), "{}", text(&dry.stderr));
    assert_eq!(std::fs::read_dir(here).unwrap().count(), 0);
    let made = run(here, "combine @/llama-qv-r8 @/llama-all-r4 --rank 2 -o out");
    assert!(text(&made.stderr).starts_with("loratool: the error is "), "{}", text(&made.stderr));
    let quiet = run(here, "combine @/llama-qv-r8 @/llama-all-r4 --rank 2 -o quiet --quiet");
    assert!(quiet.stderr.is_empty() && quiet.stdout.is_empty());
    let json = run(here, "combine @/llama-qv-r8 @/llama-all-r4 --rank 2 -o json --json");
    assert!(json.stderr.is_empty());
    let report: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert!(report["report"]["error"].as_f64().unwrap() > 0.1 && report["report"]["from_sum"] == report["report"]["error"]);
    for line in text(&made.stdout).lines() {
        assert!(line.chars().count() <= 80 || line.contains('/'), "{line}");
    }
    let help = text(&run(here, "combine --help").stdout);
    for word in ["subtract", "negate", "scale", "iso-c", "magnitude_prune_svd"] {
        assert!(help.contains(word), "{word}");
    }
    assert!(help.lines().all(|line| line.chars().count() <= 80), "{help}");
}
