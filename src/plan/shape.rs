//! How the factors of a target lie on the base tensor: which of them is the left one, which is read transposed, and whether the
//! shapes agree exactly; and what the merged values are multiplied by. `spec/adapter-model.md`, A-023 and A-024.

use crate::adapter::{Factor, Kind, Orientation, Target};
use crate::error::Diagnostic;
use crate::rules;
use crate::tensor::Shape;

/// A factor as the kernels want it, `(rows, rank)` on the left or `(rank, cols)` on the right. Of a stack, each slice is read so.
#[derive(Debug, Clone)]
pub(crate) enum Panel {
    /// As stored.
    Direct(Factor),
    /// Transposed.
    Transposed(Factor),
    /// The single value 1: the left factor of a vector's update.
    One,
}

impl Panel {
    /// The factor, if there is one.
    pub(crate) fn factor(&self) -> Option<&Factor> {
        match self {
            Panel::Direct(factor) | Panel::Transposed(factor) => Some(factor),
            Panel::One => None,
        }
    }
}

/// What one adapter adds to one tensor: `scale · left · right`; and by what it multiplies the sum.
#[derive(Debug, Clone)]
pub(crate) struct Contribution {
    /// Index of the adapter in the order given.
    pub(crate) adapter: usize,
    /// The adapter's tensors that are applied with it, which are its factors or what these are made of.
    pub(crate) tensors: Vec<String>,
    pub(crate) left: Panel,
    pub(crate) right: Panel,
    /// 0 if nothing is added.
    pub(crate) rank: u64,
    /// Weight times effective scale.
    pub(crate) scale: f64,
    /// Dimensions of the tensor that count its rows: 1, or 2 for a stack, whose first dimension counts the slices.
    pub(crate) lead: usize,
    /// What the sum is multiplied by.
    pub(crate) gain: Option<Gain>,
    /// PEFT rounds the update by itself before it adds it, as for embeddings and stacks of experts.
    pub(crate) rounded_apart: bool,
}

impl Contribution {
    /// Every factor that it reads.
    pub(crate) fn factors(&self) -> impl Iterator<Item = &Factor> {
        let gain = self.gain.as_ref().map(|gain| &gain.by);
        [self.left.factor(), self.right.factor(), gain].into_iter().flatten()
    }
}

/// A factor for each row or column of a tensor.
#[derive(Debug, Clone)]
pub(crate) struct Gain {
    pub(crate) by: Factor,
    pub(crate) along: Along,
    pub(crate) over: Over,
}

/// What has a factor of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Along {
    Rows,
    Cols,
}

/// What the factors are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Over {
    /// The norm of the row or column of base plus update: DoRA.
    Norm,
    /// Nothing: IA3.
    One,
}

/// How the factors of a target lie on a base tensor.
#[derive(Debug)]
pub(super) struct Fit {
    pub(super) left: Panel,
    pub(super) right: Panel,
    pub(super) lead: usize,
    /// What an output of the layer is in the tensor.
    pub(super) outputs: Along,
}

