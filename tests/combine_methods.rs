//! Every method of `combine` against its definition on dense matrices in f64.

mod common;

use common::fixture;
use common::updates::{adapter, combined, dense, memory, norm, raw, wave};
use faer::Mat;
use loratool::{
    Adapter, CombineMethod, CombineOptions, Factor, OpenOptions, Orientation, RankRule, Target, Weighted, combine,
    open_adapter_with,
};

fn with(method: CombineMethod) -> CombineOptions {
    let mut options = CombineOptions::default();
    options.method = method;
    options
}

/// The updates of a tensor with their weights.
fn updates(adapters: &[(&Adapter, f64)], tensor: &str) -> Vec<Mat<f64>> {
    let of = |(adapter, weight): &(&Adapter, f64)| {
        let target = adapter.targets().iter().find(|target| target.tensor == tensor)?;
        Some(faer::Scale(*weight) * dense(target))
    };
    adapters.iter().filter_map(of).collect()
}

/// Singular components above rounding.
fn svd(matrix: &Mat<f64>) -> (Mat<f64>, Vec<f64>, Mat<f64>) {
    let svd = matrix.thin_svd().unwrap();
    let s: Vec<f64> = (0..svd.S().dim()).map(|i| svd.S()[i]).filter(|value| *value > 1e-12 * svd.S()[0]).collect();
    (svd.U().subcols(0, s.len()).to_owned(), s.clone(), svd.V().subcols(0, s.len()).to_owned())
}

fn beside(parts: &[Mat<f64>]) -> Mat<f64> {
    let widths: Vec<usize> = parts.iter().map(Mat::ncols).collect();
    Mat::from_fn(parts[0].nrows(), widths.iter().sum(), |i, j| {
        let (mut part, mut j) = (0, j);
        while j >= widths[part] {
            (part, j) = (part + 1, j - widths[part]);
        }
        parts[part][(i, j)]
    })
}

fn scaled(matrix: &Mat<f64>, by: &[f64]) -> Mat<f64> {
    Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| matrix[(i, j)] * by[j])
}

fn sum(parts: &[Mat<f64>]) -> Mat<f64> {
    parts.iter().skip(1).fold(parts[0].clone(), |sum, part| sum + part)
}

/// TIES of dense matrices, literally.
fn ties(parts: &[Mat<f64>], density: f64) -> Mat<f64> {
    let (rows, cols) = (parts[0].nrows(), parts[0].ncols());
    let count = ((density * (rows * cols) as f64) as usize).max(1);
    let trimmed: Vec<Mat<f64>> = parts
        .iter()
        .map(|part| {
            let mut sizes: Vec<f64> = (0..rows * cols).map(|n| part[(n / cols, n % cols)].abs()).collect();
            sizes.sort_by(|x, y| y.partial_cmp(x).unwrap());
            let least = sizes[count - 1];
            Mat::from_fn(rows, cols, |i, j| if part[(i, j)].abs() >= least { part[(i, j)] } else { 0.0 })
        })
        .collect();
    Mat::from_fn(rows, cols, |i, j| {
        let sign = if trimmed.iter().map(|t| t[(i, j)]).sum::<f64>() >= 0.0 { 1.0 } else { -1.0 };
        let of: Vec<f64> = trimmed.iter().map(|t| t[(i, j)]).filter(|x| x * sign > 0.0).collect();
        if of.is_empty() { 0.0 } else { of.iter().sum::<f64>() / of.len() as f64 }
    })
}

fn iso_c(parts: &[Mat<f64>]) -> Mat<f64> {
    let (u, s, v) = svd(&sum(parts));
    let mean = s.iter().sum::<f64>() / s.len() as f64;
    faer::Scale(mean) * (u * v.transpose())
}

fn polar(matrix: &Mat<f64>) -> Mat<f64> {
    let (p, _, q) = svd(matrix);
    p * q.transpose()
}

