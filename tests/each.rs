//! `--each`: one output per adapter, each the bytes of a merge of that adapter alone; all of them appear at once or none does.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{bytes, copy_folder, fixture};

fn run(words: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_loratool")).args(words.iter().map(AsRef::as_ref)).output().unwrap()
}

fn good(words: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    let output = run(words);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

fn alone(base: &Path, adapter: &str, flags: &[&str]) -> BTreeMap<PathBuf, Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let (out, adapter) = (folder.path().join("out"), fixture(&format!("adapters/{adapter}")));
    let mut words: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"merge", &base, &"-a", &adapter, &"-o", &out];
    words.extend(flags.iter().map(|flag| flag as &dyn AsRef<std::ffi::OsStr>));
    good(&words);
    bytes(&out)
}

/// Adapters of different ranks and targets, whatever splits the tensors.
#[test]
fn each_output_is_that_of_the_adapter_alone() {
    let names = ["llama-qv-r8", "llama-all-r4", "llama-odd-scale"];
    for base in ["llama-tiny", "llama-tiny-f32"] {
        let base = fixture(&format!("models/{base}"));
        for flags in
            [&[][..], &["--tile", "300"], &["--digests"], &["--dtype", "f16"], &["--threads", "3", "--max-shard-size", "50kB"]]
        {
            let folder = tempfile::tempdir().unwrap();
            let out = folder.path().join("out");
            let adapters = names.map(|name| fixture(&format!("adapters/{name}")));
            let mut words: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"merge", &base, &"--each", &"-o", &out];
            for adapter in &adapters {
                words.extend([&"-a" as &dyn AsRef<std::ffi::OsStr>, adapter]);
            }
            words.extend(flags.iter().map(|flag| flag as &dyn AsRef<std::ffi::OsStr>));
            good(&words);
            for name in names {
                assert!(bytes(&out.join(name)) == alone(&base, name, flags), "{name} {flags:?}");
            }
            assert_eq!(std::fs::read_dir(&out).unwrap().count(), names.len());
        }
    }
}

/// Two tensors that start from the same bytes, with ranks that split them otherwise: what one reads is not what the other wants.
#[test]
fn tied_tensors_of_other_ranks_do_not_share_what_they_read() {
    let base = fixture("models/llama-tied");
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let mut adapters = Vec::new();
    for (name, embed, head) in [("one", 1, 4), ("two", 1, 4)] {
        let adapter = folder.path().join(name);
        write_tied_adapter(&adapter, embed, head, name.len() as f32 + f32::from(name.as_bytes()[0]));
        adapters.push(adapter);
    }
    let flags = ["--untie", "--tile", "256"];
    let mut words: Vec<&dyn AsRef<std::ffi::OsStr>> =
        vec![&"merge", &base, &"--each", &"-o", &out, &"-a", &adapters[0], &"-a", &adapters[1]];
    words.extend(flags.iter().map(|flag| flag as &dyn AsRef<std::ffi::OsStr>));
    good(&words);
    for adapter in &adapters {
        let (name, single) = (adapter.file_name().unwrap(), folder.path().join("single"));
        let mut words: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"merge", &base, &"-a", adapter, &"-o", &single, &"--overwrite"];
        words.extend(flags.iter().map(|flag| flag as &dyn AsRef<std::ffi::OsStr>));
        good(&words);
        assert!(bytes(&out.join(name)) == bytes(&single), "{name:?}");
    }
}

/// A PEFT adapter of `embed_tokens` and `lm_head` of the tied model, (256, 64), with these ranks.
fn write_tied_adapter(folder: &Path, embed: usize, head: usize, seed: f32) {
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    let values =
        |n: usize, of: f32| -> Vec<u8> { (0..n).flat_map(|i| (((i as f32 + seed) * of).sin() * 0.1).to_le_bytes()).collect() };
    let model = "base_model.model.";
    let data = [
        (format!("{model}model.embed_tokens.lora_embedding_A"), vec![embed, 256], values(embed * 256, 0.7)),
        (format!("{model}model.embed_tokens.lora_embedding_B"), vec![64, embed], values(embed * 64, 1.3)),
        (format!("{model}lm_head.lora_A.weight"), vec![head, 64], values(head * 64, 0.9)),
        (format!("{model}lm_head.lora_B.weight"), vec![256, head], values(head * 256, 1.1)),
    ];
    let views =
        data.iter().map(|(name, shape, bytes)| (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    std::fs::create_dir(folder).unwrap();
    serialize_to_file(views.collect::<Vec<_>>(), None, &folder.join("adapter_model.safetensors")).unwrap();
    let config = serde_json::json!({
        "peft_type": "LORA", "r": embed, "lora_alpha": 4, "rank_pattern": {"lm_head": head}, "target_modules": ["embed_tokens", "lm_head"],
    });
    std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
}

#[test]
fn one_that_does_not_fit_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let output = run(&[
        &"merge",
        &fixture("models/llama-tiny"),
        &"--each",
        &"-a",
        &fixture("adapters/llama-qv-r8"),
        &"-a",
        &fixture("adapters/bert-qv"),
        &"-o",
        &out,
    ]);
    assert_eq!(output.status.code(), Some(4), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn two_adapters_of_one_name_have_no_place() {
    let folder = tempfile::tempdir().unwrap();
    let (twin, out) = (folder.path().join("llama-qv-r8"), folder.path().join("out"));
    copy_folder(&fixture("adapters/llama-all-r4"), &twin);
    let output = run(&[
        &"merge",
        &fixture("models/llama-tiny"),
        &"--each",
        &"-a",
        &fixture("adapters/llama-qv-r8"),
        &"-a",
        &twin,
        &"-o",
        &out,
    ]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("two adapters are called \"llama-qv-r8\""), "{said}");
}

#[test]
fn a_dry_run_says_what_each_would_be() {
    let folder = tempfile::tempdir().unwrap();
    let output = good(&[
        &"merge",
        &fixture("models/llama-tiny"),
        &"--each",
        &"--dry-run",
        &"--json",
        &"-a",
        &fixture("adapters/llama-qv-r8"),
        &"-a",
        &fixture("adapters/llama-all-r4"),
        &"-o",
        &folder.path().join("out"),
    ]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["report"]["merges"].as_array().unwrap().len(), 2);
    assert_eq!(json["report"]["merges"][1]["balance"]["modified"], 14);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
