//! An adapter as an operator: what a layer adds to the output of its own weight, so that one base in memory serves any number of adapters.
//! For programs that run models; in f32, with sums in an order of their own, so unlike a merge it is not the same in every bit everywhere.

use std::borrow::Cow;

use crate::adapter::{Factor, Orientation};
use crate::error::{Error, Result};
use crate::exec::{float_of, values};
use crate::kernel::add_thin;
use crate::plan::{Along, Change, Contribution, Origin, Over, Panel, Plan, experts_of, is_conv1d};
use crate::rules;
use crate::tensor::read_all;

/// What the adapters of a plan do to one weight, unmerged: with y = x·Wᵀ computed by whoever holds W,
/// [`linear`](Unmerged::linear) makes of y what it would be with the merged weight, `x·(W + Σ s·B·A)ᵀ` (Hu et al. 2021, equation 3).
///
/// | kind | the forward pass |
/// |---|---|
/// | linear, either way round; LoHa, LoKr, VeRA, AdaLoRA | [`linear`](Unmerged::linear) |
/// | stack of experts | [`expert`](Unmerged::expert), with the rows that go to it |
/// | embedding | [`embed`](Unmerged::embed) |
/// | convolution | [`linear`](Unmerged::linear) on unfolded patches, `(places, in · kernel)` |
/// | DoRA | the same methods; y is multiplied by m / ‖W + ΔW‖ afterwards |
/// | IA3 of inputs | y must be computed from [`inputs`](Unmerged::inputs) of x |
///
/// x, y, A and B are f32, row-major; factors of other dtypes are rounded to f32 once, when the operator is made, with the scale in B. A bias is
/// no part of it: add it, with its own change ([`merge_tensor`](crate::merge_tensor)), to what comes out.
#[derive(Debug, Clone)]
pub struct Unmerged {
    tensor: String,
    out: usize,
    inner: usize,
    experts: usize,
    steps: Vec<Step>,
}

/// What one adapter does.
#[derive(Debug, Clone)]
struct Step {
    /// 0 if nothing is added.
    rank: usize,
    /// `(experts, rank, inner)`.
    a: Vec<f32>,
    /// `(experts, out, rank)`, with the scale.
    b: Vec<f32>,
    gain: Option<Multiplied>,
}

/// What is multiplied after the update is added, and by what.
#[derive(Debug, Clone)]
enum Multiplied {
    /// A factor for each output of each expert.
    Outputs(Vec<f32>),
    /// A factor for each input, of one matrix.
    Inputs(Vec<f32>),
}

impl Unmerged {
    /// What the plan does to `tensor`, if a layer can do it to its output.
    ///
    /// # Errors
    /// `U-001` if the plan leaves the tensor as it is, replaces rows of it, mixes updates by value, or changes a vector;
    /// `A-008`, `E-001`, `E-004` when factors are read, and with DoRA the weight.
    pub fn new(plan: &Plan<'_>, tensor: &str) -> Result<Self> {
        let refuse =
            |why: &str| Err(Error::new(rules::ARGUMENT, format!("{tensor:?} has no unmerged form: {why}")).tensor(tensor));
        let Some(change) = plan.changes().find(|change| change.name == tensor) else {
            return refuse("no adapter changes it");
        };
        if change.contributions.is_empty() {
            return refuse("no adapter updates it");
        }
        if !change.patches.is_empty() {
            return refuse("rows of it are replaced");
        }
        if change.mixing.is_some() {
            return refuse("the updates are mixed value by value");
        }
        let dims = change.info.shape.dims();
        let lead = change.contributions.first().map_or(1, |one| one.lead);
        if dims.len() <= lead {
            return refuse("it is a vector");
        }
        let lies: Vec<bool> = change.contributions.iter().map(|one| is_in_out(plan, change, one)).collect();
        let in_out = lies.first().copied().unwrap_or(false);
        if lies.contains(&!in_out) {
            return refuse("one adapter takes it for an embedding and another for a linear layer");
        }
        let (all_rows, cols) = change.info.shape.split(lead);
        let rows = change.slice_rows();
        let (out, inner) = if in_out { (cols, rows) } else { (rows, cols) };
        let (out, inner, experts) = (size(out), size(inner), size(all_rows / rows.max(1)));
        let mut unmerged = Unmerged { tensor: tensor.to_owned(), out, inner, experts, steps: Vec::new() };
        for contribution in &change.contributions {
            let step = unmerged.step(plan, change, contribution, in_out)?;
            unmerged.steps.push(step);
        }
        Ok(unmerged)
    }

