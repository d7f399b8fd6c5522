//! An extracted adapter is as close to the difference of two checkpoints as its rank allows, says how close, and is what PEFT loads. Held
//! against goldens that PEFT merged, and against singular values that are known because the difference was made of them.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::fixture;
use loratool::report::ExtractReport;
use loratool::{
    Checkpoint, Dtype, ExtractOptions, MergeOptions, Method, RankRule, RestPolicy, Split, TensorSource, Weighted, extract, merge,
    open_adapter, open_checkpoint,
};
use nalgebra::{DMatrix, DVector};

const Q: &str = "model.layers.0.self_attn.q_proj.weight";

/// A matrix with known singular values: rows and columns of a discrete cosine basis, which is orthonormal.
fn with_values(rows: usize, cols: usize, values: &[f64]) -> Vec<f64> {
    let cosine = |i: usize, k: usize, n: usize| {
        let scale = if k == 0 { (1.0 / n as f64).sqrt() } else { (2.0 / n as f64).sqrt() };
        scale * (std::f64::consts::PI * (i as f64 + 0.5) * k as f64 / n as f64).cos()
    };
    let left: Vec<f64> =
        (0..rows * values.len()).map(|n| cosine(n / values.len(), n % values.len(), rows) * values[n % values.len()]).collect();
    let right: Vec<f64> = (0..values.len() * cols).map(|n| cosine(n % cols, n / cols, cols)).collect();
    let mut out = vec![0.0; rows * cols];
    for (row, left) in out.chunks_exact_mut(cols).zip(left.chunks_exact(values.len())) {
        for (l, right) in left.iter().zip(right.chunks_exact(cols)) {
            row.iter_mut().zip(right).for_each(|(x, r)| *x += l * r);
        }
    }
    out
}

/// A sum of outer products of random vectors, of about these singular values.
fn with_random(rows: usize, cols: usize, values: &[f64]) -> Vec<f64> {
    let mut out = vec![0.0; rows * cols];
    for (k, value) in values.iter().enumerate() {
        let size = value / ((rows * cols) as f64).sqrt();
        let (left, right) = (noise(rows, 100 + 2 * k as u64), noise(cols, 101 + 2 * k as u64).collect::<Vec<f64>>());
        for (row, left) in out.chunks_exact_mut(cols).zip(left) {
            row.iter_mut().zip(&right).for_each(|(x, r)| *x += size * left * r);
        }
    }
    out
}

/// A small generator, so that the weights are the same everywhere.
fn noise(n: usize, seed: u64) -> impl Iterator<Item = f64> {
    let mut state = seed;
    (0..n).map(move |_| {
        let mut sum = 0.0;
        for _ in 0..12 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            sum += (state >> 11) as f64 / (1u64 << 53) as f64;
        }
        sum - 6.0
    })
}

fn stored(values: &[f64], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v as f32).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v as f32).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// The stored bytes as values.
fn loaded(bytes: &[u8], dtype: Dtype) -> Vec<f64> {
    match dtype {
        Dtype::F32 => bytes.chunks(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect(),
        Dtype::BF16 => bytes.chunks(2).map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f64()).collect(),
        Dtype::F16 => bytes.chunks(2).map(|b| half::f16::from_le_bytes(b.try_into().unwrap()).to_f64()).collect(),
        _ => bytes.chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
    }
}

