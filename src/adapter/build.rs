//! The one way to make an [`Adapter`]: hand over the parts, get the adapter or every problem at once.

use std::collections::{BTreeMap, HashMap};

use super::{Adapter, BaseIdentity, Factor, Kind, Lineage, Replacement, Rescaling, RowReplacement, Target};
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
    /// Rows of tensors that are replaced, in any order.
    pub rows: Vec<RowReplacement>,
    /// Tensors that are multiplied, in any order.
    pub rescalings: Vec<Rescaling>,
    /// Ranges of the base's layers that stand one after the other in the model that was trained; empty if they are as stored.
    pub replication: Vec<(u64, u64)>,
    /// Why the published base is not the one that was trained on, if it is not: the initialisation took something out of it.
    pub residual: Option<(Diagnostic, Removed)>,
    /// What is known of the base.
    pub base: BaseIdentity,
    /// History, oldest first.
    pub lineage: Vec<Lineage>,
    /// Digests of the file's tensors as the file states them, by name; empty where the dialect has none. Stated, not yet checked.
    pub digests: BTreeMap<String, String>,
    /// The content root that the file states.
    pub content: Option<String>,
    /// The content root of the adapter that this one was made of for one base; records know it by that.
    pub made_of: Option<String>,
    /// The config of the dialect, verbatim (a JSON object).
    pub origin_config: Option<String>,
    /// What is worth saying but stops nobody.
    pub warnings: Vec<Diagnostic>,
}

/// What an initialisation took out of the published base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Removed {
    /// As many of the largest singular components as the rank is: PiSSA (Meng et al. 2024, equation 4).
    LeadingComponents,
    /// s times the product of the first columns of Q and the first rows of R: OLoRA (Büyükakyüz 2024, section 3).
    LeadingColumns,
    /// As many of the smallest singular components as the rank is: KaSA (Wang et al. 2024).
    TrailingComponents,
    /// Something that the base does not tell: random, or from data.
    Unknown,
}

/// A scale beyond this is taken for a mistake and warned about (catalogue row A10).
const HUGE_SCALE: f64 = 1e3;

