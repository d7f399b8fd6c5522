//! The figures of `compare` against dense matrices in f64.

mod common;

use std::path::Path;
use std::process::Command;

use common::fixture;
use common::updates::{adapter, dense, memory, wave};
use faer::Mat;
use loratool::report::CompareReport;
use loratool::{Adapter, CombineOptions, CompareOptions, RankRule, TensorSource, Weighted, combine, compare, open_checkpoint};
use serde_json::Value;

fn compared(one: &Adapter, other: &Adapter) -> CompareReport {
    compare([one, other], None, &CompareOptions::default(), &()).unwrap()
}

fn spaces(matrix: &Mat<f64>) -> (Mat<f64>, Mat<f64>) {
    let svd = matrix.thin_svd().unwrap();
    let rank = (0..svd.S().dim()).filter(|i| svd.S()[*i] > 1e-10 * svd.S()[0]).count();
    (svd.U().subcols(0, rank).to_owned(), svd.V().subcols(0, rank).to_owned())
}

fn near(found: f64, wanted: f64, what: &str) {
    assert!((found - wanted).abs() <= 1e-6 * wanted.abs().max(1e-3), "{what}: {found} for {wanted}");
}

#[test]
fn every_figure_is_that_of_the_dense_updates() {
    for (one, other) in [("llama-qv-r8", "llama-all-r4"), ("llama-rslora", "llama-patterns"), ("llama-bf16", "llama-qv-r8")] {
        let (one, other) = (adapter(one), adapter(other));
        let report = compared(&one, &other);
        let (mut inner, mut squares, mut sums, mut both) = (0.0, [0.0; 2], Vec::new(), Vec::new());
        for told in &report.targets {
            let of = |adapter: &Adapter| dense(adapter.targets().iter().find(|t| t.tensor == told.tensor).unwrap());
            let (x, y) = (of(&one), of(&other));
            let dot: f64 = (0..x.ncols()).flat_map(|j| (0..x.nrows()).map(move |i| (i, j))).map(|at| x[at] * y[at]).sum();
            let (nx, ny) = (x.norm_l2(), y.norm_l2());
            near(told.overlap.norms[0], nx, "norm");
            near(told.overlap.norms[1], ny, "norm");
            near(told.overlap.cosine, dot / (nx * ny), "cosine");
            let ((ux, vx), (uy, vy)) = (spaces(&x), spaces(&y));
            assert_eq!(told.ranks, [ux.ncols() as u64, uy.ncols() as u64]);
            let angle =
                |a: &Mat<f64>, b: &Mat<f64>| (a.transpose() * b).singular_values().unwrap()[0].min(1.0).acos().to_degrees();
            near(told.output_angle, angle(&ux, &uy), "output angle");
            near(told.input_angle, angle(&vx, &vy), "input angle");
            let least = ux.ncols().min(uy.ncols()) as f64;
            near(told.overlap.output_overlap, (ux.transpose() * &uy).squared_norm_l2() / least, "outputs");
            near(told.overlap.input_overlap, (vx.transpose() * &vy).squared_norm_l2() / least, "inputs");
            near(told.overlap.redundancy[0], (ux.transpose() * &y * &vx).norm_l2() / ny, "redundancy");
            near(told.overlap.redundancy[1], (uy.transpose() * &x * &vy).norm_l2() / nx, "redundancy");
            let pairs = (0..x.ncols()).flat_map(|j| (0..x.nrows()).map(move |i| (i, j)));
            let differ = pairs.filter(|at| x[*at] * y[*at] < 0.0).count() as f64 / (x.nrows() * x.ncols()) as f64;
            // These matrices are so small that all of their values are counted.
            near(told.overlap.sign_conflict, differ, "signs");
            (inner, squares) = (inner + dot, [squares[0] + nx * nx, squares[1] + ny * ny]);
            sums.push((&x + &y).singular_values().unwrap());
            both.push((x, y));
        }
        near(report.together.cosine, inner / (squares[0] * squares[1]).sqrt(), "cosine of all");
        let whole: f64 = sums.iter().flatten().map(|s| s * s).sum();
        for told in &report.truncation {
            let left: f64 = sums.iter().flat_map(|s| s.iter().skip(told.rank as usize)).map(|s| s * s).sum();
            assert!((told.error - (left / whole).sqrt()).abs() < 1e-7, "{told:?}");
        }
        for (i, row) in report.output_similarity.iter().enumerate() {
            for (j, found) in row.iter().enumerate() {
                let each = |(x, y): &(Mat<f64>, Mat<f64>)| {
                    let (ux, uy) = (spaces(x).0, spaces(y).0);
                    let (rows, cols) = ((i + 1).min(ux.ncols()), (j + 1).min(uy.ncols()));
                    let common = ux.subcols(0, rows).transpose() * uy.subcols(0, cols);
                    (common.squared_norm_l2(), rows.min(cols) as f64)
                };
                let (sum, most) = both.iter().map(each).fold((0.0, 0.0), |(s, m), (x, y)| (s + x, m + y));
                near(*found, sum / most, "similarity");
            }
        }
        let error = |rank: usize| {
            let left: f64 = sums.iter().flat_map(|s| s.iter().skip(rank)).map(|s| s * s).sum();
            (left / whole).sqrt()
        };
        let smallest = |share: f64| (0..100).find(|rank| error(*rank) <= share).unwrap() as u64;
        assert_eq!((report.rank_10, report.rank_1), (smallest(0.1), smallest(0.01)));
    }
}

