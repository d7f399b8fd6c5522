//! Updates as dense matrices, and adapters of a single one: what tests of `resize`, `combine` and `compare` are held against.

use std::path::Path;
use std::sync::Arc;

use faer::Mat;
use loratool::report::CombineReport;
use loratool::{
    Adapter, AdapterParts, CombineOptions, Dtype, Factor, MemorySource, Shape, Target, TensorInfo, TensorSource, Weighted,
    combine, delta_rows, open_adapter,
};

use super::fixture;

/// A fixture by its name.
pub fn adapter(name: &str) -> Adapter {
    open_adapter(fixture("adapters").join(name)).unwrap()
}

/// The update as a matrix, an output of the layer in each row.
pub fn dense(target: &Target) -> Mat<f64> {
    let (rows, cols) = target.out_in();
    let values = delta_rows(target, 0..rows).unwrap();
    Mat::from_fn(rows as usize, cols as usize, |i, j| values[i * cols as usize + j])
}

/// The Frobenius norm.
pub fn norm(matrix: &Mat<f64>) -> f64 {
    (0..matrix.ncols()).flat_map(|j| (0..matrix.nrows()).map(move |i| matrix[(i, j)].powi(2))).sum::<f64>().sqrt()
}

/// Values without structure.
pub fn wave(rows: usize, cols: usize, seed: f64) -> Mat<f64> {
    Mat::from_fn(rows, cols, |i, j| (seed + 1.3 * (i * (j + 1)) as f64 + 0.7 * (j * j) as f64).sin())
}

/// An adapter of one matrix in memory, in f64, with the scale 1.
pub fn memory(b: &Mat<f64>, a: &Mat<f64>) -> Adapter {
    let like = adapter("llama-qv-r8");
    let mut source = MemorySource::new();
    for (name, matrix) in [("b", b), ("a", a)] {
        let shape = Shape::new(vec![matrix.nrows() as u64, matrix.ncols() as u64]).unwrap();
        let values = (0..matrix.nrows()).flat_map(|i| (0..matrix.ncols()).map(move |j| matrix[(i, j)]));
        source.insert(name, TensorInfo { dtype: Dtype::F64, shape }, values.flat_map(f64::to_le_bytes).collect()).unwrap();
    }
    let source: Arc<dyn TensorSource> = Arc::new(source);
    let factor = |name: &str| Factor::new(&source, name).unwrap();
    let mut target = Target { a: factor("a"), b: factor("b"), singular_values: None, ..like.targets()[0].clone() };
    (target.scaling.rank, target.scaling.alpha) = (a.nrows() as u64, a.nrows() as f64);
    let parts = AdapterParts { targets: vec![target], dialect: "memory", label: "memory".into(), ..AdapterParts::default() };
    Adapter::new(parts, &Default::default()).unwrap()
}

/// The bytes of a factor.
pub fn raw(factor: &Factor) -> Vec<u8> {
    let mut raw = vec![0; factor.info().bytes() as usize];
    factor.read(0, &mut raw).unwrap();
    raw
}

/// Adapters with their weights combined into `folder`, and the result as it is read back.
pub fn combined(adapters: &[(&Adapter, f64)], folder: &Path, options: &CombineOptions) -> (CombineReport, Adapter) {
    let out = folder.join("out");
    if out.exists() {
        std::fs::remove_dir_all(&out).unwrap();
    }
    let weighted: Vec<_> = adapters.iter().map(|(adapter, weight)| Weighted { adapter, weight: *weight }).collect();
    let report = combine(&weighted, &out, options, &()).unwrap();
    (report, open_adapter(&out).unwrap())
}
