//! Every kind of adapter that PEFT writes, in every pair of dtypes, against two outside judges: PEFT's own merge, and a float64 reference
//! that was computed from the files by other code. `fixtures/generate/kinds.py` makes all of it.

mod common;

use std::path::{Path, PathBuf};

use common::{Values, bytes, copy_folder, fixture, read_file, read_folder, ulp};
use loratool::{
    Adapter, BindOptions, Checkpoint, ConvertOptions, ConvertTo, ExecOptions, Limits, MergeOptions, OpenOptions, VerifyOptions,
    Weighted, convert, merge, merge_in_place, open_adapter, open_adapter_with, open_checkpoint, recompute_residual, verify,
};
use safetensors::Dtype;
use serde_json::Value;

/// A kind with one pair of dtypes.
#[derive(Clone)]
struct Case {
    kind: String,
    base: PathBuf,
    adapters: Vec<PathBuf>,
    golden: PathBuf,
    /// PEFT's own merge is right.
    peft: bool,
}

fn cases() -> Vec<Case> {
    let all: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(fixture("kinds/kinds.json")).unwrap()).unwrap();
    let texts = |v: &Value| v.as_array().unwrap().iter().map(|t| t.as_str().unwrap().to_owned()).collect::<Vec<_>>();
    let mut cases = Vec::new();
    let only = std::env::var("KIND").unwrap_or_default();
    for entry in &all {
        let kind = entry["kind"].as_str().unwrap();
        if !kind.starts_with(&only) || REFUSED.iter().any(|(refused, _)| *refused == kind) {
            continue;
        }
        let folder = fixture(&format!("kinds/{kind}"));
        for combo in texts(&entry["combos"]) {
            let (base, dtype) = combo.rsplit_once('-').unwrap();
            cases.push(Case {
                kind: kind.to_owned(),
                base: folder.join(format!("base-{base}")),
                adapters: texts(&entry["adapters"]).iter().map(|name| folder.join(format!("{name}-{dtype}"))).collect(),
                golden: folder.join("golden").join(&combo),
                peft: entry["peft"].as_bool().unwrap(),
            });
        }
    }
    cases
}

/// Kinds that are refused, by the rule that says why.
const REFUSED: &[(&str, &str)] = &[("lokr-conv1d-full", "A-010")];

/// What a kind needs to be asked for.
fn options(case: &Case) -> BindOptions {
    let kind = case.kind.as_str();
    let mut options = BindOptions::default();
    options.resize_vocabulary = kind.starts_with("vocab");
    options.untie = kind.starts_with("tied");
    options.residual_base = kind.ends_with("-config") || case.base.ends_with("base-residual-f32");
    options
}

fn merged(case: &Case, adapters: &[Adapter], base: &Checkpoint, out: &Path, exec: ExecOptions) -> loratool::report::MergeReport {
    let weighted: Vec<_> = adapters.iter().map(Weighted::full).collect();
    let mut merging = MergeOptions::default();
    (merging.bind, merging.exec) = (options(case), exec);
    merge(base, &weighted, out, &merging, &()).unwrap_or_else(|e| panic!("{}: {e}", case.golden.display()))
}

/// What a kind needs to be told about its files.
fn open_options(case: &Case) -> OpenOptions {
    let mut options = OpenOptions::default();
    if case.kind == "experts-2d" {
        // A module that nobody knows.
        options.parameter_order = vec!["first".to_owned(), "second".to_owned()];
    }
    options
}

fn opened(case: &Case) -> (Checkpoint, Vec<Adapter>) {
    let options = open_options(case);
    let base = open_checkpoint(&case.base).unwrap();
    let base = if case.kind == "layer-replication" { base.replicated(&[(0, 2), (1, 3)]).unwrap() } else { base };
    let is_residual = case.base.ends_with("base-residual-f32");
    let open = |path: &PathBuf| {
        let adapter = open_adapter_with(path, &options).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        // On the published base, what the initialisation took out of it is taken out again.
        match ["pissa", "olora", "kasa"].contains(&case.kind.as_str()) && !is_residual {
            true => recompute_residual(adapter, &base, &BindOptions::default(), &Limits::default()).unwrap(),
            false => adapter,
        }
    };
    let adapters = case.adapters.iter().map(open).collect();
    (base, adapters)
}

/// The value itself, or one of its neighbours where the reference lies on a tie but for its own error.
fn is_rounded(dtype: Dtype, x: f64, m: f64) -> bool {
    (m - x).abs() <= 0.5 * ulp(dtype, x) * (1.0 + 1e-6) + 1e-13 * x.abs()
}

