//! Which updates of several adapters belong to one tensor of the base, and whether they can.

use std::collections::{BTreeMap, HashSet};

use super::weights::Weights;
use crate::adapter::{Adapter, Kind, Orientation, Target};
use crate::error::{Diagnostic, Error, Result};
use crate::report::text::plural;
use crate::rules;
use crate::tensor::Dtype;

/// What is added to one tensor.
pub(in super::super) struct Sum {
    pub(in super::super) tensor: String,
    pub(in super::super) kind: Kind,
    /// At least one; in the order in which adapters are added, whatever the order was in which they were given.
    pub(in super::super) parts: Vec<Part>,
}

/// What one adapter adds.
pub(in super::super) struct Part {
    /// Its place among those that were given.
    pub(in super::super) adapter: usize,
    pub(in super::super) target: Target,
    /// Not zero.
    pub(in super::super) weight: f64,
}

impl Part {
    /// What multiplies B·A: the weight times the effective scale.
    pub(in super::super) fn scale(&self) -> f64 {
        self.weight * self.target.scaling.effective()
    }
}

impl Part {
    /// Has it factors of F64?
    pub(super) fn is_wide(&self) -> bool {
        [&self.target.a, &self.target.b].into_iter().any(|factor| factor.info().dtype == Dtype::F64)
    }
}

impl Sum {
    /// `(out, in)`, as [`Target::out_in`].
    pub(in super::super) fn out_in(&self) -> (u64, u64) {
        self.parts.first().map_or((0, 0), |part| part.target.out_in())
    }

    /// The number of matrices of a stack of experts; 1 of anything else.
    pub(in super::super) fn experts(&self) -> u64 {
        self.parts.first().and_then(|part| part.target.experts()).unwrap_or(1)
    }

    /// The sum of the ranks.
    pub(in super::super) fn rank(&self) -> u64 {
        self.parts.iter().map(|part| part.target.scaling.rank).sum()
    }
}

/// The sums, by the names of their tensors. `order` is that in which adapters are added.
///
/// # Errors
/// `A-020` if the names of two adapters differ by a prefix, `A-023`, `A-024` for updates that cannot be of one tensor, `P-007`, `A-010` for
/// those that a base is needed to settle: all of them at once.
pub(in super::super) fn align(adapters: &[&Adapter], order: &[usize], weights: &Weights<'_>) -> Result<Vec<Sum>> {
    let mut problems = Vec::new();
    for adapter in adapters {
        problems.extend(unsettled(adapter));
    }
    problems.extend(apart(adapters));
    let mut sums: BTreeMap<&str, Sum> = BTreeMap::new();
    for place in order {
        for target in adapters[*place].targets() {
            let weight = weights.of(*place, &target.tensor);
            if weight == 0.0 {
                continue;
            }
            let part = Part { adapter: *place, target: target.clone(), weight };
            let Some(sum) = sums.get_mut(target.tensor.as_str()) else {
                let sum = Sum { tensor: target.tensor.clone(), kind: target.kind, parts: vec![part] };
                sums.insert(&target.tensor, sum);
                continue;
            };
            match of_both(sum, &part.target) {
                Ok(kind) => {
                    sum.kind = kind;
                    sum.parts.push(part);
                }
                Err(problem) => {
                    let other = sum.parts.first().map(|first| adapters[first.adapter].label()).unwrap_or_default();
                    problems.push(problem.file(adapters[*place].label()).help(format!("the other one is {other}")));
                }
            }
        }
    }
    Error::check(problems)?;
    Ok(sums.into_values().collect())
}

/// What a base is needed to settle.
fn unsettled(adapter: &Adapter) -> Option<Diagnostic> {
    if let Some(why) = adapter.residual() {
        let message = format!("the initialisation is a part of the factors ({}), and would be added with them", why.message());
        let help = "take it out first: loratool convert --base BASE --recompute-residual";
        return Some(Diagnostic::new(rules::INIT_CHANGES_BASE, message).file(adapter.label()).help(help));
    }
    let shared = adapter.targets().iter().find(|target| matches!(target.kind, Kind::Shared(_)))?;
    let message = format!("which columns of A belong to {:?} is known by its base alone", shared.tensor);
    let diagnostic = Diagnostic::new(rules::METHOD_SUPPORTED, message).file(adapter.label()).tensor(&shared.tensor);
    Some(diagnostic.help("settle it first: loratool convert --base BASE"))
}

/// Adapters whose names have nothing in common but their ends: `layers.0.q.weight` here, `model.layers.0.q.weight` there.
fn apart(adapters: &[&Adapter]) -> Option<Diagnostic> {
    let (first, rest) = adapters.split_first()?;
    fn names(adapter: &Adapter) -> impl Iterator<Item = &str> {
        adapter.targets().iter().map(|target| target.tensor.as_str())
    }
    let ours: HashSet<&str> = names(first).collect();
    for other in rest {
        if names(other).any(|name| ours.contains(name)) {
            continue;
        }
        let is_end = |long: &str, short: &str| long.strip_suffix(short).is_some_and(|prefix| prefix.ends_with('.'));
        let of = |one| names(other).find(|two| is_end(one, two) || is_end(two, one)).map(|two| (one, two));
        // If the first has no counterpart, the others have none either.
        let pair = names(first).next().and_then(of);
        if let Some((one, two)) = pair {
            let message = format!("{one:?} of {} is called {two:?} here: no target has the same name in both", first.label());
            let (long, short) = if one.len() > two.len() { (one, two) } else { (two, one) };
            let help = format!("if they are of one model, pass --prefix {}=", long.strip_suffix(short).unwrap_or_default());
            return Some(Diagnostic::new(rules::SOME_TARGET, message).file(other.label()).tensor(two).help(help));
        }
    }
    None
}