/// Lays the factors of `target` on a base tensor of shape `base`. `contradicted` says that another target of the same adapter has
/// the opposite orientation of the declared one, so that a square cannot trust the declaration.
/// `of_experts` is how the model stores stacks of experts, for an adapter that leaves that to the model.
pub(super) fn fit(
    target: &Target,
    base: &Shape,
    name: &str,
    contradicted: bool,
    of_experts: Option<Orientation>,
) -> Result<Fit, Diagnostic> {
    let (out, inner) = target.out_in();
    let refuse = |rule, message: String| Diagnostic::new(rule, message).tensor(target.a.name());
    let lead = if matches!(target.kind, Kind::Experts(_)) { 2 } else { 1 };
    let (a, b) = (|| target.a.clone(), || target.b.clone());
    let direct = || Fit { left: Panel::Direct(b()), right: Panel::Direct(a()), lead, outputs: Along::Rows };
    let transposed = || Fit { left: Panel::Transposed(a()), right: Panel::Transposed(b()), lead, outputs: Along::Cols };
    if target.kind == Kind::Flat {
        let fits = base.dims().len() > 1 && base.split(1) == (out, inner);
        return if fits { Ok(direct()) } else { Err(unlike(target, name, &[out, inner], base)) };
    }
    let Some(orientation) = target.kind.orientation() else {
        let wanted = target.base_shape().unwrap_or_default();
        return match target.kind {
            _ if base.dims() != wanted => Err(unlike(target, name, &wanted, base)),
            Kind::Embedding => Ok(transposed()),
            _ => Ok(direct()),
        };
    };
    let shape = |orientation| target_shape(target, orientation);
    let (as_out_in, as_in_out) = (base.dims() == shape(Orientation::OutIn), base.dims() == shape(Orientation::InOut));
    match (as_out_in, as_in_out, orientation) {
        (true, true, Orientation::OutIn) if !contradicted => Ok(direct()),
        (true, true, Orientation::InOut) if !contradicted => Ok(transposed()),
        (true, true, Orientation::Undeclared) if lead == 2 && of_experts == Some(Orientation::OutIn) => Ok(direct()),
        (true, true, Orientation::Undeclared) if lead == 2 && of_experts == Some(Orientation::InOut) => Ok(transposed()),
        (true, true, _) => {
            let why = match target.kind {
                Kind::Experts(_) => "the adapter does not say which way round its experts are",
                _ if contradicted => "other targets, or the model type, contradict the declared orientation",
                _ => "the adapter does not declare its orientation",
            };
            let help = match target.kind {
                Kind::Experts(_) => {
                    "state it: --expert-axes out-in or in-out, for experts stored as (E, out, in) or (E, in, out)"
                }
                _ => "state it: --fan-in-fan-out true for GPT-2's Conv1D, false for Linear",
            };
            Err(refuse(rules::ORIENTATION, format!("{name:?} is square {base} and {why}")).help(help))
        }
        (true, false, _) => Ok(direct()),
        (false, true, _) => Ok(transposed()),
        (false, false, _) => {
            let wanted = match orientation {
                Orientation::InOut if base.dims().len() != 2 => vec![inner, out],
                _ => shape(Orientation::OutIn),
            };
            Err(unlike(target, name, &wanted, base))
        }
    }
}

fn target_shape(target: &Target, orientation: Orientation) -> Vec<u64> {
    Target { kind: target.kind.oriented(orientation), ..target.clone() }.base_shape().unwrap_or_default()
}

fn unlike(target: &Target, name: &str, wanted: &[u64], base: &Shape) -> Diagnostic {
    let dims: Vec<String> = wanted.iter().map(u64::to_string).collect();
    let message = format!("adapter target {name:?} is ({}) but the base has {base}", dims.join(", "));
    let help = match (wanted, base.dims()) {
        (&[out, inner], &[rows, cols]) => shape_help((out, inner), (rows, cols)),
        (&[_, inner, ref kernel @ ..], &[_, cols, ref found @ ..])
            if target.kind == Kind::Conv && kernel == found && cols > 0 && inner % cols == 0 && inner > cols =>
        {
            "the convolution has groups, and no weight of it equals the update; use the adapter with PEFT"
        }
        _ => "this is not the base that the adapter was trained on, or the layer is stored in another form there",
    };
    Diagnostic::new(rules::SHAPE_FITS, message).tensor(target.a.name()).help(help)
}

/// Model types whose layers are GPT-2's `Conv1D`. PEFT saves the `fan_in_fan_out` of whichever layer it wrapped last, so there a
/// declared `false` says nothing of a square weight (transformers 5.23, users of `pytorch_utils.Conv1D`).
const CONV1D_MODELS: &[&str] = &["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"];

/// Models whose experts are stored as `(E, in, out)` (transformers 5.23, `use_experts_implementation(is_transposed=True)`).
const TRANSPOSED_EXPERTS: &[&str] = &["gpt_oss", "aria", "aria_text", "openai_privacy_filter"];

/// How a model stores stacks of experts.
pub(crate) fn experts_of(model_type: &str) -> Orientation {
    if TRANSPOSED_EXPERTS.contains(&model_type) { Orientation::InOut } else { Orientation::OutIn }
}

/// Does the base's model type contradict a target that declares `nn.Linear`?
pub(super) fn contradicted_by_model(target: &Target, model_type: Option<&str>) -> bool {
    target.kind == Kind::Linear(Orientation::OutIn) && model_type.is_some_and(is_conv1d)
}

/// Are the layers of a model of this type GPT-2's `Conv1D`?
pub(crate) fn is_conv1d(model_type: &str) -> bool {
    CONV1D_MODELS.contains(&model_type)
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