#[test]
fn every_kind_in_every_dtype_is_what_peft_and_the_reference_say() {
    let scratch = tempfile::tempdir().unwrap();
    let (mut values, mut right, mut near) = (0u64, 0u64, 0u64);
    for (i, case) in cases().iter().enumerate() {
        let (base, adapters) = opened(case);
        let out = scratch.path().join(i.to_string());
        let report = merged(case, &adapters, &base, &out, ExecOptions::default());
        let (before, after) = (read_folder(&case.base), read_folder(&out));
        let exact = read_file(&case.golden.join("f64.safetensors"));
        let peft = case.golden.join("peft.safetensors");
        let peft = if case.peft && peft.exists() { read_file(&peft) } else { Default::default() };
        let place = case.golden.display();
        for (name, ours) in &after {
            let Some(exact) = exact.get(name) else {
                assert_eq!(Some(ours), before.get(name), "{place}: {name} is no target and changed");
                continue;
            };
            assert_eq!(ours.shape, exact.shape, "{place}: {name}");
            for (j, (m, x)) in ours.data.iter().zip(&exact.data).enumerate() {
                values += 1;
                right += u64::from(is_rounded(ours.dtype, *x, *m));
                if let Some(peft) = peft.get(name) {
                    near += u64::from(judged(case, name, j, before.get(name), (ours.dtype, *m), peft.data[j], *x));
                }
            }
        }
        assert!(exact.keys().all(|name| after.contains_key(name)), "{place}: {:?}", exact.keys());
        let balance = report.balance;
        assert_eq!((balance.applied, balance.ignored), (balance.adapter_tensors, 0), "{place}");
        // There the reference is the whole model.
        let all = if case.kind == "layer-replication" { balance.copied } else { 0 };
        assert_eq!(balance.modified + balance.added + all, exact.len() as u64, "{place}");
    }
    println!("{right} of {values} values are the reference rounded once; {near} are near PEFT's");
    assert!(right as f64 >= 0.9999 * values as f64, "{right} of {values}");
}

/// f32: within 2 ulp of PEFT's (8 where magnitudes divide by norms that PEFT sums in f32), or PEFT is off the reference and ours is not.
/// 16 bits: never further from the reference than PEFT.
fn judged(case: &Case, name: &str, j: usize, before: Option<&Values>, (dtype, m): (Dtype, f64), p: f64, x: f64) -> bool {
    let place = format!("{}: {name}[{j}]: ours {m:e}, PEFT's {p:e}, exact {x:e}", case.golden.display());
    if dtype == Dtype::F32 {
        let w = before.and_then(|before| before.data.get(j)).copied().unwrap_or(0.0);
        let unit = ulp(Dtype::F32, w.abs().max((x - w).abs()));
        let allowed = if case.kind.starts_with("dora") { 8.0 } else { 2.0 };
        let near = (m - p).abs() <= allowed * unit;
        let fair = is_rounded(dtype, x, m) && (p - x).abs() > 1.4 * unit;
        assert!(near || fair, "{place}");
        return near;
    }
    assert!((m - x).abs() <= (p - x).abs() + 1e-15 * x.abs().max(1e-3), "{place}");
    true
}

#[test]
fn what_no_merge_equals_is_refused_by_name() {
    for (kind, rule) in REFUSED {
        let error = open_adapter(fixture(&format!("kinds/{kind}/adapter-f32"))).unwrap_err();
        assert_eq!(error.diagnostics()[0].rule().id, *rule, "{kind}: {error}");
    }
}

/// Threads, tiles and instruction sets change no byte.
#[test]
fn the_bytes_do_not_depend_on_how_the_work_is_cut() {
    let scratch = tempfile::tempdir().unwrap();
    for (i, case) in
        cases().iter().enumerate().filter(|(_, case)| case.golden.ends_with("bf16-f32") || case.golden.ends_with("f32-f32"))
    {
        let (base, adapters) = opened(case);
        let exec = |threads: usize, tile_bytes, portable| {
            let mut exec = ExecOptions::default();
            (exec.threads, exec.tile_bytes, exec.portable) = (std::num::NonZeroUsize::new(threads), tile_bytes, portable);
            exec
        };
        let ways = [exec(1, 1 << 20, false), exec(4, 256, false), exec(2, 64, true)];
        let mut outputs = Vec::new();
        for (way, exec) in ways.into_iter().enumerate() {
            let out = scratch.path().join(format!("{i}-{way}"));
            merged(case, &adapters, &base, &out, exec);
            outputs.push(bytes(&out));
        }
        assert!(outputs.iter().all(|output| *output == outputs[0]), "{}", case.golden.display());
    }
}

