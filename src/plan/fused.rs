//! Experts that the adapter has as stacks and the base one by one, or the other way round: transformers 5 holds them as stacks in memory
//! and writes them one by one, as its version 4 held them. Both are the same numbers in another order, so updates carry over exactly.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use crate::adapter::{Factor, Kind, Orientation, Scaling, ScalingRule, Target};
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Error};
use crate::rules;
use crate::tensor::{Derived, Dtype, Shape, TensorInfo, TensorSource, Window, read_all};

/// What a family calls its experts (transformers 5.23, `conversion_mapping.py`).
struct Family {
    /// The module that holds the stacks.
    stacks: &'static str,
    /// The module of the single experts.
    single: &'static str,
    /// The parts of a stack's parameter, from the first row on.
    parts: &'static [(&'static str, &'static [&'static str])],
}

const FAMILIES: &[Family] = &[
    // Mixtral, MiniMax
    Family {
        stacks: "mlp.experts",
        single: "block_sparse_moe.experts",
        parts: &[("gate_up_proj", &["w1", "w3"]), ("down_proj", &["w2"])],
    },
    // Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek, GLM-4-MoE
    Family {
        stacks: "mlp.experts",
        single: "mlp.experts",
        parts: &[("gate_up_proj", &["gate_proj", "up_proj"]), ("down_proj", &["down_proj"])],
    },
];

/// One expert's part of a stack.
struct Part {
    tensor: String,
    expert: u64,
    /// Place among the parts of the parameter, and how many there are.
    part: u64,
    parts: u64,
}

/// The tensors in the base of which a stack consists, if the base has its experts one by one.
fn parts_of(base: &Checkpoint, stack: &str, experts: Range<u64>) -> Option<Vec<Part>> {
    FAMILIES.iter().find_map(|family| {
        let (module, parameter) = stack.rsplit_once('.')?;
        let above = module.strip_suffix(family.stacks)?;
        let (_, parts) = family.parts.iter().find(|(name, _)| *name == parameter)?;
        let name = |expert: u64, part: &str| format!("{above}{}.{expert}.{part}.weight", family.single);
        base.info(&name(experts.start, parts[0]))?;
        let all = experts.clone().flat_map(|expert| parts.iter().enumerate().map(move |(i, part)| (expert, i as u64, *part)));
        let parts_count = parts.len() as u64;
        Some(all.map(|(expert, part, called)| Part { tensor: name(expert, called), expert, part, parts: parts_count }).collect())
    })
}

/// Has the base the experts of this stack one by one?
pub(super) fn is_apart(base: &Checkpoint, stack: &str) -> bool {
    parts_of(base, stack, 0..1).is_some()
}

/// The targets of single experts that a target of a stack amounts to.
///
/// # Errors
/// `A-021` for an expert that the base does not have, `A-023` for one that the adapter does not have, or of another shape.
pub(super) fn split(base: &Checkpoint, target: &Target, name: &str) -> Option<Result<Vec<Target>, Diagnostic>> {
    let experts = target.experts()?;
    // Counted in the base first, which is as long as its header.
    parts_of(base, name, 0..1)?;
    let count = (0..=experts).take_while(|expert| parts_of(base, name, *expert..expert + 1).is_some()).count() as u64;
    let parts = parts_of(base, name, 0..experts.min(count))?;
    if count != experts {
        let (rule, found) = match count > experts {
            true => (rules::SHAPE_FITS, "more".to_owned()),
            false => (rules::EVERY_TARGET, count.to_string()),
        };
        let message = format!("{name:?} has {experts} experts, and the base has {found}");
        let problem = Diagnostic::new(rule, message).tensor(target.a.name());
        return Some(Err(problem.help("this is not the base that the adapter was trained on")));
    }
    Some(split_into(base, target, name, parts))
}

