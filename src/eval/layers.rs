//! The layers that all families are built of. A linear layer and an embedding know what adapters do to them and do it to their output, so the
//! weight itself stays the base's.

use std::sync::Arc;

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor};
use candle_nn::ops::{layer_norm_slow, rms_norm_slow};

use super::weights::Weights;
use crate::error::{Error, Result as Checked};
use crate::op::Unmerged;
use crate::rules;

/// Names of a model's tensors, below one prefix.
#[derive(Clone)]
pub(super) struct Names<'w, 'a> {
    weights: &'w Weights<'a>,
    prefix: String,
}

impl<'w, 'a> Names<'w, 'a> {
    /// From the top; of `prefixes`, the first under which there is `probe`, which is how a model with a head differs from one without.
    pub(super) fn new(weights: &'w Weights<'a>, prefixes: &[&str], probe: &str) -> Self {
        let has = |prefix: &&&str| weights.has(&format!("{prefix}{probe}"));
        let prefix = prefixes.iter().find(has).copied().unwrap_or_default().to_owned();
        Names { weights, prefix }
    }

    pub(super) fn root(&self) -> Self {
        Names { weights: self.weights, prefix: String::new() }
    }

    pub(super) fn at(&self, part: impl std::fmt::Display) -> Self {
        Names { weights: self.weights, prefix: format!("{}{part}.", self.prefix) }
    }

    /// How many rows a tensor has.
    pub(super) fn rows(&self, name: &str) -> Checked<usize> {
        let name = format!("{}{name}", self.prefix);
        Ok(self.weights.tensor(&name)?.dims().first().copied().unwrap_or(0))
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.weights.has(&format!("{}{name}", self.prefix))
    }

    /// A tensor that must have this shape.
    pub(super) fn tensor(&self, name: &str, dims: &[usize]) -> Checked<Tensor> {
        let name = format!("{}{name}", self.prefix);
        fits(&name, self.weights.tensor(&name)?, dims)
    }

    /// A linear layer `(out, inner)`, with a bias if there is one.
    pub(super) fn linear(&self, inner: usize, out: usize) -> Checked<Linear> {
        let name = format!("{}weight", self.prefix);
        let (weight, update) = self.weights.layer(&name)?;
        let weight = fits(&name, weight, &[out, inner])?;
        let bias = self.has("bias").then(|| self.tensor("bias", &[out])).transpose()?;
        Ok(Linear { weight, bias, update })
    }

    /// A table `(count, dim)`; a vocabulary may be longer than the config says.
    pub(super) fn embedding(&self, count: usize, dim: usize) -> Checked<Embedding> {
        let name = format!("{}weight", self.prefix);
        let (table, update) = self.weights.layer(&name)?;
        match table.dims() {
            [rows, cols] if *cols == dim && *rows >= count => Ok(Embedding { table, update }),
            _ => fits(&name, table, &[count, dim]).map(|table| Embedding { table, update }),
        }
    }

    pub(super) fn layer_norm(&self, dim: usize, eps: f64) -> Checked<Norm> {
        let bias = self.tensor("bias", &[dim])?;
        Ok(Norm { weight: self.tensor("weight", &[dim])?, bias: Some(bias), eps: eps as f32 })
    }

    pub(super) fn rms_norm(&self, dim: usize, eps: f64) -> Checked<Norm> {
        Ok(Norm { weight: self.tensor("weight", &[dim])?, bias: None, eps: eps as f32 })
    }
}

fn fits(name: &str, tensor: Tensor, dims: &[usize]) -> Checked<Tensor> {
    if tensor.dims() == dims {
        return Ok(tensor);
    }
    let message = format!("{name:?} is {:?}, and by config.json it is {dims:?}", tensor.dims());
    Err(Error::new(rules::RUNNABLE, message).tensor(name).help("config.json belongs to another model than the tensors"))
}

/// y = x·Wᵀ + b, and what adapters make of it.
pub(super) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    update: Option<Arc<Unmerged>>,
}

impl Linear {
    pub(super) fn outputs(&self) -> usize {
        self.weight.dims().first().copied().unwrap_or(0)
    }