/// Kinds that PEFT's files cannot hold: the order of the parameters of this module is known to its caller alone.
const NOT_WRITTEN: &[&str] = &["experts-2d"];

/// A container and what is made of it merge to the same bytes, and `verify` recognises them.
#[test]
fn a_container_holds_every_kind_and_gives_it_back() {
    let scratch = tempfile::tempdir().unwrap();
    for (i, case) in cases().iter().enumerate() {
        let (base, adapters) = opened(case);
        let out = |what: &str| scratch.path().join(format!("{i}-{what}"));
        merged(case, &adapters, &base, &out("peft"), ExecOptions::default());
        let expected = read_folder(&out("peft"));
        let mut through = Vec::new();
        for (j, adapter) in adapters.iter().enumerate() {
            let container = out(&format!("container-{j}.safetensors"));
            let mut converting = ConvertOptions::default();
            (converting.base, converting.bind) = (Some(&base), options(case));
            convert(adapter, &container, &converting, &()).unwrap_or_else(|e| panic!("{}: {e}", case.golden.display()));
            let read = open_adapter(&container).unwrap();
            let back = out(&format!("back-{j}"));
            let mut converting = ConvertOptions::default();
            converting.to = ConvertTo::Peft;
            match convert(&read, &back, &converting, &()) {
                Ok(_) => through.push(open_adapter(&back).unwrap_or_else(|e| panic!("{}: {e}", case.golden.display()))),
                Err(error) => {
                    let known = NOT_WRITTEN.contains(&case.kind.as_str());
                    assert!(
                        known && matches!(error.diagnostics()[0].rule().id, "P-006" | "P-011"),
                        "{}: {error}",
                        case.golden.display()
                    );
                    through.push(read);
                }
            }
        }
        merged(case, &through, &base, &out("again"), ExecOptions::default());
        assert_eq!(expected, read_folder(&out("again")), "{}", case.golden.display());
        let weighted: Vec<_> = adapters.iter().map(Weighted::full).collect();
        let verified = open_checkpoint(out("again")).unwrap();
        let mut verifying = VerifyOptions::default();
        verifying.bind = options(case);
        let report = verify(&verified, &base, &weighted, &verifying, &()).unwrap();
        assert!(report.is_merged, "{}: {}", case.golden.display(), report.says);
    }
}

/// What cannot be done in place, because a value does not follow from the value that was there, or because tensors move.
const NOT_IN_PLACE: &[&str] = &["dora", "ia3", "tokens", "vocab", "tied", "layer-replication"];

#[test]
fn in_place_a_kind_has_the_same_bytes_or_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    for (i, case) in cases().iter().enumerate().filter(|(_, case)| case.golden.ends_with("bf16-f32")) {
        let place = case.golden.display();
        let copy = scratch.path().join(format!("{i}-base"));
        copy_folder(&case.base, &copy);
        let (base, adapters) = opened(&Case { base: copy.clone(), ..case.clone() });
        let weighted: Vec<_> = adapters.iter().map(Weighted::full).collect();
        let mut merging = MergeOptions::default();
        merging.bind = options(case);
        match merge_in_place(&base, &weighted, None, &merging, &()) {
            Ok(_) => {
                let out = scratch.path().join(format!("{i}-out"));
                let (base, adapters) = opened(case);
                merged(case, &adapters, &base, &out, ExecOptions::default());
                assert_eq!(read_folder(&copy), read_folder(&out), "{place}");
                assert!(!NOT_IN_PLACE.iter().any(|kind| case.kind.starts_with(kind)), "{place} was done in place");
            }
            Err(error) => {
                assert_eq!(error.diagnostics()[0].rule().id, "U-005", "{place}: {error}");
                assert!(NOT_IN_PLACE.iter().any(|kind| case.kind.starts_with(kind)), "{place}: {error}");
                assert_eq!(read_folder(&copy), read_folder(&case.base), "{place}");
            }
        }
    }
}

/// Tensors that an adapter may as well not have: a saved embedding, and what is all that there is of its module.
const MAY_BE_MISSING: &[&str] = &[
    "embed_tokens.base_layer.weight",
    "lm_head.base_layer.weight",
    "embed_tokens.weight",
    "lm_head.weight",
    "norm.weight",
    "ia3_l",
];

