//! The spectrum of an adapter, against the singular values of the dense update in f64, and its picture.

mod common;

use std::process::Command;

use common::fixture;
use loratool::{BindOptions, ExecOptions, Limits, TensorSource, delta_rows, open_adapter, open_checkpoint, spectrum};
use nalgebra::DMatrix;

#[test]
fn the_figures_are_those_of_the_dense_update() {
    let adapter = open_adapter(fixture("adapters/llama-patterns")).unwrap();
    let base = open_checkpoint(fixture("models/llama-tiny-f32")).unwrap();
    let (bind, limits, exec) = (BindOptions::default(), Limits::default(), ExecOptions::default());
    let report = spectrum(&adapter, Some(&base), &bind, &limits, &exec, &()).unwrap();
    assert!(report.dead.is_empty() && report.updates.len() == adapter.targets().len());
    let near = |x: f64, y: f64| (x - y).abs() <= 1e-6 * y.abs();
    let mut whole = 0.0;
    for (update, target) in report.updates.iter().zip(adapter.targets()) {
        assert_eq!(update.tensor, target.tensor);
        let (rows, cols) = target.out_in();
        let dense = DMatrix::from_row_slice(rows as usize, cols as usize, &delta_rows(target, 0..rows).unwrap());
        let mut values: Vec<f64> = dense.singular_values().iter().copied().collect();
        values.sort_by(|x, y| y.total_cmp(x));
        assert!(update.singular_values.iter().zip(&values).all(|(x, y)| (x - y).abs() < 1e-9 * values[0]), "{update:?}");
        let square: f64 = values.iter().map(|value| value * value).sum();
        whole += square;
        assert!(near(update.norm, square.sqrt()) && near(update.stable_rank, square / values[0].powi(2)), "{update:?}");
        let sum: f64 = values.iter().sum();
        let entropy: f64 = values.iter().filter(|v| **v > 1e-12).map(|v| -(v / sum) * (v / sum).ln()).sum();
        assert!(near(update.effective_rank, entropy.exp()), "{update:?}");
        let keeps =
            |share: f64| (1..).find(|k| values[..*k].iter().map(|v| v * v).sum::<f64>() >= share * square).unwrap() as u64;
        assert_eq!((update.energy.keeps_90, update.energy.keeps_99), (keeps(0.9), keeps(0.99)));
        let mut raw = vec![0; base.info(&target.tensor).unwrap().bytes() as usize];
        base.read(&target.tensor, 0, &mut raw).unwrap();
        let weight: f64 = raw.chunks(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())).powi(2)).sum();
        assert!(near(update.relative.unwrap(), (square / weight).sqrt()), "{update:?}");
    }
    assert!(near(report.norm, whole.sqrt()));
    // All that is kept at 99.9 % is at most what there is.
    assert!(report.smaller.windows(2).all(|pair| pair[0].parameters <= pair[1].parameters));
    assert!(report.smaller.iter().all(|smaller| smaller.parameters <= adapter.parameters()));
}

#[test]
fn the_picture_is_drawn_in_both_formats_and_nothing_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let plot = |name: &str| {
        let path = folder.path().join(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_loratool"));
        let done = command
            .arg("inspect")
            .arg(fixture("adapters/llama-patterns"))
            .args(["--spectrum", "--plot"])
            .arg(&path)
            .output()
            .unwrap();
        (done.status.code(), std::fs::read(path).unwrap_or_default())
    };
    let (code, svg) = plot("a.svg");
    let text = String::from_utf8(svg).unwrap();
    assert!(code == Some(0) && text.starts_with("<svg") && text.contains("q_proj") && text.trim_end().ends_with("</svg>"));
    let (code, png) = plot("a.png");
    assert!(code == Some(0) && png.starts_with(b"\x89PNG\r\n\x1a\n") && png.len() > 10_000);
    assert_ne!(plot("a.png").0, Some(0));
    let (code, none) = plot("a.gif");
    assert!(code == Some(2) && none.is_empty(), "{code:?}");
}
