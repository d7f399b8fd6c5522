//! `verify` is asked about merges that are right and about every way of merging wrongly that it claims to name. The wrong ones are
//! made here, by editing the bytes of files, so that a test that finds nothing fails.
#![cfg(feature = "cli")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{Values, fixture, read_file, read_folder};
use loratool::report::{Verdict, VerifyReport};
use loratool::{Adapter, Checkpoint, MergeOptions, VerifyOptions, Weighted, merge, open_adapter, open_checkpoint, verify};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tempfile::TempDir;

const Q0: &str = "model.layers.0.self_attn.q_proj.weight";
const Q1: &str = "model.layers.1.self_attn.q_proj.weight";

fn model(name: &str) -> Checkpoint {
    open_checkpoint(fixture(&format!("models/{name}"))).unwrap()
}

fn adapter(name: &str) -> Adapter {
    open_adapter(fixture(&format!("adapters/{name}"))).unwrap()
}

/// Merges into a folder of its own.
fn merged(base: &Checkpoint, adapters: &[Weighted<'_>]) -> (TempDir, PathBuf) {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("merged");
    // Merging twice is one of the faults that is planted.
    let mut options = MergeOptions::default();
    options.allow_repeat = true;
    merge(base, adapters, &path, &options, &()).unwrap();
    (scratch, path)
}

fn ask(path: &Path, base: &Checkpoint, adapters: &[Weighted<'_>]) -> VerifyReport {
    verify(&open_checkpoint(path).unwrap(), base, adapters, &VerifyOptions::default(), &()).unwrap()
}

/// Edits the bytes of one tensor, wherever in the folder it lies.
fn edit(folder: &Path, tensor: &str, change: impl FnOnce(&mut [u8])) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let mut bytes = fs::read(&path).unwrap();
        let Ok(view) = SafeTensors::deserialize(&bytes).unwrap().tensor(tensor).map(|view| view.data().as_ptr_range()) else {
            continue;
        };
        let start = bytes.as_ptr() as usize;
        let range = view.start as usize - start..view.end as usize - start;
        change(&mut bytes[range]);
        fs::write(&path, bytes).unwrap();
        return;
    }
    panic!("no tensor {tensor}");
}

/// Stores values in an F32 tensor.
fn store(folder: &Path, tensor: &str, values: &[f64]) {
    edit(folder, tensor, |bytes| {
        assert_eq!(bytes.len(), 4 * values.len());
        bytes.chunks_exact_mut(4).zip(values).for_each(|(raw, x)| raw.copy_from_slice(&(*x as f32).to_le_bytes()));
    });
}

fn transposed(values: &[f64], n: usize) -> Vec<f64> {
    (0..values.len()).map(|i| values[i % n * n + i / n]).collect()
}

/// M − W of a tensor.
fn moved(after: &Values, before: &Values) -> Vec<f64> {
    after.data.iter().zip(&before.data).map(|(m, w)| m - w).collect()
}

fn sum(x: &[f64], y: &[f64]) -> Vec<f64> {
    x.iter().zip(y).map(|(x, y)| x + y).collect()
}

fn verdict<'r>(report: &'r VerifyReport, tensor: &str) -> &'r loratool::report::VerifiedTensor {
    report.tensors.iter().find(|t| t.tensor == tensor).unwrap()
}

/// Every changed tensor has this verdict and so has the whole, which is a "no".
fn all_are(report: &VerifyReport, wanted: Verdict) {
    let found: Vec<_> = report.tensors.iter().map(|t| (t.verdict, t.says.as_str())).collect();
    assert!(!found.is_empty() && found.iter().all(|(verdict, _)| *verdict == wanted), "{found:?}");
    assert_eq!((report.verdict, report.is_merged), (wanted, false), "{}", report.says);
}

