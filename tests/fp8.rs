//! Bases whose weights are codes of E4M3 with scales, against codes and scales that torch found by the rule of `spec/adapter-model.md`,
//! section 4.5. `fixtures/generate/fp8.py` makes all of it.

mod common;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use common::{copy_folder, fixture, read_file};
use loratool::report::Verdict;
use loratool::{
    Adapter, ExecOptions, InspectOptions, MergeOptions, Rounding, VerifyOptions, Weighted, dry_run, inspect_checkpoint, merge,
    merge_each, merge_in_place, merge_tensor, open_adapter, open_checkpoint, unmerge_by_subtraction, verify,
};
use safetensors::{Dtype, SafeTensors};

const CASES: &[&str] = &["blocks", "blocks-bf16", "default-block", "one-scale", "two-adapters", "dora"];
const QUERY: &str = "model.layers.0.self_attn.q_proj.weight";

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensors().into_iter().map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))).collect()
}

fn folder(path: &Path) -> Tensors {
    let paths = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|end| end == "safetensors")).flat_map(|path| tensors(&path)).collect()
}

fn case(name: &str) -> PathBuf {
    fixture(&format!("fp8/{name}"))
}

fn adapters(name: &str) -> Vec<Adapter> {
    let of = |folder: &str| case(name).join(folder);
    ["adapter", "adapter2"].map(of).iter().filter(|path| path.exists()).map(|path| open_adapter(path).unwrap()).collect()
}

fn merged(
    base: &Path,
    adapters: &[Adapter],
    out: &Path,
    options: &MergeOptions,
) -> loratool::Result<loratool::report::MergeReport> {
    let base = open_checkpoint(base)?;
    let weighted: Vec<_> = adapters.iter().map(Weighted::full).collect();
    merge(&base, &weighted, out, options, &())
}

/// Values of codes by their bits, and not with our own kernel.
fn value(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let magnitude = if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7) };
    if code & 0x7f == 0x7f { f64::NAN } else { magnitude.copysign(if code > 0x7f { -1.0 } else { 1.0 }) }
}

#[test]
fn codes_and_scales_are_those_that_torch_finds() {
    let scratch = tempfile::tempdir().unwrap();
    for name in CASES {
        let out = scratch.path().join(name);
        let report = merged(&case(name).join("base"), &adapters(name), &out, &MergeOptions::default()).unwrap();
        let (before, after) = (folder(&case(name).join("base")), folder(&out));
        let expected = tensors(&case(name).join("expected.safetensors"));
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>(), "{name}");
        for (tensor, found) in &after {
            let wanted = expected.get(tensor).unwrap_or(&before[tensor]);
            assert_eq!((found.0, &found.1), (wanted.0, &wanted.1), "{name}: {tensor}");
            let first = found.2.iter().zip(&wanted.2).position(|(x, y)| x != y);
            assert_eq!(first, None, "{name}: {tensor}: {:?} of {} bytes", first, found.2.len());
        }
        let changed = expected.iter().filter(|(tensor, wanted)| before[*tensor].2 != wanted.2).count();
        assert_eq!((changed, report.balance.modified, report.balance.copied), (4, 4, 2), "{name}");
        assert!(report.survived.is_some_and(|gain| (0.9..1.1).contains(&gain)), "{name}: {:?}", report.survived);
        for tensor in report.tensors.iter().filter(|tensor| tensor.action == "update") {
            assert!(tensor.gain.is_some() && tensor.block.is_some() && tensor.changed > Some(0), "{name}: {tensor:?}");
        }
        assert_eq!(report.tensors.iter().filter(|tensor| tensor.action == "requantise").count(), 2, "{name}");
    }
}

/// A block that the update leaves alone keeps its bytes, though its neighbours get others.
#[test]
fn a_block_without_update_keeps_its_codes_and_its_scale() {
    let (before, after) = (folder(&case("blocks").join("base")), tensors(&case("blocks").join("expected.safetensors")));
    let (codes, scales) = (QUERY.to_owned(), format!("{QUERY}_scale_inv"));
    assert_eq!(before[&codes].2[16 * 24..32 * 24], after[&codes].2[16 * 24..32 * 24]);
    assert_eq!(before[&scales].2[8..16], after[&scales].2[8..16]);
    assert!(before[&codes].2[..16 * 24] != after[&codes].2[..16 * 24] && before[&scales].2[..8] != after[&scales].2[..8]);
}

/// What the codes mean is within half a step of the float64 reference.
#[test]
fn the_values_are_near_the_reference() {
    for name in CASES {
        let expected = tensors(&case(name).join("expected.safetensors"));
        let exact = read_file(&case(name).join("f64.safetensors"));
        let floats = read_file(&case(name).join("expected.safetensors"));
        for (tensor, exact) in &exact {
            let (_, shape, codes) = &expected[tensor];
            let scales = floats.iter().find(|(scales, _)| scales.starts_with(&format!("{tensor}_scale"))).unwrap().1;
            let grid = if scales.shape.len() == 2 { (scales.shape[0], scales.shape[1]) } else { (1, 1) };
            let block = match (*name, grid) {
                (_, (1, 1)) => (shape[0], shape[1]),
                ("two-adapters", _) => (16, 8),
                _ => (16, 16),
            };
            for (i, (code, exact)) in codes.iter().zip(&exact.data).enumerate() {
                let (row, col) = (i / shape[1], i % shape[1]);
                let scale = scales.data[row / block.0 * grid.1 + col / block.1];
                let half = (exact.abs() / 16.0).max(scale.abs() / 1024.0);
                assert!((value(*code) * scale - exact).abs() <= half * 1.01, "{name}: {tensor} [{row}, {col}]");
            }
        }
    }
}

