//! `merge --method` puts into the base what `combine` by that method makes, and by methods that work on single values without a rank.

mod common;

use std::path::Path;

use common::fixture;
use loratool::{
    Adapter, CombineMethod, CombineOptions, Kind, MergeOptions, Orientation, RankRule, TensorSource, Weighted, combine,
    delta_rows, merge, merge_each, merge_in_place, open_adapter, open_checkpoint,
};

fn values(source: &dyn TensorSource, name: &str) -> Vec<f64> {
    let info = source.info(name).unwrap();
    let mut raw = vec![0; info.bytes() as usize];
    source.read(name, 0, &mut raw).unwrap();
    match info.dtype.to_string().as_str() {
        "F32" => raw.as_chunks::<4>().0.iter().map(|x| f64::from(f32::from_le_bytes(*x))).collect(),
        "F64" => raw.as_chunks::<8>().0.iter().map(|x| f64::from_le_bytes(*x)).collect(),
        other => panic!("{other}"),
    }
}

const METHODS: [CombineMethod; 11] = [
    CombineMethod::Ties { density: 0.3 },
    CombineMethod::MagnitudePrune { density: 0.4 },
    CombineMethod::DareLinear { density: 0.5, seed: 3 },
    CombineMethod::DareTies { density: 0.5, seed: 3 },
    CombineMethod::Della { density: 0.5, epsilon: 0.4, seed: 3 },
    CombineMethod::Breadcrumbs { density: 0.8, outliers: 0.05 },
    CombineMethod::Slerp,
    CombineMethod::Knots { density: 0.3 },
    CombineMethod::CoreSpace { density: 0.5 },
    CombineMethod::Tsv,
    CombineMethod::IsoC,
];

fn options(method: CombineMethod) -> MergeOptions {
    let mut options = MergeOptions::default();
    options.method = method;
    options
}

/// Everything that the method changes, held against base plus combination.
fn held(base: &str, names: [&str; 2], method: CombineMethod, folder: &Path) {
    let adapters: Vec<Adapter> = names.iter().map(|name| open_adapter(fixture("adapters").join(name)).unwrap()).collect();
    let weighted = [Weighted { adapter: &adapters[0], weight: 0.8 }, Weighted { adapter: &adapters[1], weight: 0.6 }];
    let base = open_checkpoint(fixture("models").join(base)).unwrap();
    let out = folder.join(method.name());
    let report = merge(&base, &weighted, &out, &options(method), &()).unwrap();
    let merged = open_checkpoint(&out).unwrap();
    let mut whole = CombineOptions::default();
    (whole.method, whole.rank) = (method, Some(RankRule::Fixed(512)));
    let beside = folder.join(format!("{} combined", method.name()));
    combine(&weighted, &beside, &whole, &()).unwrap();
    let combination = open_adapter(&beside).unwrap();
    assert_eq!(report.tensors.len(), combination.targets().len(), "{}", method.name());
    for target in combination.targets() {
        let (rows, cols) = target.out_in();
        let delta = delta_rows(target, 0..rows).unwrap();
        let is_turned = matches!(target.kind, Kind::Linear(Orientation::InOut));
        let (before, after) = (values(&base, &target.tensor), values(&merged, &target.tensor));
        let size = delta.iter().map(|d| d * d).sum::<f64>().sqrt();
        let mut off = 0.0;
        for (n, d) in delta.iter().enumerate() {
            let (i, j) = (n / cols as usize, n % cols as usize);
            let at = if is_turned { j * rows as usize + i } else { n };
            off += (after[at] - before[at] - d).powi(2);
        }
        // The base is of f32 at the least, and the factors of the combination are too.
        assert!(off.sqrt() <= 3e-6 * size, "{} {}: {:e} of {size:e}", method.name(), target.tensor, off.sqrt());
    }
    let record = std::fs::read_to_string(out.join("loratool.merge.json")).unwrap();
    assert!(record.contains(&format!("\"{} of ", method.name())) && record.contains(&format!("0.8 × {}", names[0])), "{record}");
}

