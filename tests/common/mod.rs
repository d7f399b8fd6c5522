//! What the integration tests share: where the fixtures are, and values of a safetensors file by an outside reader.
#![allow(dead_code, reason = "each test binary uses its part")]

pub mod scene;
pub mod updates;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

/// A path inside `fixtures/`.
pub fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

/// Copies the files of a folder into a new one.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Names and bytes of a folder's files.
pub fn bytes(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let paths = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    paths.map(|p| (p.file_name().unwrap().into(), std::fs::read(&p).unwrap())).collect()
}

/// Values of one tensor, widened to f64 by the `half` crate and the reference reader, not by our own kernels.
#[derive(Debug, Clone, PartialEq)]
pub struct Values {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
}

/// All float tensors of a file.
pub fn read_file(path: &Path) -> BTreeMap<String, Values> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let wide = |dtype, raw: &[u8]| -> Option<Vec<f64>> {
        Some(match dtype {
            Dtype::F64 => raw.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
            Dtype::F32 => raw.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect(),
            Dtype::F16 => raw.chunks_exact(2).map(|b| half::f16::from_le_bytes(b.try_into().unwrap()).to_f64()).collect(),
            Dtype::BF16 => raw.chunks_exact(2).map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f64()).collect(),
            _ => return None,
        })
    };
    let tensors = file.tensors();
    let values = tensors.iter().filter_map(|(name, view)| {
        let data = wide(view.dtype(), view.data())?;
        Some((name.clone(), Values { dtype: view.dtype(), shape: view.shape().to_vec(), data }))
    });
    values.collect()
}

/// All float tensors of a checkpoint folder, over all its files.
pub fn read_folder(folder: &Path) -> BTreeMap<String, Values> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    entries.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).flat_map(|p| read_file(&p)).collect()
}

/// The distance from `|x|` to the next larger value of the dtype: the unit in the last place.
pub fn ulp(dtype: Dtype, x: f64) -> f64 {
    let (digits, smallest) = match dtype {
        Dtype::F64 => (52, -1022),
        Dtype::F32 => (23, -126),
        Dtype::F16 => (10, -14),
        Dtype::BF16 => (7, -126),
        other => panic!("no ulp of {other}"),
    };
    let exponent = if x == 0.0 { smallest } else { (x.abs().log2().floor() as i32).max(smallest) };
    2f64.powi(exponent - digits)
}