fn tsv(parts: &[Mat<f64>]) -> Mat<f64> {
    let each: Vec<_> = parts.iter().map(svd).collect();
    let s: Vec<f64> = each.iter().flat_map(|(_, s, _)| s.clone()).collect();
    let u = polar(&beside(&each.iter().map(|(u, _, _)| u.clone()).collect::<Vec<_>>()));
    let v = polar(&beside(&each.iter().map(|(_, _, v)| v.clone()).collect::<Vec<_>>()));
    scaled(&u, &s) * v.transpose()
}

fn knots(parts: &[Mat<f64>], density: f64) -> Mat<f64> {
    let (u, s, v) = svd(&beside(parts));
    let inner = parts[0].ncols();
    let each: Vec<Mat<f64>> = (0..parts.len()).map(|t| v.subrows(t * inner, inner).to_owned()).collect();
    scaled(&u, &s) * ties(&each, density).transpose()
}

fn core_space(parts: &[Mat<f64>], density: f64) -> Mat<f64> {
    let each: Vec<_> = parts.iter().map(svd).collect();
    let roots = |s: &[f64]| s.iter().map(|x| x.sqrt()).collect::<Vec<_>>();
    let b: Vec<Mat<f64>> = each.iter().map(|(u, s, _)| scaled(u, &roots(s))).collect();
    let a: Vec<Mat<f64>> = each.iter().map(|(_, s, v)| scaled(v, &roots(s))).collect();
    let (u, _, _) = svd(&beside(&b));
    let (v, _, _) = svd(&beside(&a));
    let cores: Vec<Mat<f64>> = parts.iter().map(|part| u.transpose() * part * &v).collect();
    &u * ties(&cores, density) * v.transpose()
}

fn slerp(parts: &[Mat<f64>], weights: &[f64]) -> Mat<f64> {
    let [one, two] = parts else { return parts[0].clone() };
    let plain = [faer::Scale(1.0 / weights[0]) * one, faer::Scale(1.0 / weights[1]) * two];
    let dot: f64 =
        (0..one.ncols()).flat_map(|j| (0..one.nrows()).map(move |i| (i, j))).map(|at| plain[0][at] * plain[1][at]).sum();
    let angle = (dot / (norm(&plain[0]) * norm(&plain[1]))).acos();
    let (whole, t) = (weights[0] + weights[1], weights[1] / (weights[0] + weights[1]));
    let gain = |part: f64| whole * (part * angle).sin() / angle.sin();
    faer::Scale(gain(1.0 - t)) * &plain[0] + faer::Scale(gain(t)) * &plain[1]
}

fn held_against(method: CombineMethod, weights: [f64; 3], oracle: impl Fn(&[Mat<f64>], &[f64]) -> Mat<f64>) {
    let folder = tempfile::tempdir().unwrap();
    let names = ["llama-qv-r8", "llama-all-r4", "llama-rslora"];
    let adapters: Vec<Adapter> = names.iter().map(|name| adapter(name)).collect();
    let count = if method == CombineMethod::Slerp { 2 } else { 3 };
    let weighted: Vec<(&Adapter, f64)> = adapters.iter().zip(weights).take(count).collect();
    let mut options = with(method);
    // All components, so that what is stored is all of it.
    options.rank = Some(RankRule::Fixed(128));
    let (report, again) = combined(&weighted, folder.path(), &options);
    assert!(report.error < 1e-6 && report.from_sum > 0.01, "{}: {} {}", method.name(), report.error, report.from_sum);
    for (found, told) in again.targets().iter().zip(&report.targets) {
        let parts = updates(&weighted, &found.tensor);
        let wanted = oracle(&parts, &weights);
        let off = norm(&(&dense(found) - &wanted));
        assert!(off <= 1e-6 * norm(&wanted), "{} {}: {off:e} of {:e}", method.name(), found.tensor, norm(&wanted));
        let away = norm(&(&dense(found) - sum(&parts)));
        assert!((told.norm - norm(&sum(&parts))).abs() <= 1e-6 * told.norm);
        assert!((told.from_sum * told.norm - away).abs() <= 1e-6 * told.norm, "{}: {} told", method.name(), told.from_sum);
    }
}

