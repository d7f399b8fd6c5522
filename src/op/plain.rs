//! A plain safetensors file: the tensors in the canonical order, and no metadata but `format`. The header is written last, so that a
//! file that was cut short has a length of 0 and is none.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use crate::adapter::Factor;
use crate::codec::safetensors::Layout;
use crate::error::{Error, Result};
use crate::io::{ContentRoot, disk, tensor_digest, write_error};
use crate::limits::Limits;
use crate::rules;
use crate::tensor::{TensorInfo, pieces};

/// What was written.
pub(super) struct Written {
    /// Length of the file.
    pub(super) bytes: u64,
    /// The content root of its tensors.
    pub(super) content: String,
}

/// Writes every one of `factors` under its name into the empty file `out`, of which `out_path` is the name in messages. `advance`
/// is called with the number of bytes of each piece that was written, and may end it.
///
/// # Errors
/// `C-003`, `C-019`, `C-021` if the header would be over a limit; `E-001`, `E-004` while reading, `E-002` while writing; the first of
/// `advance`.
pub(super) fn write(
    factors: &BTreeMap<String, Factor>,
    out: &File,
    out_path: &Path,
    mut advance: impl FnMut(u64) -> Result<()>,
) -> Result<Written> {
    let mut tensors: Vec<(&str, &TensorInfo)> = factors.iter().map(|(name, factor)| (name.as_str(), factor.info())).collect();
    Layout::canonical_order(&mut tensors);
    check_limits(&tensors, out_path)?;
    let layout = Layout::new(&[("format".to_owned(), "pt".to_owned())], &tensors);
    if layout.head.len() as u64 - 8 > Limits::default().header_bytes {
        let message = format!("the header would have {} bytes, over the limit", layout.head.len() - 8);
        return Err(Error::new(rules::HEADER_LIMIT, message).file(out_path));
    }
    let mut root = ContentRoot::default();
    for ((name, info), position) in tensors.iter().zip(&layout.offsets) {
        let Some(factor) = factors.get(*name) else { continue };
        let mut hash = tensor_digest(info);
        pieces(info.bytes(), |offset, piece| {
            factor.read(offset, piece)?;
            hash.update(piece);
            disk::write_at(out, piece, position + offset).map_err(|e| write_error(out_path, e))?;
            advance(piece.len() as u64)
        })?;
        root.insert(name, hash.finish());
    }
    disk::write_at(out, &layout.head, 0).map_err(|e| write_error(out_path, e))?;
    Ok(Written { bytes: layout.file_len, content: root.finish() })
}

fn check_limits(tensors: &[(&str, &TensorInfo)], out_path: &Path) -> Result<()> {
    let limits = Limits::default();
    if tensors.len() > limits.tensors {
        let message = format!("{} tensors, over the limit of {}", tensors.len(), limits.tensors);
        return Err(Error::new(rules::TENSOR_LIMIT, message).file(out_path));
    }
    match tensors.iter().find(|(name, _)| name.len() > limits.name_bytes) {
        None => Ok(()),
        Some((name, _)) => {
            let message = format!("a tensor name would have {} bytes", name.len());
            Err(Error::new(rules::NAME_SANE, message).file(out_path).tensor(*name))
        }
    }
}