#[test]
fn the_gauge_does_not_matter_and_relations_have_their_words() {
    let (b, a) = (wave(40, 3, 0.1), wave(3, 50, 0.5));
    let gauge = Mat::from_fn(3, 3, |i, j| if i == j { 40.0 } else { 0.3 * (i as f64 - 2.0 * j as f64) });
    let inverse = faer::linalg::solvers::DenseSolveCore::inverse(&gauge.partial_piv_lu());
    let (one, two) = (memory(&b, &a), memory(&(&b * &gauge), &(&inverse * &a)));
    let other = memory(&wave(40, 2, 0.9), &wave(2, 50, 0.2));
    let (x, y) = (compared(&one, &other), compared(&two, &other));
    near(x.together.cosine, y.together.cosine, "cosine");
    near(x.together.output_overlap, y.together.output_overlap, "outputs");
    near(x.targets[0].input_angle, y.targets[0].input_angle, "angle");
    let same = compared(&one, &two);
    assert!(same.relation == "same" && same.together.sign_conflict == 0.0 && same.rank_1 == 3, "{same:?}");
    near(same.together.redundancy[0], 1.0, "redundancy");
    let scaled = |by: f64| memory(&(faer::Scale(by) * &b), &a);
    assert_eq!(compared(&one, &scaled(2.0)).relation, "redundant");
    let opposite = compared(&one, &scaled(-1.0));
    assert!(opposite.relation == "opposite" && opposite.together.sign_conflict == 1.0 && opposite.rank_10 == 0, "{opposite:?}");
    let mixed = |by: f64| {
        let other = wave(40, 3, 7.7);
        memory(&(faer::Scale(by) * &b + &other), &a)
    };
    let words: Vec<&str> = [0.6, -0.6].iter().map(|by| compared(&one, &mixed(*by)).relation).collect();
    assert_eq!(words, ["aligned", "conflicting"]);
}

/// The control is what random adapters are, and a random adapter is told as one.
#[test]
fn a_random_adapter_looks_like_the_control() {
    let mut state = 1u64;
    let mut normal = |rows: usize, cols: usize| {
        Mat::from_fn(rows, cols, |_, _| {
            (0..12)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (state >> 40) as f64 / (1u64 << 24) as f64
                })
                .sum::<f64>()
                - 6.0
        })
    };
    let one = memory(&normal(200, 4), &normal(4, 300));
    let other = memory(&normal(200, 4), &normal(4, 300));
    let report = compared(&one, &other);
    let control = report.control.as_ref().unwrap();
    near(report.chance, 1.0 / (200.0f64 * 300.0).sqrt(), "chance");
    assert!(report.together.cosine.abs() < 4.0 * report.chance && control.cosine.abs() < 4.0 * report.chance);
    near(control.norms[1], report.together.norms[1], "the norm of the control");
    assert!(report.verdict.contains("random") && report.relation == "unrelated", "{}", report.verdict);
    for (found, random) in
        [(report.together.output_overlap, control.output_overlap), (report.together.input_overlap, control.input_overlap)]
    {
        assert!((found - random).abs() < 0.02, "{found} {random}");
    }
    // A sample of ten thousand: half of a percent is a standard deviation.
    assert!((report.together.sign_conflict - 0.5).abs() < 0.02 && (control.sign_conflict - 0.5).abs() < 0.02);
}

