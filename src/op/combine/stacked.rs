//! The factors of a sum, side by side: B = [B₁ … Bₙ], A = [g₁·A₁; …; gₙ·Aₙ], so that B·A = Σ gₜ·Bₜ·Aₜ. They are computed from the factors
//! of the adapters when they are read, so that they cost no memory and no room on a disk.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::adapter::Factor;
use crate::error::{Error, Result};
use crate::exec::float_of;
use crate::rules;
use crate::tensor::{Dtype, TensorInfo, TensorSource};

/// Values of one factor that stand together: its rows in A, one row's values in B.
pub(super) struct Run {
    pub(super) factor: Factor,
    /// Multiplies the values.
    pub(super) gain: f64,
    /// Values in each of the blocks of the tensor.
    pub(super) len: u64,
}

/// A tensor whose blocks are one run of each factor, one after the other.
struct Stack {
    info: TensorInfo,
    runs: Vec<Run>,
}

/// Factors side by side.
pub(super) struct Stacked {
    label: PathBuf,
    stacks: BTreeMap<String, Stack>,
}

impl Stacked {
    pub(super) fn new(label: &Path) -> Self {
        Stacked { label: label.to_owned(), stacks: BTreeMap::new() }
    }

    /// Adds a tensor of plain floats.
    pub(super) fn insert(&mut self, name: String, info: TensorInfo, runs: Vec<Run>) {
        self.stacks.insert(name, Stack { info, runs });
    }
}

impl TensorSource for Stacked {
    fn label(&self) -> &Path {
        &self.label
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.stacks.keys().map(String::as_str))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.stacks.get(name).map(|stack| &stack.info)
    }

    fn read(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let missing = || Error::new(rules::READ, "no such tensor").file(&self.label).tensor(name);
        let stack = self.stacks.get(name).ok_or_else(missing)?;
        let float = float_of(stack.info.dtype).ok_or_else(missing)?;
        let mut values = vec![0.0; buf.len() / float.size()];
        stack.values(offset / float.size() as u64, &mut values)?;
        float.narrow(&values, buf);
        // Factors are finite, so that what is not has left the range of the dtype.
        float.widen(buf, &mut values);
        if values.iter().any(|value: &f64| !value.is_finite()) {
            let message = format!("values of {name:?} leave the range of {}", stack.info.dtype);
            let help = if stack.info.dtype == Dtype::F16 { "give --dtype f32" } else { "give smaller weights" };
            return Err(Error::new(rules::RESULT_FINITE, message).tensor(name).help(help));
        }
        Ok(())
    }

    fn values(&self, name: &str, first: u64, out: &mut [f64]) -> Option<Result<()>> {
        let stack = self.stacks.get(name).filter(|stack| stack.info.dtype == Dtype::F64)?;
        Some(stack.values(first, out))
    }

    fn unchanged(&self) -> Result<()> {
        self.stacks.values().flat_map(|stack| &stack.runs).try_for_each(|run| run.factor.source().unchanged())
    }
}

impl Stack {
    /// Values from `first` on, in f64.
    fn values(&self, first: u64, out: &mut [f64]) -> Result<()> {
        let total: u64 = self.runs.iter().map(|run| run.len).sum();
        let last = first + out.len() as u64;
        if total == 0 || out.is_empty() {
            return Ok(());
        }
        let blocks = first / total..last.div_ceil(total);
        let (mut raw, mut values) = (Vec::new(), Vec::new());
        let mut start = 0;
        for run in &self.runs {
            let place = start..start + run.len;
            start = place.end;
            // Of a single block only what is wanted is read; of several all, because nearly all is wanted.
            let within = if blocks.end - blocks.start == 1 {
                let base = blocks.start * total;
                let from = first.saturating_sub(base).clamp(place.start, place.end);
                let to = (last - base).clamp(place.start, place.end);
                from - place.start..to - place.start
            } else {
                0..run.len
            };
            if within.is_empty() {
                continue;
            }
            run.read(&blocks, &within, &mut raw, &mut values)?;
            let len = (within.end - within.start) as usize;
            for (block, row) in blocks.clone().zip(values.chunks_exact(len)) {
                // The first block and the last may be cut.
                let at = block * total + place.start + within.start;
                let cut = first.saturating_sub(at).min(len as u64);
                let end = last.saturating_sub(at).min(len as u64);
                if cut < end {
                    let to = (at + cut - first) as usize;
                    let row = &row[cut as usize..end as usize];
                    out[to..to + row.len()].iter_mut().zip(row).for_each(|(slot, value)| *slot = value * run.gain);
                }
            }
        }
        Ok(())
    }
}

