//! Weights that a base stores as codes of one byte and a scale for each block of them (`spec/adapter-model.md`, section 4.5): how a base tells
//! that a weight is one, and what the executor needs to know of it. Everything else that is packed is refused.

use std::sync::{Arc, Mutex};

use super::layout::Change;
use crate::checkpoint::Checkpoint;
use crate::error::Diagnostic;
use crate::rules;
use crate::tensor::{Dtype, TensorInfo, TensorSource, is_plain_float};

/// Block size of a base whose config states none: DeepSeek's, which transformers and vLLM take too.
const DEFAULT_BLOCK: (u64, u64) = (128, 128);
/// The `quant_method` of configs that mean this form.
const METHOD: &str = "fp8";
/// What the scales are called, after the name of the weight. In spite of its name, the first multiplies the codes too.
const BLOCK_SCALES: &str = "_scale_inv";
const ONE_SCALE: &str = "_scale";

/// How a weight is stored as codes and scales.
#[derive(Debug, Clone)]
pub(crate) struct Quantised<'a> {
    /// Rows and columns of the weight.
    pub(crate) shape: (u64, u64),
    /// Rows and columns of a block; all of the weight, if it has one scale.
    pub(crate) block: (u64, u64),
    /// The name of the scales, where they are in the base, and what they are.
    pub(crate) scales: String,
    pub(crate) shard: usize,
    pub(crate) begin: u64,
    pub(crate) info: TensorInfo,
    /// Which of the two tensors the change is of.
    pub(crate) role: Role<'a>,
    /// The new scale of a weight that has only one.
    pub(crate) one: OneScale,
}

/// The two tensors that a quantised weight consists of. Each is computed from the same blocks of both.
#[derive(Debug, Clone)]
pub(crate) enum Role<'a> {
    Codes,
    /// Of this weight.
    Scales(Arc<Change<'a>>),
}

/// The scale of a block after the merge.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scale {
    pub(crate) value: f64,
    /// Nothing is added to the block: its codes and its scale stay, bit for bit.
    pub(crate) kept: bool,
}

/// A cell for a scale that depends on all values of a tensor, so whoever needs it first computes it.
pub(crate) type OneScale = Arc<Mutex<Option<Scale>>>;

impl Quantised<'_> {
    /// Rows and columns of the scales.
    pub(crate) fn grid(&self) -> (u64, u64) {
        let (rows, cols) = self.shape;
        (rows.div_ceil(self.block.0), cols.div_ceil(self.block.1))
    }

    /// Has the weight one scale for all of it?
    pub(crate) fn is_one(&self) -> bool {
        self.grid() == (1, 1)
    }
}

/// Accepts a base tensor that an adapter adds to or multiplies: a plain float, or codes with their scales.
///
/// # Errors
/// `A-025`.
pub(super) fn accept(base: &Checkpoint, name: &str, info: &TensorInfo) -> Result<(), Diagnostic> {
    if is_plain_float(info.dtype) { Ok(()) } else { of(base, name, info).map(drop) }
}

/// How the base stores the weight `name`, which is no plain float.
///
/// # Errors
/// `A-025` if it is not stored as codes of E4M3 with scales that fit.
pub(super) fn of<'a>(base: &Checkpoint, name: &str, info: &TensorInfo) -> Result<Quantised<'a>, Diagnostic> {
    let refuse = |message: String| Diagnostic::new(rules::BASE_DTYPE, message).file(base.path()).tensor(name).help(UNPACKED_BASE);
    if info.dtype != Dtype::F8_E4M3 {
        return Err(packed_dtype(name, info, base));
    }
    let (in_blocks, alone) = (format!("{name}{BLOCK_SCALES}"), format!("{name}{ONE_SCALE}"));
    let (scales, of_scales) = match (base.info(&in_blocks), base.info(&alone)) {
        (Some(_), Some(_)) => return Err(refuse(format!("{name:?} has two sets of scales: {in_blocks:?} and {alone:?}"))),
        (Some(found), None) => (in_blocks, found),
        (None, Some(found)) => (alone, found),
        (None, None) => return Err(packed_dtype(name, info, base)),
    };
    if let Some(method) = base.config().quantization.as_deref().filter(|method| *method != METHOD) {
        return Err(refuse(format!("{name:?} is {} in the base, quantised by {method:?}: it cannot be merged into", info.dtype)));
    }
    if !matches!(of_scales.dtype, Dtype::F32 | Dtype::BF16) {
        return Err(refuse(format!("the scales {scales:?} are {}, and F32 or BF16 is known", of_scales.dtype)));
    }
    let Some(shape) = info.shape.matrix().filter(|(rows, cols)| rows.min(cols) > &0 && base.tied(name).is_none()) else {
        let message =
            format!("{name:?} is {} {} in the base, which is merged into as an untied matrix only", info.dtype, info.shape);
        return Err(refuse(message));
    };
    let stated = base.config().weight_block.filter(|_| scales.ends_with(BLOCK_SCALES));
    let one = of_scales.shape.elements() == 1 && stated.is_none();
    let block = if one { shape } else { stated.unwrap_or(DEFAULT_BLOCK) };
    let block = (block.0.clamp(1, shape.0), block.1.clamp(1, shape.1));
    let Some((shard, entry)) = base.locate(&scales).and_then(|i| Some((i, base.shards().get(i)?.file.entry(&scales)?))) else {
        return Err(packed_dtype(name, info, base));
    };
    let (begin, info, cell) = (entry.begin, of_scales.clone(), OneScale::default());
    let found = Quantised { shape, block, scales, shard, begin, info, role: Role::Codes, one: cell };
    if !found.scales.ends_with(BLOCK_SCALES) && !one {
        let what = format!("{:?} is {}, and only one scale, or one for each block, is known", found.scales, found.info.shape);
        return Err(refuse(what));
    }
    let single = found.is_one() && found.info.shape.elements() == 1;
    if !single && found.info.shape.matrix() != Some(found.grid()) {
        let ((rows, cols), (high, wide)) = (found.grid(), found.block);
        let what = format!(
            "{:?} is {} but blocks of {high} x {wide} of {name:?} have ({rows}, {cols}) scales",
            found.scales, found.info.shape
        );
        return Err(refuse(what));
    }
    Ok(found)
}

/// The weight that scales of this name would be of.
pub(super) fn weight_of(scales: &str) -> Option<&str> {
    scales.strip_suffix(BLOCK_SCALES).or_else(|| scales.strip_suffix(ONE_SCALE))
}

pub(super) const UNPACKED_BASE: &str = "merge into the unquantised base, then quantise the result";

/// The refusal of a dtype that nothing can be added to.
pub(super) fn packed_dtype(name: &str, info: &TensorInfo, base: &Checkpoint) -> Diagnostic {
    let message = format!("{name:?} is {} in the base: cannot merge into a packed or quantised dtype", info.dtype);
    Diagnostic::new(rules::BASE_DTYPE, message).file(base.path()).tensor(name).help(UNPACKED_BASE)
}