    /// `(out, in)` of the layer, of one expert for a stack.
    pub fn out_in(&self) -> (usize, usize) {
        (self.out, self.inner)
    }

    /// Bytes that the factors take in memory.
    pub fn bytes(&self) -> usize {
        self.steps.iter().map(|step| (step.a.len() + step.b.len()) * size_of::<f32>()).sum()
    }

    /// Does an adapter multiply inputs, so that W is not to be applied to x itself?
    pub fn multiplies_inputs(&self) -> bool {
        self.steps.iter().any(|step| matches!(step.gain, Some(Multiplied::Inputs(_))))
    }

    /// What W is to be applied to instead of x `(n, in)`, where an adapter multiplies inputs; else x itself.
    pub fn inputs<'x>(&self, x: &'x [f32]) -> Cow<'x, [f32]> {
        self.steps.iter().rev().fold(Cow::Borrowed(x), |x, step| step.inputs(x))
    }

    /// Makes x·W'ᵀ of y = [`inputs`](Self::inputs)(x)·Wᵀ. x is `(n, in)`, y is `(n, out)` without a bias.
    ///
    /// # Errors
    /// `U-001` if x and y are not so long.
    pub fn linear(&self, x: &[f32], y: &mut [f32]) -> Result<()> {
        self.expert(0, x, y)
    }

    /// [`linear`](Self::linear) of one matrix of a stack.
    ///
    /// # Errors
    /// `U-001` if x and y are not so long, or there is no such expert.
    pub fn expert(&self, expert: usize, x: &[f32], y: &mut [f32]) -> Result<()> {
        self.check(expert, x.len() / self.inner.max(1), x.len() % self.inner.max(1), y.len())?;
        // The last step sees x, the one before it what the last one makes of x.
        let mut seen = Vec::with_capacity(self.steps.len());
        let mut x = Cow::Borrowed(x);
        for step in self.steps.iter().rev() {
            x = step.inputs(x);
            seen.push(x.clone());
        }
        for (step, x) in self.steps.iter().zip(seen.iter().rev()) {
            let (a, b) = step.factors(expert, self.inner, self.out);
            add_thin(x, a, b, y, (self.inner, step.rank, self.out));
            step.outputs(expert, self.out, y);
        }
        Ok(())
    }

    /// Makes rows `ids` of the merged table of y, those rows of the table `(n, out)` as it is.
    ///
    /// # Errors
    /// `U-001` if y is not so long, an id is beyond the vocabulary, or inputs are multiplied.
    pub fn embed(&self, ids: &[u32], y: &mut [f32]) -> Result<()> {
        self.check(0, ids.len(), 0, y.len())?;
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.inner) {
            return Err(self.refuse(format!("token {id} is beyond the vocabulary of {}", self.inner)));
        }
        for step in &self.steps {
            if matches!(step.gain, Some(Multiplied::Inputs(_))) {
                return Err(self.refuse("inputs of an embedding cannot be multiplied".to_owned()));
            }
            let (a, b) = step.factors(0, self.inner, self.out);
            let u: Vec<f32> = ids.iter().flat_map(|id| (0..step.rank).map(|k| a[k * self.inner + *id as usize])).collect();
            let identity: Vec<f32> = (0..step.rank * step.rank).map(|i| f32::from(u8::from(i % (step.rank + 1) == 0))).collect();
            add_thin(&u, &identity, b, y, (step.rank, step.rank, self.out));
            step.outputs(0, self.out, y);
        }
        Ok(())
    }

    fn check(&self, expert: usize, rows: usize, rest: usize, y: usize) -> Result<()> {
        if rest != 0 || y != rows * self.out {
            let message = format!("x is no (n, {}) or y, of {y} values, no (n, {})", self.inner, self.out);
            return Err(self.refuse(message));
        }
        if expert >= self.experts {
            return Err(self.refuse(format!("expert {expert} of {}", self.experts)));
        }
        Ok(())
    }

    fn refuse(&self, message: String) -> Error {
        Error::new(rules::ARGUMENT, message).tensor(&self.tensor)
    }

    fn step(&self, plan: &Plan<'_>, change: &Change<'_>, one: &Contribution, in_out: bool) -> Result<Step> {
        let rank = size(one.rank);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let (of_a, of_b) = if in_out { (&one.left, &one.right) } else { (&one.right, &one.left) };
        if let (Some(of_a), Some(of_b), true) = (of_a.factor(), of_b.factor(), rank > 0) {
            // Stacks in the layout of old versions of PEFT have A on the side of the outputs.
            let as_stored = matches!(one.left, Panel::Transposed(_)) == in_out;
            let wide = values(of_a)?;
            if as_stored {
                // A that layers share is wider than the layer (VeRA).
                let width = wide.len() / (rank * self.experts).max(1);
                a = wide.chunks_exact(width.max(1)).flat_map(|row| row.iter().take(self.inner)).copied().collect();
                b = values(of_b)?;
            } else {
                a = turned(&wide, self.inner, rank);
                b = turned(&values(of_b)?, rank, self.out);
            }
            b.iter_mut().for_each(|value| *value *= one.scale);
        }
        let gain = match &one.gain {
            None => None,
            Some(gain) => {
                let by = values(&gain.by)?;
                let of_outputs = (gain.along == Along::Rows) != in_out;
                Some(match (gain.over, of_outputs) {
                    (Over::Norm, _) => {
                        Multiplied::Outputs(self.over_norms(&origin(plan, change)?, in_out, (&a, &b, rank), &by)?)
                    }
                    (Over::One, true) => Multiplied::Outputs(narrowed(&by)),
                    (Over::One, false) => Multiplied::Inputs(narrowed(&by)),
                })
            }
        };
        Ok(Step { rank, a: narrowed(&a), b: narrowed(&b), gain })
    }

    /// m / ‖W + ΔW‖ for each output, W being the weight as it was before any adapter (Liu et al. 2024, equation 5).
    fn over_norms(
        &self,
        weight: &[f64],
        in_out: bool,
        (a, b, rank): (&[f64], &[f64], usize),
        magnitudes: &[f64],
    ) -> Result<Vec<f32>> {
        let (out, inner) = (self.out, self.inner);
        let mut gains = Vec::with_capacity(magnitudes.len());
        for (o, magnitude) in magnitudes.iter().enumerate() {
            let value = |i: usize| if in_out { weight[i * out + o] } else { weight[o * inner + i] };
            let mut row: Vec<f64> = (0..inner).map(value).collect();
            add_row(&mut row, a, b[o * rank..(o + 1) * rank].iter().copied());
            let norm = row.iter().map(|value| value * value).sum::<f64>().sqrt();
            gains.push((magnitude / norm) as f32);
        }
        match gains.iter().all(|gain| gain.is_finite()) {
            true => Ok(gains),
            false => {
                Err(Error::new(rules::RESULT_FINITE, format!("an output of {:?} has the norm 0", self.tensor))
                    .tensor(&self.tensor))
            }
        }
    }
}

