//! `--dtype` and `--max-shard-size`: another dtype is the correctly rounded sum in that dtype, overflow is an error and what is lost is
//! said; other files hold the same tensors, and the reference reader and the index agree.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{fixture, read_file, read_folder};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

fn run(words: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_loratool")).args(words.iter().map(AsRef::as_ref)).output().unwrap()
}

fn good(words: &[&dyn AsRef<std::ffi::OsStr>]) -> Value {
    let mut words = words.to_vec();
    words.push(&"--json");
    let output = run(&words);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    serde_json::from_slice(&output.stdout).unwrap()
}

struct Scene {
    folder: tempfile::TempDir,
    adapter: PathBuf,
}

impl Scene {
    fn new() -> Scene {
        Scene { folder: tempfile::tempdir().unwrap(), adapter: fixture("adapters/llama-qv-r8") }
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }
}

/// The float64 reference of the golden, rounded by the `half` crate, is what each dtype must hold.
#[test]
fn another_dtype_is_rounded_once() {
    let exact = read_file(&fixture("goldens/llama-qv-r8--llama-tiny-f32/f64.safetensors"));
    let before = read_folder(&fixture("models/llama-tiny-f32"));
    for (word, dtype, name) in [("f16", Dtype::F16, "float16"), ("bf16", Dtype::BF16, "bfloat16")] {
        let scene = Scene::new();
        let json =
            good(&[&"merge", &fixture("models/llama-tiny-f32"), &"-a", &scene.adapter, &"-o", &scene.out(), &"--dtype", &word]);
        let after = read_folder(&scene.out());
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
        for (tensor, values) in &after {
            assert_eq!(values.dtype, dtype, "{tensor}");
            let wanted = &exact.get(tensor).unwrap_or(&before[tensor]).data;
            for (m, x) in values.data.iter().zip(wanted) {
                // Through f32 with a sticky last bit, since half's own conversion from f64 rounds twice.
                let nearest = match dtype {
                    Dtype::F16 => half::f16::from_f64(*x).to_f64(),
                    _ => nearest_bf16(*x),
                };
                assert_eq!(*m, nearest, "{tensor}: {x:e}");
            }
        }
        assert!(fs::read_to_string(scene.out().join("config.json")).unwrap().contains(&format!("\"dtype\": \"{name}\"")));
        let converted = &json["report"]["converted"];
        let balance = &json["report"]["balance"];
        assert_eq!(balance["copied"], 0);
        assert_eq!(balance["modified"].as_u64().unwrap() + balance["converted"].as_u64().unwrap(), before.len() as u64);
        assert_eq!(converted["tensors"], before.len());
        assert!(converted["error"].as_f64().unwrap() > 1e-5);
    }
}

fn nearest_bf16(x: f64) -> f64 {
    let step = common::ulp(Dtype::BF16, x);
    (x / step).round_ties_even() * step
}

#[test]
fn widening_loses_nothing_and_can_be_verified() {
    let scene = Scene::new();
    let base = fixture("models/llama-tiny");
    let json = good(&[&"merge", &base, &"-a", &scene.adapter, &"-o", &scene.out(), &"--dtype", &"f32"]);
    let (before, after) = (read_folder(&base), read_folder(&scene.out()));
    for (tensor, values) in before.iter().filter(|(tensor, _)| !tensor.contains("q_proj") && !tensor.contains("v_proj")) {
        assert_eq!(values.data, after[tensor].data, "{tensor}");
    }
    assert_eq!(json["report"]["converted"]["zeroed"], 0);
    good(&[&"verify", &scene.out(), &"--base", &base, &"-a", &scene.adapter]);
}

/// A base with one value that only the wider dtype holds.
fn base_with(scene: &Scene, tensor: &str, value: f32) -> PathBuf {
    let (from, to) = (fixture("models/llama-tiny-f32"), scene.folder.path().join("base"));
    common::copy_folder(&from, &to);
    let path = to.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let at = {
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let view = file.tensor(tensor).unwrap();
        view.data().as_ptr() as usize - bytes.as_ptr() as usize + 4 * 7
    };
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    to
}