impl Adapter {
    /// Checks the parts and makes the adapter.
    ///
    /// # Errors
    /// Every broken rule among `A-002` to `A-007`, `A-009`, `A-010` and `A-012`, at once.
    pub fn new(mut parts: AdapterParts, limits: &Limits) -> Result<Self> {
        parts.targets.sort_by(|x, y| x.tensor.cmp(&y.tensor));
        parts.replacements.sort_by(|x, y| x.tensor.cmp(&y.tensor));
        parts.rows.sort_by(|x, y| x.tensor.cmp(&y.tensor));
        parts.rescalings.sort_by(|x, y| x.tensor.cmp(&y.tensor));
        let mut problems = Vec::new();
        for target in &parts.targets {
            check_target(target, limits, &mut problems, &mut parts.warnings);
        }
        for replacement in &parts.replacements {
            check_dtype(&replacement.with, &mut problems);
        }
        for rows in &parts.rows {
            check_rows(rows, &mut problems);
        }
        for rescaling in &parts.rescalings {
            check_dtype(&rescaling.by, &mut problems);
        }
        check_unique(&parts, &mut problems);
        if parts.targets.is_empty() && parts.replacements.is_empty() && parts.rows.is_empty() && parts.rescalings.is_empty() {
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
    check_singular_values(target, problems);
    if let Some(magnitude) = &target.magnitude {
        check_magnitude(target, magnitude, out, problems);
    }
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

/// The sizes of factors that have the number of dimensions that their kind demands.
struct Sizes {
    a_rank: u64,
    inner: u64,
    out: u64,
    b_rank: u64,
}

fn sizes(target: &Target) -> Option<Sizes> {
    let (a, b) = (target.a.info().shape.dims(), target.b.info().shape.dims());
    let (out, inner) = target.out_in();
    match (target.kind, a, b) {
        (Kind::Linear(_) | Kind::Embedding | Kind::Flat | Kind::Shared(_), &[a_rank, _], &[_, b_rank]) => {
            Some(Sizes { a_rank, inner, out, b_rank })
        }
        (Kind::Experts(_), &[experts, a_rank, _], &[others, _, b_rank]) if experts == others && experts > 0 => {
            Some(Sizes { a_rank, inner, out, b_rank })
        }
        (Kind::Conv, &[a_rank, ref kernel @ ..], &[_, b_rank, ref ones @ ..])
            if (2..=4).contains(&kernel.len()) && kernel.len() == ones.len() + 1 && ones.iter().all(|&one| one == 1) =>
        {
            Some(Sizes { a_rank, inner, out, b_rank })
        }
        _ => None,
    }
}

/// A and B have the dimensions of their kind (section 1.1 of `spec/adapter-model.md`), with one rank of at least 1.
fn check_shapes(target: &Target, problems: &mut Vec<Diagnostic>) {
    let (a, b) = (&target.a, &target.b);
    let shapes = format!("A {} and B {}", a.info().shape, b.info().shape);
    let mut problem = |rule, message: String, help: &str| {
        problems.push(Diagnostic::new(rule, format!("target {:?}: {message}", target.tensor)).tensor(a.name()).help(help));
    };
    let Some(Sizes { a_rank, inner, out, b_rank }) = sizes(target) else {
        let empty = a.info().shape.elements() == 0 || b.info().shape.elements() == 0 || a.info().shape.dims().len() == 1;
        return if empty {
            let help =
                "empty or flat factors are what ZeRO-3 and FSDP leave when shards were not gathered; save the adapter again";
            problem(rules::FACTOR_SHAPES, format!("{shapes} are not the factors of a layer"), help);
        } else {
            let help = "linear layers have A (rank, in) and B (out, rank); convolutions A (rank, in, k…) and B (out, rank, 1…)";
            problem(rules::FACTOR_SHAPES, format!("{shapes} are not the factors of any known layer"), help);
        };
    };
    if a_rank > 0 && (out == 0 || inner == 0) {
        let help = "empty or flat factors are what ZeRO-3 and FSDP leave when shards were not gathered; save the adapter again";
        problem(rules::FACTOR_SHAPES, format!("{shapes} are not the factors of a layer"), help);
    } else if a_rank == b_rank && a_rank > 0 {
        if a_rank != target.scaling.rank {
            problem(
                rules::RANK_AGREES,
                format!("{shapes} have rank {a_rank} but the file states rank {}", target.scaling.rank),
                "the file contradicts itself; export it again",
            );
        }
    } else if a_rank == 0 && b_rank == 0 {
        problem(rules::RANK_AGREES, format!("rank 0 ({shapes})"), "the target has no update; write the adapter again without it");
    } else if target.kind == Kind::Conv && b_rank > 0 && a_rank.checked_rem(b_rank) == Some(0) {
        problem(
            rules::METHOD_SUPPORTED,
            format!(
                "{shapes} are factors of a convolution in {} groups, whose A has all inputs and whose weight has not",
                a_rank / b_rank
            ),
            "no weight of the grouped layer equals it, and PEFT refuses to merge it too; use it with PEFT",
        );
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

/// One magnitude for each output.
fn check_magnitude(target: &Target, magnitude: &Factor, out: u64, problems: &mut Vec<Diagnostic>) {
    check_dtype(magnitude, problems);
    let shape = &magnitude.info().shape;
    if let Kind::Experts(_) = target.kind {
        let message = format!("{:?} gives magnitudes to a stack of experts, which no method does", magnitude.name());
        problems.push(Diagnostic::new(rules::METHOD_SUPPORTED, message).tensor(magnitude.name()));
    } else if shape.elements() != out || !shape.dims().contains(&out) {
        let message = format!("{:?} is {shape} but the layer has {out} outputs, each with a magnitude", magnitude.name());
        problems.push(Diagnostic::new(rules::FACTOR_SHAPES, message).tensor(magnitude.name()));
    }
}

/// As many new rows as there are indices, and none twice.
fn check_rows(rows: &RowReplacement, problems: &mut Vec<Diagnostic>) {
    check_dtype(&rows.with, problems);
    let name = rows.with.name();
    let (shape, count) = (&rows.with.info().shape, rows.rows.len() as u64);
    if shape.dims().len() < 2 || shape.dims().first() != Some(&count) || count == 0 {
        let message = format!("{name:?} is {shape} but {count} rows of {:?} are to be replaced", rows.tensor);
        let help = "the config is that of another adapter, or its list of tokens was edited";
        problems.push(Diagnostic::new(rules::FACTOR_SHAPES, message).tensor(name).help(help));
    }
    let mut seen = std::collections::HashSet::new();
    if let Some(twice) = rows.rows.iter().find(|row| !seen.insert(**row)) {
        let message = format!("row {twice} of {:?} is replaced twice by {name:?}", rows.tensor);
        problems.push(Diagnostic::new(rules::TARGETS_UNIQUE, message).tensor(name));
    }
}

/// As many as the rank is, from the largest to the smallest, and none for experts.
fn check_singular_values(target: &Target, problems: &mut Vec<Diagnostic>) {
    let Some(values) = &target.singular_values else { return };
    let falls =
        values.is_sorted_by(|before, after| before >= after) && values.iter().all(|value| (0.0..f64::INFINITY).contains(value));
    let mut problem = |rule, what: &str| {
        let message = format!("the singular values of {:?} are {what}", target.tensor);
        problems.push(Diagnostic::new(rule, message).tensor(&target.tensor).help("they are informative: leave them out"));
    };
    if let Kind::Experts(_) = target.kind {
        problem(rules::MANIFEST_FIELDS, "those of a stack of experts, which has none");
    } else if !falls {
        problem(rules::MANIFEST_FIELDS, "not numbers of 0 or more, the largest first");
    } else if values.len() as u64 != target.scaling.rank {
        problem(rules::MANIFEST_SHAPES, &format!("{} for rank {}", values.len(), target.scaling.rank));
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

/// No base tensor may be updated twice, nor replaced twice. One replacement and one update of the same tensor, or rows of it, are fine:
/// the replacement comes first (PEFT stores the embedding matrix beside its LoRA, or beside the tokens that were trained).
fn check_unique(parts: &AdapterParts, problems: &mut Vec<Diagnostic>) {
    let weights = parts.targets.iter().map(|t| (t.tensor.as_str(), t.a.name()));
    let biases = parts.targets.iter().filter_map(|t| t.bias.as_ref()).map(|b| (b.tensor.as_str(), b.delta.name()));
    let whole = parts.replacements.iter().map(|r| (r.tensor.as_str(), r.with.name()));
    let rows = parts.rows.iter().map(|r| (r.tensor.as_str(), r.with.name()));
    let rescaled = parts.rescalings.iter().map(|r| (r.tensor.as_str(), r.by.name()));
    let mut check = |names: &mut dyn Iterator<Item = (&str, &str)>, what: &str| {
        let mut seen: HashMap<String, String> = HashMap::new();
        for (tensor, key) in names {
            if let Some(first) = seen.insert(tensor.to_owned(), key.to_owned()) {
                let message = format!("{tensor:?} is {what} twice, by {first:?} and by {key:?}");
                problems.push(Diagnostic::new(rules::TARGETS_UNIQUE, message).tensor(key));
            }
        }
    };
    check(&mut weights.chain(biases).chain(rescaled), "updated");
    check(&mut { whole }, "replaced");
    check(&mut { rows }, "replaced in part");
}
