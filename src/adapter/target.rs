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
    /// An ungrouped convolution. W is `(out, in, x…)`, A is `(rank, in, x…)`, B is `(out, rank, 1…)` with one to three kernel sizes x;
    /// ΔW = s·B·A with everything behind the first dimension of A taken as one.
    Conv,
    /// A stack of E matrices, one for each expert, each as a linear layer of this orientation: W is `(E, out, in)` or `(E, in, out)`, A is
    /// `(E, rank, in)`, B is `(E, out, rank)`.
    Experts(Orientation),
    /// A weight of any number of dimensions as it is stored: `(out, …)`, with everything behind the first dimension taken as one. A is
    /// `(rank, in)`, B is `(out, rank)`. The shape is the base's (LoHa, LoKr).
    Flat,
    /// A linear layer whose A is `(rank, width)` with a width that several layers share; of it, the first `in` columns count (VeRA).
    Shared(Orientation),
}

impl Kind {
    /// The name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Linear(Orientation::OutIn) => "linear",
            Kind::Linear(Orientation::InOut) => "linear_transposed",
            Kind::Linear(Orientation::Undeclared) => "linear_undeclared",
            Kind::Embedding => "embedding",
            Kind::Conv => "conv",
            Kind::Flat => "flat",
            Kind::Shared(_) => "shared",
            Kind::Experts(Orientation::OutIn) => "experts_out_in",
            Kind::Experts(Orientation::InOut) => "experts_in_out",
            Kind::Experts(Orientation::Undeclared) => "experts_undeclared",
        }
    }

    /// The same kind of layer the other way round; `None` for kinds that have no orientation.
    pub(crate) fn orientation(self) -> Option<Orientation> {
        match self {
            Kind::Linear(orientation) | Kind::Experts(orientation) | Kind::Shared(orientation) => Some(orientation),
            Kind::Embedding | Kind::Conv | Kind::Flat => None,
        }
    }

    /// The kind with another orientation, if it has one.
    #[must_use]
    pub(crate) fn oriented(self, orientation: Orientation) -> Self {
        match self {
            Kind::Linear(_) => Kind::Linear(orientation),
            Kind::Experts(_) => Kind::Experts(orientation),
            Kind::Shared(_) => Kind::Shared(orientation),
            Kind::Embedding | Kind::Conv | Kind::Flat => self,
        }
    }
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
    /// The base tensor, named as the adapter's file implies (mostly `<module>.weight`). Binding may rename its prefix.
    pub tensor: String,
    /// The kind of layer.
    pub kind: Kind,
    /// Factor A, `(rank, in)` for a linear layer; other shapes by [`Kind`].
    pub a: Factor,
    /// Factor B, `(out, rank)` for a linear layer; other shapes by [`Kind`].
    pub b: Factor,
    /// Rank, alpha and scaling rule.
    pub scaling: Scaling,
    /// PEFT's `lora_bias`: an update of the layer's bias that is scaled like the weight's.
    pub bias: Option<BiasDelta>,
    /// DoRA's magnitudes, one for each output: the merged weight is `m / ‖W + ΔW‖ · (W + ΔW)`, with the norm over all inputs of an
    /// output (Liu et al. 2024, equation 5).
    pub magnitude: Option<Factor>,
    /// The singular values of scale · B·A, largest first, as many as the rank is. If they are stated, the columns of B are orthogonal to each
    /// other and so are the rows of A, but for the rounding of their values, and column i of B and row i of A belong to the i-th value: the
    /// first r of each are the best update of rank r. Not for stacks of experts.
    pub singular_values: Option<Vec<f64>>,
}

impl Target {
    /// `(out, in)` of the layer, of one expert for a stack: rows of B, columns of A. For a convolution, in counts the places of the
    /// kernel too.
    pub fn out_in(&self) -> (u64, u64) {
        let (a, b) = (self.a.info().shape.dims(), self.b.info().shape.dims());
        let dim = |dims: &[u64], i: usize| dims.get(i).copied().unwrap_or(0);
        match self.kind {
            Kind::Linear(_) | Kind::Embedding | Kind::Flat | Kind::Shared(_) => (dim(b, 0), dim(a, 1)),
            Kind::Conv => (dim(b, 0), a.iter().skip(1).product()),
            Kind::Experts(_) => (dim(b, 1), dim(a, 2)),
        }
    }

    /// How many matrices a stack of experts holds; `None` for anything else.
    pub fn experts(&self) -> Option<u64> {
        matches!(self.kind, Kind::Experts(_)).then(|| self.a.info().shape.dims().first().copied().unwrap_or(0))
    }

    /// The shape of the base tensor: what the factors and the kind demand; `None` where they leave it open.
    pub fn base_shape(&self) -> Option<Vec<u64>> {
        let (out, inner) = self.out_in();
        let a = self.a.info().shape.dims();
        let matrix = |orientation| match orientation {
            Orientation::OutIn => Some([out, inner]),
            Orientation::InOut => Some([inner, out]),
            Orientation::Undeclared => None,
        };
        match self.kind {
            Kind::Linear(orientation) => matrix(orientation).map(|dims| dims.to_vec()),
            Kind::Embedding => Some(vec![inner, out]),
            Kind::Flat | Kind::Shared(_) => None,
            Kind::Conv => Some(std::iter::once(out).chain(a.iter().skip(1).copied()).collect()),
            Kind::Experts(orientation) => {
                matrix(orientation).map(|[rows, cols]| vec![a.first().copied().unwrap_or(0), rows, cols])
            }
        }
    }

    /// Every tensor of the target.
    pub fn factors(&self) -> impl Iterator<Item = &Factor> {
        [Some(&self.a), Some(&self.b), self.bias.as_ref().map(|b| &b.delta), self.magnitude.as_ref()].into_iter().flatten()
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
    /// It is the parameter itself, under all names that it is tied to, and not a copy of one module (PEFT `save_embedding_layers`).
    pub shared: bool,
}

/// Rows of a tensor that are replaced: tokens that were trained (PEFT `trainable_token_indices`).
#[derive(Debug, Clone)]
pub struct RowReplacement {
    /// The base tensor, with at least two dimensions.
    pub tensor: String,
    /// Which rows, each once: row `i` of `with` takes the place of row `rows[i]`.
    pub rows: Vec<u64>,
    /// The new rows, `(rows, …)`.
    pub with: Factor,
}

/// A tensor that is multiplied row by row or column by column: IA3 (Liu et al. 2022, section 3.3).
#[derive(Debug, Clone)]
pub struct Rescaling {
    /// The base tensor: a weight `(out, in)`, or a bias `(out,)`.
    pub tensor: String,
    /// Whether there is a factor for each output or for each input.
    pub axis: Axis,
    /// Which way round the layer stores its weight.
    pub orientation: Orientation,
    /// Pass over a base that does not have the tensor: not every layer has a bias.
    pub if_there: bool,
    /// The factors, as many as there are outputs, or inputs.
    pub by: Factor,
}

/// What a factor of a [`Rescaling`] belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// An output of the layer.
    Output,
    /// An input of the layer.
    Input,
}