#[test]
fn overflow_in_an_untouched_tensor_is_an_error_and_underflow_is_counted() {
    let scene = Scene::new();
    let base = base_with(&scene, "model.norm.weight", 7e4);
    let output = run(&[&"merge", &base, &"-a", &scene.adapter, &"-o", &scene.out(), &"--dtype", &"f16"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(said.contains("model.norm.weight") && said.contains("[7]") && said.contains("--dtype f32"), "{said}");
    assert!(!scene.out().exists());
    good(&[&"merge", &base, &"-a", &scene.adapter, &"-o", &scene.out(), &"--dtype", &"bf16"]);

    let scene = Scene::new();
    let base = base_with(&scene, "model.norm.weight", 1e-9);
    let json = good(&[&"merge", &base, &"-a", &scene.adapter, &"-o", &scene.out(), &"--dtype", &"f16"]);
    assert_eq!(json["report"]["converted"]["zeroed"], 1);
    // What is not finite in a tensor that nobody adds to stays what it is.
    let scene = Scene::new();
    let base = base_with(&scene, "model.norm.weight", f32::NAN);
    good(&[&"merge", &base, &"-a", &scene.adapter, &"-o", &scene.out(), &"--dtype", &"f16"]);
    assert!(read_folder(&scene.out())["model.norm.weight"].data[7].is_nan());
}

fn shards(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let mut found: Vec<_> = entries.filter(|p| p.extension().is_some_and(|x| x == "safetensors")).collect();
    found.sort();
    found
}

#[test]
fn other_files_hold_the_same_tensors() {
    for (base, size, files) in
        [("llama-tiny", "60kB", 4), ("llama-tiny", "20kB", 12), ("llama-tiny", "1GB", 1), ("llama-tiny-f32", "100kB", 5)]
    {
        let scene = Scene::new();
        let base = fixture(&format!("models/{base}"));
        good(&[&"merge", &base, &"-a", &scene.adapter, &"-o", &scene.out(), &"--max-shard-size", &size]);
        let plain = scene.folder.path().join("plain");
        good(&[&"merge", &base, &"-a", &scene.adapter, &"-o", &plain]);
        assert_eq!(read_folder(&scene.out()), read_folder(&plain));
        let found = shards(&scene.out());
        assert_eq!(found.len(), files, "{found:?}");
        let limit = loratool_bytes(size);
        for file in &found {
            let bytes = fs::read(file).unwrap();
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            let sum: usize = tensors.tensors().iter().map(|(_, view)| view.data().len()).sum();
            assert!(sum as u64 <= limit || tensors.len() == 1, "{}: {sum}", file.display());
            assert!(bytes[8..].starts_with(b"{\"__metadata__\":{\"format\":\"pt\"}"), "{}", file.display());
        }
        let index = scene.out().join("model.safetensors.index.json");
        assert_eq!(index.exists(), files > 1);
        // What we write we read: the index and the files agree.
        good(&[&"validate", &scene.out()]);
        good(&[&"verify", &scene.out(), &"--base", &base, &"-a", &scene.adapter]);
        if files > 1 {
            assert!(found[0].ends_with(format!("model-00001-of-{files:05}.safetensors")));
            let index: Value = serde_json::from_slice(&fs::read(index).unwrap()).unwrap();
            let total: usize = found
                .iter()
                .map(|f| {
                    SafeTensors::deserialize(&fs::read(f).unwrap())
                        .unwrap()
                        .tensors()
                        .iter()
                        .map(|(_, v)| v.data().len())
                        .sum::<usize>()
                })
                .sum();
            assert_eq!(index["metadata"]["total_size"], total);
        }
    }
}

fn loratool_bytes(size: &str) -> u64 {
    match size {
        "20kB" => 20_000,
        "60kB" => 60_000,
        "100kB" => 100_000,
        _ => 1_000_000_000,
    }
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_written() {
    let scene = Scene::new();
    let base = fixture("models/llama-tiny");
    let file = fixture("models/llama-tiny-f32/model.safetensors");
    let cases: &[(&[&str], &Path, &str)] = &[
        (&["--max-shard-size", "0"], &base, "not a number of bytes"),
        (&["--max-shard-size", "5 pounds"], &base, "not a number of bytes"),
        (&["--max-shard-size", "1GB"], &file, "a single file is not split"),
        (&["--seed", "3"], &base, "nothing is left to chance"),
        (&["--rounding", "peft", "--dtype", "f32"], &base, "to the base's dtype"),
        (&["--resume", "--no-sync"], &base, "cannot be used with"),
        (&["--dtype", "f8"], &base, "invalid value"),
        (&["--undo-log", "undo.safetensors"], &base, "an undo log is of a merge in place"),
    ];
    for (flags, base, says) in cases {
        let mut words: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"merge", base, &"-a", &scene.adapter, &"-o"];
        let out = scene.out();
        words.push(&out);
        words.extend(flags.iter().map(|flag| flag as &dyn AsRef<std::ffi::OsStr>));
        let output = run(&words);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {said}");
        assert!(said.contains(says), "{flags:?}: {said}");
        assert!(!out.exists());
    }
    let quantised = scene.folder.path().join("quantised");
    common::copy_folder(&fixture("models/llama-tiny-f32"), &quantised);
    let config = fs::read_to_string(quantised.join("config.json")).unwrap();
    fs::write(quantised.join("config.json"), config.replacen('{', "{\"quantization_config\":{\"quant_method\":\"fp8\"},", 1))
        .unwrap();
    let output = run(&[&"merge", &quantised, &"-a", &scene.adapter, &"-o", &scene.out(), &"--dtype", &"bf16"]);
    assert_eq!(output.status.code(), Some(4), "{}", String::from_utf8_lossy(&output.stderr));
}