#[test]
fn our_own_merges_are_correctly_rounded_throughout() {
    for (base, adapters) in [
        ("llama-tiny", vec![("llama-qv-r8", 1.0)]),
        ("llama-tiny-f16", vec![("llama-all-r4", 0.7)]),
        ("llama-tiny-f32", vec![("llama-embed", 1.0)]),
        ("llama-tiny-f64", vec![("llama-qv-r8", 1.0)]),
        ("llama-tiny-f32", vec![("llama-rslora", 0.5), ("llama-all-r4", -1.0)]),
        ("llama-tiny-f32", vec![("llama-zero-b", 1.0)]),
        ("gpt2-tiny-bf16", vec![("gpt2-all", 1.0)]),
        ("bert-tiny", vec![("bert-lora-bias", 1.0)]),
        ("bert-tiny", vec![("bert-bias-all", 1.0)]),
        ("t5-tiny", vec![("t5-qv", 1.0)]),
    ] {
        let base = model(base);
        let opened: Vec<(Adapter, f64)> = adapters.iter().map(|(name, weight)| (adapter(name), *weight)).collect();
        let weighted: Vec<Weighted<'_>> = opened.iter().map(|(adapter, weight)| Weighted { adapter, weight: *weight }).collect();
        let (_scratch, path) = merged(&base, &weighted);
        let report = ask(&path, &base, &weighted);
        assert_eq!((report.verdict, report.is_merged), (Verdict::Merged, true), "{adapters:?}: {}", report.says);
        assert!(report.values > 0 && report.correct == report.values && report.ulps.none == report.values, "{adapters:?}");
        assert!(report.untouched.tensors > 0 && report.untouched.same == report.untouched.tensors, "{adapters:?}");
        assert_eq!((report.bytes, report.sample), (report.bytes_compared, None), "{adapters:?}");
    }
}

