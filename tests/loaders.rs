//! What `validate --for` says of the loaders, and that `docs/loaders.md` says the same.
#![cfg(feature = "cli")]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::{copy_folder, fixture};
use loratool::Loader;
use serde_json::Value;

fn run(adapter: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_loratool")).arg("validate").arg(adapter).args(args).output().unwrap()
}

/// The exit code, and the effects that each loader has on the adapter.
fn effects(adapter: &Path, loaders: &[&str]) -> (i32, Vec<Vec<String>>) {
    let flags: Vec<&str> = loaders.iter().flat_map(|loader| ["--for", loader]).chain(["--json"]).collect();
    let out = run(adapter, &flags);
    let object: Value = serde_json::from_slice(&out.stdout).unwrap();
    let found = object["report"]["loaders"].as_array().unwrap().iter().map(|loader| {
        let findings = loader["findings"].as_array().unwrap().iter();
        findings.map(|finding| finding["id"].as_str().unwrap().to_owned()).collect()
    });
    (out.status.code().unwrap(), found.collect())
}

#[test]
fn a_loader_that_reads_it_is_a_yes() {
    let (code, found) = effects(&fixture("adapters/llama-qv-r8"), &["vllm", "sglang", "lorax", "mistralrs"]);
    assert_eq!((code, found), (0, vec![vec![]; 4]));
    let out = run(&fixture("adapters/llama-qv-r8"), &["--for", "vllm"]);
    assert!(String::from_utf8(out.stdout).unwrap().ends_with("\nvLLM 0.33.0: nothing is known against it\n"));
}

#[test]
fn what_needs_a_step_is_a_yes_and_what_is_wrong_a_no() {
    let adapter = fixture("adapters/llama-qv-r8");
    assert_eq!(effects(&adapter, &["llamacpp"]), (0, vec![vec!["llamacpp/gguf".to_owned()]]));
    assert_eq!(effects(&adapter, &["llamacpp", "mlx"]).0, 1);
    let (code, found) = effects(&fixture("adapters/llama-rslora"), &["sglang", "vllm"]);
    assert_eq!((code, found), (1, vec![vec!["sglang/rslora".to_owned()], vec!["vllm/odd-scale".to_owned()]]));
}

#[test]
fn text_names_the_finding_the_target_and_the_way_out_in_80_columns() {
    let flags: Vec<&str> = Loader::ALL.iter().flat_map(|loader| ["--for", loader.name()]).collect();
    for adapter in ["llama-patterns", "llama-embed", "bert-bias-all", "gpt2-all", "minilm-reviews"] {
        let out = run(&fixture("adapters").join(adapter), &flags);
        let shown = String::from_utf8(out.stdout).unwrap();
        assert!(shown.lines().skip(1).all(|line| line.chars().count() <= 80), "{shown}");
        assert_eq!(out.status.code(), Some(1));
        assert!(String::from_utf8(out.stderr).unwrap().contains("[U-006]"));
    }
    let out = run(&fixture("adapters/llama-rslora"), &["--for", "sglang"]);
    let shown = String::from_utf8(out.stdout).unwrap();
    let expected = "\
SGLang 0.5.23: reads it WRONG: 1 finding
  effect              what    n  first
  ignored in silence  rsLoRA  4  model.layers.0.self_attn.q_proj.weight
  -> loratool bake (rsLoRA)
";
    assert!(shown.ends_with(expected), "{shown}");
}

#[test]
fn a_container_is_no_folder_of_peft_until_it_is_converted() {
    let folder = tempfile::tempdir().unwrap();
    let (file, back) = (folder.path().join("a.safetensors"), folder.path().join("back"));
    for (from, to, kind) in [(fixture("adapters/llama-qv-r8"), &file, "container"), (file.clone(), &back, "peft")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_loratool"));
        let done = command.arg("convert").arg(from).arg("-o").arg(to).args(["--quiet", "--to", kind]).status().unwrap();
        assert!(done.success());
    }
    assert_eq!(effects(&file, &["vllm"]), (1, vec![vec!["vllm/no-config".to_owned()]]));
    assert_eq!(effects(&back, &["vllm"]), (0, vec![vec![]]));
}

#[test]
fn other_files_beside_the_weights_are_seen() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = folder.path().join("adapter");
    copy_folder(&fixture("adapters/llama-qv-r8"), &adapter);
    std::fs::copy(adapter.join("adapter_model.safetensors"), adapter.join("old.safetensors")).unwrap();
    let (code, found) = effects(&adapter, &["sglang", "vllm", "lorax"]);
    assert_eq!((code, found), (1, vec![vec!["sglang/other-files".to_owned()], vec![], vec!["lorax/other-files".to_owned()]]));
}

#[test]
fn loaders_are_for_adapters_and_known_by_name() {
    let out = run(&fixture("models/llama-tiny"), &["--for", "vllm"]);
    assert_eq!(out.status.code(), Some(2));
    let out = run(&fixture("adapters/llama-qv-r8"), &["--for", "nonsense"]);
    assert_eq!(out.status.code(), Some(2));
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(Loader::ALL.iter().all(|loader| said.contains(loader.name())), "{said}");
}

/// The section of a loader, as `docs/loaders.md` has it.
fn section(loader: Loader) -> String {
    let mut text = format!("## {} (`--for {}`)\n\n", loader.title(), loader.name());
    text.push_str(&format!("Version {}, read in {}.\n\n", loader.version(), loader.read_from()));
    text.push_str("| id | what the adapter has | effect | the loader … | basis | way out |\n|---|---|---|---|---|---|\n");
    for rule in loader.rules() {
        let basis = std::iter::once(rule.basis.name()).chain(rule.issues.iter().copied()).collect::<Vec<_>>().join("; ");
        let way_out = rule.way_out.replace("{}", "…");
        text.push_str(&format!(
            "| `{}` | {} | {} | {} | {basis} | {way_out} |\n",
            rule.id,
            rule.what,
            rule.effect.name(),
            rule.does
        ));
    }
    text
}

/// Run with `LORATOOL_WRITE_TABLES=1`, it writes the sections into the document in place of those that are there.
#[test]
fn the_document_is_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/loaders.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let prose = text.split("\n## ").next().unwrap();
    let sections: Vec<String> = Loader::ALL.into_iter().map(section).collect();
    let expected = format!("{prose}\n{}", sections.join("\n"));
    if std::env::var_os("LORATOOL_WRITE_TABLES").is_some() {
        std::fs::write(&path, &expected).unwrap();
    }
    assert!(text == expected, "docs/loaders.md differs from the table; LORATOOL_WRITE_TABLES=1 writes it anew");
    for effect in ["refused", "ignored in silence", "changed meaning", "needs a flag", "rounded once more", "not known"] {
        assert!(prose.contains(&format!("| {effect} |")), "{effect} is not explained");
    }
}