/// A safetensors file of some tensors.
fn file(path: &Path, tensors: &[(&str, &[u64], Dtype, Vec<u8>)]) {
    let views: Vec<(String, safetensors::tensor::TensorView<'_>)> = tensors
        .iter()
        .map(|(name, dims, dtype, bytes)| {
            let dims = dims.iter().map(|d| *d as usize).collect();
            ((*name).to_owned(), safetensors::tensor::TensorView::new(*dtype, dims, bytes).unwrap())
        })
        .collect();
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// A pair of checkpoints of one weight each, and the difference of what they hold.
struct Pair {
    folder: tempfile::TempDir,
    base: Checkpoint,
    tuned: Checkpoint,
    d: Vec<f64>,
    rows: usize,
    cols: usize,
}

impl Pair {
    /// `change` on top of normal values of 0.02, both rounded to `dtype`.
    fn new(rows: usize, cols: usize, change: &[f64], dtype: Dtype) -> Pair {
        Pair::named(Q, rows, cols, change, dtype)
    }

    fn named(tensor: &str, rows: usize, cols: usize, change: &[f64], dtype: Dtype) -> Pair {
        Pair::mixed(tensor, rows, cols, change, [dtype; 2])
    }

    /// The dtypes are those of the base and of the tuned checkpoint.
    fn mixed(tensor: &str, rows: usize, cols: usize, change: &[f64], dtypes: [Dtype; 2]) -> Pair {
        let base: Vec<f64> = noise(rows * cols, 5).map(|x| 0.02 * x).collect();
        let base = loaded(&stored(&base, dtypes[0]), dtypes[0]);
        let tuned: Vec<f64> = base.iter().zip(change).map(|(w, d)| w + d).collect();
        let tuned = loaded(&stored(&tuned, dtypes[1]), dtypes[1]);
        let folder = tempfile::tempdir().unwrap();
        let dims = [rows as u64, cols as u64];
        let put = |name: &str, values: &[f64], dtype: Dtype| {
            let path = folder.path().join(name);
            // With an output head of its own, an embedding is not tied to one.
            let head = stored(&vec![0.0; rows * cols], dtype);
            file(&path, &[(tensor, &dims, dtype, stored(values, dtype)), ("lm_head.weight", &dims, dtype, head)]);
            open_checkpoint(path).unwrap()
        };
        let (before, after) = (put("base.safetensors", &base, dtypes[0]), put("tuned.safetensors", &tuned, dtypes[1]));
        let d = tuned.iter().zip(&base).map(|(t, w)| t - w).collect();
        Pair { folder, base: before, tuned: after, d, rows, cols }
    }

    fn extract(&self, options: &ExtractOptions) -> (ExtractReport, PathBuf) {
        let out = self.folder.path().join("adapter");
        if out.exists() {
            fs::remove_dir_all(&out).unwrap();
        }
        (extract(Some(&self.base), &self.tuned, &out, options, &()).unwrap(), out)
    }

    /// scale·B·A of a written adapter, in f64 from its bytes.
    fn delta(&self, adapter: &Path) -> Vec<f64> {
        match open_adapter(adapter).unwrap().targets() {
            [] => vec![0.0; self.rows * self.cols],
            [target, ..] if target.kind == loratool::Kind::Embedding => {
                let delta = loratool::delta_rows(target, 0..self.cols as u64).unwrap();
                (0..delta.len()).map(|n| delta[n % self.cols * self.rows + n / self.cols]).collect()
            }
            [target, ..] => loratool::delta_rows(target, 0..self.rows as u64).unwrap(),
        }
    }

    /// ‖D - scale·B·A‖ / ‖D‖ of it.
    fn error(&self, adapter: &Path) -> f64 {
        let delta = self.delta(adapter);
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
        norm(&mut self.d.iter().zip(&delta).map(|(d, e)| d - e)) / norm(&mut self.d.iter().copied())
    }
}

fn options(rank: RankRule) -> ExtractOptions {
    let mut options = ExtractOptions::default();
    options.rank = rank;
    options
}

fn fixed(rank: u64) -> ExtractOptions {
    options(RankRule::Fixed(rank))
}

/// Options with something changed.
fn with(mut options: ExtractOptions, change: impl FnOnce(&mut ExtractOptions)) -> ExtractOptions {
    change(&mut options);
    options
}

/// Spectra of which the smallest possible error is known.
fn spectra(count: usize) -> Vec<(&'static str, Vec<f64>)> {
    let of = |f: &dyn Fn(f64) -> f64| (1..=count).map(|i| f(i as f64)).collect::<Vec<f64>>();
    vec![
        ("slow", of(&|i| 1.0 / i.sqrt())),
        ("harmonic", of(&|i| 1.0 / i)),
        ("fast", of(&|i| 0.85f64.powf(i))),
        ("steps", of(&|i| if i <= 12.0 { 1.0 } else { 0.3 })),
        ("flat", of(&|_| 1.0)),
    ]
}

#[test]
fn the_error_is_the_smallest_possible_one_and_is_stated() {
    for (rows, cols) in [(384, 256), (200, 500)] {
        for (what, values) in spectra(150) {
            let pair = Pair::new(rows, cols, &with_values(rows, cols, &values), Dtype::F64);
            for rank in [4, 16, 40] {
                let (report, out) = pair.extract(&fixed(rank));
                let square = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
                let best = (square(&values[rank as usize..]) / square(&values)).sqrt();
                let error = pair.error(&out);
                let target = &report.targets[0];
                assert!(error / best < 1.001, "{what} {rows}x{cols} rank {rank}: {error} for {best}");
                assert!((target.error / error - 1.0).abs() < 0.01, "{what}: {} stated, {error} found", target.error);
                assert!((error / best - 1.0) <= target.excess + 1e-4, "{what}: excess {} stated", target.excess);
                let left: Vec<f64> = pair.d.iter().zip(pair.delta(&out)).map(|(d, e)| d - e).collect();
                let largest = DMatrix::from_row_slice(rows, cols, &left).singular_values().max();
                assert!(target.spectral >= largest, "{what}: {} bounds {largest}", target.spectral);
                // A wholly flat spectrum has no order.
                if what != "flat" {
                    for (stated, value) in target.singular_values.iter().zip(&values) {
                        assert!((stated / value - 1.0).abs() < 0.02, "{what}: {stated} for {value}");
                    }
                }
            }
        }
    }
}

#[test]
fn the_exact_method_agrees_with_the_iteration() {
    let (_, values) = spectra(150).swap_remove(1);
    let pair = Pair::new(300, 260, &with_values(300, 260, &values), Dtype::F32);
    let exact = with(fixed(16), |o| {
        o.method = Method::Exact;
    });
    let (by_iteration, _) = pair.extract(&fixed(16));
    let (exactly, _) = pair.extract(&exact);
    assert_eq!((by_iteration.targets[0].method, exactly.targets[0].method), ("krylov", "exact"));
    assert!(by_iteration.targets[0].blocks >= 3);
    assert!((by_iteration.error / exactly.error - 1.0).abs() < 1e-3);
}

#[test]
fn the_sixteen_bit_factors_are_fitted_to_each_other() {
    let values: Vec<f64> = (1..=16).map(|i| 0.8f64.powi(i)).collect();
    let pair = Pair::new(300, 260, &with_values(300, 260, &values), Dtype::F32);
    for (dtype, unit) in [(Dtype::BF16, 2f64.powi(-8)), (Dtype::F16, 2f64.powi(-11))] {
        let (report, out) = pair.extract(&with(fixed(16), |o| {
            o.dtype = dtype;
        }));
        let error = pair.error(&out);
        // Rounding one factor is off by its rms, u/√3 at least; rounding two by √2 times that. The fit takes the first one's share away.
        assert!(error < 1.1 * unit / 3f64.sqrt(), "{dtype}: {error}");
        assert!((report.error / error - 1.0).abs() < 0.01, "{dtype}: {} stated, {error} found", report.error);
    }
}

#[test]
fn the_split_decides_where_the_singular_values_are() {
    let values: Vec<f64> = (1..=8).map(|i| 0.7f64.powi(i)).collect();
    let pair = Pair::new(150, 140, &with_values(150, 140, &values), Dtype::F32);
    for (split, of_b, of_a) in [(Split::Sqrt, 0.5, 0.5), (Split::B, 1.0, 0.0), (Split::A, 0.0, 1.0)] {
        let (_, out) = pair.extract(&with(fixed(4), |o| {
            o.split = split;
        }));
        let adapter = open_adapter(&out).unwrap();
        let target = &adapter.targets()[0];
        let read = |factor: &loratool::Factor| {
            let mut raw = vec![0; factor.info().bytes() as usize];
            factor.read(0, &mut raw).unwrap();
            loaded(&raw, Dtype::F32)
        };
        let (a, b) = (read(&target.a), read(&target.b));
        for k in 0..4 {
            let b = b.chunks(4).map(|row| row[k] * row[k]).sum::<f64>().sqrt();
            let a = a[k * 140..(k + 1) * 140].iter().map(|x| x * x).sum::<f64>().sqrt();
            assert!(
                (b / values[k].powf(of_b) - 1.0).abs() < 1e-4 && (a / values[k].powf(of_a) - 1.0).abs() < 1e-4,
                "{split:?} {k}"
            );
        }
    }
}

#[test]
fn the_rank_follows_the_rule() {
    let values: Vec<f64> = (1..=60).map(|i| 0.8f64.powi(i)).collect();
    let pair = Pair::new(300, 260, &with_values(300, 260, &values), Dtype::F32);
    let square = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
    let energy = |share: f64| (1..=60).find(|r| square(&values[..*r]) >= share * square(&values)).unwrap() as u64;
    for share in [0.5, 0.9, 0.999] {
        assert_eq!(pair.extract(&options(RankRule::Energy(share))).0.targets[0].rank, energy(share), "energy {share}");
        let error = (1.0 - share).sqrt();
        let (report, out) = pair.extract(&options(RankRule::Error(error)));
        assert_eq!(report.targets[0].rank, energy(share), "error {error}");
        assert!(pair.error(&out) <= error * 1.001);
    }
    let (report, _) = pair.extract(&options(RankRule::Parameters(560 * 5 + 100)));
    assert_eq!((report.targets[0].rank, report.parameters), (5, 560 * 5));
    let (report, _) = pair.extract(&options(RankRule::Bytes(4 * 560 * 3)));
    assert_eq!(report.targets[0].rank, 3);
    let (report, _) = pair.extract(&with(options(RankRule::Energy(0.999)), |o| {
        o.max_rank = 7;
    }));
    assert_eq!(report.targets[0].rank, 7);
}

/// A base in one dtype and a tuned checkpoint in another: what is decomposed is the difference of the stored values, rounding and all.
#[test]
fn the_dtypes_of_a_pair_may_differ() {
    let (rows, cols) = (180, 140);
    let values: Vec<f64> = (1..=60).map(|i| 0.8f64.powi(i)).collect();
    let change = with_values(rows, cols, &values);
    for dtypes in [
        [Dtype::BF16, Dtype::F32],
        [Dtype::F32, Dtype::BF16],
        [Dtype::F16, Dtype::BF16],
        [Dtype::F64, Dtype::F16],
        [Dtype::BF16, Dtype::F64],
    ] {
        let pair = Pair::mixed(Q, rows, cols, &change, dtypes);
        let (report, out) = pair.extract(&fixed(8));
        let values = DMatrix::from_row_slice(rows, cols, &pair.d).singular_values();
        let best = (values.iter().skip(8).map(|v| v * v).sum::<f64>() / values.norm_squared()).sqrt();
        let error = pair.error(&out);
        assert!(error / best < 1.001, "{dtypes:?}: {error} for {best}");
        assert!((report.error / error - 1.0).abs() < 1e-3, "{dtypes:?}: {} stated, {error} found", report.error);
    }
}

/// A budget goes where a value of a factor buys most, over targets of different shapes and sizes.
#[test]
fn a_budget_is_divided_over_all_targets() {
    let shapes = [(60usize, 40usize, 1.0), (40, 40, 0.5), (120, 40, 1.2)];
    let folder = tempfile::tempdir().unwrap();
    let name = |i: usize| format!("model.layers.{i}.self_attn.q_proj.weight");
    let (mut base, mut tuned, mut gains) = (Vec::new(), Vec::new(), Vec::new());
    for (i, (rows, cols, size)) in shapes.into_iter().enumerate() {
        let values: Vec<f64> = (1..=20).map(|k| size * (0.7 + 0.07 * i as f64).powi(k)).collect();
        gains.extend(values.iter().map(|v| (v * v / (rows + cols) as f64, i)));
        let dims = [rows as u64, cols as u64];
        base.push((name(i), dims, stored(&vec![0.0; rows * cols], Dtype::F64)));
        tuned.push((name(i), dims, stored(&with_values(rows, cols, &values), Dtype::F64)));
    }
    for (side, tensors) in [("base.safetensors", base), ("tuned.safetensors", tuned)] {
        let views: Vec<(&str, &[u64], Dtype, Vec<u8>)> =
            tensors.iter().map(|(name, dims, bytes)| (name.as_str(), &dims[..], Dtype::F64, bytes.clone())).collect();
        file(&folder.path().join(side), &views);
    }
    let open = |side: &str| open_checkpoint(folder.path().join(side)).unwrap();
    gains.sort_by(|x, y| y.0.total_cmp(&x.0));
    for count in [1, 4, 11, 25] {
        let mut ranks = [0; 3];
        gains[..count].iter().for_each(|(_, i)| ranks[*i] += 1);
        let budget = (0..3).map(|i| ranks[i] * (shapes[i].0 + shapes[i].1) as u64).sum();
        let out = folder.path().join(format!("adapter-{count}"));
        let options = options(RankRule::Parameters(budget));
        let report = extract(Some(&open("base.safetensors")), &open("tuned.safetensors"), &out, &options, &()).unwrap();
        let found = |i: usize| report.targets.iter().find(|target| target.tensor == name(i)).map_or(0, |target| target.rank);
        assert_eq!(([found(0), found(1), found(2)], report.parameters), (ranks, budget), "{count} components");
    }
}

/// A rank beyond what is there: what is there, and a warning (catalogue row A27).
#[test]
fn a_rank_that_is_too_high_is_what_there_is() {
    let values: Vec<f64> = (1..=6).map(|i| 0.7f64.powi(i)).collect();
    let pair = Pair::new(260, 240, &with_values(260, 240, &values), Dtype::F32);
    let (report, out) = pair.extract(&fixed(1000));
    // The rest is the rounding of the sum to f32, which is of full rank, and below what f32 sums resolve.
    assert!((6..240).contains(&report.targets[0].rank) && pair.error(&out) < 1e-5, "{:?}", report.targets[0].rank);
    assert!(report.warnings.iter().any(|note| note.rule == "A-003"), "{:?}", report.warnings);
}

/// The noise of bf16 is known from the file (planted ranks of `frontier` 1.3).
#[test]
fn the_rank_that_was_planted_is_found_in_bf16() {
    let (rows, cols) = (768, 1024);
    let w = 0.02 * ((rows * cols) as f64).sqrt();
    for rank in [4usize, 16] {
        let values: Vec<f64> = (0..rank).map(|i| (-(i as f64) / 4.0).exp()).collect();
        let norm = values.iter().map(|v| v * v).sum::<f64>().sqrt();
        for rho in [0.01, 0.03] {
            let scaled: Vec<f64> = values.iter().map(|v| v * rho * w / norm).collect();
            let pair = Pair::new(rows, cols, &with_random(rows, cols, &scaled), Dtype::BF16);
            let (report, _) = pair.extract(&options(RankRule::Auto));
            let found = report.targets[0].rank as i64;
            assert!((found - rank as i64).abs() <= 1, "rho {rho}: {found} for {rank}");
        }
        let lost: Vec<f64> = values.iter().map(|v| v * 3e-4 * w / norm).collect();
        let pair = Pair::new(rows, cols, &with_random(rows, cols, &lost), Dtype::BF16);
        let out = pair.folder.path().join("adapter");
        let error = extract(Some(&pair.base), &pair.tuned, &out, &options(RankRule::Auto), &()).unwrap_err();
        assert_eq!((error.diagnostics()[0].rule().id, error.class().exit_code()), ("U-008", 1));
        assert!(error.to_string().contains("unrecoverable"), "{error}");
    }
}

/// In F16, whose steps are eight times as fine, and in an embedding, whose factors lie the other way round.
#[test]
fn the_rank_that_was_planted_is_found_in_f16_and_in_an_embedding() {
    let (rows, cols) = (768, 512);
    let w = 0.02 * ((rows * cols) as f64).sqrt();
    let values: Vec<f64> = (0..8).map(|i| (-f64::from(i) / 4.0).exp()).collect();
    let norm = values.iter().map(|v| v * v).sum::<f64>().sqrt();
    let change = |rho: f64| with_random(rows, cols, &values.iter().map(|v| v * rho * w / norm).collect::<Vec<f64>>());
    for (tensor, dtype, finer) in
        [(Q, Dtype::F16, 8.0), ("model.embed_tokens.weight", Dtype::BF16, 1.0), ("model.embed_tokens.weight", Dtype::F16, 8.0)]
    {
        let pair = Pair::named(tensor, rows, cols, &change(0.02 / finer), dtype);
        let found = pair.extract(&options(RankRule::Auto)).0.targets[0].rank;
        assert!((7..=9).contains(&found), "{tensor} in {dtype}: {found}");
        let pair = Pair::named(tensor, rows, cols, &change(3e-4 / finer), dtype);
        let out = pair.folder.path().join("adapter");
        let error = extract(Some(&pair.base), &pair.tuned, &out, &options(RankRule::Auto), &()).unwrap_err();
        assert_eq!(error.diagnostics()[0].rule().id, "U-008", "{tensor} in {dtype}: {error}");
    }
}

/// What PEFT merged gives the adapter back, target by target.
#[test]
fn what_peft_merged_is_extracted_to_rounding() {
    for (golden, base, adapter) in [
        ("llama-qv-r8--llama-tiny-f32", "llama-tiny-f32", "llama-qv-r8"),
        ("llama-all-r4--llama-tiny-f32", "llama-tiny-f32", "llama-all-r4"),
        ("llama-patterns--llama-tiny-f32", "llama-tiny-f32", "llama-patterns"),
    ] {
        let base = open_checkpoint(fixture("models").join(base)).unwrap();
        let tuned = open_checkpoint(fixture("goldens").join(golden).join("peft.safetensors")).unwrap();
        let original = open_adapter(fixture("adapters").join(adapter)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("adapter");
        let report = extract(Some(&base), &tuned, &out, &fixed(12), &()).unwrap();
        let again = open_adapter(&out).unwrap();
        assert_eq!(again.targets().len(), original.targets().len(), "{golden}");
        for (before, after) in original.targets().iter().zip(again.targets()) {
            assert_eq!(before.tensor, after.tensor);
            let rows = before.out_in().0;
            let delta = |target| loratool::delta_rows(target, 0..rows).unwrap();
            let (before, after) = (delta(before), delta(after));
            // Half a unit of f32 of weights of up to 0.2 is the rounding of PEFT's merge.
            let far = before.iter().zip(&after).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
            assert!(far < 4e-8, "{golden}: {far:e}");
        }
        assert!(report.error < 1e-4 && report.targets.iter().all(|target| target.rank <= 12));
    }
}

/// extract, then merge: as close to the tuned weights as the stated error says.
#[test]
fn merging_what_was_extracted_comes_as_close_as_it_says() {
    let values: Vec<f64> = (1..=100).map(|i| 1.0 / f64::from(i)).collect();
    let pair = Pair::new(300, 260, &with_values(300, 260, &values), Dtype::F32);
    let (report, out) = pair.extract(&fixed(16));
    let adapter = open_adapter(&out).unwrap();
    let merged = pair.folder.path().join("merged.safetensors");
    merge(&pair.base, &[Weighted::full(&adapter)], &merged, &MergeOptions::default(), &()).unwrap();
    let merged = open_checkpoint(merged).unwrap();
    let read = |checkpoint: &Checkpoint| {
        let mut raw = vec![0; 300 * 260 * 4];
        checkpoint.read(Q, 0, &mut raw).unwrap();
        loaded(&raw, Dtype::F32)
    };
    let far: f64 = read(&merged).iter().zip(read(&pair.tuned)).map(|(m, t)| (m - t).powi(2)).sum::<f64>().sqrt();
    assert!((far / (report.error * report.change) - 1.0).abs() < 1e-3, "{far}");
}

#[test]
fn threads_change_no_byte_and_a_seed_may() {
    let values: Vec<f64> = (1..=100).map(|i| 1.0 / f64::from(i)).collect();
    let pair = Pair::new(500, 260, &with_values(500, 260, &values), Dtype::F32);
    let bytes = |threads: usize, seed: u64| {
        let mut options = fixed(8);
        options.exec.threads = std::num::NonZeroUsize::new(threads);
        options.seed = seed;
        let (_, out) = pair.extract(&options);
        fs::read(out.join("adapter_model.safetensors")).unwrap()
    };
    let one = bytes(1, 0);
    assert!(one == bytes(3, 0) && one == bytes(8, 0));
    assert!(one != bytes(1, 1));
}

/// A model of several kinds of tensor, of which some change.
struct Model {
    folder: tempfile::TempDir,
}

impl Model {
    fn new(change: impl Fn(&str, &mut Vec<f64>)) -> Model {
        let folder = tempfile::tempdir().unwrap();
        let tensors: [(&str, &[u64]); 8] = [
            ("model.embed_tokens.weight", &[40, 16]),
            ("model.layers.0.self_attn.q_proj.weight", &[16, 16]),
            ("model.layers.0.self_attn.q_proj.bias", &[16]),
            ("model.layers.0.conv.weight", &[6, 16, 3]),
            ("model.layers.0.mlp.experts.gate_up_proj", &[3, 20, 16]),
            ("model.layers.0.input_layernorm.weight", &[16]),
            ("model.norm.weight", &[16]),
            ("lm_head.weight", &[40, 16]),
        ];
        for side in ["base", "tuned"] {
            let made: Vec<(&str, &[u64], Dtype, Vec<u8>)> = tensors
                .iter()
                .enumerate()
                .map(|(i, (name, dims))| {
                    let mut values: Vec<f64> = noise(dims.iter().product::<u64>() as usize, i as u64).map(|x| 0.1 * x).collect();
                    if side == "tuned" {
                        change(name, &mut values);
                    }
                    (*name, *dims, Dtype::F32, stored(&values, Dtype::F32))
                })
                .collect();
            fs::create_dir(folder.path().join(side)).unwrap();
            file(&folder.path().join(side).join("model.safetensors"), &made);
            let config = r#"{"model_type": "llama", "hidden_size": 16, "tie_word_embeddings": false}"#;
            fs::write(folder.path().join(side).join("config.json"), config).unwrap();
        }
        Model { folder }
    }

    fn open(&self, side: &str) -> Checkpoint {
        open_checkpoint(self.folder.path().join(side)).unwrap()
    }

    fn extract(&self, options: &ExtractOptions) -> loratool::Result<ExtractReport> {
        let out = self.folder.path().join("adapter");
        if out.exists() {
            fs::remove_dir_all(&out).unwrap();
        }
        extract(Some(&self.open("base")), &self.open("tuned"), &out, options, &())
    }
}

/// Adds a change of rank one, with the matrix taken as rows of so many values.
fn rank_one(values: &mut [f64], cols: usize, size: f64) {
    for (n, value) in values.iter_mut().enumerate() {
        *value += size * ((n / cols) as f64 * 0.7 + 0.5).sin() * ((n % cols) as f64 * 1.3).cos();
    }
}

#[test]
fn every_kind_of_layer_is_extracted_and_merges_back() {
    let model = Model::new(|name, values| match name {
        "model.embed_tokens.weight" | "model.layers.0.self_attn.q_proj.weight" | "lm_head.weight" => rank_one(values, 16, 0.1),
        "model.layers.0.conv.weight" => rank_one(values, 48, 0.1),
        // The second of three experts stays as it is.
        "model.layers.0.mlp.experts.gate_up_proj" => {
            rank_one(&mut values[..320], 16, 0.1);
            rank_one(&mut values[640..], 16, 0.2);
        }
        _ => {}
    });
    let mut options = fixed(2);
    options.to = loratool::ConvertTo::Container;
    options.targets = Some("weight|experts".to_owned());
    let out = model.folder.path().join("adapter.safetensors");
    let (base, tuned) = (model.open("base"), model.open("tuned"));
    let report = extract(Some(&base), &tuned, &out, &options, &()).unwrap();
    let names: Vec<&str> = report.targets.iter().map(|target| target.tensor.as_str()).collect();
    assert_eq!(
        names,
        [
            "lm_head.weight",
            "model.embed_tokens.weight",
            "model.layers.0.conv.weight",
            "model.layers.0.mlp.experts.gate_up_proj",
            "model.layers.0.self_attn.q_proj.weight",
        ]
    );
    assert_eq!(report.unchanged, 3);
    let merged = model.folder.path().join("merged");
    let adapter = open_adapter(&out).unwrap();
    merge(&base, &[Weighted::full(&adapter)], &merged, &MergeOptions::default(), &()).unwrap();
    let merged = open_checkpoint(merged).unwrap();
    for name in tuned.names() {
        let read = |checkpoint: &Checkpoint| {
            let mut raw = vec![0; checkpoint.info(name).unwrap().bytes() as usize];
            checkpoint.read(name, 0, &mut raw).unwrap();
            loaded(&raw, Dtype::F32)
        };
        let far = read(&merged).iter().zip(read(&tuned)).map(|(m, t)| (m - t).abs()).fold(0.0, f64::max);
        assert!(far < 1e-6, "{name}: {far:e}");
    }
}

#[test]
fn what_has_no_factors_is_listed_and_refused_or_stored_or_left_out_as_asked() {
    let change = |size: f64| {
        Model::new(move |name, values| match name {
            "model.layers.0.self_attn.q_proj.weight" => rank_one(values, 16, 0.1),
            "model.norm.weight" | "model.layers.0.self_attn.q_proj.bias" => rank_one(values, 16, size),
            _ => {}
        })
    };
    // A little is left out, and said.
    let report = change(0.005).extract(&fixed(4)).unwrap();
    assert_eq!((report.targets.len(), report.rest.len()), (1, 2));
    assert!(report.rest.iter().all(|one| !one.stored && one.share.unwrap() < 0.01));
    assert!(report.lost > 0.0 && report.lost < 0.01);
    // Much is not.
    let model = change(0.2);
    let error = model.extract(&fixed(4)).unwrap_err();
    assert_eq!((error.diagnostics()[0].rule().id, error.class().exit_code()), ("U-009", 4));
    assert!(error.to_string().contains("model.norm.weight"), "{error}");
    assert!(!model.folder.path().join("adapter").exists());
    let report = model
        .extract(&with(fixed(4), |o| {
            o.rest = RestPolicy::Skip;
        }))
        .unwrap();
    assert!(report.lost > 0.01 && report.rest.iter().all(|one| !one.stored));
    let report = model
        .extract(&with(fixed(4), |o| {
            o.rest = RestPolicy::Store;
        }))
        .unwrap();
    assert!(report.rest.iter().all(|one| one.stored) && report.lost < 1e-9);
    let adapter = open_adapter(model.folder.path().join("adapter")).unwrap();
    assert_eq!(adapter.replacements().len(), 2);
    assert!(
        change(0.005)
            .extract(&with(fixed(4), |o| {
                o.rest = RestPolicy::Refuse;
            }))
            .is_err()
    );
}

#[test]
fn an_output_head_is_left_alone_unless_it_is_named() {
    let model = Model::new(|name, values| match name {
        "model.layers.0.self_attn.q_proj.weight" | "lm_head.weight" => rank_one(values, 16, 0.1),
        _ => {}
    });
    let report = model
        .extract(&with(fixed(2), |o| {
            o.rest = RestPolicy::Skip;
        }))
        .unwrap();
    assert_eq!((report.targets.len(), report.rest[0].why), (1, "output head"));
    let report = model
        .extract(&with(fixed(2), |o| {
            o.targets = Some("q_proj|lm_head".into());
        }))
        .unwrap();
    assert_eq!(report.targets.len(), 2);
    let report = model
        .extract(&with(fixed(2), |o| {
            o.exclude = Some("head".into());
        }))
        .unwrap();
    assert_eq!((report.targets.len(), report.rest[0].why), (1, "excluded"));
}

/// Catalogue row A27: two equal checkpoints, a NaN, other tensors.
#[test]
fn checkpoints_that_make_no_pair_are_named() {
    let same = Model::new(|_, _| {});
    let error = same.extract(&fixed(4)).unwrap_err();
    assert_eq!((error.diagnostics()[0].rule().id, error.class().exit_code()), ("U-008", 1));

    let broken = Model::new(|name, values| {
        if name.ends_with("q_proj.weight") {
            values[37] = f64::NAN;
        }
    });
    let error = broken.extract(&fixed(4)).unwrap_err();
    assert_eq!((error.diagnostics()[0].rule().id, error.class().exit_code()), ("A-030", 5));
    assert!(error.to_string().contains("[2, 5]"), "{error}");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.safetensors");
    file(&path, &[("other.weight", &[4, 4], Dtype::F32, vec![0; 64])]);
    let other = open_checkpoint(&path).unwrap();
    let error = extract(Some(&same.open("base")), &other, &folder.path().join("out"), &fixed(4), &()).unwrap_err();
    assert_eq!((error.diagnostics()[0].rule().id, error.class().exit_code()), ("A-020", 4));

    // Some more there, some less here: said, and the rest is extracted.
    let model = Model::new(|name, values| {
        if name.ends_with("q_proj.weight") {
            rank_one(values, 16, 0.1);
        }
    });
    let mut raw = vec![0; 16 * 16 * 4];
    model.open("tuned").read(Q, 0, &mut raw).unwrap();
    let path = model.folder.path().join("part.safetensors");
    file(&path, &[(Q, &[16, 16], Dtype::F32, raw), ("score.weight", &[2, 16], Dtype::F32, vec![0; 128])]);
    let part = open_checkpoint(&path).unwrap();
    let run = |rest| {
        let options = with(fixed(2), |o| {
            o.rest = rest;
            o.overwrite = loratool::Overwrite::Replace;
        });
        extract(Some(&model.open("base")), &part, &folder.path().join("part"), &options, &())
    };
    assert!(run(RestPolicy::SkipSmall).unwrap_err().to_string().contains("score.weight"));
    let report = run(RestPolicy::Store).unwrap();
    assert_eq!((report.targets.len(), report.only_in_base.len(), report.rest[0].why), (1, 7, "not in the base"));
    assert!(report.warnings.iter().any(|note| note.message.contains("lm_head.weight")));
}

/// Without a base the weights themselves are factorised, and the error says what that costs.
#[test]
fn weights_themselves_are_factorised_without_a_base() {
    let values: Vec<f64> = (1..=60).map(|i| 0.9f64.powi(i)).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    file(&path, &[(Q, &[200, 150], Dtype::F32, stored(&with_values(200, 150, &values), Dtype::F32))]);
    let model = open_checkpoint(&path).unwrap();
    let report = extract(None, &model, &folder.path().join("out"), &fixed(10), &()).unwrap();
    let square = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
    let best = (square(&values[10..]) / square(&values)).sqrt();
    assert!((report.error / best - 1.0).abs() < 1e-3 && report.base.is_none() && report.targets[0].relative.is_none());
}

/// Names may differ by a prefix that is known, as those of a body and of a model with a head do.
#[test]
fn a_prefix_of_one_side_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let mut values: Vec<f64> = noise(400, 1).collect();
    let put = |name: &str, tensor: &str, values: &[f64]| {
        let path = folder.path().join(name);
        file(&path, &[(tensor, &[20, 20], Dtype::F32, stored(values, Dtype::F32))]);
        open_checkpoint(path).unwrap()
    };
    let base = put("base.safetensors", "bert.encoder.layer.0.output.dense.weight", &values);
    rank_one(&mut values, 20, 0.1);
    let tuned = put("tuned.safetensors", "encoder.layer.0.output.dense.weight", &values);
    let report = extract(Some(&base), &tuned, &folder.path().join("out"), &fixed(2), &()).unwrap();
    assert_eq!(report.targets[0].tensor, "bert.encoder.layer.0.output.dense.weight");
    assert_eq!(report.renamed, Some((String::new(), "bert.".to_owned())));
}

/// With statistics of the inputs the error of the outputs is the smallest there is: held against all singular values of D·F by nalgebra.
#[test]
fn what_the_inputs_are_like_decides_what_is_kept() {
    let values: Vec<f64> = (1..=80).map(|i| 1.0 / f64::from(i)).collect();
    // The inputs of an embedding are the rows of what is stored.
    for (tensor, rows, cols, inputs) in [(Q, 200, 160, 160), ("model.embed_tokens.weight", 160, 200, 160)] {
        let pair = Pair::named(tensor, rows, cols, &with_random(rows, cols, &values), Dtype::F32);
        let d = DMatrix::from_row_slice(rows, cols, &pair.d);
        let rms: Vec<f64> = (0..inputs).map(|j| if j % 3 == 0 { 3.0 } else { 0.2 }).collect();
        let some: Vec<f64> = noise(inputs * inputs, 8).enumerate().map(|(n, x)| x * 0.97f64.powi((n % inputs) as i32)).collect();
        let few: Vec<f64> = noise(inputs * 40, 9).collect();
        let (size, named) = (inputs as u64, || Some(tensor.to_owned()));
        let kinds = [
            ("root mean squares", vec![size], &rms, DMatrix::from_diagonal(&DVector::from_column_slice(&rms))),
            ("a covariance", vec![size, size], &some, DMatrix::from_row_slice(inputs, inputs, &some)),
            ("40 samples", vec![size, 40], &few, DMatrix::from_row_slice(inputs, 40, &few)),
        ];
        for (what, dims, stated, f) in kinds {
            let mut memory = loratool::MemorySource::new();
            let info = loratool::TensorInfo { dtype: Dtype::F64, shape: loratool::Shape::new(dims).unwrap() };
            memory.insert(tensor, info, stored(stated, Dtype::F64)).unwrap();
            let stats = loratool::ActStats::new(std::sync::Arc::new(memory));
            let seen = |d: &DMatrix<f64>| if tensor == Q { d * &f } else { f.transpose() * d };
            let mut best: Vec<f64> = seen(&d).singular_values().iter().map(|value| value * value).collect();
            best.sort_by(|x, y| y.total_cmp(x));
            let whole: f64 = best.iter().sum();
            for (rank, dtype, split) in [(4, Dtype::F32, Split::Sqrt), (16, Dtype::F32, Split::A), (16, Dtype::BF16, Split::B)] {
                let (report, out) = pair.extract(&with(fixed(rank), |o| {
                    (o.act_stats, o.targets) = (Some(stats.clone()), named());
                    (o.dtype, o.split) = (dtype, split);
                }));
                let (target, what) = (&report.targets[0], format!("{tensor}, {what}, rank {rank}, {dtype}"));
                let left = &d - DMatrix::from_row_slice(rows, cols, &pair.delta(&out));
                let error = (seen(&left).norm_squared() / whole).sqrt();
                let least = (best[rank as usize..].iter().sum::<f64>() / whole).sqrt();
                let rounding = if dtype == Dtype::F32 { 1e-3 } else { 1e-2 };
                assert!((error / least - 1.0).abs() < rounding, "{what}: {error} for {least}");
                assert!((target.weighted_error.unwrap() / error - 1.0).abs() < 1e-3, "{what}: {target:?} for {error}");
                assert!((pair.error(&out) / target.error - 1.0).abs() < 1e-3, "{what}");
                assert!(open_adapter(&out).unwrap().targets()[0].singular_values.is_none(), "{what}");
                let plain = pair.extract(&with(fixed(rank), |o| o.targets = named())).0;
                assert!(plain.targets[0].error < target.error && plain.targets[0].weighted_error.is_none(), "{what}");
            }
            // A budget is divided by what the outputs lose.
            let spent = (rows + cols) as u64 * 5;
            let (report, _) = pair.extract(&with(options(RankRule::Parameters(spent)), |o| {
                (o.act_stats, o.targets) = (Some(stats.clone()), named())
            }));
            assert_eq!(report.targets[0].rank, 5, "{tensor}, {what}");
        }
    }
}

/// The singular values are in the file, so that a smaller rank is a prefix.
#[test]
fn a_smaller_rank_of_an_extracted_adapter_is_a_prefix() {
    let values: Vec<f64> = (1..=80).map(|i| 1.0 / f64::from(i)).collect();
    let pair = Pair::new(200, 160, &with_values(200, 160, &values), Dtype::F32);
    for dtype in [Dtype::F32, Dtype::BF16] {
        let (report, out) = pair.extract(&with(fixed(16), |o| o.dtype = dtype));
        let adapter = open_adapter(&out).unwrap();
        assert_eq!(adapter.targets()[0].singular_values.as_ref(), Some(&report.targets[0].singular_values));
        let small = pair.folder.path().join("small");
        if small.exists() {
            fs::remove_dir_all(&small).unwrap();
        }
        let mut options = loratool::ResizeOptions::default();
        options.rank = RankRule::Fixed(5);
        loratool::resize(&adapter, &small, &options, &()).unwrap();
        let cut = open_adapter(&small).unwrap();
        let (whole, cut) = (&adapter.targets()[0], &cut.targets()[0]);
        let read = |factor: &loratool::Factor| {
            let mut raw = vec![0; factor.info().bytes() as usize];
            factor.read(0, &mut raw).unwrap();
            raw
        };
        let a = read(&cut.a);
        assert!(read(&whole.a).starts_with(&a) && cut.scaling.rank == 5 && cut.singular_values.as_ref().unwrap().len() == 5);
        let size = a.len() / 160 / 5;
        let (b, small_b) = (read(&whole.b), read(&cut.b));
        assert!(b.chunks(16 * size).zip(small_b.chunks(5 * size)).all(|(row, cut)| row.starts_with(cut)));
        assert!((pair.error(&small) / pair.extract(&fixed(5)).0.error - 1.0).abs() < 0.01);
    }
}

/// Of a component that two blocks ago was none nothing is known: it does not count as converged.
#[test]
fn a_rank_above_the_width_of_a_block_is_not_taken_for_converged() {
    let values: Vec<f64> =
        (0..300).map(|i| if i < 140 { 1.0 + 1e-3 * f64::from(i) } else { 0.8 - 1e-3 * f64::from(i) }).collect();
    let mut falling = values;
    falling.sort_by(|x, y| y.total_cmp(x));
    let pair = Pair::new(400, 320, &with_values(400, 320, &falling), Dtype::F32);
    for rank in [100, 128] {
        let (report, out) = pair.extract(&fixed(rank));
        let square = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
        let best = (square(&falling[rank as usize..]) / square(&falling)).sqrt();
        let (excess, target) = (pair.error(&out) / best - 1.0, &report.targets[0]);
        assert!(
            excess < 1e-3 && excess <= target.excess + 1e-4,
            "{rank}: {excess}, {} stated by {}",
            target.excess,
            target.method
        );
    }
}

#[test]
fn a_promise_that_is_not_kept_is_told() {
    let values: Vec<f64> = (1..=80).map(|i| 1.0 / f64::from(i).sqrt()).collect();
    let pair = Pair::new(200, 160, &with_values(200, 160, &values), Dtype::F32);
    let (report, _) = pair.extract(&with(options(RankRule::Error(0.1)), |o| o.max_rank = 8));
    assert!(
        report.targets[0].rank == 8 && report.warnings.iter().any(|w| w.message.contains("more than 0.1 is lost")),
        "{report:?}"
    );
    let (report, _) = pair.extract(&with(options(RankRule::Error(1e-4)), |o| o.dtype = Dtype::BF16));
    assert!(report.warnings.iter().any(|w| w.message.contains("rounding of the factors")), "{report:?}");
    let (report, _) = pair.extract(&options(RankRule::Error(0.1)));
    assert!(report.warnings.is_empty(), "{report:?}");
    // A budget with a low highest rank.
    let (report, _) = pair.extract(&with(options(RankRule::Parameters(u64::MAX)), |o| o.max_rank = 8));
    assert_eq!(report.targets[0].rank, 8);
}

/// Rows of tokens that were not seen, and weights that were pruned, are not destroyed by rounding.
#[test]
fn what_was_not_tuned_is_not_taken_for_destroyed() {
    let (rows, cols) = (400, 256);
    let mut change = with_random(rows, cols, &[0.2, 0.15, 0.1, 0.08]);
    change[rows / 10 * cols..].fill(0.0);
    let pair = Pair::new(rows, cols, &change, Dtype::BF16);
    let (report, _) = pair.extract(&options(RankRule::Auto));
    assert!(report.omitted.is_empty() && (3..=5).contains(&report.targets[0].rank), "{report:?}");
}

/// A part of a stack keeps its own rank, and what did not change says nothing of noise.
#[test]
fn noise_of_one_expert_is_not_kept_for_another() {
    let (rows, cols) = (160, 128);
    let name = "model.layers.0.mlp.experts.gate_up_proj";
    let folder = tempfile::tempdir().unwrap();
    let base: Vec<f64> = noise(3 * rows * cols, 5).map(|x| 0.02 * x).collect();
    let base = loaded(&stored(&base, Dtype::BF16), Dtype::BF16);
    let mut tuned = base.clone();
    for (part, values) in [(0, &[0.3, 0.2][..]), (2, &[0.3, 0.25, 0.2, 0.15, 0.12])] {
        let change = with_random(rows, cols, values);
        tuned[part * rows * cols..].iter_mut().zip(change).for_each(|(w, d)| *w += d);
    }
    let dims = [3, rows as u64, cols as u64];
    for (side, values) in [("base.safetensors", &base), ("tuned.safetensors", &tuned)] {
        file(&folder.path().join(side), &[(name, &dims, Dtype::BF16, stored(values, Dtype::BF16))]);
    }
    let open = |side: &str| open_checkpoint(folder.path().join(side)).unwrap();
    let mut options = options(RankRule::Auto);
    options.to = loratool::ConvertTo::Container;
    let out = folder.path().join("adapter.safetensors");
    let report = extract(Some(&open("base.safetensors")), &open("tuned.safetensors"), &out, &options, &()).unwrap();
    let target = &report.targets[0];
    assert!(target.rank == 5 && target.noise.unwrap() > 0.0, "{report:?}");
    let adapter = open_adapter(&out).unwrap();
    let a = &adapter.targets()[0].a;
    let mut raw = vec![0; a.info().bytes() as usize];
    a.read(0, &mut raw).unwrap();
    let a = loaded(&raw, Dtype::F32);
    let live = |part: usize| a.chunks(a.len() / 15).skip(5 * part).take(5).filter(|row| row.iter().any(|x| *x != 0.0)).count();
    assert_eq!([live(0), live(1), live(2)], [2, 0, 5]);
}

#[test]
fn statistics_of_no_layer_are_refused_and_of_some_are_told() {
    let pair = Pair::new(64, 48, &with_values(64, 48, &[1.0, 0.5]), Dtype::F32);
    let stats = |name: &str| {
        let mut memory = loratool::MemorySource::new();
        let info = loratool::TensorInfo { dtype: Dtype::F64, shape: loratool::Shape::new(vec![48]).unwrap() };
        memory.insert("other", info.clone(), stored(&[1.0; 48], Dtype::F64)).unwrap();
        memory.insert(name, info, stored(&[1.0; 48], Dtype::F64)).unwrap();
        loratool::ActStats::new(std::sync::Arc::new(memory))
    };
    let with_stats = |name: &str| with(fixed(2), |o| o.act_stats = Some(stats(name)));
    let (report, _) = pair.extract(&with_stats(Q));
    assert!(report.warnings.iter().any(|w| w.message.contains("\"other\"")), "{report:?}");
    let out = pair.folder.path().join("none");
    let error = extract(Some(&pair.base), &pair.tuned, &out, &with_stats("layers.0.q"), &()).unwrap_err();
    assert_eq!(error.diagnostics()[0].rule().id, "A-020");
}

/// Tensors that are the same, of any values and of none, and tensors that are left out by name, stop nothing.
#[test]
fn odd_tensors_that_nobody_extracts_stop_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let odd = [f64::NEG_INFINITY, f64::NAN, 0.0, 1.0];
    for side in ["base", "tuned"] {
        let mut q: Vec<f64> = noise(64, 1).collect();
        let mut k = q.clone();
        if side == "tuned" {
            rank_one(&mut q, 8, 0.5);
            k[7] = f64::NAN;
        }
        let tensors: [(&str, &[u64], Dtype, Vec<u8>); 5] = [
            (Q, &[8, 8], Dtype::F32, stored(&q, Dtype::F32)),
            ("model.layers.0.self_attn.k_proj.weight", &[8, 8], Dtype::F32, stored(&k, Dtype::F32)),
            ("model.layers.0.self_attn.v_proj.weight", &[8, 0], Dtype::F32, Vec::new()),
            ("model.layers.0.self_attn.o_proj.weight", &[0, 8], Dtype::F32, Vec::new()),
            ("model.layers.0.self_attn.mask", &[4], Dtype::F32, stored(&odd, Dtype::F32)),
        ];
        file(&folder.path().join(format!("{side}.safetensors")), &tensors);
    }
    let open = |side: &str| open_checkpoint(folder.path().join(side)).unwrap();
    let (base, tuned, out) = (open("base.safetensors"), open("tuned.safetensors"), folder.path().join("out"));
    let error = extract(Some(&base), &tuned, &out, &fixed(1), &()).unwrap_err();
    assert_eq!(error.diagnostics()[0].rule().id, "A-030");
    for rule in [RankRule::Fixed(1), RankRule::Error(0.5)] {
        let options = with(options(rule), |o| o.exclude = Some("k_proj".to_owned()));
        let report = extract(Some(&base), &tuned, &out, &options, &()).unwrap();
        assert!(report.targets.len() == 1 && report.unchanged == 3, "{report:?}");
        fs::remove_dir_all(&out).unwrap();
    }
}

/// A pair of checkpoints in folders, of one config; `change` makes the tuned values.
fn folders(
    config: &str,
    tensors: &[(&str, &[u64])],
    change: impl Fn(&str, &mut Vec<f64>),
) -> (tempfile::TempDir, Checkpoint, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    for side in ["base", "tuned"] {
        let made: Vec<(&str, &[u64], Dtype, Vec<u8>)> = tensors
            .iter()
            .enumerate()
            .map(|(i, (name, dims))| {
                let mut values: Vec<f64> = noise(dims.iter().product::<u64>() as usize, i as u64).map(|x| 0.1 * x).collect();
                if side == "tuned" {
                    change(name, &mut values);
                }
                (*name, *dims, Dtype::F32, stored(&values, Dtype::F32))
            })
            .collect();
        fs::create_dir(folder.path().join(side)).unwrap();
        file(&folder.path().join(side).join("model.safetensors"), &made);
        fs::write(folder.path().join(side).join("config.json"), config).unwrap();
    }
    let open = |side: &str| open_checkpoint(folder.path().join(side)).unwrap();
    let (base, tuned) = (open("base"), open("tuned"));
    (folder, base, tuned)
}

/// The largest difference of the merge of `adapter` and the tuned checkpoint.
fn far_from_tuned(folder: &Path, base: &Checkpoint, tuned: &Checkpoint, adapter: &Path) -> f64 {
    let merged = folder.join("merged");
    merge(base, &[Weighted::full(&open_adapter(adapter).unwrap())], &merged, &MergeOptions::default(), &()).unwrap();
    let merged = open_checkpoint(merged).unwrap();
    let read = |checkpoint: &Checkpoint, name: &str| {
        let mut raw = vec![0; checkpoint.info(name).unwrap().bytes() as usize];
        checkpoint.read(name, 0, &mut raw).unwrap();
        loaded(&raw, Dtype::F32)
    };
    let far = |name: &str| read(&merged, name).iter().zip(read(tuned, name)).map(|(m, t)| (m - t).abs()).fold(0.0, f64::max);
    tuned.names().map(far).fold(0.0, f64::max)
}

/// Wrapped by `modules_to_save`, PEFT would replace it on one side of the tie: so GPT-2's logits were off by half of the change.
#[test]
fn a_tied_embedding_is_stored_as_the_parameter_itself() {
    let tensors: [(&str, &[u64]); 2] = [("transformer.wte.weight", &[40, 16]), ("transformer.h.0.attn.c_attn.weight", &[16, 48])];
    let (folder, base, tuned) = folders(r#"{"model_type": "gpt2", "n_embd": 16}"#, &tensors, |name, values| {
        rank_one(values, if name.contains("wte") { 16 } else { 48 }, 0.1);
    });
    let out = folder.path().join("adapter");
    extract(Some(&base), &tuned, &out, &with(fixed(2), |o| o.rest = RestPolicy::Store), &()).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
    assert!(config["modules_to_save"].is_null(), "{config}");
    assert!(open_adapter(&out).unwrap().replacements()[0].shared);
    assert!(far_from_tuned(folder.path(), &base, &tuned, &out) < 1e-6);
}