/// PEFT's tensors are put into the place of ours, file by file.
#[test]
fn merges_of_peft_are_merges_with_honest_figures() {
    let text = fs::read_to_string(fixture("goldens/cases.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
    let (mut seen, mut other_rounding) = (0, 0);
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let base = model(case["base"].as_str().unwrap());
        let listed = case["adapters"].as_array().unwrap().iter();
        let opened: Vec<(Adapter, f64)> =
            listed.map(|a| (adapter(a["path"].as_str().unwrap()), a["weight"].as_f64().unwrap())).collect();
        let weighted: Vec<Weighted<'_>> = opened.iter().map(|(adapter, weight)| Weighted { adapter, weight: *weight }).collect();
        let (_scratch, path) = merged(&base, &weighted);
        let golden = fs::read(fixture(&format!("goldens/{name}/peft.safetensors"))).unwrap();
        for (tensor, view) in SafeTensors::deserialize(&golden).unwrap().tensors() {
            edit(&path, &tensor, |bytes| bytes.copy_from_slice(view.data()));
        }
        let report = ask(&path, &base, &weighted);
        assert!(report.is_merged, "{name}: {} {:#?}", report.says, report.tensors);
        let ulps = report.ulps;
        assert_eq!(ulps.none + ulps.one + ulps.two + ulps.to_4 + ulps.to_16 + ulps.more, report.values);
        assert_eq!(ulps.none, report.correct);
        assert!(matches!(report.verdict, Verdict::Merged | Verdict::MergedOtherRounding), "{name}: {}", report.says);
        seen += 1;
        other_rounding += u32::from(report.verdict == Verdict::MergedOtherRounding);
        // What is called "other rounding" is not called correct, and the other way round.
        assert_eq!(report.correct == report.values, matches!(report.verdict, Verdict::Merged | Verdict::RoundingLost), "{name}");
    }
    assert!(seen > 20 && other_rounding > 10, "{seen} {other_rounding}");
}

#[test]
fn a_copy_of_the_base_is_not_merged() {
    let adapter = adapter("llama-qv-r8");
    for base in ["llama-tiny", "llama-tiny-f32"] {
        let base = model(base);
        let report = ask(base.path(), &base, &[Weighted::full(&adapter)]);
        all_are(&report, Verdict::NotMerged);
        assert_eq!(report.untouched.same, report.untouched.tensors);
    }
}

#[test]
fn two_merges_are_told_from_twice_the_scale() {
    let (base, adapter) = (model("llama-tiny"), adapter("llama-qv-r8"));
    let full = [Weighted::full(&adapter)];
    let (_first, path) = merged(&base, &full);
    let (_second, twice) = merged(&open_checkpoint(&path).unwrap(), &full);
    let report = ask(&twice, &base, &full);
    all_are(&report, Verdict::MergedTwice);
    let gain = report.tensors[0].gain.unwrap();
    assert!((gain - 2.0).abs() < 0.01 && report.tensors[0].gain_error.unwrap() < 0.002, "{gain}");

    let (_scratch, at_once) = merged(&base, &[Weighted { adapter: &adapter, weight: 2.0 }]);
    let report = ask(&at_once, &base, &full);
    all_are(&report, Verdict::OtherScale);
    assert!(report.tensors[0].says.contains("scale × 2"), "{}", report.tensors[0].says);
}

#[test]
fn a_factor_has_the_name_of_its_cause() {
    let base = model("llama-tiny-f32");
    // Alpha, rank and rule: qv-r8 16, 8, alpha/rank; rslora 8, 6, alpha/sqrt(rank).
    for (name, weight, applied, wanted) in [
        ("llama-qv-r8", 1.0, -1.0, Verdict::Subtracted),
        ("llama-qv-r8", 1.0, 0.5, Verdict::ScaleIgnored),
        ("llama-qv-r8", 1.0, 8.0, Verdict::AlphaNotDivided),
        ("llama-qv-r8", 1.0, 8f64.sqrt(), Verdict::RsloraApplied),
        ("llama-qv-r8", 0.3, 1.0, Verdict::WeightIgnored),
        ("llama-qv-r8", 1.0, 1.3, Verdict::OtherScale),
        ("llama-rslora", 1.0, 1.0 / 6f64.sqrt(), Verdict::RsloraMissing),
        ("llama-rslora", 1.0, 6f64.sqrt(), Verdict::AlphaNotDivided),
        ("llama-rslora", 1.0, 6f64.sqrt() / 8.0, Verdict::ScaleIgnored),
    ] {
        let adapter = adapter(name);
        let (_scratch, path) = merged(&base, &[Weighted { adapter: &adapter, weight: applied }]);
        all_are(&ask(&path, &base, &[Weighted { adapter: &adapter, weight }]), wanted);
    }
}

#[test]
fn a_transposed_square_is_named_and_only_that() {
    let (base, adapter) = (model("llama-tiny-f32"), adapter("llama-qv-r8"));
    let full = [Weighted::full(&adapter)];
    let (_scratch, path) = merged(&base, &full);
    let (before, after) = (read_folder(base.path()), read_folder(&path));
    let delta = moved(&after[Q0], &before[Q0]);
    store(&path, Q0, &sum(&before[Q0].data, &transposed(&delta, 64)));
    let report = ask(&path, &base, &full);
    assert_eq!((verdict(&report, Q0).verdict, report.is_merged), (Verdict::Transposed, false), "{}", verdict(&report, Q0).says);
    let rest = report.tensors.iter().filter(|t| t.tensor != Q0);
    assert!(rest.clone().count() == 3 && rest.clone().all(|t| t.verdict == Verdict::Merged));
}

#[test]
fn the_update_of_another_layer_is_named_by_its_tensor() {
    let (base, adapter) = (model("llama-tiny-f32"), adapter("llama-qv-r8"));
    let full = [Weighted::full(&adapter)];
    let (_scratch, path) = merged(&base, &full);
    let (before, after) = (read_folder(base.path()), read_folder(&path));
    store(&path, Q0, &sum(&before[Q0].data, &moved(&after[Q1], &before[Q1])));
    let report = ask(&path, &base, &full);
    let tensor = verdict(&report, Q0);
    assert_eq!(
        (tensor.verdict, tensor.other.as_deref(), report.is_merged),
        (Verdict::OtherTensor, Some(Q1), false),
        "{}",
        tensor.says
    );
    assert_eq!(verdict(&report, Q1).verdict, Verdict::Merged);
}

#[test]
fn a_missing_adapter_is_named_and_what_is_no_known_fault_is_different() {
    let (base, adapter, other) = (model("llama-tiny-f32"), adapter("llama-qv-r8"), adapter("llama-rslora"));
    let (_scratch, path) = merged(&base, &[Weighted::full(&other)]);
    all_are(&ask(&path, &base, &[Weighted::full(&adapter)]), Verdict::Different);
    // Of two adapters one was forgotten, in either order.
    for (present, missing) in [(&adapter, "adapter 2"), (&other, "adapter 1")] {
        let (_scratch, path) = merged(&base, &[Weighted::full(present)]);
        let report = ask(&path, &base, &[Weighted::full(&adapter), Weighted::full(&other)]);
        all_are(&report, Verdict::AdapterMissing);
        assert!(report.tensors[0].says.starts_with(missing), "{}", report.tensors[0].says);
    }
    // Both at once: the update is there, and something else.
    let (_scratch, path) = merged(&base, &[Weighted::full(&adapter), Weighted::full(&other)]);
    all_are(&ask(&path, &base, &[Weighted::full(&adapter)]), Verdict::Different);
}

#[test]
fn one_wrong_value_of_a_changed_tensor_is_seen() {
    let (base, adapter) = (model("llama-tiny-f32"), adapter("llama-qv-r8"));
    let full = [Weighted::full(&adapter)];
    for (value, nonfinite) in [(1.0f32, 0), (f32::NAN, 1)] {
        let (_scratch, path) = merged(&base, &full);
        edit(&path, Q0, |bytes| bytes[400..404].copy_from_slice(&value.to_le_bytes()));
        let report = ask(&path, &base, &full);
        let tensor = verdict(&report, Q0);
        assert_eq!((tensor.verdict, tensor.nonfinite, report.is_merged), (Verdict::Different, nonfinite, false));
        assert_eq!((tensor.ulps.none, tensor.ulps.more), (4095, 1));
    }
}

#[test]
fn a_flipped_bit_of_an_untouched_tensor_is_located() {
    let (base, adapter) = (model("llama-tiny"), adapter("llama-qv-r8"));
    let full = [Weighted::full(&adapter)];
    let (_scratch, path) = merged(&base, &full);
    let tensor = "model.layers.1.mlp.down_proj.weight";
    let shape = read_folder(base.path())[tensor].shape.clone();
    edit(&path, tensor, |bytes| bytes[2 * (3 * shape[1] + 5)] ^= 1);
    let report = ask(&path, &base, &full);
    assert_eq!((report.verdict, report.is_merged), (Verdict::OthersDiffer, false));
    let [found] = &report.untouched.differ[..] else { panic!("{:?}", report.untouched) };
    assert_eq!((found.tensor.as_str(), found.index.as_slice(), found.differing), (tensor, &[3, 5][..], 1));
    assert_eq!(found.offset, 2 * (3 * shape[1] as u64 + 5));
    assert_eq!(report.correct, report.values);
}

/// Writes all float tensors of a folder into one file, F32 or BF16, after `change` has seen them.
fn rewritten(
    folder: &Path,
    to: Dtype,
    change: impl FnOnce(&mut std::collections::BTreeMap<String, Values>),
) -> (TempDir, PathBuf) {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("model.safetensors");
    let mut tensors = read_folder(folder);
    change(&mut tensors);
    let raw = |values: &Values| -> Vec<u8> {
        match to {
            Dtype::F32 => values.data.iter().flat_map(|x| (*x as f32).to_le_bytes()).collect(),
            _ => values.data.iter().flat_map(|x| half::bf16::from_f32(*x as f32).to_le_bytes()).collect(),
        }
    };
    let raws: Vec<(String, Vec<usize>, Vec<u8>)> = tensors.iter().map(|(n, v)| (n.clone(), v.shape.clone(), raw(v))).collect();
    let views = raws.iter().map(|(n, s, r)| (n.clone(), safetensors::tensor::TensorView::new(to, s.clone(), r).unwrap()));
    safetensors::serialize_to_file(views, None, &path).unwrap();
    (scratch, path)
}

#[test]
fn tensors_that_are_missing_new_or_of_another_shape_are_named() {
    let (base, adapter) = (model("llama-tiny"), adapter("llama-qv-r8"));
    let full = [Weighted::full(&adapter)];
    let (_scratch, path) = merged(&base, &full);
    let (_other, file) = rewritten(&path, Dtype::BF16, |tensors| {
        tensors.remove(Q0).unwrap();
        let norm = tensors.remove("model.norm.weight").unwrap();
        tensors.insert("model.norm.weight".to_owned(), Values { shape: vec![1, 64], ..norm.clone() });
        tensors.insert("model.extra".to_owned(), norm);
    });
    let report = ask(&file, &base, &full);
    let found: Vec<_> = report.structure.iter().map(|f| (f.tensor.as_str(), f.finding, f.fault)).collect();
    assert_eq!(found, [(Q0, "missing", true), ("model.norm.weight", "shape", true), ("model.extra", "extra", true)]);
    assert_eq!((report.verdict, report.is_merged, report.tensors.len()), (Verdict::OtherTensors, false, 3));
}

#[test]
fn another_layout_and_another_dtype_are_no_fault() {
    let (base, adapter) = (model("llama-tiny"), adapter("llama-qv-r8"));
    let full = [Weighted::full(&adapter)];
    let (_scratch, path) = merged(&base, &full);
    // Four shards in one file.
    let (_one, file) = rewritten(&path, Dtype::BF16, |_| ());
    let report = ask(&file, &base, &full);
    assert_eq!((report.verdict, report.structure.len()), (Verdict::Merged, 0));
    // A merge in F32 of the BF16 base: correctly rounded to F32, from the float64 reference of the fixtures.
    let exact = read_file(&fixture("goldens/llama-qv-r8--llama-tiny/f64.safetensors"));
    let put = |tensors: &mut std::collections::BTreeMap<String, Values>| {
        for (name, values) in exact {
            tensors.get_mut(&name).unwrap().data = values.data;
        }
    };
    let (_wide, file) = rewritten(&path, Dtype::F32, put);
    let report = ask(&file, &base, &full);
    assert!(report.is_merged && report.correct as f64 > 0.999 * report.values as f64, "{}", report.says);
    assert!(report.structure.len() == 21 && report.structure.iter().all(|f| f.finding == "dtype" && !f.fault));
    assert_eq!(report.untouched.same, 17);
    // The BF16 merge stored as F32 is a merge in a lower precision, not a correctly rounded one.
    let (_narrow, file) = rewritten(&path, Dtype::F32, |_| ());
    let report = ask(&file, &base, &full);
    assert_eq!((report.verdict, report.is_merged), (Verdict::MergedLowerPrecision, true), "{}", report.says);
}

/// An update that is small against the steps of the dtype: correctly rounded, most of it is lost, and that is said; a merge into the
/// base's copy and a merge that is done twice are still told from it.
#[test]
fn what_rounding_lost_is_told_from_what_was_not_merged() {
    let (base, adapter) = (model("llama-tiny"), adapter("llama-qv-r8"));
    let faint = [Weighted { adapter: &adapter, weight: 0.01 }];
    let (_scratch, path) = merged(&base, &faint);
    let report = ask(&path, &base, &faint);
    assert_eq!((report.verdict, report.is_merged), (Verdict::RoundingLost, true), "{}", report.says);
    assert!(report.warnings.iter().any(|note| note.rule == "A-035"));
    for tensor in &report.tensors {
        let (gain, expected) = (tensor.gain.unwrap(), tensor.gain_expected.unwrap());
        assert!(gain < 0.9 && gain == expected && tensor.ulps.none == tensor.values, "{tensor:?}");
    }
    all_are(&ask(base.path(), &base, &faint), Verdict::NotMerged);
    // Without the weight.
    let (_full, whole) = merged(&base, &[Weighted::full(&adapter)]);
    all_are(&ask(&whole, &base, &faint), Verdict::WeightIgnored);
}

/// The same faults in a 16-bit dtype, where rounding blurs them.
#[test]
fn faults_are_named_through_the_rounding_of_16_bits() {
    let (base, adapter) = (model("llama-tiny"), adapter("llama-qv-r8"));
    let full = [Weighted::full(&adapter)];
    let (_scratch, path) = merged(&base, &full);
    let (before, after) = (read_folder(base.path()), read_folder(&path));
    let delta = transposed(&moved(&after[Q0], &before[Q0]), 64);
    let (swapped, turned) = (sum(&before[Q0].data, &moved(&after[Q1], &before[Q1])), sum(&before[Q1].data, &delta));
    for (tensor, values) in [(Q0, swapped), (Q1, turned)] {
        edit(&path, tensor, |bytes| {
            let raw = values.iter().map(|x| half::bf16::from_f32(*x as f32).to_le_bytes());
            bytes.chunks_exact_mut(2).zip(raw).for_each(|(old, new)| old.copy_from_slice(&new));
        });
    }
    let report = ask(&path, &base, &full);
    assert_eq!(verdict(&report, Q0).other.as_deref(), Some(Q1), "{}", verdict(&report, Q0).says);
    // The update of layer 0, transposed on layer 1, is neither layer 1's nor anything that is named.
    assert_eq!(verdict(&report, Q1).verdict, Verdict::Different, "{}", verdict(&report, Q1).says);
    assert_eq!(report.verdict, Verdict::Mixed);
    for (weight, wanted) in [(-1.0, Verdict::Subtracted), (8f64.sqrt(), Verdict::RsloraApplied), (0.5, Verdict::ScaleIgnored)] {
        let (_scratch, path) = merged(&base, &[Weighted { adapter: &adapter, weight }]);
        all_are(&ask(&path, &base, &full), wanted);
    }
}

#[test]
fn a_sample_reads_its_share_and_says_so() {
    let (base, adapter) = (model("llama-tiny-f32"), adapter("llama-qv-r8"));
    let full = [Weighted::full(&adapter)];
    let (_first, path) = merged(&base, &full);
    let sample = |path: &Path, share| {
        let options = {
            let mut options = VerifyOptions::default();
            options.sample = Some(share);
            options
        };
        verify(&open_checkpoint(path).unwrap(), &base, &full, &options, &())
    };
    let report = sample(&path, 0.1).unwrap();
    let share = report.bytes_compared as f64 / report.bytes as f64;
    assert!(report.is_merged && (0.09..0.2).contains(&share) && report.sample == Some(0.1), "{share}");
    assert!(report.tensors.iter().all(|t| t.values > 0 && t.gain_error.is_some()));
    assert_eq!(report, sample(&path, 0.1).unwrap());
    let (_second, twice) = merged(&open_checkpoint(&path).unwrap(), &full);
    all_are(&sample(&twice, 0.1).unwrap(), Verdict::MergedTwice);
    for share in [0.0, -1.0, 1.5, f64::NAN] {
        assert_eq!(sample(&path, share).unwrap_err().diagnostics()[0].rule().id, "U-001");
    }
}

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_loratool")).args(args).output().unwrap()
}

