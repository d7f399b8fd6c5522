//! The one way to make an [`Adapter`]: hand over the parts, get the adapter or every problem at once.

use std::collections::{BTreeMap, HashMap};

use super::{Adapter, BaseIdentity, Factor, Lineage, Replacement, Target};
use crate::error::{Diagnostic, Error, Result};
use crate::limits::Limits;
use crate::rules;
use crate::tensor::is_plain_float;

/// The parts of an adapter, not yet checked. Readers of dialects and programs that compute their factors fill it in.
#[derive(Debug, Clone, Default)]
pub struct AdapterParts {
    /// Where it was read from, for messages.
    pub label: String,
    /// `container`, `peft` or `memory`.
    pub dialect: &'static str,
    /// Low-rank updates, in any order.
    pub targets: Vec<Target>,
    /// Full tensors, in any order.
    pub replacements: Vec<Replacement>,
    /// What is known of the base.
    pub base: BaseIdentity,
    /// History, oldest first.
    pub lineage: Vec<Lineage>,
    /// Digests of the file's tensors as the file states them, by name; empty where the dialect has none. Stated, not yet checked.
    pub digests: BTreeMap<String, String>,
    /// The content root that the file states.
    pub content: Option<String>,
    /// The config of the dialect, verbatim (a JSON object).
    pub origin_config: Option<String>,
    /// What is worth saying but stops nobody.
    pub warnings: Vec<Diagnostic>,
}

/// A scale beyond this is taken for a mistake and warned about (catalogue row A10).
const HUGE_SCALE: f64 = 1e3;

impl Adapter {
    /// Checks the parts and makes the adapter.
    ///
    /// # Errors
    /// Every broken rule among `A-002` to `A-007`, `A-009` and `A-012`, at once.
    pub fn new(mut parts: AdapterParts, limits: &Limits) -> Result<Self> {
        parts.targets.sort_by(|x, y| x.tensor.cmp(&y.tensor));
        parts.replacements.sort_by(|x, y| x.tensor.cmp(&y.tensor));
        let mut problems = Vec::new();
        for target in &parts.targets {
            check_target(target, limits, &mut problems, &mut parts.warnings);
        }
        for replacement in &parts.replacements {
            check_dtype(&replacement.with, &mut problems);
        }
        check_unique(&parts, &mut problems);
        if parts.targets.is_empty() && parts.replacements.is_empty() {
            problems.push(Diagnostic::new(rules::ADAPTER_NOT_EMPTY, "no LoRA pairs in the file: nothing to apply"));
        }
        let label = parts.label.clone();
        Error::check(problems.into_iter().map(|p| if p.place().file.is_some() { p } else { p.file(&label) }).collect())?;
        Ok(Adapter { parts })
    }
}

fn check_target(target: &Target, limits: &Limits, problems: &mut Vec<Diagnostic>, warnings: &mut Vec<Diagnostic>) {
    let before = problems.len();
    check_dtype(&target.a, problems);
    check_dtype(&target.b, problems);
    check_shapes(target, problems);
    if problems.len() > before {
        return;
    }
    let (out, inner) = target.out_in();
    let rank = target.scaling.rank;
    if rank > limits.rank {
        problems.push(
            Diagnostic::new(
                rules::RANK_LIMIT,
                format!("rank {rank} of {:?} is over the limit of {}", target.tensor, limits.rank),
            )
            .tensor(target.a.name()),
        );
    } else if rank > out.min(inner) {
        let message = format!("rank {rank} of {:?} is more than its {out} by {inner} weight can hold", target.tensor);
        warnings.push(Diagnostic::new(rules::RANK_LIMIT, message).tensor(target.a.name()));
    }
    check_scaling(target, problems, warnings);
    if let Some(bias) = &target.bias {
        check_dtype(&bias.delta, problems);
        if bias.delta.info().shape.dims() != [out] {
            let message =
                format!("bias update {:?} is {} but the layer has {out} outputs", bias.delta.name(), bias.delta.info().shape);
            problems.push(Diagnostic::new(rules::FACTOR_SHAPES, message).tensor(bias.delta.name()));
        }
    }
}

fn check_dtype(factor: &Factor, problems: &mut Vec<Diagnostic>) {
    let dtype = factor.info().dtype;
    if !is_plain_float(dtype) {
        let message = format!("{:?} is {dtype}; factors are F64, F32, F16 or BF16", factor.name());
        problems.push(Diagnostic::new(rules::FACTOR_DTYPE, message).tensor(factor.name()));
    }
}