/// A PEFT folder names the modules that transformers 5 has in memory, and a container the tensors of the file.
#[test]
fn names_are_those_of_modules_where_peft_reads_them() {
    let tensors: [(&str, &[u64]); 2] = [
        ("vit.encoder.layer.0.attention.attention.query.weight", &[16, 16]),
        ("vit.encoder.layer.0.output.dense.weight", &[16, 32]),
    ];
    let (folder, base, tuned) = folders(r#"{"model_type": "vit", "hidden_size": 16}"#, &tensors, |name, values| {
        rank_one(values, if name.contains("output") { 32 } else { 16 }, 0.1);
    });
    let names = |out: &Path| open_adapter(out).unwrap().targets().iter().map(|t| t.tensor.clone()).collect::<Vec<_>>();
    let out = folder.path().join("adapter");
    extract(Some(&base), &tuned, &out, &fixed(2), &()).unwrap();
    assert_eq!(names(&out), ["vit.layers.0.attention.q_proj.weight", "vit.layers.0.mlp.fc2.weight"]);
    assert!(far_from_tuned(folder.path(), &base, &tuned, &out) < 1e-6);
    let out = folder.path().join("adapter.safetensors");
    extract(Some(&base), &tuned, &out, &with(fixed(2), |o| o.to = loratool::ConvertTo::Container), &()).unwrap();
    assert_eq!(names(&out), tensors.map(|(name, _)| name.to_owned()));
}

