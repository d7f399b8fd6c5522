//! What the user may decide about the output: its dtype, its files, its rounding. `Default` keeps what the base has and rounds to nearest.

use std::sync::Arc;

use crate::kernel::fusion::ByValue;
use crate::tensor::Dtype;

/// How the sum of a weight and its updates becomes a value of the output's dtype. `spec/adapter-model.md`, A-034 and section 4.3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Rounding {
    /// The nearest value, once, over all adapters (default).
    #[default]
    Nearest,
    /// As PEFT's `merge_and_unload()` on a CPU: sums in f32, and rounded after each adapter.
    Peft,
    /// As PEFT's `merge_and_unload(safe_merge=True)`, which rounds each update to the dtype before it adds it.
    PeftSafe,
    /// One of the two values around the sum, by chance, so that the expected value is the sum.
    Stochastic {
        /// The same seed gives the same bytes.
        seed: u64,
    },
}

/// What the output is like.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct OutputOptions {
    /// The dtype of all plain float tensors: F32, F16 or BF16. Default none: each keeps its own.
    pub dtype: Option<Dtype>,
    /// Bytes of tensors in one file; a tensor that is larger has a file of its own. Default none: the base's files.
    pub max_shard_bytes: Option<u64>,
    /// How values are rounded.
    pub rounding: Rounding,
    /// How several adapters become one update, if not as their sum.
    pub(crate) mixing: Option<Arc<Mixing>>,
}

/// How the updates of several adapters become one, value by value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Mixing {
    pub(crate) method: ByValue,
    /// The content root of each adapter.
    pub(crate) roots: Vec<String>,
}
