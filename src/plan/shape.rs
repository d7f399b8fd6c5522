//! How the factors of a target lie on the base tensor: which of them is the left one, which is read transposed, and whether the
//! shapes agree exactly. `spec/adapter-model.md`, A-023 and A-024.

use crate::adapter::{Factor, Kind, Orientation, Target};
use crate::error::Diagnostic;
use crate::rules;
use crate::tensor::Shape;

/// A factor as the kernels want it, `(rows, rank)` on the left or `(rank, cols)` on the right.
#[derive(Debug, Clone)]
pub(crate) enum Panel<'a> {
    /// As stored.
    Direct(&'a Factor),
    /// Transposed.
    Transposed(&'a Factor),
    /// The single value 1: the left factor of a vector's update.
    One,
}

/// What one adapter adds to one tensor: `scale · left · right`.
#[derive(Debug, Clone)]
pub(crate) struct Contribution<'a> {
    /// Index of the adapter in the order given.
    pub(crate) adapter: usize,
    pub(crate) left: Panel<'a>,
    pub(crate) right: Panel<'a>,
    pub(crate) rank: u64,
    /// Weight times effective scale.
    pub(crate) scale: f64,
    /// It is the update of an embedding, which PEFT rounds by itself.
    pub(crate) embedding: bool,
}

/// Lays the factors of `target` on a base tensor of shape `base`. `contradicted` says that another target of the same adapter has
/// the opposite orientation of the declared one, so that a square cannot trust the declaration.
pub(super) fn fit<'a>(
    target: &'a Target,
    base: &Shape,
    name: &str,
    contradicted: bool,
) -> Result<(Panel<'a>, Panel<'a>), Diagnostic> {
    let (out, inner) = target.out_in();
    let direct = (Panel::Direct(&target.b), Panel::Direct(&target.a));
    let transposed = (Panel::Transposed(&target.a), Panel::Transposed(&target.b));
    let refuse = |rule, message: String| Diagnostic::new(rule, message).tensor(target.a.name());
    let Some((rows, cols)) = base.matrix() else {
        let message = format!("adapter target {name:?} is a matrix update ({out}, {inner}) but the base has {base}");
        return Err(refuse(rules::SHAPE_FITS, message).help("convolution and expert weights are not merged by this version"));
    };
    let as_out_in = (rows, cols) == (out, inner);
    let as_in_out = (rows, cols) == (inner, out);
    match target.kind {
        Kind::Embedding if as_in_out => return Ok(transposed),
        Kind::Linear(Orientation::OutIn) if as_out_in && as_in_out && !contradicted => return Ok(direct),
        Kind::Linear(Orientation::InOut) if as_out_in && as_in_out && !contradicted => return Ok(transposed),
        Kind::Linear(_) if as_out_in && as_in_out => {
            let why = if contradicted {
                "other targets, or the model type, contradict the declared orientation"
            } else {
                "the adapter does not declare its orientation"
            };
            let message = format!("{name:?} is square {base} and {why}");
            return Err(
                refuse(rules::ORIENTATION, message).help("state it: --fan-in-fan-out true for GPT-2's Conv1D, false for Linear")
            );
        }
        Kind::Linear(_) if as_out_in => return Ok(direct),
        Kind::Linear(_) if as_in_out => return Ok(transposed),
        _ => {}
    }
    let wanted = match target.kind {
        Kind::Embedding => (inner, out),
        _ => (out, inner),
    };
    let message = format!("adapter target {name:?} is ({}, {}) but the base has {base}", wanted.0, wanted.1);
    Err(refuse(rules::SHAPE_FITS, message).help(shape_help(wanted, (rows, cols))))
}

/// Model types whose layers are GPT-2's `Conv1D`. PEFT saves the `fan_in_fan_out` of whichever layer it wrapped last, so there a
/// declared `false` says nothing of a square weight (transformers 5.23, users of `pytorch_utils.Conv1D`).
const CONV1D_MODELS: &[&str] = &["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"];

/// Does the base's model type contradict a target that declares `nn.Linear`?
pub(super) fn contradicted_by_model(target: &Target, model_type: Option<&str>) -> bool {
    target.kind == Kind::Linear(Orientation::OutIn) && model_type.is_some_and(|model| CONV1D_MODELS.contains(&model))
}

/// A target whose base tensor is not square and lies the other way than declared.
pub(super) fn contradicts(target: &Target, base: &Shape) -> bool {
    let (out, inner) = target.out_in();
    match target.kind {
        Kind::Linear(Orientation::OutIn) => out != inner && base.matrix() == Some((inner, out)),
        Kind::Linear(Orientation::InOut) => out != inner && base.matrix() == Some((out, inner)),
        _ => false,
    }
}

/// What to say about two shapes that differ.
pub(super) fn shape_help(wanted: (u64, u64), found: (u64, u64)) -> &'static str {
    let near = |x: u64, y: u64| x != y && x.abs_diff(y) <= 512 && x.min(y) > 1000;
    if wanted.1 == found.1 && near(wanted.0, found.0) {
        "the vocabulary was resized or padded: use the base that the adapter was trained on, resized in the same way"
    } else {
        "this is not the base that the adapter was trained on, or the layer is fused there"
    }
}