/// What no merge would take is not stored.
#[test]
fn a_matrix_of_another_shape_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let values = |n: usize| stored(&noise(n, 3).collect::<Vec<f64>>(), Dtype::F32);
    let put = |side: &str, dims: [u64; 2], rows: u64| {
        let head = "lm_head.weight";
        let tensors: [(&str, &[u64], Dtype, Vec<u8>); 3] = [
            (Q, &[8, 8], Dtype::F32, values(if side == "base" { 64 } else { 65 })[..256].to_vec()),
            ("model.layers.0.mlp.up_proj.weight", &dims, Dtype::F32, values(48)),
            (head, &[rows, 8], Dtype::F32, values(rows as usize * 8)),
        ];
        let path = folder.path().join(format!("{side}.safetensors"));
        file(&path, &tensors);
        open_checkpoint(path).unwrap()
    };
    let (base, tuned) = (put("base", [6, 8], 20), put("tuned", [8, 6], 22));
    let out = folder.path().join("out");
    let store = with(fixed(1), |o| o.rest = RestPolicy::Store);
    let error = extract(Some(&base), &tuned, &out, &store, &()).unwrap_err();
    assert!(error.diagnostics()[0].rule().id == "U-009" && error.to_string().contains("up_proj"), "{error}");
    let report = extract(Some(&base), &tuned, &out, &with(store, |o| o.exclude = Some("up_proj".to_owned())), &()).unwrap();
    assert!(report.rest.iter().any(|one| one.tensor == "lm_head.weight" && one.stored), "{report:?}");
}