#[test]
fn the_bytes_do_not_depend_on_how_the_work_is_cut() {
    let scratch = tempfile::tempdir().unwrap();
    for name in CASES {
        let expected = tensors(&case(name).join("expected.safetensors"));
        for (way, (threads, tile, portable, digests)) in
            [(1, 64, false, false), (3, 256, true, false), (2, 4096, false, true), (4, 64, true, true)].into_iter().enumerate()
        {
            let mut options = MergeOptions::default();
            options.exec = ExecOptions::default();
            (options.exec.threads, options.exec.tile_bytes, options.exec.portable) = (NonZeroUsize::new(threads), tile, portable);
            options.digests = digests;
            let out = scratch.path().join(format!("{name}-{way}"));
            merged(&case(name).join("base"), &adapters(name), &out, &options).unwrap();
            let found = folder(&out);
            assert!(expected.iter().all(|(tensor, wanted)| found[tensor] == *wanted), "{name}: way {way}");
        }
        let (base, adapters) = (open_checkpoint(case(name).join("base")).unwrap(), adapters(name));
        let weighted: Vec<_> = adapters.iter().map(Weighted::full).collect();
        let plan = loratool::Plan::new(&base, &weighted, &Default::default(), &Default::default()).unwrap();
        for (tensor, wanted) in &expected {
            assert!(merge_tensor(&plan, tensor).unwrap() == wanted.2, "{name}: {tensor} in memory");
        }
    }
}

#[test]
fn verify_knows_the_merge_from_the_base_and_from_other_merges() {
    let scratch = tempfile::tempdir().unwrap();
    for name in CASES {
        let (base, adapters) = (open_checkpoint(case(name).join("base")).unwrap(), adapters(name));
        let weighted: Vec<_> = adapters.iter().map(Weighted::full).collect();
        let out = |what: &str| scratch.path().join(format!("{name}-{what}"));
        let judged = |path: &Path, sample: Option<f64>| {
            let mut options = VerifyOptions::default();
            options.sample = sample;
            verify(&open_checkpoint(path).unwrap(), &base, &weighted, &options, &()).unwrap()
        };
        merge(&base, &weighted, &out("once"), &MergeOptions::default(), &()).unwrap();
        for sample in [None, Some(0.3)] {
            let report = judged(&out("once"), sample);
            assert!(report.is_merged && report.correct == report.values, "{name}: {}", report.says);
            assert_eq!(report.tensors.len(), 2, "{name}");
        }
        let report = judged(&case(name).join("base"), None);
        assert_eq!((report.verdict, report.is_merged), (Verdict::NotMerged, false), "{name}: {}", report.says);
        if *name == "dora" {
            continue;
        }
        let twice: Vec<_> = adapters.iter().map(|adapter| Weighted { adapter, weight: 2.0 }).collect();
        merge(&base, &twice, &out("twice"), &MergeOptions::default(), &()).unwrap();
        let report = judged(&out("twice"), None);
        assert_eq!((report.verdict, report.is_merged), (Verdict::MergedTwice, false), "{name}: {}", report.says);
    }
}

/// A code that was changed afterwards is seen.
#[test]
fn verify_sees_one_code_that_is_not_right() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out");
    let adapters = adapters("blocks");
    merged(&case("blocks").join("base"), &adapters, &out, &MergeOptions::default()).unwrap();
    edit(&out.join("model-00001-of-00002.safetensors"), QUERY, |bytes| bytes[100] ^= 0x20);
    let base = open_checkpoint(case("blocks").join("base")).unwrap();
    let weighted: Vec<_> = adapters.iter().map(Weighted::full).collect();
    let report = verify(&open_checkpoint(&out).unwrap(), &base, &weighted, &VerifyOptions::default(), &()).unwrap();
    assert!(!report.is_merged && report.correct == report.values - 1, "{}", report.says);
}

/// Changes the bytes of one tensor of a file.
fn edit(file: &Path, tensor: &str, change: impl FnOnce(&mut [u8])) {
    let mut bytes = std::fs::read(file).unwrap();
    let (start, end) = {
        let found = SafeTensors::deserialize(&bytes).unwrap();
        let data = found.tensor(tensor).unwrap().data().as_ptr_range();
        (data.start as usize - bytes.as_ptr() as usize, data.end as usize - bytes.as_ptr() as usize)
    };
    change(&mut bytes[start..end]);
    std::fs::write(file, bytes).unwrap();
}