impl Step {
    fn factors(&self, expert: usize, inner: usize, out: usize) -> (&[f32], &[f32]) {
        let (a, b) = (self.rank * inner, out * self.rank);
        (&self.a[expert * a..(expert + 1) * a], &self.b[expert * b..(expert + 1) * b])
    }

    fn inputs<'x>(&self, x: Cow<'x, [f32]>) -> Cow<'x, [f32]> {
        let Some(Multiplied::Inputs(by)) = &self.gain else { return x };
        let mut x = x.into_owned();
        x.chunks_exact_mut(by.len().max(1)).for_each(|row| row.iter_mut().zip(by).for_each(|(value, by)| *value *= by));
        Cow::Owned(x)
    }

    fn outputs(&self, expert: usize, out: usize, y: &mut [f32]) {
        let Some(Multiplied::Outputs(by)) = &self.gain else { return };
        // Of a stack there is a factor for each output of each expert, or one for all experts.
        let by = by.get(expert * out..(expert + 1) * out).unwrap_or(by);
        y.chunks_exact_mut(out.max(1)).for_each(|row| row.iter_mut().zip(by).for_each(|(value, by)| *value *= by));
    }
}

/// Rows of a batch that belong to different adapters, as serving programs have them: row i of x goes to `operators[choice[i]]`, or stays as it
/// is with `None`. Rows of one adapter that lie next to each other are computed together, so sort them (Chen et al. 2023, section 4).
///
/// # Errors
/// As [`Unmerged::linear`]; `U-001` if there are not as many choices as rows, or no such operator, or an operator that multiplies inputs.
pub fn linear_by_row(operators: &[&Unmerged], choice: &[Option<usize>], x: &[f32], y: &mut [f32]) -> Result<()> {
    let refuse = |message: String| Err(Error::new(rules::ARGUMENT, message));
    let rows = choice.len();
    if rows == 0 || !x.len().is_multiple_of(rows) || !y.len().is_multiple_of(rows) {
        return refuse(format!("{} values of x and {} of y are no {rows} rows", x.len(), y.len()));
    }
    let (inner, out) = (x.len() / rows, y.len() / rows);
    let mut at = 0;
    for run in choice.chunk_by(|one, other| one == other) {
        let (from, to) = (at, at + run.len());
        at = to;
        let Some(index) = run.first().copied().flatten() else { continue };
        let Some(operator) = operators.get(index) else { return refuse(format!("operator {index} of {}", operators.len())) };
        if operator.multiplies_inputs() {
            return refuse(format!(
                "{:?}: inputs are multiplied, so its rows cannot share a product with others",
                operator.tensor
            ));
        }
        let (Some(x), Some(y)) = (x.get(from * inner..to * inner), y.get_mut(from * out..to * out)) else { continue };
        operator.linear(x, y)?;
    }
    Ok(())
}