#[test]
fn options_that_cannot_be_are_refused() {
    let model = Model::new(|_, values| rank_one(values, 16, 0.1));
    let refused = |options: ExtractOptions| {
        let error = model.extract(&options).unwrap_err();
        assert_eq!(error.class().exit_code(), 2, "{error}");
    };
    refused(options(RankRule::Energy(1.5)));
    refused(options(RankRule::Error(0.0)));
    refused(options(RankRule::Bytes(3)));
    refused(with(fixed(2), |o| {
        o.tolerance = 0.0;
    }));
    refused(with(fixed(2), |o| {
        o.dtype = Dtype::F64;
    }));
    refused(with(fixed(2), |o| {
        o.targets = Some("(".into());
    }));
    refused(with(fixed(2), |o| {
        o.targets = Some("no_such".into());
    }));
}

/// Goes on so many times.
struct Patience(std::sync::atomic::AtomicUsize);

impl loratool::Progress for Patience {
    fn cancelled(&self) -> bool {
        use std::sync::atomic::Ordering::Relaxed;
        self.0.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_err()
    }
}

#[test]
fn an_extraction_that_is_cancelled_anywhere_leaves_nothing() {
    let values: Vec<f64> = (1..=60).map(|i| 1.0 / f64::from(i)).collect();
    let pair = Pair::new(150, 140, &with_values(150, 140, &values), Dtype::F32);
    let out = pair.folder.path().join("adapter");
    for n in 0.. {
        let patience = Patience(n.into());
        match extract(Some(&pair.base), &pair.tuned, &out, &fixed(4), &patience) {
            Ok(_) => {
                assert!(n > 8, "{n} questions");
                break;
            }
            Err(error) => {
                assert_eq!((error.diagnostics()[0].rule().id, error.class().exit_code()), ("E-006", 130));
                // The two checkpoints alone.
                assert_eq!(fs::read_dir(pair.folder.path()).unwrap().count(), 2, "after {n} questions");
            }
        }
    }
}
