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
