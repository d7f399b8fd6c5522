//! Factors of a stack of experts as PEFT packs them: A `(E·rank, in)` with the expert slowest, B `(out, rank·E)` with the expert fastest
//! (`tuners/lora/layer.py`, `ParamWrapper.get_delta_weight`). Ours are A `(E, rank, in)` and B `(E, out, rank)`.

use crate::error::Result;
use crate::tensor::{Shape, TensorInfo, TensorSource, read_all};

/// What A and B are when they are unpacked; `None` if they do not hold a whole number of experts of this rank.
pub(super) fn unpacked(a: &TensorInfo, b: &TensorInfo, rank: u64) -> Option<(TensorInfo, TensorInfo)> {
    let ((rows, inner), (out, cols)) = (a.shape.matrix()?, b.shape.matrix()?);
    let experts = rows.checked_div(rank).filter(|experts| experts * rank == rows && rows == cols && *experts > 0)?;
    let info = |of: &TensorInfo, dims: Vec<u64>| Some(TensorInfo { dtype: of.dtype, shape: Shape::new(dims)? });
    Some((info(a, vec![experts, rank, inner])?, info(b, vec![experts, out, rank])?))
}

/// B `(out, rank·E)`, the expert fastest, as `(E, out, rank)`.
///
/// # Errors
/// As [`TensorSource::read`].
pub(super) fn unpack(source: &dyn TensorSource, name: &str, unpacked: &TensorInfo) -> Result<Vec<u8>> {
    let packed = read_all(source, name)?;
    let &[experts, out, rank] = unpacked.shape.dims() else { return Ok(packed) };
    let size = unpacked.bytes().checked_div(unpacked.shape.elements()).unwrap_or(1);
    let mut values = Vec::with_capacity(packed.len());
    for expert in 0..experts {
        for row_and_k in 0..out * rank {
            let at = ((row_and_k * experts + expert) * size) as usize;
            values.extend_from_slice(packed.get(at..at + size as usize).unwrap_or_default());
        }
    }
    Ok(values)
}

/// B `(E, out, rank)` as PEFT packs it.
///
/// # Errors
/// As [`TensorSource::read`].
pub(super) fn pack(source: &dyn TensorSource, name: &str, unpacked: &TensorInfo) -> Result<Vec<u8>> {
    let values = read_all(source, name)?;
    let &[experts, out, rank] = unpacked.shape.dims() else { return Ok(values) };
    let size = unpacked.bytes().checked_div(unpacked.shape.elements()).unwrap_or(1);
    let mut packed = Vec::with_capacity(values.len());
    for row_and_k in 0..out * rank {
        for expert in 0..experts {
            let at = ((expert * out * rank + row_and_k) * size) as usize;
            packed.extend_from_slice(values.get(at..at + size as usize).unwrap_or_default());
        }
    }
    Ok(packed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{Dtype, MemorySource};

    #[test]
    fn the_expert_is_the_fastest_index_of_b() {
        let info = |dims: &[u64]| TensorInfo { dtype: Dtype::U8, shape: Shape::new(dims.to_vec()).unwrap_or_default() };
        let (a, b) = (info(&[6, 5]), info(&[2, 6]));
        let (_, unpacked_b) = unpacked(&a, &b, 2).unwrap();
        assert_eq!(unpacked_b.shape.dims(), [3, 2, 2]);
        assert!(unpacked(&a, &b, 4).is_none());
        let mut source = MemorySource::new();
        source.insert("b", b, (0..12).collect()).unwrap();
        // Row o, rank k, expert e is value o·6 + k·3 + e.
        let ours = unpack(&source, "b", &unpacked_b).unwrap();
        assert_eq!(ours, [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]);
        source.insert("ours", unpacked_b.clone(), ours).unwrap();
        assert_eq!(pack(&source, "ours", &unpacked_b).unwrap(), (0..12).collect::<Vec<u8>>());
    }
}