fn split_into(base: &Checkpoint, target: &Target, name: &str, parts: Vec<Part>) -> Result<Vec<Target>, Diagnostic> {
    let refuse = |rule, message: String| Diagnostic::new(rule, message).tensor(target.a.name());
    let ((out, inner), rank) = (target.out_in(), target.scaling.rank);
    let mut targets = Vec::with_capacity(parts.len());
    for Part { tensor, expert, part, parts } in parts {
        let Some((rows, cols)) = base.info(&tensor).and_then(|info| info.shape.matrix()) else {
            let message = format!("{name:?} has {} experts, and the base has no {tensor:?}", target.experts().unwrap_or(0));
            return Err(refuse(rules::EVERY_TARGET, message).help("use the base that the adapter was trained on"));
        };
        let whole = rows * parts;
        let orientation = match (whole == out && cols == inner, whole == inner && cols == out, target.kind.orientation()) {
            (false, true, _) | (true, true, Some(Orientation::InOut)) => Orientation::InOut,
            (true, false, _) => Orientation::OutIn,
            // None of the families has its experts transposed, so PEFT since 0.19.1 takes them for (E, out, in).
            (true, true, _) => Orientation::OutIn,
            (false, false, _) => {
                let message =
                    format!("an expert of {name:?} is ({out}, {inner}) but the base has {parts} of ({rows}, {cols}) for it");
                return Err(refuse(rules::SHAPE_FITS, message).help("this is not the base that the adapter was trained on"));
            }
        };
        let (a, b) = match orientation {
            Orientation::InOut => (
                view(&target.a, [rank, rows], expert * rank * inner + part * rows, inner),
                view(&target.b, [out, rank], expert * out * rank, rank),
            ),
            _ => (
                view(&target.a, [rank, inner], expert * rank * inner, inner),
                view(&target.b, [rows, rank], (expert * out + part * rows) * rank, rank),
            ),
        };
        let (a, b) = a.zip(b).ok_or_else(|| refuse(rules::SHAPE_FITS, format!("{name:?} is too large")))?;
        targets.push(Target { tensor, kind: Kind::Linear(orientation), a, b, ..target.clone() });
    }
    Ok(targets)
}

pub(super) fn view(factor: &Factor, dims: [u64; 2], first: u64, stride: u64) -> Option<Factor> {
    let info = TensorInfo { dtype: factor.info().dtype, shape: Shape::new(dims.to_vec())? };
    let name = factor.name().to_owned();
    let source: Arc<dyn TensorSource> = Arc::new(Window { of: Arc::clone(factor.source()), name, first, stride, info });
    Factor::new(&source, factor.name())
}

/// Where a target of a single expert lies in a base that has stacks: the stack, the expert, the part and the number of parts.
pub(super) fn in_stack(base: &Checkpoint, tensor: &str) -> Option<(String, u64, u64, u64)> {
    let (path, called) = tensor.strip_suffix(".weight")?.rsplit_once('.')?;
    let (module, expert) = path.rsplit_once('.')?;
    let expert: u64 = expert.parse().ok()?;
    FAMILIES.iter().find_map(|family| {
        let above = module.strip_suffix(family.single)?;
        let (parameter, parts) = family.parts.iter().find(|(_, parts)| parts.contains(&called))?;
        let stack = format!("{above}{}.{parameter}", family.stacks);
        base.info(&stack)?;
        let part = parts.iter().position(|part| *part == called)?;
        Some((stack, expert, part as u64, parts.len() as u64))
    })
}

/// Targets of single experts, gathered by the stack of the base that they lie in.
#[derive(Default)]
pub(super) struct Gathered<'a> {
    stacks: BTreeMap<String, Vec<Single<'a>>>,
}

struct Single<'a> {
    target: &'a Target,
    expert: u64,
    part: u64,
    parts: u64,
}

/// A target for a stack, and the names of the tensors that it is made of.
pub(super) struct Stacked {
    pub(super) target: Target,
    /// The effective scale that all of its parts have.
    pub(super) scale: f64,
    pub(super) tensors: Vec<String>,
}

impl<'a> Gathered<'a> {
    /// Takes a target in, if its place in the base is a stack, and names that.
    pub(super) fn take(&mut self, base: &Checkpoint, tensor: &str, target: &'a Target) -> Option<String> {
        let (stack, expert, part, parts) =
            in_stack(base, tensor).filter(|_| matches!(target.kind, Kind::Linear(_) | Kind::Flat))?;
        self.stacks.entry(stack.clone()).or_default().push(Single { target, expert, part, parts });
        Some(stack)
    }

    /// One target for each stack: A with the factors of all parts below each other, B with theirs on the diagonal, and zeros where an
    /// expert or a part has none or a smaller rank.
    pub(super) fn stacked(self, base: &Checkpoint) -> Vec<Result<Stacked, Diagnostic>> {
        self.stacks.into_iter().map(|(stack, singles)| stacked(base, stack, &singles)).collect()
    }
}