/// A is `(rank, in)`, B is `(out, rank)`, with one rank of at least 1.
fn check_shapes(target: &Target, problems: &mut Vec<Diagnostic>) {
    let (a, b) = (&target.a, &target.b);
    let shapes = format!("A {} and B {}", a.info().shape, b.info().shape);
    let mut problem = |rule, message: String, help: &str| {
        problems.push(Diagnostic::new(rule, format!("target {:?}: {message}", target.tensor)).tensor(a.name()).help(help));
    };
    let (Some((a_rank, inner)), Some((out, b_rank))) = (a.info().shape.matrix(), b.info().shape.matrix()) else {
        let empty = a.info().shape.elements() == 0 || b.info().shape.elements() == 0 || a.info().shape.dims().len() == 1;
        let help = if empty {
            "empty or flat factors are what ZeRO-3 and FSDP leave when shards were not gathered; save the adapter again"
        } else {
            "convolution and expert factors are not applied by this version"
        };
        return match empty {
            true => problem(rules::FACTOR_SHAPES, format!("{shapes} are not both matrices"), help),
            false => {
                problem(rules::METHOD_SUPPORTED, format!("{shapes} are factors of a convolution or of a stack of experts"), help)
            }
        };
    };
    if a_rank == b_rank && a_rank > 0 && out > 0 && inner > 0 {
        if a_rank != target.scaling.rank {
            problem(
                rules::RANK_AGREES,
                format!("{shapes} have rank {a_rank} but the file states rank {}", target.scaling.rank),
                "the file contradicts itself; export it again",
            );
        }
    } else if a_rank == 0 && b_rank == 0 {
        problem(rules::RANK_AGREES, format!("rank 0 ({shapes})"), "the target has no update; write the adapter again without it");
    } else if inner == out && a_rank != b_rank {
        problem(
            rules::RANK_AGREES,
            format!("{shapes} look transposed"),
            "A is (rank, in) and B is (out, rank); transpose both or swap them",
        );
    } else {
        problem(rules::RANK_AGREES, format!("{shapes} have different ranks"), "A is (rank, in) and B is (out, rank)");
    }
}

fn check_scaling(target: &Target, problems: &mut Vec<Diagnostic>, warnings: &mut Vec<Diagnostic>) {
    let alpha = target.scaling.alpha;
    let scale = target.scaling.effective();
    let diagnostic = |rule, message: String| Diagnostic::new(rule, message).tensor(&target.tensor);
    if alpha == 0.0 {
        let message = format!(
            "alpha of {:?} is 0, which is ambiguous: PEFT reads no effect, llama.cpp a scale of 1, kohya alpha = rank",
            target.tensor
        );
        problems.push(diagnostic(rules::ALPHA_SANE, message).help("write the alpha that was meant into the config"));
    } else if !alpha.is_finite() || !scale.is_finite() || scale == 0.0 {
        problems.push(diagnostic(rules::ALPHA_SANE, format!("alpha {alpha} of {:?} gives no usable scale", target.tensor)));
    } else if scale < 0.0 {
        let message = format!("alpha {alpha} of {:?} is negative", target.tensor);
        problems.push(
            diagnostic(rules::SCALE_SANE, message).help("to subtract an adapter, give it a negative weight: --adapter PATH:-1"),
        );
    } else if scale > HUGE_SCALE {
        warnings.push(diagnostic(rules::SCALE_SANE, format!("effective scale {scale} of {:?} is huge", target.tensor)));
    }
}

/// No base tensor may be updated twice, nor replaced twice. One replacement and one update of the same tensor are fine: the
/// replacement comes first (PEFT stores the embedding matrix beside its LoRA).
fn check_unique(parts: &AdapterParts, problems: &mut Vec<Diagnostic>) {
    let weights = parts.targets.iter().map(|t| (t.tensor.as_str(), t.a.name()));
    let biases = parts.targets.iter().filter_map(|t| t.bias.as_ref()).map(|b| (b.tensor.as_str(), b.delta.name()));
    let replacements = parts.replacements.iter().map(|r| (r.tensor.as_str(), r.with.name()));
    let mut check = |names: &mut dyn Iterator<Item = (&str, &str)>, what: &str| {
        let mut seen: HashMap<String, String> = HashMap::new();
        for (tensor, key) in names {
            if let Some(first) = seen.insert(tensor.to_owned(), key.to_owned()) {
                let message = format!("{tensor:?} is {what} twice, by {first:?} and by {key:?}");
                problems.push(Diagnostic::new(rules::TARGETS_UNIQUE, message).tensor(key));
            }
        }
    };
    check(&mut weights.chain(biases), "updated");
    check(&mut { replacements }, "replaced");
}
