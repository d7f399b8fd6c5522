//! A baked adapter computes what the original does: bit for bit where the report says so, and otherwise off by what it says.
#![cfg(feature = "cli")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{bytes, copy_folder, fixture};
use loratool::report::BakeReport;
use loratool::{Adapter, BakeOptions, Progress, bake, delta_rows, open_adapter};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

fn adapter(name: &str) -> Adapter {
    open_adapter(fixture("adapters").join(name)).unwrap()
}

/// Every update, in f64, by its tensor.
fn updates(adapter: &Adapter) -> BTreeMap<String, Vec<f64>> {
    let update = |target: &loratool::Target| (target.tensor.clone(), delta_rows(target, 0..target.out_in().0).unwrap());
    adapter.targets().iter().map(update).collect()
}

fn bits(updates: &BTreeMap<String, Vec<f64>>) -> Vec<(&str, Vec<u64>)> {
    updates.iter().map(|(name, values)| (name.as_str(), values.iter().map(|value| value.to_bits()).collect())).collect()
}

/// Bakes into `out` of a folder, and checks what is true of every result.
fn baked(original: &Adapter, folder: &Path, options: &BakeOptions) -> (BakeReport, Adapter) {
    let out = folder.join("out");
    let report = bake(original, &out, options, &()).unwrap();
    let names: Vec<_> = bytes(&out).into_keys().collect();
    assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors"].map(std::path::PathBuf::from));
    let config: Value = serde_json::from_slice(&fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
    for (field, value) in [
        ("peft_type", json!("LORA")),
        ("r", json!(report.rank)),
        ("bias", json!("none")),
        ("use_rslora", json!(false)),
        ("rank_pattern", json!({})),
        ("alpha_pattern", json!({})),
        ("modules_to_save", Value::Null),
    ] {
        assert_eq!(config[field], value, "{field}");
    }
    let weights = fs::read(out.join("adapter_model.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&weights).unwrap();
    assert_eq!(header.metadata(), &Some([("format".to_owned(), "pt".to_owned())].into()));
    for (name, view) in SafeTensors::deserialize(&weights).unwrap().tensors() {
        assert!(name.starts_with("base_model.model."), "{name}");
        let rank = if name.ends_with(".lora_A.weight") { view.shape()[0] } else { view.shape()[1] };
        assert!(name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight"), "{name}");
        assert_eq!(rank as u64, report.rank, "{name}");
    }
    let again = open_adapter(&out).unwrap();
    assert!(again.warnings().iter().all(|warning| warning.rule().id == "A-003"), "{:?}", again.warnings());
    assert!(again.targets().iter().all(|target| target.scaling.effective() == report.scale));
    (report, again)
}

/// The report is right: of the whole, and of the target that lost most.
fn assert_errors(original: &Adapter, again: &Adapter, report: &BakeReport) {
    let (before, after) = (updates(original), updates(again));
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let error = |name: &str| norm(&mut before[name].iter().zip(&after[name]).map(|(x, y)| x - y));
    let own = |name: &str| norm(&mut before[name].iter().copied());
    let whole = norm(&mut before.keys().map(|name| error(name))) / norm(&mut before.keys().map(|name| own(name)));
    let near = |stated: f64, found: f64| (stated / found - 1.0).abs() < 1e-5;
    assert!(near(report.error, whole), "{} {whole}", report.error);
    let worst = before.keys().map(|name| error(name) / own(name)).fold(0.0, f64::max);
    let stated = report.worst.as_ref().unwrap();
    assert!(near(stated.error, worst) && near(error(&stated.tensor) / own(&stated.tensor), worst), "{stated:?} {worst}");
}

#[test]
fn what_is_said_to_be_exact_is_the_same_bit_for_bit() {
    for name in [
        "bert-qv",
        "gpt2-all",
        "llama-all-r4",
        "llama-bf16",
        "llama-f16",
        "llama-odd-scale",
        "llama-qv-r8",
        "llama-r1",
        "llama-rslora",
        "llama-zero-b",
        "t5-qv",
    ] {
        let folder = tempfile::tempdir().unwrap();
        let original = adapter(name);
        let (report, again) = baked(&original, folder.path(), &BakeOptions::default());
        assert!(report.exact && report.worst.is_none() && report.error == 0.0, "{name}: {report:?}");
        assert_eq!((report.padded, report.folded, report.retyped), (0, 0, 0), "{name}");
        assert_eq!(bits(&updates(&original)), bits(&updates(&again)), "{name}");
    }
}

#[test]
fn ranks_are_padded_with_zeros_that_add_nothing() {
    for name in ["llama-rslora", "llama-bf16", "gpt2-all", "llama-odd-scale"] {
        let folder = tempfile::tempdir().unwrap();
        let original = adapter(name);
        let mut options = BakeOptions::default();
        options.rank = Some(16);
        let (report, again) = baked(&original, folder.path(), &options);
        assert!(report.exact && report.padded == report.targets, "{name}: {report:?}");
        assert_eq!(report.rank, 16);
        assert_eq!(bits(&updates(&original)), bits(&updates(&again)), "{name}");
    }
}

/// The overlapping patterns with alphas of which the scales are 2, 4 and 2.
fn powers_of_two(folder: &Path) -> Adapter {
    let copy = folder.join("powers");
    copy_folder(&fixture("adapters/llama-patterns-overlap"), &copy);
    let path = copy.join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["alpha_pattern"] = json!({"^model.layers.0.self_attn.q_proj": 12, "^model.layers.1.self_attn.q_proj": 8});
    fs::write(&path, config.to_string()).unwrap();
    open_adapter(copy).unwrap()
}

#[test]
fn scales_that_differ_by_a_power_of_two_cost_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let original = powers_of_two(folder.path());
    let (report, again) = baked(&original, folder.path(), &BakeOptions::default());
    assert_eq!((report.exact, report.scale, report.padded, report.folded), (true, 2.0, 2, 1));
    assert_eq!(bits(&updates(&original)), bits(&updates(&again)));
    // And so is a merge.
    let merged = |adapter: &Path, out: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_loratool"));
        command.arg("merge").arg(fixture("models/llama-tiny")).arg("-a").arg(adapter).arg("--quiet").arg("-o");
        assert!(command.arg(folder.path().join(out)).status().unwrap().success());
        let mut files = bytes(&folder.path().join(out));
        files.remove(Path::new("loratool.merge.json"));
        files
    };
    assert!(merged(&folder.path().join("powers"), "m1") == merged(&folder.path().join("out"), "m2"));
}

#[test]
fn other_scales_are_rounded_once_and_the_report_says_by_how_much() {
    for (name, rounded) in [("llama-patterns", 2), ("llama-patterns-overlap", 1)] {
        let folder = tempfile::tempdir().unwrap();
        let original = adapter(name);
        let (report, again) = baked(&original, folder.path(), &BakeOptions::default());
        assert_eq!((report.exact, report.rounded), (false, rounded), "{name}");
        // Half a step of F32 at most.
        assert!(report.error > 0.0 && report.error < 1.0 / f64::from(1 << 24), "{name}: {}", report.error);
        assert_errors(&original, &again, &report);
    }
}

type Tensor<'a> = (&'a str, Dtype, [usize; 2], &'a dyn Fn(usize) -> f64);

/// Writes a PEFT folder.
fn write(folder: &Path, config: Value, tensors: &[Tensor<'_>]) -> Adapter {
    fs::create_dir(folder).unwrap();
    let raw: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, dtype, [rows, cols], value)| {
            let bytes = |i: usize| match dtype {
                Dtype::F64 => value(i).to_le_bytes().to_vec(),
                Dtype::F32 => (value(i) as f32).to_le_bytes().to_vec(),
                Dtype::F16 => half::f16::from_f64(value(i)).to_le_bytes().to_vec(),
                _ => half::bf16::from_f64(value(i)).to_le_bytes().to_vec(),
            };
            (0..rows * cols).flat_map(bytes).collect()
        })
        .collect();
    let views: Vec<(&str, TensorView<'_>)> = tensors
        .iter()
        .zip(&raw)
        .map(|((name, dtype, shape, _), raw)| (*name, TensorView::new(*dtype, shape.to_vec(), raw).unwrap()))
        .collect();
    fs::write(folder.join("adapter_model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    open_adapter(folder).unwrap()
}

fn plain(rank: u64, alpha: f64) -> Value {
    json!({"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q", "v"]})
}

fn waves(i: usize) -> f64 {
    (i as f64 * 0.7).sin()
}

#[test]
fn two_dtypes_become_the_one_that_holds_both() {
    let folder = tempfile::tempdir().unwrap();
    let tensors: [Tensor<'_>; 4] = [
        ("base_model.model.q.lora_A.weight", Dtype::F16, [3, 8], &waves),
        ("base_model.model.q.lora_B.weight", Dtype::BF16, [8, 3], &waves),
        ("base_model.model.v.lora_A.weight", Dtype::BF16, [3, 8], &waves),
        ("base_model.model.v.lora_B.weight", Dtype::BF16, [8, 3], &waves),
    ];
    let original = write(&folder.path().join("in"), plain(3, 7.0), &tensors);
    let (report, again) = baked(&original, folder.path(), &BakeOptions::default());
    assert_eq!((report.exact, report.retyped), (true, 1));
    assert_eq!(bits(&updates(&original)), bits(&updates(&again)));
    let dtypes: Vec<String> = again.targets().iter().map(|target| target.b.info().dtype.to_string()).collect();
    assert_eq!(dtypes, ["F32", "BF16"]);
}

#[test]
fn f64_is_rounded_and_the_report_says_by_how_much() {
    let folder = tempfile::tempdir().unwrap();
    let tensors: [Tensor<'_>; 4] = [
        ("base_model.model.q.lora_A.weight", Dtype::F64, [3, 8], &waves),
        ("base_model.model.q.lora_B.weight", Dtype::F64, [8, 3], &waves),
        ("base_model.model.v.lora_A.weight", Dtype::F32, [3, 8], &waves),
        ("base_model.model.v.lora_B.weight", Dtype::F32, [8, 3], &waves),
    ];
    let original = write(&folder.path().join("in"), plain(3, 7.0), &tensors);
    let (report, again) = baked(&original, folder.path(), &BakeOptions::default());
    assert_eq!((report.exact, report.rounded, report.retyped), (false, 1, 1));
    assert_errors(&original, &again, &report);
}

#[test]
fn a_value_beyond_its_dtype_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let large = |_: usize| 60_000.0;
    let tensors: [Tensor<'_>; 6] = [
        ("base_model.model.k.lora_A.weight", Dtype::F16, [2, 8], &waves),
        ("base_model.model.k.lora_B.weight", Dtype::F16, [8, 2], &waves),
        ("base_model.model.q.lora_A.weight", Dtype::F16, [2, 8], &waves),
        ("base_model.model.q.lora_B.weight", Dtype::F16, [8, 2], &large),
        ("base_model.model.v.lora_A.weight", Dtype::F16, [2, 8], &waves),
        ("base_model.model.v.lora_B.weight", Dtype::F16, [8, 2], &waves),
    ];
    let mut config = plain(2, 1.0);
    config["alpha_pattern"] = json!({"q": 4});
    let original = write(&folder.path().join("in"), config, &tensors);
    let error = bake(&original, &folder.path().join("out"), &BakeOptions::default(), &()).unwrap_err();
    let rule = error.diagnostics()[0].rule().id;
    assert_eq!((rule, fs::read_dir(folder.path()).unwrap().count()), ("A-031", 1), "{error}");
}

/// Names as other tools leave them come out as PEFT's.
#[test]
fn names_are_those_of_peft() {
    let folder = tempfile::tempdir().unwrap();
    let tensors: [Tensor<'_>; 2] = [
        ("to_out.0.lora_A.default.weight", Dtype::F32, [2, 8], &waves),
        ("to_out.0.lora_B.default.weight", Dtype::F32, [8, 2], &waves),
    ];
    let mut config = plain(2, 2.0);
    config["target_modules"] = json!(".*to_out.*");
    let original = write(&folder.path().join("in"), config, &tensors);
    let (report, again) = baked(&original, folder.path(), &BakeOptions::default());
    assert_eq!(again.targets()[0].a.name(), "base_model.model.to_out.0.lora_A.weight");
    assert!(report.exact);
    let config: Value = serde_json::from_slice(&fs::read(folder.path().join("out/adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["target_modules"], json!(["to_out.0"]));
    assert!(config.get("fan_in_fan_out").is_none(), "nobody has declared it");
}

#[test]
fn baking_again_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (first, again) = baked(&adapter("llama-patterns"), folder.path(), &BakeOptions::default());
    let second = bake(&again, &folder.path().join("twice"), &BakeOptions::default(), &()).unwrap();
    assert!(!first.exact && second.exact);
    assert!(bytes(&folder.path().join("out")) == bytes(&folder.path().join("twice")));
}

fn run(args: &[&Path], flags: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_loratool")).args(args).args(flags).output().unwrap()
}

#[test]
fn what_a_plain_adapter_cannot_say_is_refused_by_name() {
    let cases: [(&str, &[&str]); 7] = [
        ("bert-bias-lora-only", &["encoder.layer.0.attention.self.query.bias", "encoder.layer.1.attention.self.value.bias"]),
        ("bert-lora-bias", &["encoder.layer.0.attention.self.query.bias", "encoder.layer.1.attention.self.value.bias"]),
        ("bert-seqcls", &["classifier.weight", "classifier.bias"]),
        ("llama-embed", &["model.embed_tokens.weight", "lm_head.weight"]),
        ("llama-embed-unsaved", &["model.embed_tokens.weight"]),
        ("llama-lmhead", &["lm_head.weight"]),
        ("minilm-reviews", &["classifier.weight", "classifier.bias"]),
    ];
    for (name, tensors) in cases {
        let folder = tempfile::tempdir().unwrap();
        let out =
            run(&[Path::new("bake"), &fixture("adapters").join(name), Path::new("-o"), &folder.path().join("out")], &["--json"]);
        let object: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(out.status.code(), Some(4), "{name}");
        let problems = object["error"]["problems"].as_array().unwrap();
        assert!(problems.iter().all(|problem| problem["rule"] == "U-007" && problem["help"].is_string()), "{name}");
        for tensor in tensors {
            assert!(problems.iter().any(|problem| problem["tensor"] == *tensor), "{name}: {tensor}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{name}");
    }
}

#[test]
fn a_rank_that_is_too_low_or_too_high_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (rank, code, said) in [("4", 2, "has rank 8"), ("0", 2, "--rank"), ("100000", 7, "over the limit")] {
        let (input, out) = (fixture("adapters/llama-qv-r8"), folder.path().join("out"));
        let done = run(&[Path::new("bake"), &input, Path::new("-o"), &out], &["--rank", rank]);
        let text = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(code), "{text}");
        assert!(text.contains(said) && fs::read_dir(folder.path()).unwrap().count() == 0, "{text}");
    }
}

#[test]
fn a_container_is_baked_and_what_it_says_besides_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.safetensors");
    let converted =
        run(&[Path::new("convert"), &fixture("adapters/llama-rslora"), Path::new("-o"), &file], &["--to", "container"]);
    assert!(converted.status.success());
    let original = open_adapter(&file).unwrap();
    let (report, again) = baked(&original, folder.path(), &BakeOptions::default());
    assert_eq!((report.from, report.losses.len()), ("container", 1));
    assert_eq!(bits(&updates(&adapter("llama-rslora"))), bits(&updates(&again)));
    // The tensors are the same, and so is their digest.
    assert_eq!(Some(report.content.as_str()), original.stated_content());
}

#[test]
fn loaders_that_read_the_original_wrong_read_the_baked_one() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["llama-rslora", "llama-patterns"] {
        let (input, out) = (fixture("adapters").join(name), folder.path().join(name));
        let done = run(&[Path::new("bake"), &input, Path::new("-o"), &out], &[]);
        let shown = String::from_utf8(done.stdout).unwrap();
        assert!(shown.lines().skip(3).all(|line| line.chars().count() <= 80), "{shown}");
        assert!(shown.contains("vllm, sglang, tensorrt-llm, lorax, mistralrs, llamacpp\n"), "{shown}");
        let flags = ["--for", "sglang", "--for", "lorax", "--for", "llamacpp"];
        assert_eq!(run(&[Path::new("validate"), &input], &flags).status.code(), Some(1));
        assert_eq!(run(&[Path::new("validate"), &out], &flags).status.code(), Some(0));
        let again = run(&[Path::new("bake"), &input, Path::new("-o"), &out], &[]);
        assert!(again.status.code() == Some(2) && String::from_utf8(again.stderr).unwrap().contains("--overwrite"));
        assert!(run(&[Path::new("bake"), &input, Path::new("-o"), &out], &["--overwrite"]).status.success());
        let onto_itself = run(&[Path::new("bake"), &out, Path::new("-o"), &out], &["--overwrite"]);
        assert_eq!(onto_itself.status.code(), Some(2));
    }
}

/// Goes on so many times.
struct Patience(AtomicUsize);

impl Progress for Patience {
    fn cancelled(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err()
    }
}

#[test]
fn cancelled_anywhere_it_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let original = adapter("llama-patterns");
    let out = folder.path().join("out");
    for n in 0.. {
        match bake(&original, &out, &BakeOptions::default(), &Patience(n.into())) {
            Ok(_) => {
                // 8 tensors hashed and written, 4 targets looked at twice, and once at the end.
                assert_eq!(n, 8 + 8 + 4 + 4 + 1);
                return;
            }
            Err(error) => {
                assert_eq!(error.diagnostics()[0].rule().id, "E-006");
                assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
            }
        }
    }
}