#[test]
fn slerp_is_the_arc() {
    held_against(CombineMethod::Slerp, [0.3, 0.9, 0.0], slerp);
}

#[test]
fn iso_c_has_one_singular_value() {
    held_against(CombineMethod::IsoC, [1.0, -0.5, 0.7], |parts, _| iso_c(parts));
}

#[test]
fn tsv_has_orthonormal_vectors() {
    held_against(CombineMethod::Tsv, [1.0, -0.5, 0.7], |parts, _| tsv(parts));
}

#[test]
fn knots_merges_the_vectors_of_all() {
    for density in [0.2, 0.7] {
        held_against(CombineMethod::Knots { density }, [1.0, -0.5, 0.7], |parts, _| knots(parts, density));
    }
}

#[test]
fn core_space_merges_small_cores() {
    for density in [0.2, 0.7] {
        held_against(CombineMethod::CoreSpace { density }, [1.0, -0.5, 0.7], |parts, _| core_space(parts, density));
    }
}

#[test]
fn ties_is_that_of_the_dense_updates() {
    for density in [0.2, 0.7] {
        held_against(CombineMethod::Ties { density }, [1.0, -0.5, 0.7], |parts, _| ties(parts, density));
    }
}

/// What a lower rank leaves of a method by value is nearly the best that this rank can hold, and the error is that of the stored factors.
#[test]
fn a_rank_of_a_method_by_value_is_told_with_its_error() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (adapter("llama-qv-r8"), adapter("llama-all-r4"));
    let weighted = [(&one, 1.0), (&two, 1.0)];
    for rank in [1, 6, 20] {
        let mut options = with(CombineMethod::Ties { density: 0.3 });
        options.rank = Some(RankRule::Fixed(rank));
        let (report, again) = combined(&weighted, folder.path(), &options);
        for (found, told) in again.targets().iter().zip(&report.targets) {
            let wanted = ties(&updates(&weighted, &found.tensor), 0.3);
            let best = wanted.singular_values().unwrap().iter().skip(rank as usize).map(|s| s * s).sum::<f64>().sqrt();
            let off = norm(&(&dense(found) - &wanted));
            assert!(off <= best * 1.002, "{off} for {best}");
            assert!((told.error * norm(&wanted) - off).abs() <= 1e-4 * off, "{} told, {} found", told.error, off / norm(&wanted));
        }
    }
}

/// B·G and G⁻¹·A are one adapter, and no method may see which of the two it was given.
#[test]
fn no_method_sees_the_gauge_of_the_factors() {
    let folder = tempfile::tempdir().unwrap();
    let (b, a) = (wave(20, 3, 0.1), wave(3, 30, 0.5));
    let gauge = Mat::from_fn(3, 3, |i, j| if i == j { 40.0 } else { 0.3 * (i as f64 - 2.0 * j as f64) });
    let inverse = faer::linalg::solvers::DenseSolveCore::inverse(&gauge.partial_piv_lu());
    let (one, two) = (memory(&b, &a), memory(&(&b * &gauge), &(&inverse * &a)));
    let other = memory(&wave(20, 2, 0.9), &wave(2, 30, 0.2));
    for method in [
        CombineMethod::Linear,
        CombineMethod::Svd,
        CombineMethod::Slerp,
        CombineMethod::Ties { density: 0.3 },
        CombineMethod::MagnitudePrune { density: 0.3 },
        CombineMethod::Breadcrumbs { density: 0.8, outliers: 0.02 },
        CombineMethod::Knots { density: 0.3 },
        CombineMethod::CoreSpace { density: 0.5 },
        CombineMethod::Tsv,
        CombineMethod::IsoC,
    ] {
        let of = |x: &Adapter| dense(&combined(&[(x, 0.6), (&other, 0.4)], folder.path(), &with(method)).1.targets()[0]);
        let (one, two) = (of(&one), of(&two));
        assert!(norm(&(&one - &two)) <= 1e-5 * norm(&one), "{}", method.name());
    }
}