    /// x is `(…, in)`, the result `(…, out)`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (out, inner) = self.weight.dims2()?;
        let flat = x.reshape(((), inner))?;
        let y = match &self.update {
            None => flat.matmul(&self.weight.t()?)?,
            Some(update) => self.updated(&flat, update)?,
        };
        let y = match &self.bias {
            None => y,
            Some(bias) => y.broadcast_add(bias)?,
        };
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = out;
        }
        y.reshape(dims)
    }

    fn updated(&self, x: &Tensor, update: &Arc<Unmerged>) -> Result<Tensor> {
        let x = x.contiguous()?;
        let y = match update.multiplies_inputs() {
            false => x.matmul(&self.weight.t()?)?,
            true => {
                let plain = x.flatten_all()?.to_vec1::<f32>()?;
                let scaled = update.inputs(&plain).into_owned();
                Tensor::from_vec(scaled, x.dims(), x.device())?.matmul(&self.weight.t()?)?
            }
        };
        y.inplace_op2(&x, &Apply(update))?;
        Ok(y)
    }

    /// The layer that has an embedding's table as its weight: y = x·Tᵀ.
    pub(super) fn tied(table: &Embedding) -> Self {
        Linear { weight: table.table.clone(), bias: None, update: None }
    }
}

/// Rows of a table.
pub(super) struct Embedding {
    table: Tensor,
    update: Option<Arc<Unmerged>>,
}

impl Embedding {
    /// ids are u32 `(…)`, the result is `(…, dim)`.
    pub(super) fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let dim = self.table.dim(1)?;
        let flat = ids.flatten_all()?;
        let rows = self.table.index_select(&flat, 0)?;
        let rows = match &self.update {
            None => rows,
            Some(update) => {
                let mut plain = rows.flatten_all()?.to_vec1::<f32>()?;
                update.embed(&flat.to_vec1::<u32>()?, &mut plain).map_err(candle_core::Error::wrap)?;
                Tensor::from_vec(plain, rows.dims(), rows.device())?
            }
        };
        let mut dims = ids.dims().to_vec();
        dims.push(dim);
        rows.reshape(dims)
    }

    /// Does an adapter update it?
    pub(super) fn is_updated(&self) -> bool {
        self.update.is_some()
    }
}

/// Layer norm with a bias, or RMS norm without.
pub(super) struct Norm {
    weight: Tensor,
    bias: Option<Tensor>,
    eps: f32,
}

impl Norm {
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.bias {
            Some(bias) => layer_norm_slow(x, &self.weight, bias, self.eps),
            None => rms_norm_slow(x, &self.weight, self.eps),
        }
    }
}

/// `(batch, time, heads · width)` to `(batch, heads, time, width)`.
pub(super) fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, time, all) = x.dims3()?;
    x.reshape((batch, time, heads, all / heads))?.transpose(1, 2)?.contiguous()
}

/// And back.
pub(super) fn join_heads(x: &Tensor) -> Result<Tensor> {
    let (batch, heads, time, width) = x.dims4()?;
    x.transpose(1, 2)?.reshape((batch, time, heads * width))
}

/// Adds what an adapter adds, in place: y is fresh and nobody else's.
struct Apply<'u>(&'u Unmerged);

impl InplaceOp2 for Apply<'_> {
    fn name(&self) -> &'static str {
        "unmerged-adapter"
    }

    fn cpu_fwd(&self, y: &mut CpuStorage, y_at: &Layout, x: &CpuStorage, x_at: &Layout) -> Result<()> {
        let (CpuStorage::F32(y), CpuStorage::F32(x)) = (y, x) else { candle_core::bail!("adapters are applied in f32") };
        let (Some((y_from, y_to)), Some((x_from, x_to))) = (y_at.contiguous_offsets(), x_at.contiguous_offsets()) else {
            candle_core::bail!("adapters are applied to contiguous rows")
        };
        match (y.get_mut(y_from..y_to), x.get(x_from..x_to)) {
            (Some(y), Some(x)) => self.0.linear(x, y).map_err(candle_core::Error::wrap),
            _ => candle_core::bail!("rows are out of bounds"),
        }
    }
}