/// A file that lacks one tensor is refused, whichever it is, and never merged without it.
#[test]
fn no_tensor_of_any_kind_can_be_lost() {
    let scratch = tempfile::tempdir().unwrap();
    let mut dropped = 0;
    for case in cases().iter().filter(|case| case.golden.ends_with("f32-f32") && !case.base.ends_with("base-fused-f32")) {
        let folder = scratch.path().join(&case.kind);
        copy_folder(&case.adapters[0], &folder);
        let stored = std::fs::read(folder.join("adapter_model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&stored).unwrap();
        let all = file.tensors();
        for (lost, _) in all.iter().filter(|(name, _)| !MAY_BE_MISSING.iter().any(|end| name.ends_with(end))) {
            let rest = all.iter().filter(|(name, _)| name != lost).map(|(name, view)| (name.clone(), view));
            std::fs::write(folder.join("adapter_model.safetensors"), safetensors::serialize(rest, None).unwrap()).unwrap();
            let outcome = open_adapter_with(&folder, &open_options(case)).and_then(|adapter| {
                let mut binding = options(case);
                binding.residual_base = true;
                let base = open_checkpoint(&case.base)?.replicated(adapter.replication())?;
                loratool::Plan::new(&base, &[Weighted::full(&adapter)], &binding, &Limits::default()).map(drop)
            });
            assert!(outcome.is_err(), "{}: {lost} is missing, and nobody says so", case.kind);
            dropped += 1;
        }
    }
    assert!(dropped > 250, "{dropped}");
}

/// PEFT up to 0.21.2 adds the update of an attention's output projection twice, in training as well: asked for, so do we.
#[test]
fn an_output_projection_is_added_twice_on_request() {
    let folder = fixture("kinds/mha");
    let scratch = tempfile::tempdir().unwrap();
    let mut options = OpenOptions::default();
    options.attention_twice = true;
    let adapter = open_adapter_with(folder.join("adapter-f32"), &options).unwrap();
    let out = scratch.path().join("out");
    let base = open_checkpoint(folder.join("base-f32")).unwrap();
    merge(&base, &[Weighted::full(&adapter)], &out, &MergeOptions::default(), &()).unwrap();
    let (after, golden) = (read_folder(&out), folder.join("golden/f32-f32"));
    let (twice, once) = (read_file(&golden.join("f64-twice.safetensors")), read_file(&golden.join("f64.safetensors")));
    for (name, exact) in &twice {
        let near = |exact: &Values| after[name].data.iter().zip(&exact.data).all(|(m, x)| is_rounded(Dtype::F32, *x, *m));
        assert!(near(exact), "{name}");
        assert_eq!(near(&once[name]), !name.ends_with("out_proj.weight"), "{name}");
    }
}

/// At weight 0 an adapter is left out, whatever its kind, and the counts balance.
#[test]
fn at_weight_zero_a_kind_is_left_out() {
    let scratch = tempfile::tempdir().unwrap();
    let plain = |base: &Checkpoint, adapters: &[Weighted<'_>], out: &Path, bind: BindOptions| {
        let mut merging = MergeOptions::default();
        merging.bind = bind;
        merge(base, adapters, out, &merging, &())
    };
    for (i, case) in cases().iter().enumerate().filter(|(_, case)| case.golden.ends_with("f32-f32")) {
        let (base, adapters) = opened(case);
        let weighted: Vec<_> = adapters.iter().map(|adapter| Weighted { adapter, weight: 0.0 }).collect();
        let error = plain(&base, &weighted, &scratch.path().join(i.to_string()), options(case)).unwrap_err();
        // Nothing is left to do, and that is what is said.
        assert_eq!(error.diagnostics()[0].rule().id, "A-012", "{}: {error}", case.golden.display());
    }
}

/// What was computed for one base is still known as the adapter that it was made of.
#[test]
fn an_adapter_whose_residual_was_computed_is_not_merged_twice() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = fixture("kinds/pissa");
    let recomputed = |base: &Checkpoint| {
        let adapter = open_adapter(folder.join("adapter-f32")).unwrap();
        recompute_residual(adapter, base, &BindOptions::default(), &Limits::default()).unwrap()
    };
    let base = open_checkpoint(folder.join("base-f32")).unwrap();
    let out = scratch.path().join("once");
    merge(&base, &[Weighted::full(&recomputed(&base))], &out, &MergeOptions::default(), &()).unwrap();
    let merged = open_checkpoint(&out).unwrap();
    let again =
        merge(&merged, &[Weighted::full(&recomputed(&merged))], &scratch.path().join("twice"), &MergeOptions::default(), &());
    assert_eq!(again.unwrap_err().diagnostics()[0].rule().id, "A-032");
}
