//! `--digests`: the record names every tensor of the output by the digest of `spec/container.md`, computed here by the `sha2` crate from
//! what the reference reader reads; `verify` without a base tells any change from them.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::fixture;
use safetensors::SafeTensors;
use serde_json::Value;
use sha2::{Digest, Sha256};

fn run(words: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_loratool")).args(words.iter().map(AsRef::as_ref)).output().unwrap()
}

fn merge(base: &Path, adapter: &str, out: &Path, flags: &[&str]) {
    let adapter = fixture(&format!("adapters/{adapter}"));
    let mut words: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"merge", &base, &"-a", &adapter, &"-o", &out];
    words.extend(flags.iter().map(|flag| flag as &dyn AsRef<std::ffi::OsStr>));
    let output = run(&words);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Names and digests of a folder's tensors, by definition.
fn digests(folder: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for path in
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|x| x == "safetensors"))
    {
        let bytes = fs::read(path).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let mut hash = Sha256::new();
            hash.update(format!("loratool.tensor.v1\0{}\0", view.dtype()));
            hash.update((view.shape().len() as u64).to_le_bytes());
            view.shape().iter().for_each(|&dim| hash.update((dim as u64).to_le_bytes()));
            hash.update(view.data());
            found.push((name, hex(hash)));
        }
    }
    found.sort();
    found
}

struct Scene {
    folder: tempfile::TempDir,
}

impl Scene {
    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    fn record(&self) -> Value {
        serde_json::from_slice(&fs::read(self.out().join("loratool.merge.json")).unwrap()).unwrap()
    }
}

#[test]
fn every_tensor_is_named_by_its_digest() {
    // Tiles of a few rows, columns that would be split, other dtypes, a tensor that is added: the hash is of the bytes in order.
    let cases = [
        ("llama-tiny", "llama-all-r4", &["--digests"][..]),
        ("llama-tiny", "llama-all-r4", &["--digests", "--tile", "64", "--threads", "5"]),
        ("llama-tiny-f32", "llama-embed", &["--digests", "--tile", "200"]),
        ("gpt2-tiny-bf16", "gpt2-all", &["--digests", "--dtype", "f32", "--max-shard-size", "40kB"]),
        ("bert-tiny", "bert-lora-bias", &["--digests", "--rounding", "stochastic"]),
    ];
    for (base, adapter, flags) in cases {
        let scene = Scene { folder: tempfile::tempdir().unwrap() };
        merge(&fixture(&format!("models/{base}")), adapter, &scene.out(), flags);
        let record = scene.record();
        let recorded = record["digests"]["tensors"].as_object().unwrap();
        let recorded: Vec<_> =
            recorded.iter().map(|(name, digest)| (name.clone(), digest.as_str().unwrap().to_owned())).collect();
        let wanted = digests(&scene.out());
        assert_eq!(recorded, wanted, "{base} {flags:?}");
        let mut root = Sha256::new();
        wanted.iter().for_each(|(name, digest)| root.update(format!("{name}\0{digest}\n")));
        assert_eq!(record["digests"]["content"], hex(root));
        let output = run(&[&"verify", &scene.out()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(String::from_utf8_lossy(&output.stdout).starts_with(&format!("{} tensors as they were written", wanted.len())));
    }
}

/// The bytes are those of a merge without digests.
#[test]
fn digests_change_no_byte() {
    let (with, without) = (Scene { folder: tempfile::tempdir().unwrap() }, Scene { folder: tempfile::tempdir().unwrap() });
    merge(&fixture("models/llama-tiny"), "llama-all-r4", &with.out(), &["--digests"]);
    merge(&fixture("models/llama-tiny"), "llama-all-r4", &without.out(), &[]);
    assert_eq!(digests(&with.out()), digests(&without.out()));
    assert!(without.record().get("digests").is_none());
}

#[test]
fn a_flipped_bit_is_named_and_so_is_a_lost_record() {
    let scene = Scene { folder: tempfile::tempdir().unwrap() };
    let base = fixture("models/llama-tiny");
    merge(&base, "llama-qv-r8", &scene.out(), &["--digests"]);
    let path = scene.out().join("model-00002-of-00004.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 5;
    bytes[last] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let name = {
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let at = |data: &[u8]| data.as_ptr() as usize - bytes.as_ptr() as usize;
        file.tensors()
            .into_iter()
            .find(|(_, view)| (at(view.data())..at(view.data()) + view.data().len()).contains(&last))
            .unwrap()
            .0
    };
    let output = run(&[&"verify", &scene.out()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(9), "{said}");
    assert!(said.contains(&name) && said.contains("C-037"), "{said}");
    // With a base the answer is about the merge, and the digest is a warning.
    let output = run(&[&"verify", &scene.out(), &"--base", &base, &"-a", &fixture("adapters/llama-qv-r8")]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("C-037"), "{said}");

    fs::remove_file(scene.out().join("loratool.merge.json")).unwrap();
    let output = run(&[&"verify", &scene.out()]);
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_content_root_that_was_edited_is_no_content_root() {
    let scene = Scene { folder: tempfile::tempdir().unwrap() };
    merge(&fixture("models/llama-tiny"), "llama-qv-r8", &scene.out(), &["--digests"]);
    let mut record = scene.record();
    record["digests"]["content"] = "0".repeat(64).into();
    fs::write(scene.out().join("loratool.merge.json"), record.to_string()).unwrap();
    let output = run(&[&"verify", &scene.out()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(9) && said.contains("C-038"), "{said}");
}

/// What was merged on top without digests has none, rather than old ones.
#[test]
fn old_digests_do_not_outlive_a_merge() {
    let scene = Scene { folder: tempfile::tempdir().unwrap() };
    merge(&fixture("models/llama-tiny"), "llama-qv-r8", &scene.out(), &["--digests"]);
    let adapter = fixture("adapters/llama-all-r4");
    assert!(run(&[&"merge", &scene.out(), &"-a", &adapter, &"--in-place"]).status.success());
    assert!(scene.record().get("digests").is_none());
    assert_eq!(scene.record()["merges"].as_array().unwrap().len(), 2);
}