#[test]
fn adapters_without_a_common_tensor_are_disjoint_and_those_of_two_models_refused() {
    let report = compared(&adapter("llama-lmhead"), &adapter("llama-qv-r8"));
    assert!(report.relation == "disjoint" && report.targets.is_empty() && report.control.is_none());
    assert!(report.only_first.len() == 1 && report.only_second.len() == 4 && report.rank_1 == 0);
    let other = memory(&wave(20, 2, 0.1), &wave(2, 30, 0.2));
    let error = compare([&adapter("llama-qv-r8"), &other], None, &CompareOptions::default(), &()).unwrap_err();
    assert_eq!(error.diagnostics()[0].rule().id, "A-023");
}

/// What is told of a rank is what `combine` then finds.
#[test]
fn the_cost_of_a_rank_is_that_of_combining() {
    let folder = tempfile::tempdir().unwrap();
    let (one, other) = (adapter("llama-qv-r8"), adapter("llama-rslora"));
    let report = compared(&one, &other);
    for told in report.truncation.iter().filter(|told| told.rank < 12) {
        let mut options = CombineOptions::default();
        options.rank = Some(RankRule::Fixed(told.rank));
        let out = folder.path().join(told.rank.to_string());
        let made = combine(&[Weighted::full(&one), Weighted::full(&other)], &out, &options, &()).unwrap();
        near(made.error, told.error, "error");
    }
}

#[test]
fn a_base_says_how_large_updates_are() {
    let base = open_checkpoint(fixture("models/llama-tiny-f32")).unwrap();
    let (one, other) = (adapter("llama-qv-r8"), adapter("llama-all-r4"));
    let report = compare([&one, &other], Some(&base), &CompareOptions::default(), &()).unwrap();
    for told in &report.targets {
        let mut raw = vec![0; base.info(&told.tensor).unwrap().bytes() as usize];
        base.read(&told.tensor, 0, &mut raw).unwrap();
        let norm = raw.as_chunks::<4>().0.iter().map(|x| f64::from(f32::from_le_bytes(*x)).powi(2)).sum::<f64>().sqrt();
        let relative = told.relative.unwrap();
        near(relative[0], told.overlap.norms[0] / norm, "relative");
        near(relative[1], told.overlap.norms[1] / norm, "relative");
    }
}

#[test]
#[cfg(feature = "cli")]
fn the_command_prints_and_draws() {
    let folder = tempfile::tempdir().unwrap();
    let run = |more: &[&str]| {
        let root = fixture("adapters");
        let mut command = Command::new(env!("CARGO_BIN_EXE_loratool"));
        command.arg("compare").arg(root.join("llama-qv-r8")).arg(root.join("llama-all-r4")).args(more);
        command.current_dir(folder.path()).output().unwrap()
    };
    let text = String::from_utf8(run(&[]).stdout).unwrap();
    assert!(text.contains("unrelated") && text.contains("of a random one"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 80 || line.contains('/')), "{text}");
    let json: Value = serde_json::from_slice(&run(&["--json"]).stdout).unwrap();
    assert!(json["report"]["relation"] == "unrelated" && json["report"]["targets"][0]["cosine"].is_number(), "{json}");
    for (name, begins) in [("a.svg", &b"<svg"[..]), ("a.png", b"\x89PNG")] {
        assert!(run(&["--plot", name]).status.success());
        assert!(std::fs::read(folder.path().join(name)).unwrap().starts_with(begins));
        assert_eq!(run(&["--plot", name]).status.code(), Some(2), "a picture is not overwritten");
    }
    assert_eq!(run(&["--plot", "a.pdf"]).status.code(), Some(2));
    assert!(!Path::new("a.pdf").exists());
}
