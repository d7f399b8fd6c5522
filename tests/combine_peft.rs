//! `--compat peft:TYPE` gives what PEFT's `add_weighted_adapter` gives (`fixtures/generate/combine.py`).

mod common;

use std::path::Path;
use std::sync::Arc;

use common::fixture;
use loratool::{
    Adapter, CombineMethod, CombineOptions, ConvertTo, Limits, MajoritySign, Overwrite, PeftCombination, PeftKind, RankRule,
    ReadMode, SafetensorsFile, Strictness, TensorSource, Weighted, combine, delta_rows, open_adapter,
};
use serde_json::Value;

fn golden(name: &str) -> SafetensorsFile {
    let path = fixture("goldens/combine").join(format!("{name}.safetensors"));
    SafetensorsFile::open(&path, ReadMode::Read, Strictness::Strict, &Limits::default()).unwrap()
}

fn floats(source: &dyn TensorSource, name: &str) -> Vec<f32> {
    let mut raw = vec![0; source.info(name).unwrap_or_else(|| panic!("no {name}")).bytes() as usize];
    source.read(name, 0, &mut raw).unwrap();
    raw.as_chunks::<4>().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect()
}

/// Steps between two values of f32.
fn ulps(x: f32, y: f32) -> u32 {
    let place = |x: f32| if x.is_sign_negative() { -((x.to_bits() & 0x7fff_ffff) as i64) } else { x.to_bits() as i64 };
    place(x).abs_diff(place(y)) as u32
}

/// An adapter of a case.
fn at(path: &str) -> loratool::Result<Adapter> {
    open_adapter(match path.strip_prefix("combine/") {
        Some(name) => fixture("goldens/combine").join(name),
        None => fixture(path),
    })
}

fn kind(name: &str) -> PeftKind {
    *PeftKind::ALL.iter().find(|kind| kind.name() == format!("peft:{name}")).unwrap()
}

fn made(case: &Value, adapters: &[Adapter], folder: &Path) -> Adapter {
    let mut options = CombineOptions::default();
    let majority = match case["majority_sign_method"].as_str() {
        Some("frequency") => MajoritySign::Frequency,
        _ => MajoritySign::Total,
    };
    let density = case["density"].as_f64().unwrap_or(1.0);
    options.method =
        CombineMethod::Peft(PeftCombination { kind: kind(case["type"].as_str().unwrap()), density, majority, seed: 0 });
    options.rank = case["svd_rank"].as_u64().map(RankRule::Fixed);
    options.to = ConvertTo::Container;
    options.overwrite = Overwrite::Replace;
    let weight = |place: usize| case["adapters"][place]["weight"].as_f64().unwrap();
    let weighted: Vec<_> = adapters.iter().enumerate().map(|(i, adapter)| Weighted { adapter, weight: weight(i) }).collect();
    let out = folder.join("out.safetensors");
    combine(&weighted, &out, &options, &()).unwrap();
    open_adapter(&out).unwrap()
}

