//! Activation functions by the names of `transformers` (`ACT2FN`), and the two operations that candle has only without a gradient, composed
//! of such that have one: what trains and what predicts is the same arithmetic.

use candle_core::{D, Result, Tensor};

/// An activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    Gelu,
    GeluTanh,
    Relu,
    Silu,
}

impl Act {
    /// By the name in `config.json`.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "gelu" => Act::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Act::GeluTanh,
            "relu" => Act::Relu,
            "silu" | "swish" => Act::Silu,
            _ => return None,
        })
    }

    pub(super) fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Act::Gelu => x.gelu_erf(),
            Act::GeluTanh => x.gelu(),
            Act::Relu => x.relu(),
            Act::Silu => x.silu(),
        }
    }
}

/// exp(x) / Σ exp(x) along the last dimension.
pub(super) fn softmax(x: &Tensor) -> Result<Tensor> {
    let x = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    x.broadcast_div(&x.sum_keepdim(D::Minus1)?)
}