#[test]
fn the_result_is_the_base_and_the_combination() {
    let folder = tempfile::tempdir().unwrap();
    for method in METHODS {
        held("llama-tiny-f64", ["llama-qv-r8", "llama-all-r4"], method, folder.path());
    }
}

/// GPT-2 stores its weights (in, out); what is kept is decided as in the layer.
#[test]
fn weights_that_are_stored_the_other_way_round_are_treated_alike() {
    let folder = tempfile::tempdir().unwrap();
    for method in METHODS.into_iter().filter(|method| !matches!(method, CombineMethod::Della { .. })) {
        let adapter = open_adapter(fixture("adapters/gpt2-all")).unwrap();
        let half = folder.path().join("half");
        if !half.exists() {
            let mut cut = CombineOptions::default();
            cut.rank = Some(RankRule::Fixed(2));
            combine(&[Weighted::full(&adapter)], &half, &cut, &()).unwrap();
        }
        let (one, two) = (fixture("adapters/gpt2-all"), half);
        let adapters = [open_adapter(one).unwrap(), open_adapter(two).unwrap()];
        let weighted = [Weighted::full(&adapters[0]), Weighted { adapter: &adapters[1], weight: -0.4 }];
        if method == CombineMethod::Slerp {
            continue;
        }
        let base = open_checkpoint(fixture("models/gpt2-tiny")).unwrap();
        let out = folder.path().join(method.name());
        merge(&base, &weighted, &out, &options(method), &()).unwrap();
        let merged = open_checkpoint(&out).unwrap();
        let mut whole = CombineOptions::default();
        (whole.method, whole.rank) = (method, Some(RankRule::Fixed(512)));
        let beside = folder.path().join(format!("{} combined", method.name()));
        combine(&weighted, &beside, &whole, &()).unwrap();
        for target in open_adapter(&beside).unwrap().targets() {
            let name = format!("transformer.{}", target.tensor.trim_start_matches("transformer."));
            let name = if base.info(&target.tensor).is_some() { target.tensor.clone() } else { name };
            let (rows, cols) = target.out_in();
            let delta = delta_rows(target, 0..rows).unwrap();
            let (before, after) = (values(&base, &name), values(&merged, &name));
            let size = delta.iter().map(|d| d * d).sum::<f64>().sqrt();
            let largest = before.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            let off: f64 = delta
                .iter()
                .enumerate()
                .map(|(n, d)| {
                    let at = n % cols as usize * rows as usize + n / cols as usize;
                    (after[at] - before[at] - d).powi(2)
                })
                .sum();
            // One rounding of the base to f32, for each value.
            let rounding = largest * 2f64.powi(-24) * (delta.len() as f64).sqrt();
            assert!(off.sqrt() <= 3e-6 * size + rounding, "{} {name}: {:e} of {size:e}", method.name(), off.sqrt());
        }
    }
    let adapter = open_adapter(fixture("adapters/gpt2-all")).unwrap();
    let base = open_checkpoint(fixture("models/gpt2-tiny")).unwrap();
    let della = options(CombineMethod::Della { density: 0.5, epsilon: 0.2, seed: 0 });
    let error = merge(&base, &[Weighted::full(&adapter)], &folder.path().join("della"), &della, &()).unwrap_err();
    assert!(error.diagnostics()[0].rule().id == "A-010" && error.diagnostics()[0].message().contains("(in, out)"), "{error:?}");
}