impl Run {
    /// Values `within` of the run, in each of the blocks, one after the other.
    fn read(&self, blocks: &Range<u64>, within: &Range<u64>, raw: &mut Vec<u8>, values: &mut Vec<f64>) -> Result<()> {
        let float = float_of(self.factor.info().dtype).unwrap_or_else(|| unreachable!("adapters hold plain floats only"));
        let size = float.size() as u64;
        let first = blocks.start * self.len + within.start;
        let count =
            if blocks.end - blocks.start == 1 { within.end - within.start } else { (blocks.end - blocks.start) * self.len };
        raw.resize((count * size) as usize, 0);
        self.factor.read(first * size, raw)?;
        values.resize(count as usize, 0.0);
        float.widen(raw, values);
        let any = values.iter().fold(false, |any, value: &f64| any | !value.is_finite());
        if any {
            let message = format!("{:?} holds a value that is not finite", self.factor.name());
            return Err(Error::new(rules::FACTORS_FINITE, message).file(self.factor.source().label()).tensor(self.factor.name()));
        }
        Ok(())
    }
}

/// The dtype that holds all values of some factors, times 1 or -1, without rounding.
pub(super) fn common_dtype<'f>(factors: impl Iterator<Item = &'f Factor>) -> Dtype {
    let mut common: Option<Dtype> = None;
    for factor in factors {
        common = Some(match (common, factor.info().dtype) {
            (_, Dtype::F64) | (Some(Dtype::F64), _) => Dtype::F64,
            (None, own) => own,
            (Some(common), own) if common == own => own,
            _ => Dtype::F32,
        });
    }
    common.unwrap_or(Dtype::F32)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::tensor::{MemorySource, Shape};

    fn info(dims: &[u64], dtype: Dtype) -> TensorInfo {
        TensorInfo { dtype, shape: Shape::new(dims.to_vec()).unwrap() }
    }

    fn factor(dims: &[u64], first: f32) -> Factor {
        let mut source = MemorySource::new();
        let count: u64 = dims.iter().product();
        let raw = (0..count).flat_map(|i| (first + i as f32).to_le_bytes()).collect();
        source.insert("x", info(dims, Dtype::F32), raw).unwrap();
        let source: Arc<dyn TensorSource> = Arc::new(source);
        Factor::new(&source, "x").unwrap()
    }

    /// Any part of the tensor is what the whole has there, by the definition of a stack.
    #[test]
    fn every_range_is_a_part_of_the_whole() {
        for (blocks, lens) in [(1u64, vec![6u64, 4]), (5, vec![2, 3]), (4, vec![1, 1, 5]), (7, vec![3])] {
            let gains = [2.0, -1.0, 0.5];
            let runs: Vec<Run> = lens
                .iter()
                .zip(gains)
                .enumerate()
                .map(|(i, (len, gain))| Run { factor: factor(&[blocks * len], 100.0 * i as f32), gain, len: *len })
                .collect();
            let total: u64 = lens.iter().sum();
            let mut whole = Vec::new();
            for block in 0..blocks {
                for (i, (len, gain)) in lens.iter().zip(gains).enumerate() {
                    whole.extend((0..*len).map(|k| gain * (100.0 * i as f64 + (block * len + k) as f64)));
                }
            }
            let mut stacked = Stacked::new(Path::new("s"));
            stacked.insert("t".into(), info(&[blocks * total], Dtype::F64), runs);
            for start in 0..blocks * total {
                for end in start..=blocks * total {
                    let mut raw = vec![0; (end - start) as usize * 8];
                    stacked.read("t", start * 8, &mut raw).unwrap();
                    let values: Vec<f64> = raw.as_chunks::<8>().0.iter().map(|raw| f64::from_le_bytes(*raw)).collect();
                    assert_eq!(values, whole[start as usize..end as usize]);
                }
            }
        }
    }
}
