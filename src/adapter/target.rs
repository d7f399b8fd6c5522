//! A target: one base tensor that the adapter changes by a low-rank update; and a replacement: one that it replaces.

use super::{Factor, Scaling};

/// How a layer uses its weight, as far as the update depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// A matrix product. W is `(out, in)` and ΔW = s·B·A, or `(in, out)` and ΔW = s·(B·A)ᵀ, as the orientation says.
    Linear(Orientation),
    /// A lookup table. W is `(vocab, dim)`, A is `(rank, vocab)`, B is `(dim, rank)`, ΔW = s·(B·A)ᵀ.
    Embedding,
}

/// Which way round a linear layer stores its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orientation {
    /// `(out, in)`: `nn.Linear`.
    OutIn,
    /// `(in, out)`: GPT-2's `Conv1D`, PEFT's `fan_in_fan_out`.
    InOut,
    /// The file does not say. Binding decides by the shape of the base tensor, and refuses squares.
    Undeclared,
}

/// One low-rank update of one base tensor.
#[derive(Debug, Clone)]
pub struct Target {
    /// The base tensor, named as the adapter's file implies (`<module>.weight`). Binding may rename its prefix.
    pub tensor: String,
    /// The kind of layer.
    pub kind: Kind,
    /// Factor A, `(rank, in)`.
    pub a: Factor,
    /// Factor B, `(out, rank)`.
    pub b: Factor,
    /// Rank, alpha and scaling rule.
    pub scaling: Scaling,
    /// PEFT's `lora_bias`: an update of the layer's bias that is scaled like the weight's.
    pub bias: Option<BiasDelta>,
}

impl Target {
    /// `(out, in)` of the layer: rows of B, columns of A.
    pub fn out_in(&self) -> (u64, u64) {
        let dim = |f: &Factor, i: usize| f.info().shape.dims().get(i).copied().unwrap_or(0);
        (dim(&self.b, 0), dim(&self.a, 1))
    }
}

/// An update of a bias: `b + scale · delta`.
#[derive(Debug, Clone)]
pub struct BiasDelta {
    /// The base tensor, `(out,)`.
    pub tensor: String,
    /// The update, `(out,)`, before scaling.
    pub delta: Factor,
}

/// A tensor that takes the place of a base tensor: `modules_to_save`, or a bias that was trained.
#[derive(Debug, Clone)]
pub struct Replacement {
    /// The base tensor.
    pub tensor: String,
    /// What replaces it, of the same shape.
    pub with: Factor,
}