/// The kind of a tensor that both can be updates of.
fn of_both(sum: &Sum, other: &Target) -> Result<Kind, Diagnostic> {
    let one = sum.kind;
    let refuse = |rule, message: String| Err(Diagnostic::new(rule, message).tensor(&other.tensor));
    let (out, inner) = other.out_in();
    if let (Kind::Experts(one), Kind::Experts(two)) = (one, other.kind)
        && one != two
        && out == inner
    {
        let message = format!(
            "which way round the square experts of {:?} lie, the adapters do not say in one way: say it of all with --expert-axes",
            other.tensor
        );
        return Err(Diagnostic::new(rules::ORIENTATION, message).tensor(&other.tensor));
    }
    let Some(kind) = kind(one, other.kind) else {
        let message =
            format!("{:?} is updated as {} by one adapter, and as {} by another", other.tensor, named(one), named(other.kind));
        return refuse(rules::ORIENTATION, message);
    };
    let (ours, theirs) = (sum.parts.first().map(|part| &part.target), other);
    // Of factors of one kind all dimensions but the rank are the same.
    let shape = |target: &Target| {
        let a = target.a.info().shape.dims();
        (target.out_in(), target.experts(), if target.kind == Kind::Conv { a.get(1..).map(<[u64]>::to_vec) } else { None })
    };
    let differs = ours.is_some_and(|ours| {
        let (mut ours, mut theirs) = (shape(ours), shape(theirs));
        if ours.2.is_none() || theirs.2.is_none() {
            (ours.2, theirs.2) = (None, None);
        }
        ours != theirs
    });
    if differs {
        let size = |target: &Target| format!("{:?}", target.out_in());
        let message = format!(
            "{:?} is {} (out, in) in one adapter, and {} in another: they are of different bases",
            other.tensor,
            ours.map(size).unwrap_or_default(),
            size(theirs)
        );
        return refuse(rules::SHAPE_FITS, message);
    }
    Ok(kind)
}

fn kind(one: Kind, other: Kind) -> Option<Kind> {
    match (one, other) {
        (one, other) if one == other => Some(one),
        (Kind::Linear(Orientation::Undeclared), Kind::Linear(known))
        | (Kind::Linear(known), Kind::Linear(Orientation::Undeclared)) => Some(Kind::Linear(known)),
        (Kind::Experts(Orientation::Undeclared), Kind::Experts(known))
        | (Kind::Experts(known), Kind::Experts(Orientation::Undeclared)) => Some(Kind::Experts(known)),
        // What is flat is as the base stores it, outputs first.
        (Kind::Flat, known @ (Kind::Conv | Kind::Linear(Orientation::OutIn)))
        | (known @ (Kind::Conv | Kind::Linear(Orientation::OutIn)), Kind::Flat) => Some(known),
        _ => None,
    }
}

fn named(kind: Kind) -> String {
    let of = |what: &str, orientation| match orientation {
        Orientation::OutIn => format!("{what} (out, in)"),
        Orientation::InOut => format!("{what} (in, out)"),
        Orientation::Undeclared => format!("{what} of either orientation"),
    };
    match kind {
        Kind::Linear(orientation) | Kind::Shared(orientation) => of("a matrix", orientation),
        Kind::Experts(orientation) => of("a stack of matrices", orientation),
        Kind::Embedding => "an embedding".to_owned(),
        Kind::Conv => "a convolution".to_owned(),
        Kind::Flat => "a weight as it is stored".to_owned(),
    }
}

/// How many updates each of so many adapters adds.
pub(super) fn counts(adapters: usize, sums: &[Sum]) -> Vec<u64> {
    let mut counts = vec![0; adapters];
    sums.iter().flat_map(|sum| &sum.parts).for_each(|part| counts[part.adapter] += 1);
    counts
}

/// Targets that nothing is added to, because their weights are zero.
pub(super) fn left_out(adapters: &[&Adapter], counts: &[u64], weights: &Weights<'_>) -> Vec<Diagnostic> {
    let of = |(place, adapter): (usize, &&Adapter)| {
        let whole = adapter.replacements().iter().map(|it| &it.tensor).chain(adapter.rows().iter().map(|it| &it.tensor));
        let beside = whole.chain(adapter.rescalings().iter().map(|it| &it.tensor));
        let beside = beside.filter(|tensor| weights.of(place, tensor) == 0.0).count() as u64;
        let count = adapter.targets().len() as u64 - counts[place] + beside;
        let message = match (count, weights.whole(place)) {
            (0, weight) if weight != 0.0 => return None,
            (_, 0.0) => "its weight is 0, so that it adds nothing".to_owned(),
            (count, _) => format!("{} with weight 0: what it has for them is not added", plural(count, "tensor")),
        };
        Some(Diagnostic::new(rules::ADAPTER_NOT_EMPTY, message).file(adapter.label()).help("leave it out if that is meant"))
    };
    adapters.iter().enumerate().filter_map(of).collect()
}