/// The same bytes whatever the threads, the tiles and the order of the adapters are.
#[test]
fn bytes_do_not_depend_on_how_the_work_is_split() {
    let folder = tempfile::tempdir().unwrap();
    let adapters = ["llama-qv-r8", "llama-all-r4"].map(|name| open_adapter(fixture("adapters").join(name)).unwrap());
    let base = open_checkpoint(fixture("models/llama-tiny")).unwrap();
    for method in METHODS.into_iter().filter(|method| *method != CombineMethod::Slerp) {
        let mut seen: Vec<Vec<u8>> = Vec::new();
        for (i, (tile, threads, turned)) in [(1 << 20, 1, false), (64, 2, false), (4096, 3, true)].into_iter().enumerate() {
            let mut weighted = vec![Weighted::full(&adapters[0]), Weighted { adapter: &adapters[1], weight: 0.5 }];
            if turned {
                weighted.reverse();
            }
            let mut options = options(method);
            options.exec.tile_bytes = tile;
            options.exec.threads = std::num::NonZeroUsize::new(threads);
            let out = folder.path().join(format!("{} {i}", method.name()));
            merge(&base, &weighted, &out, &options, &()).unwrap();
            let mut files: Vec<_> = std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().path()).collect();
            files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
            files.sort();
            assert!(!files.is_empty());
            seen.push(files.iter().flat_map(|path| std::fs::read(path).unwrap()).collect());
        }
        assert!(seen[0] == seen[1] && seen[0] == seen[2], "{}", method.name());
    }
}

/// Of updates that cancel, the order of the sum is in the bits.
#[test]
fn the_order_of_adapters_changes_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str| open_adapter(fixture("adapters").join(name)).unwrap();
    let (one, two) = (open("llama-qv-r8"), open("llama-all-r4"));
    let base = open_checkpoint(fixture("models/llama-tiny-f32")).unwrap();
    let all = [(&one, 1e12), (&two, 1.0), (&one, -1e12)].map(|(adapter, weight)| Weighted { adapter, weight });
    for method in [CombineMethod::MagnitudePrune { density: 1.0 }, CombineMethod::Tsv] {
        let mut seen: Vec<Vec<f64>> = Vec::new();
        for (i, order) in [[0, 1, 2], [0, 2, 1], [2, 1, 0], [1, 0, 2]].into_iter().enumerate() {
            let mut options = options(method);
            options.allow_repeat = true;
            let out = folder.path().join(format!("{} {i}", method.name()));
            merge(&base, &order.map(|place| all[place]), &out, &options, &()).unwrap();
            seen.push(values(&open_checkpoint(&out).unwrap(), "model.layers.0.self_attn.q_proj.weight"));
        }
        assert!(seen.iter().all(|values| *values == seen[0]), "{}", method.name());
    }
}

#[test]
fn what_has_no_meaning_with_a_method_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let adapters = ["llama-qv-r8", "llama-all-r4"].map(|name| open_adapter(fixture("adapters").join(name)).unwrap());
    let weighted = [Weighted::full(&adapters[0]), Weighted::full(&adapters[1])];
    let base = open_checkpoint(fixture("models/llama-tiny")).unwrap();
    let ties = options(CombineMethod::Ties { density: 0.2 });
    assert_eq!(merge_in_place(&base, &weighted, None, &ties, &()).unwrap_err().diagnostics()[0].rule().id, "U-005");
    let out = folder.path().join("out");
    assert_eq!(merge_each(&base, &weighted, &out, &ties, &()).unwrap_err().diagnostics()[0].rule().id, "U-001");
    let bad = options(CombineMethod::Ties { density: 2.0 });
    assert_eq!(merge(&base, &weighted, &out, &bad, &()).unwrap_err().diagnostics()[0].rule().id, "U-001");
    let dora = open_adapter(fixture("kinds/dora-linear/adapter-f32")).unwrap();
    let base = open_checkpoint(fixture("kinds/dora-linear/base-f32")).unwrap();
    let error = merge(&base, &[Weighted::full(&dora)], &out, &ties, &()).unwrap_err();
    assert!(error.diagnostics()[0].rule().id == "A-010" && error.diagnostics()[0].message().contains("DoRA"), "{error:?}");
}
