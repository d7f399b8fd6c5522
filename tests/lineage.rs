//! A merged folder carries a record of what was merged into it, and the same adapter is not merged twice.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{copy_folder, fixture};
use serde_json::Value;

const RECORD: &str = "loratool.merge.json";

fn run(words: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_loratool")).args(words.iter().map(AsRef::as_ref)).output().unwrap()
}

fn good(words: &[&dyn AsRef<std::ffi::OsStr>]) {
    let output = run(words);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn merges(folder: &Path) -> Vec<(String, f64)> {
    let Ok(text) = fs::read(folder.join(RECORD)) else { return Vec::new() };
    let record: Value = serde_json::from_slice(&text).unwrap();
    let merges = record["merges"].as_array().unwrap().iter().flat_map(|step| step["adapters"].as_array().unwrap());
    merges.map(|m| (m["adapter"].as_str().unwrap().to_owned(), m["weight"].as_f64().unwrap())).collect()
}

/// The content root by its definition in `spec/container.md`, from the file that PEFT wrote.
fn content_root(weights: &Path) -> String {
    use sha2::{Digest, Sha256};
    let bytes = fs::read(weights).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let hex = |hash: Sha256| hash.finalize().iter().map(|b| format!("{b:02x}")).collect::<String>();
    let mut lines: Vec<String> = tensors
        .tensors()
        .iter()
        .map(|(name, view)| {
            let mut hash = Sha256::new();
            hash.update(b"loratool.tensor.v1\0F32\0");
            hash.update((view.shape().len() as u64).to_le_bytes());
            view.shape().iter().for_each(|&dim| hash.update((dim as u64).to_le_bytes()));
            hash.update(view.data());
            format!("{name}\0{}\n", hex(hash))
        })
        .collect();
    lines.sort();
    let mut root = Sha256::new();
    lines.iter().for_each(|line| root.update(line));
    hex(root)
}

struct Scene {
    folder: tempfile::TempDir,
    base: PathBuf,
    adapter: PathBuf,
}

impl Scene {
    fn new() -> Scene {
        Scene {
            folder: tempfile::tempdir().unwrap(),
            base: fixture("models/llama-tiny"),
            adapter: fixture("adapters/llama-qv-r8"),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn copy(&self, name: &str) -> PathBuf {
        copy_folder(&self.base, &self.path(name));
        self.path(name)
    }
}

#[test]
fn the_record_names_adapters_by_content() {
    let scene = Scene::new();
    let (a, out) = (&scene.adapter, scene.path("out"));
    good(&[&"merge", &scene.base, &"-a", &format!("{}:0.5", a.display()), &"-o", &out]);
    assert_eq!(merges(&out), [("llama-qv-r8".to_owned(), 0.5)]);
    let text = fs::read_to_string(out.join(RECORD)).unwrap();
    assert!(text.contains(&content_root(&a.join("adapter_model.safetensors"))), "{text}");
    // What is merged on top is added to the record.
    good(&[&"merge", &out, &"-a", &fixture("adapters/llama-all-r4"), &"-o", &scene.path("both")]);
    assert_eq!(merges(&scene.path("both")).len(), 2);
}

/// By whom, from what, how, and what became of it.
#[test]
fn the_record_says_what_went_in_and_how() {
    let scene = Scene::new();
    let out = scene.path("out");
    good(&[
        &"merge",
        &scene.base,
        &"-a",
        &scene.adapter,
        &"-o",
        &out,
        &"--rounding",
        &"stochastic",
        &"--seed",
        &"7",
        &"--allow-repeat",
    ]);
    let record: Value = serde_json::from_slice(&fs::read(out.join(RECORD)).unwrap()).unwrap();
    let step = &record["merges"][0];
    assert_eq!(
        (&step["tool"], &step["rounding"]),
        (&format!("loratool {}", env!("CARGO_PKG_VERSION")).into(), &"stochastic, seed 7".into())
    );
    assert_eq!(step["flags"], serde_json::json!(["--allow-repeat"]));
    assert_eq!((&step["counts"]["applied"], &step["counts"]["modified"]), (&8.into(), &4.into()));
    let shard = "model-00002-of-00004.safetensors";
    let bytes = fs::read(scene.base.join(shard)).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let digest: String = {
        use sha2::Digest;
        sha2::Sha256::digest(&bytes[8..8 + len]).iter().map(|b| format!("{b:02x}")).collect()
    };
    assert_eq!((&step["base"]["name"], &step["base"]["headers"][shard]), (&"llama-tiny".into(), &digest.into()));
}

#[test]
fn the_same_adapter_is_not_merged_twice() {
    let scene = Scene::new();
    let (a, out) = (&scene.adapter, scene.path("out"));
    good(&[&"merge", &scene.base, &"-a", a, &"-o", &out]);
    // Under another name too.
    let renamed = scene.path("renamed.safetensors");
    good(&[&"convert", a, &"--to", &"container", &"-o", &renamed]);
    for again in [a, &renamed] {
        let output = run(&[&"merge", &out, &"-a", again, &"-o", &scene.path("twice")]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("[A-032]") && said.contains("--allow-repeat") && said.contains(RECORD), "{said}");
        assert!(!scene.path("twice").exists());
        let output = run(&[&"merge", &out, &"-a", again, &"--in-place"]);
        assert_eq!(output.status.code(), Some(2));
    }
    good(&[&"merge", &out, &"-a", a, &"--allow-repeat", &"-o", &scene.path("twice")]);
    assert_eq!(merges(&scene.path("twice")).len(), 2);
    // Taking it out is no repeat, and a checkpoint that it is not in any more has no record.
    good(&[&"unmerge", &out, &"-a", a, &"-o", &scene.path("without")]);
    assert!(!scene.path("without").join(RECORD).exists());
    good(&[&"merge", &scene.path("without"), &"-a", a, &"-o", &scene.path("again")]);
}

#[test]
fn in_place_the_record_is_the_same() {
    let scene = Scene::new();
    let (a, model) = (&scene.adapter, scene.copy("model"));
    good(&[&"merge", &model, &"-a", a, &"-o", &scene.path("out")]);
    good(&[&"merge", &model, &"-a", a, &"--in-place", &"--undo-log", &scene.path("undo")]);
    assert_eq!(fs::read(model.join(RECORD)).unwrap(), fs::read(scene.path("out").join(RECORD)).unwrap());
    good(&[&"unmerge", &model, &"--undo-log", &scene.path("undo"), &"--in-place"]);
    assert!(!model.join(RECORD).exists());
}

#[test]
fn a_record_that_cannot_be_read_is_not_passed_over() {
    let scene = Scene::new();
    let model = scene.copy("model");
    for text in ["", "{", "{\"version\":2,\"merges\":[]}", "[]"] {
        fs::write(model.join(RECORD), text).unwrap();
        let output = run(&[&"merge", &model, &"-a", &scene.adapter, &"-o", &scene.path("out")]);
        assert_eq!(output.status.code(), Some(3), "{text}");
        assert!(!scene.path("out").exists());
    }
}

/// The record is of the folder: by its file alone, an adapter is not merged twice either, and the record does not go stale.
#[test]
fn a_file_beside_a_record_is_in_it() {
    let scene = Scene { base: fixture("models/llama-tiny-f32"), ..Scene::new() };
    let (a, model) = (&scene.adapter, scene.copy("model"));
    good(&[&"merge", &model, &"-a", a, &"--in-place"]);
    let file = model.join("model.safetensors");
    let output = run(&[&"merge", &file, &"-a", a, &"-o", &scene.path("out.safetensors")]);
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    let output = run(&[&"merge", &file, &"-a", &fixture("adapters/llama-all-r4"), &"--in-place"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && said.contains("give the folder as the base"), "{said}");
}

#[test]
fn taking_out_what_is_not_in_it_is_said() {
    let scene = Scene::new();
    good(&[&"merge", &scene.base, &"-a", &fixture("adapters/llama-rslora"), &"-o", &scene.path("out")]);
    let output = run(&[&"unmerge", &scene.path("out"), &"-a", &scene.adapter, &"-o", &scene.path("restored")]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.contains("with weight 0, and 1 is taken out"), "{said}");
    let output = run(&[&"unmerge", &scene.path("out"), &"-a", &fixture("adapters/llama-rslora"), &"-o", &scene.path("right")]);
    assert!(!String::from_utf8_lossy(&output.stderr).contains("is taken out"));
}