/// Does the layer store its weight as `(in, out)`: GPT-2's `Conv1D`, an embedding, or stacks of experts of such a model?
fn is_in_out(plan: &Plan<'_>, change: &Change<'_>, contribution: &Contribution) -> bool {
    let model = plan.base().config().model_type.as_deref().unwrap_or_default();
    let lies_so = matches!(contribution.left, Panel::Transposed(_));
    match contribution.lead {
        2 => experts_of(model) == Orientation::InOut,
        _ if contribution.rank == 0 => is_conv1d(model) && change.info.shape.dims().len() == 2,
        // A matrix of one expert is an nn.Linear, whatever the stack is that the adapter has for all of them.
        _ => lies_so && !change.name.contains(".experts."),
    }
}

/// Matrices `(rows, cols)`, one after the other, as `(cols, rows)`.
fn turned(matrices: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    let matrices = matrices.chunks_exact((rows * cols).max(1));
    matrices.flat_map(|one| (0..cols).flat_map(move |c| (0..rows).map(move |r| one[r * cols + c]))).collect()
}

/// The values that a change starts from.
fn origin(plan: &Plan<'_>, change: &Change<'_>) -> Result<Vec<f64>> {
    let factor: &Factor = match &change.origin {
        Origin::Adapter(factor) => factor,
        Origin::Base { info, .. } => {
            let bytes = read_all(plan.base(), &change.name)?;
            let float = float_of(info.dtype);
            let float = float
                .ok_or_else(|| Error::new(rules::BASE_DTYPE, format!("{:?} is packed", change.name)).tensor(&change.name))?;
            let mut wide = vec![0.0; bytes.len() / float.size()];
            float.widen(&bytes, &mut wide);
            return Ok(wide);
        }
    };
    values(factor)
}

/// Adds Σ bₖ·Aₖ to a row.
fn add_row(row: &mut [f64], a: &[f64], b: impl Iterator<Item = f64>) {
    for (b, a) in b.zip(a.chunks_exact(row.len().max(1))) {
        row.iter_mut().zip(a).for_each(|(value, a)| *value += b * a);
    }
}

fn narrowed(wide: &[f64]) -> Vec<f32> {
    wide.iter().map(|value| *value as f32).collect()
}

/// A count of values that are in memory.
fn size(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