/// A copy of the base of a case, and its first shard, which has the codes of the query.
fn copied(name: &str, scratch: &Path) -> (PathBuf, PathBuf) {
    let base = scratch.join("base");
    copy_folder(&case(name).join("base"), &base);
    (base.clone(), base.join("model-00001-of-00002.safetensors"))
}

#[test]
fn codes_that_are_no_numbers_are_refused_or_kept_by_name() {
    let scratch = tempfile::tempdir().unwrap();
    let (base, shard) = copied("blocks", scratch.path());
    edit(&shard, QUERY, |bytes| bytes[25] = 0xff);
    let out = scratch.path().join("out");
    let error = merged(&base, &adapters("blocks"), &out, &MergeOptions::default()).unwrap_err();
    assert_eq!(error.diagnostics()[0].rule().id, "A-030", "{error}");
    assert!(error.to_string().contains("[1, 1]") && !out.exists(), "{error}");
    let mut options = MergeOptions::default();
    options.bind.allow_nonfinite_base = true;
    merged(&base, &adapters("blocks"), &out, &options).unwrap();
    assert_eq!(folder(&out)[QUERY].2[25], 0xff);
}

#[test]
fn what_cannot_be_quantised_again_is_refused_by_name() {
    let scratch = tempfile::tempdir().unwrap();
    let adapters = adapters("blocks");
    let weighted: Vec<_> = adapters.iter().map(Weighted::full).collect();
    let (folder, _) = copied("blocks", scratch.path());
    let base = open_checkpoint(&folder).unwrap();
    let out = scratch.path().join("out");
    let of = |options: &MergeOptions| dry_run(&base, &weighted, &out, options).unwrap_err().diagnostics()[0].rule().id;
    let mut dtype = MergeOptions::default();
    dtype.output.dtype = Some(Dtype::BF16);
    let mut chance = MergeOptions::default();
    chance.output.rounding = Rounding::Stochastic { seed: 1 };
    assert_eq!((of(&dtype), of(&chance)), ("A-025", "U-001"));
    let error = merge_in_place(&base, &weighted, None, &MergeOptions::default(), &()).unwrap_err();
    assert_eq!(error.diagnostics()[0].rule().id, "U-005", "{error}");
    let error = unmerge_by_subtraction(&base, &weighted, Some(&out), &MergeOptions::default(), &()).unwrap_err();
    assert_eq!(error.diagnostics()[0].rule().id, "A-025", "{error}");
    assert!(!out.exists());
}

#[test]
fn scales_that_do_not_fit_are_refused_by_name() {
    let scratch = tempfile::tempdir().unwrap();
    let (base, _) = copied("blocks", scratch.path());
    let config = std::fs::read_to_string(base.join("config.json")).unwrap();
    let refused = |from: &str, to: &str| {
        assert!(config.contains(from));
        std::fs::write(base.join("config.json"), config.replace(from, to)).unwrap();
        let error = merged(&base, &adapters("blocks"), &scratch.path().join("out"), &MergeOptions::default()).unwrap_err();
        assert_eq!(error.diagnostics()[0].rule().id, "A-025", "{error}");
        error.to_string()
    };
    assert!(refused("16,\n      16", "8,\n      16").contains("8 x 16"));
    assert!(refused("\"fp8\"", "\"compressed-tensors\"").contains("compressed-tensors"));
}

#[test]
fn inspect_says_how_the_base_is_quantised() {
    let report = inspect_checkpoint(&open_checkpoint(case("blocks").join("base")).unwrap(), &InspectOptions::default());
    assert_eq!((report.quantization.as_deref(), report.quantization_block), (Some("fp8"), Some([16, 16])));
    let output =
        std::process::Command::new(env!("CARGO_BIN_EXE_loratool")).arg("inspect").arg(case("blocks").join("base")).output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    assert!(text.contains("fp8, in blocks of 16 x 16"), "{text}");
}

#[test]
fn the_command_says_that_weights_were_quantised_again() {
    let scratch = tempfile::tempdir().unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_loratool"));
    command.arg("merge").arg(case("blocks").join("base")).arg("-a").arg(case("blocks").join("adapter"));
    let output = command.arg("-o").arg(scratch.path().join("out")).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("quantised again, to F8_E4M3 with new scales: 2 tensors"), "{text}");
    assert!(text.contains("of the update survived rounding"), "{text}");
}

/// Two merges that share one reading of the base are each what it is alone.
#[test]
fn one_merge_for_each_adapter_has_the_same_bytes() {
    let scratch = tempfile::tempdir().unwrap();
    let (base, adapters) = (open_checkpoint(case("two-adapters").join("base")).unwrap(), adapters("two-adapters"));
    let weighted: Vec<_> = adapters.iter().map(Weighted::full).collect();
    let each = scratch.path().join("each");
    merge_each(&base, &weighted, &each, &MergeOptions::default(), &()).unwrap();
    for (one, name) in weighted.iter().zip(["adapter", "adapter2"]) {
        let alone = scratch.path().join(name);
        merge(&base, std::slice::from_ref(one), &alone, &MergeOptions::default(), &()).unwrap();
        assert!(folder(&alone) == folder(&each.join(name)), "{name}");
    }
}