#[test]
fn every_type_is_what_peft_makes() {
    let cases: Vec<Value> =
        serde_json::from_str(&std::fs::read_to_string(fixture("goldens/combine/cases.json")).unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let adapters: Vec<Adapter> =
            case["adapters"].as_array().unwrap().iter().map(|one| at(one["path"].as_str().unwrap()).unwrap()).collect();
        let found = made(case, &adapters, folder.path());
        let golden = golden(name);
        let mut checked = 0;
        for target in found.targets() {
            assert_eq!(target.scaling.effective(), if name == "cat" { target.scaling.effective() } else { 1.0 }, "{name}");
            let delta = format!("{}:delta", target.tensor);
            if golden.info(&delta).is_some() {
                let (rows, _) = target.out_in();
                let (wanted, ours) = (floats(&golden, &delta), delta_rows(target, 0..rows).unwrap());
                let size = wanted.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                let off = wanted.iter().zip(&ours).map(|(x, y)| (f64::from(*x) - y).powi(2)).sum::<f64>().sqrt();
                // A decomposition in f32 there, and one in f64 here.
                assert!(off <= 1e-5 * size, "{name} {}: {off:e} of {size:e}", target.tensor);
                checked += 1;
                continue;
            }
            let Some(_) = golden.info(&format!("{}:A", target.tensor)) else { continue };
            for (factor, part) in [(&target.a, "A"), (&target.b, "B")] {
                let wanted = floats(&golden, &format!("{}:{part}", target.tensor));
                let source: &Arc<dyn TensorSource> = factor.source();
                let ours = floats(source.as_ref(), factor.name());
                if name == "cat" {
                    // PEFT pads with zeros to the ranks of other layers, and puts all of the scale into A.
                    assert!(wanted.len() >= ours.len());
                    continue;
                }
                let most = wanted.iter().zip(&ours).map(|(x, y)| ulps(*x, *y)).max().unwrap();
                assert!(wanted.len() == ours.len() && most <= 2, "{name} {}: {most} ulps", factor.name());
            }
            if name == "cat" {
                let (out, inner) = target.out_in();
                let (a, b) = (floats(&golden, &format!("{}:A", target.tensor)), floats(&golden, &format!("{}:B", target.tensor)));
                let rank = a.len() / inner as usize;
                let ours = delta_rows(target, 0..out).unwrap();
                for (n, ours) in ours.iter().enumerate() {
                    let (i, j) = (n / inner as usize, n % inner as usize);
                    let theirs: f64 = (0..rank).map(|k| f64::from(b[i * rank + k]) * f64::from(a[k * inner as usize + j])).sum();
                    assert!((ours - theirs).abs() <= 1e-6 * theirs.abs().max(1e-3), "{name}");
                }
            }
            checked += 1;
        }
        assert_eq!(checked, 4, "{name}");
    }
    assert!(cases.len() >= 14);
}

/// What is left to chance is the same for one seed, and another for another; with nothing to drop it is the sum that PEFT makes.
#[test]
fn chance_follows_the_seed() {
    let folder = tempfile::tempdir().unwrap();
    let adapters = ["llama-qv-r8", "llama-bf16"].map(|name| open_adapter(fixture("adapters").join(name)).unwrap());
    let of = |kind: PeftKind, density: f64, seed: u64| {
        let mut options = CombineOptions::default();
        options.method = CombineMethod::Peft(PeftCombination { kind, density, majority: MajoritySign::Total, seed });
        (options.to, options.overwrite) = (ConvertTo::Container, Overwrite::Replace);
        let weighted: Vec<_> = adapters.iter().map(Weighted::full).collect();
        let out = folder.path().join("out.safetensors");
        combine(&weighted, &out, &options, &()).unwrap();
        let made = open_adapter(&out).unwrap();
        let target = &made.targets()[0];
        (floats(target.a.source().as_ref(), target.a.name()), floats(target.b.source().as_ref(), target.b.name()))
    };
    assert_eq!(of(PeftKind::DareLinear, 1.0, 0), of(PeftKind::Linear, 1.0, 0));
    assert_eq!(of(PeftKind::DareTies, 0.5, 3), of(PeftKind::DareTies, 0.5, 3));
    assert_ne!(of(PeftKind::DareTies, 0.5, 3), of(PeftKind::DareTies, 0.5, 4));
    let (a, b) = of(PeftKind::DareLinear, 0.3, 1);
    for factor in [a, b] {
        let zeros = factor.iter().filter(|x| **x == 0.0).count() as f64 / factor.len() as f64;
        assert!((zeros - 0.49).abs() < 0.1, "{zeros}");
    }
}

#[test]
fn what_peft_cannot_add_is_refused_by_name() {
    let adapters = ["llama-qv-r8", "llama-all-r4"].map(|name| open_adapter(fixture("adapters").join(name)).unwrap());
    let weighted: Vec<_> = adapters.iter().map(Weighted::full).collect();
    let mut options = CombineOptions::default();
    let folder = tempfile::tempdir().unwrap();
    options.method =
        CombineMethod::Peft(PeftCombination { kind: PeftKind::Linear, density: 1.0, majority: MajoritySign::Total, seed: 0 });
    let error = combine(&weighted, &folder.path().join("out"), &options, &()).unwrap_err();
    let diagnostic = &error.diagnostics()[0];
    assert!(diagnostic.rule().id == "A-002" && diagnostic.message().contains("q_proj"), "{diagnostic:?}");
}
