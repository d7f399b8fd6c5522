//! `--rounding`: PEFT's roundings give the very bits that PEFT gives, and stochastic rounding keeps on average what rounding to the nearest
//! loses. PEFT's bits were written by PEFT itself (`fixtures/generate/goldens.py`).

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{Values, fixture, read_file, read_folder};
use loratool::{MergeOptions, Rounding, Weighted, merge, open_adapter, open_checkpoint};
use serde_json::Value;

/// Name, base, adapters with weights.
type Case = (String, String, Vec<(String, f64)>);

/// Every golden.
fn cases() -> Vec<Case> {
    let all: Vec<Value> = serde_json::from_slice(&std::fs::read(fixture("goldens/cases.json")).unwrap()).unwrap();
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    let adapters = |v: &Value| v.as_array().unwrap().iter().map(|a| (text(&a["path"]), a["weight"].as_f64().unwrap())).collect();
    all.iter().map(|c| (text(&c["name"]), text(&c["base"]), adapters(&c["adapters"]))).collect()
}

fn merged(base: &Path, adapters: &[(String, f64)], edit: impl FnOnce(&mut MergeOptions)) -> BTreeMap<String, Values> {
    let scratch = tempfile::tempdir().unwrap();
    let base = open_checkpoint(base).unwrap();
    let opened: Vec<_> = adapters.iter().map(|(path, _)| open_adapter(fixture(&format!("adapters/{path}"))).unwrap()).collect();
    let weighted: Vec<_> =
        opened.iter().zip(adapters).map(|(adapter, (_, weight))| Weighted { adapter, weight: *weight }).collect();
    let mut options = MergeOptions::default();
    edit(&mut options);
    merge(&base, &weighted, &scratch.path().join("out"), &options, &()).unwrap();
    read_folder(&scratch.path().join("out"))
}

/// How many values of a golden are not the ones of a merge with this rounding.
fn differing(golden: &str, rounding: Rounding, portable: bool) -> Vec<(String, usize, usize)> {
    let mut found = Vec::new();
    for (name, base, adapters) in cases() {
        let path = fixture(&format!("goldens/{name}/{golden}"));
        if !path.exists() {
            continue;
        }
        let ours = merged(&fixture(&format!("models/{base}")), &adapters, |o| {
            o.output.rounding = rounding;
            o.exec.portable = portable;
        });
        let (mut all, mut off) = (0, 0);
        for (tensor, theirs) in read_file(&path) {
            all += theirs.data.len();
            // A zero has a sign too.
            let same = |(x, y): (&f64, &f64)| x.to_bits() == y.to_bits();
            off += ours[&tensor].data.iter().zip(&theirs.data).filter(|pair| !same(*pair)).count();
        }
        found.push((name, off, all));
    }
    found
}

#[test]
fn peft_rounding_gives_the_bits_of_peft() {
    for portable in [false, true] {
        let found = differing("peft.safetensors", Rounding::Peft, portable);
        assert_eq!(found.len(), 41);
        let off: Vec<_> = found.iter().filter(|(_, off, _)| *off > 0).collect();
        assert!(off.is_empty(), "{off:?}");
    }
    // The judge can tell: rounded once, many values are others.
    let nearest: usize = differing("peft.safetensors", Rounding::Nearest, false).iter().map(|(_, off, _)| off).sum();
    assert!(nearest > 10_000, "{nearest}");
}

#[test]
fn peft_safe_rounding_gives_the_bits_of_peft_s_safe_merge() {
    let found = differing("peft_safe.safetensors", Rounding::PeftSafe, false);
    assert_eq!(found.len(), 6);
    assert!(found.iter().all(|(_, off, _)| *off == 0), "{found:?}");
    let unsafe_: usize = differing("peft_safe.safetensors", Rounding::Peft, false).iter().map(|(_, off, _)| off).sum();
    assert!(unsafe_ > 1000, "{unsafe_}");
}