#[test]
fn the_exit_code_is_the_answer_and_the_report_is_printed_with_both() {
    let (base, adapter) = (fixture("models/llama-tiny"), fixture("adapters/llama-qv-r8"));
    let (base, adapter) = (base.to_str().unwrap(), adapter.to_str().unwrap());
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("merged");
    let out = out.to_str().unwrap();
    assert_eq!(run(&["merge", base, "-a", adapter, "-o", out, "-q"]).status.code(), Some(0));
    for (checkpoint, code, says) in [(out, 0, "merged: every value is correctly rounded"), (base, 1, "not merged, the base's")] {
        let args = ["verify", checkpoint, "--base", base, "--adapter", adapter];
        let printed = run(&args);
        let text = String::from_utf8(printed.stdout).unwrap();
        assert_eq!(printed.status.code(), Some(code), "{text}");
        assert!(text.lines().next().unwrap().ends_with(says) && text.contains("ulp off"), "{text}");
        assert!(text.lines().filter(|line| !line.contains('/')).all(|line| line.chars().count() <= 80), "{text}");
        assert_eq!(String::from_utf8(printed.stderr).unwrap().contains("[U-004]"), code == 1);

        let json: Value = serde_json::from_slice(&run(&[&args[..], &["--json"]].concat()).stdout).unwrap();
        assert_eq!(json["report"]["is_merged"], code == 0);
        assert_eq!(json["error"]["class"] == "negative", code == 1);
        assert_eq!(json["report"]["tensors"].as_array().unwrap().len(), 4);
    }
}

#[test]
fn the_answer_does_not_depend_on_the_number_of_threads() {
    let (base, adapter) = (model("llama-tiny"), adapter("llama-all-r4"));
    let full = [Weighted { adapter: &adapter, weight: 0.9 }];
    let (_scratch, path) = merged(&base, &[Weighted::full(&adapter)]);
    let with = |threads: usize| {
        let mut options = VerifyOptions::default();
        options.exec.threads = std::num::NonZeroUsize::new(threads);
        verify(&open_checkpoint(&path).unwrap(), &base, &full, &options, &()).unwrap()
    };
    assert_eq!(with(1), with(3));
}