#[test]
fn numbers_that_mean_nothing_are_refused() {
    let one = adapter("llama-qv-r8");
    let refused = |method| {
        let folder = tempfile::tempdir().unwrap();
        let weighted = [Weighted::full(&one)];
        combine(&weighted, &folder.path().join("out"), &with(method), &()).unwrap_err().diagnostics()[0].rule().id
    };
    for method in [
        CombineMethod::Ties { density: 0.0 },
        CombineMethod::Ties { density: 1.5 },
        CombineMethod::Knots { density: f64::NAN },
        CombineMethod::Della { density: 0.9, epsilon: 0.3, seed: 0 },
        CombineMethod::Breadcrumbs { density: 0.5, outliers: 1.0 },
    ] {
        assert_eq!(refused(method), "U-001", "{method:?}");
    }
    let three = [(&one, 1.0), (&one, 1.0), (&one, 1.0)];
    let weighted: Vec<_> = three.iter().map(|(adapter, weight)| Weighted { adapter, weight: *weight }).collect();
    let folder = tempfile::tempdir().unwrap();
    let error = combine(&weighted, &folder.path().join("out"), &with(CombineMethod::Slerp), &()).unwrap_err();
    assert!(error.diagnostics()[0].message().contains("between two updates"));
}

/// The updates of all experts of a stack, by its factors (E, rank, in) and (E, out, rank).
fn experts(target: &Target) -> Vec<Mat<f64>> {
    let values = |factor: &Factor| raw(factor).as_chunks::<4>().0.iter().map(|x| f64::from(f32::from_le_bytes(*x))).collect();
    let (a, b): (Vec<f64>, Vec<f64>) = (values(&target.a), values(&target.b));
    let ((out, inner), rank) = (target.out_in(), target.scaling.rank as usize);
    let (out, inner) = (out as usize, inner as usize);
    let scale = target.scaling.effective();
    let one = |e: usize| {
        let (a, b) = (&a[e * rank * inner..], &b[e * out * rank..]);
        Mat::from_fn(out, inner, |i, j| scale * (0..rank).map(|k| b[i * rank + k] * a[k * inner + j]).sum::<f64>())
    };
    (0..target.experts().unwrap() as usize).map(one).collect()
}

/// Each matrix of a stack is combined by itself.
#[test]
fn every_expert_keeps_its_own_largest_values() {
    for name in ["experts-qwen3", "experts-square", "experts-mixtral"] {
        let folder = tempfile::tempdir().unwrap();
        let mut open = OpenOptions::default();
        open.expert_axes = Some(Orientation::OutIn);
        let one = open_adapter_with(fixture("kinds").join(name).join("adapter-f32"), &open).unwrap();
        for method in [CombineMethod::Ties { density: 0.3 }, CombineMethod::Tsv, CombineMethod::IsoC] {
            let mut options = with(method);
            options.rank = Some(RankRule::Fixed(128));
            options.to = loratool::ConvertTo::Container;
            let out = folder.path().join(format!("{}.safetensors", method.name()));
            combine(&[Weighted { adapter: &one, weight: 0.7 }], &out, &options, &()).unwrap();
            let again = open_adapter_with(&out, &open).unwrap();
            let stacks = again.targets().iter().zip(one.targets()).filter(|(_, was)| was.experts().is_some());
            let mut count = 0;
            for (found, was) in stacks {
                for (found, was) in experts(found).iter().zip(experts(was)) {
                    let part = [faer::Scale(0.7) * &was];
                    let wanted = match method {
                        CombineMethod::Ties { density } => ties(&part, density),
                        CombineMethod::Tsv => tsv(&part),
                        _ => iso_c(&part),
                    };
                    assert!(norm(&(found - &wanted)) <= 1e-6 * norm(&wanted), "{name} {}", method.name());
                    count += 1;
                }
            }
            assert!(count > 1, "{name}");
        }
    }
}