fn stacked(base: &Checkpoint, stack: String, singles: &[Single<'_>]) -> Result<Stacked, Diagnostic> {
    let Some(first) = singles.first() else { unreachable!("a stack is gathered with its first target") };
    let refuse = |target: &Target, rule, message: String| Diagnostic::new(rule, message).tensor(target.a.name());
    let found = base.info(&stack).map(|info| info.shape.dims().to_vec()).unwrap_or_default();
    let (out, inner) = first.target.out_in();
    let parts = first.parts;
    let &[experts, rows, cols] = &found[..] else {
        let message = format!("{stack:?} is no stack of experts in the base");
        return Err(refuse(first.target, rules::SHAPE_FITS, message));
    };
    let scaling = first.target.scaling;
    let mut rank = 1;
    let mut seen = HashSet::new();
    for Single { target, expert, part, .. } in singles {
        let dtypes = [target.a.info().dtype, target.b.info().dtype];
        let why = if target.out_in() != (out, inner) || rows != out * parts || cols != inner || *expert >= experts {
            Some((rules::SHAPE_FITS, "its shape or number does not fit the stack"))
        } else if target.scaling.effective() != scaling.effective() {
            Some((rules::METHOD_SUPPORTED, "its scale is not that of the others, and a stack has one"))
        } else if dtypes != [first.target.a.info().dtype, first.target.b.info().dtype] {
            Some((rules::METHOD_SUPPORTED, "its dtype is not that of the others"))
        } else if !seen.insert((*expert, *part)) {
            Some((rules::TARGETS_UNIQUE, "another target lands there too"))
        } else if target.magnitude.is_some() || target.bias.is_some() {
            Some((rules::METHOD_SUPPORTED, "magnitudes and bias updates of single experts have no place in a stack"))
        } else {
            None
        };
        if let Some((rule, why)) = why {
            let message = format!(
                "{:?} goes into {stack:?} {} of the base, but {why}",
                target.tensor,
                base.info(&stack).map_or_else(String::new, |info| info.shape.to_string())
            );
            return Err(refuse(target, rule, message));
        }
        rank = rank.max(target.scaling.rank);
    }
    let total = rank * parts;
    let info = |dtype: Dtype, dims: Vec<u64>| Shape::new(dims).map(|shape| TensorInfo { dtype, shape });
    let a_info = info(first.target.a.info().dtype, vec![experts, total, inner]);
    let b_info = info(first.target.b.info().dtype, vec![experts, rows, total]);
    let Some((a_info, b_info)) = a_info.zip(b_info) else {
        return Err(refuse(first.target, rules::SHAPE_FITS, format!("the factors of {stack:?} would be too large")));
    };
    let pieces: Vec<Piece> = singles
        .iter()
        .map(|s| Piece {
            a: s.target.a.clone(),
            b: s.target.b.clone(),
            rank: s.target.scaling.rank,
            expert: s.expert,
            part: s.part,
        })
        .collect();
    let mut derived = Derived::new(first.target.a.source());
    let of_a: Arc<[Piece]> = pieces.into();
    let of_b = Arc::clone(&of_a);
    let layout = Sizes { rank, total, rows, inner, out };
    let (len_a, len_b) = (a_info.bytes(), b_info.bytes());
    derived.insert("A", a_info, move |_| stacked_a(&of_a, layout, len_a));
    derived.insert("B", b_info, move |_| stacked_b(&of_b, layout, len_b));
    let derived: Arc<dyn TensorSource> = Arc::new(derived);
    let (Some(a), Some(b)) = (Factor::new(&derived, "A"), Factor::new(&derived, "B")) else { unreachable!("both were inserted") };
    let scale = scaling.effective();
    let scaling = Scaling { rank: total, alpha: scaling.effective() * total as f64, rule: ScalingRule::Standard };
    let names = singles.iter().flat_map(|single| [single.target.a.name().to_owned(), single.target.b.name().to_owned()]);
    let target = Target {
        tensor: stack,
        kind: Kind::Experts(Orientation::OutIn),
        a,
        b,
        scaling,
        bias: None,
        magnitude: None,
        singular_values: None,
    };
    Ok(Stacked { target, scale, tensors: names.collect() })
}

/// The factors of one expert's part.
struct Piece {
    a: Factor,
    b: Factor,
    rank: u64,
    expert: u64,
    part: u64,
}

#[derive(Clone, Copy)]
struct Sizes {
    rank: u64,
    total: u64,
    rows: u64,
    inner: u64,
    out: u64,
}

fn stacked_a(pieces: &[Piece], sizes: Sizes, len: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    for Piece { a, expert, part, .. } in pieces {
        let read = read_all(&**a.source(), a.name())?;
        let size = a.info().bytes() / a.info().shape.elements().max(1);
        let at = ((expert * sizes.total + part * sizes.rank) * sizes.inner * size) as usize;
        bytes[at..at + read.len()].copy_from_slice(&read);
    }
    Ok(bytes)
}

fn stacked_b(pieces: &[Piece], sizes: Sizes, len: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    for Piece { b, rank, expert, part, .. } in pieces {
        let read = read_all(&**b.source(), b.name())?;
        let size = b.info().bytes() / b.info().shape.elements().max(1);
        for (row, line) in (0..sizes.out).zip(read.chunks_exact((rank * size).max(1) as usize)) {
            let row = expert * sizes.rows + part * sizes.out + row;
            let at = ((row * sizes.total + part * sizes.rank) * size) as usize;
            bytes[at..at + line.len()].copy_from_slice(line);
        }
    }
    Ok(bytes)
}