/// Where an update is far below the steps of the format, rounding to the nearest drops it.
#[test]
fn chance_keeps_what_rounding_to_the_nearest_loses() {
    let (base, faint) = (fixture("models/llama-tiny"), [("llama-all-r4".to_owned(), 0.004)]);
    let before = read_folder(&base);
    let exact = merged(&base, &faint, |o| o.output.dtype = Some(loratool::Dtype::F32));
    let gain = |after: &BTreeMap<String, Values>| {
        let (mut along, mut square) = (0.0, 0.0);
        for (name, m) in after {
            for ((m, w), x) in m.data.iter().zip(&before[name].data).zip(&exact[name].data) {
                along += (m - w) * (x - w);
                square += (x - w) * (x - w);
            }
        }
        along / square
    };
    let seeded = |seed| merged(&base, &faint, |o| o.output.rounding = Rounding::Stochastic { seed });
    let nearest = gain(&merged(&base, &faint, |_| {}));
    let gains: Vec<f64> = (0..16).map(|seed| gain(&seeded(seed))).collect();
    let mean = gains.iter().sum::<f64>() / 16.0;
    let spread = (gains.iter().map(|g| (g - mean) * (g - mean)).sum::<f64>() / 15.0 / 16.0).sqrt();
    assert!(nearest < 0.5, "{nearest}");
    assert!((mean - 1.0).abs() < 4.0 * spread && spread < 0.05, "{mean} ± {spread}");
    assert!(seeded(1) == seeded(1) && seeded(1) != seeded(2));
}

#[test]
fn chance_does_not_depend_on_threads_tiles_or_kernels() {
    let (base, adapters) = (fixture("models/llama-tiny"), [("llama-all-r4".to_owned(), 0.1)]);
    let stochastic = |edit: fn(&mut MergeOptions)| {
        merged(&base, &adapters, |o| {
            o.output.rounding = Rounding::Stochastic { seed: 5 };
            edit(o);
        })
    };
    let reference = stochastic(|_| {});
    assert!(stochastic(|o| o.exec.tile_bytes = 300) == reference);
    assert!(stochastic(|o| o.exec.threads = std::num::NonZeroUsize::new(5)) == reference);
    assert!(stochastic(|o| o.exec.portable = true) == reference);
    // No value is more than a step from the sum.
    let exact = merged(&base, &adapters, |o| o.output.dtype = Some(loratool::Dtype::F32));
    for (name, m) in &reference {
        for (m, x) in m.data.iter().zip(&exact[name].data) {
            assert!((m - x).abs() <= 1.001 * common::ulp(safetensors::Dtype::BF16, m.abs().max(x.abs())), "{name}: {m} {x}");
        }
    }
}

#[test]
fn what_peft_does_not_define_is_refused() {
    let adapter = open_adapter(fixture("adapters/llama-qv-r8")).unwrap();
    let base = open_checkpoint(fixture("models/llama-tiny")).unwrap();
    let mut options = MergeOptions::default();
    options.output.rounding = Rounding::Peft;
    options.output.dtype = Some(loratool::Dtype::F16);
    let scratch = tempfile::tempdir().unwrap();
    let error = merge(&base, &[Weighted::full(&adapter)], &scratch.path().join("out"), &options, &()).unwrap_err();
    assert_eq!(error.class().exit_code(), 2, "{error}");
}

/// Updates that are smaller than the steps of BF16: rounded after each adapter, another share of them survives.
#[test]
fn verify_knows_a_faint_merge_by_its_rounding() {
    let scratch = tempfile::tempdir().unwrap();
    let base = open_checkpoint(fixture("models/llama-tiny")).unwrap();
    let names = ["llama-qv-r8", "llama-rslora", "llama-r1"];
    let opened: Vec<_> = names.iter().map(|name| open_adapter(fixture(&format!("adapters/{name}"))).unwrap()).collect();
    for weight in [0.03, 0.01, 0.3] {
        let weighted: Vec<_> = opened.iter().map(|adapter| Weighted { adapter, weight }).collect();
        for rounding in [Rounding::Peft, Rounding::PeftSafe, Rounding::Stochastic { seed: 3 }, Rounding::Nearest] {
            let out = scratch.path().join(format!("{weight} {rounding:?}"));
            let mut options = MergeOptions::default();
            options.output.rounding = rounding;
            merge(&base, &weighted, &out, &options, &()).unwrap();
            let merged = open_checkpoint(&out).unwrap();
            let report = loratool::verify(&merged, &base, &weighted, &Default::default(), &()).unwrap();
            assert!(report.is_merged, "{weight} {rounding:?}: {}", report.says);
            // Half of it is another merge.
            let half: Vec<_> = weighted.iter().map(|w| Weighted { weight: weight / 2.0, ..*w }).collect();
            assert!(!loratool::verify(&merged, &base, &half, &Default::default(), &()).unwrap().is_merged);
        }
    }
}
