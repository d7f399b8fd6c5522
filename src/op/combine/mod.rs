//! `combine`: several adapters as one. The sum is exact: factors are put side by side, and A and B of different adapters are never added to
//! each other, which would add products of one's B with another's A. A lower rank is the best one, by the singular values of the whole, and
//! says what it costs before anything is written.

mod align;
mod base;
mod measure;
mod method;
mod mixed;
mod options;
mod stacked;
mod wanted;
mod weights;

use std::path::Path;

use serde_json::{Value, json};

use super::crew;
use super::digests::{content, verify};
use super::lineage::name;
use super::rank::RankRule;
use super::resize::{Cut, ResizeOptions, cut};
use super::spool::Spool;
use super::write;
use crate::adapter::{Adapter, AdapterParts, BaseIdentity, Lineage, LineageInput, Target};
use crate::error::{Diagnostic, Error, Result};
use crate::exec::{self, Progress};
use crate::io::{Overwrite, check_output};
use crate::op::ConvertTo;
use crate::plan::Weighted;
use crate::report::{CombineReport, CombinedAdapter, CombinedTarget, Note};
use crate::rules;

use align::Sum;
pub use method::CombineMethod;
pub use options::{CombineOptions, LayerWeight, PartsPolicy};
use wanted::Layout;
use weights::Weights;

/// Several adapters as one, before it is written.
pub struct Combination {
    adapter: Adapter,
    report: CombineReport,
    base: BaseIdentity,
    step: Lineage,
    inputs: Vec<Adapter>,
}

/// Combines adapters and writes the result. `progress` counts the bytes of factors that are read, then those that are written.
///
/// # Errors
/// As [`Combination::new`] and [`Combination::write`]. On any error the output is what it was before.
pub fn combine(
    adapters: &[Weighted<'_>],
    output: &Path,
    options: &CombineOptions,
    progress: &dyn Progress,
) -> Result<CombineReport> {
    Combination::check_output(adapters, output, options)?;
    Combination::new(adapters, output, options, progress)?.write(output, options.to, options.overwrite, progress)
}

impl Combination {
    /// What can be said of the output before anything is computed.
    ///
    /// # Errors
    /// `U-002`, `U-003`, `E-002`.
    pub fn check_output(adapters: &[Weighted<'_>], output: &Path, options: &CombineOptions) -> Result<()> {
        let inputs: Vec<&Path> = adapters.iter().map(|weighted| Path::new(weighted.adapter.label())).collect();
        check_output(output, write::kind(options.to).0, &inputs, options.overwrite)
    }

    /// Combines `adapters`. What is computed is kept in a file without a name in the folder of `beside`, until the value is dropped.
    ///
    /// Every adapter adds its weight times its update, whatever its rank, alpha, scaling rule, dtype and dialect are; updates are summed in an
    /// order of their own, so that the result does not depend on the one that is given.
    ///
    /// # Errors
    /// `U-001` for options that cannot be carried out; `A-020`, `A-023`, `A-024`, `A-027`, `P-007`, `A-010` for adapters that have no sum;
    /// `A-003` if the ranks add up to more than the limit; `A-012` if nothing is left; `A-008` if a value is not finite, `A-031` if one is
    /// not in its new dtype; `E-012` if a decomposition does not converge; `C-037` if a stated digest does not match; `E-001`, `E-002`,
    /// `E-004`, `E-006`.
    pub fn new(adapters: &[Weighted<'_>], beside: &Path, options: &CombineOptions, progress: &dyn Progress) -> Result<Self> {
        options.check()?;
        if adapters.is_empty() {
            return Err(Error::new(rules::ARGUMENT, "no adapter is given"));
        }
        let all: Vec<&Adapter> = adapters.iter().map(|weighted| weighted.adapter).collect();
        let weights = Weights::new(adapters.iter().map(|weighted| weighted.weight).collect(), &options.layers)?;
        weights.check_used(&all.iter().map(|adapter| tensors(adapter)).collect::<Vec<_>>())?;
        let (base, mut warnings) = base::agree(&all, options.allow_base_mismatch)?;
        let roots = roots(&all, progress)?;
        let order = order(adapters, &roots);
        let sums = align::align(&all, &order, &weights)?;
        check_ranks(&sums, options)?;
        warnings.extend(align::left_out(&all, &sums, &weights));
        warnings.extend(repeated(&all, &roots));
        warnings.extend(all.iter().flat_map(|adapter| adapter.warnings().iter().cloned()));
        let mixed = mixed::mix(&all, &order, &sums, &weights, options.parts, Spool::new(beside)?)?;

        let wide = Layout::wide(&sums);
        let exact = wanted::side_by_side(&sums, &wide, &mixed, beside)?;
        let parts = AdapterParts {
            label: beside.display().to_string(),
            dialect: "memory",
            replacements: mixed.replacements.clone(),
            rows: mixed.rows.clone(),
            rescalings: mixed.rescalings.clone(),
            replication: all.first().map(|adapter| adapter.replication().to_vec()).unwrap_or_default(),
            base: base.clone(),
            lineage: history(&all, &order),
            ..AdapterParts::default()
        };
        let limits = &options.limits;
        let made = match options.rule(&sums) {
            Some(rule) if !sums.is_empty() => {
                let whole = Adapter::new(AdapterParts { targets: exact.clone(), ..parts }, limits)?;
                let resize = ResizeOptions {
                    rank: rule,
                    loader: options.loader,
                    split: options.split,
                    dtype: Some(options.dtype.unwrap_or(crate::tensor::Dtype::F32)),
                    exec: options.exec.clone(),
                    limits: limits.clone(),
                    ..Default::default()
                };
                Made::cut(&sums, cut(&whole, &resize, Spool::new(beside)?, progress)?)
            }
            _ => {
                let layout = Layout::stored(&sums, &wide, options.dtype);
                let stored = wanted::side_by_side(&sums, &layout, &mixed, beside)?;
                let each = measured(&sums, &exact, &stored, &layout, options, progress)?;
                let adapter = Adapter::new(AdapterParts { targets: stored, ..parts }, limits)?;
                Made { adapter, each, warnings: Vec::new() }
            }
        };
        warnings.extend(made.warnings);
        warnings.extend(made.adapter.warnings().iter().cloned());
        let count = |place: usize| sums.iter().flat_map(|sum| &sum.parts).filter(|part| part.adapter == place).count() as u64;
        let combined = |(place, weighted): (usize, &Weighted<'_>)| CombinedAdapter {
            path: weighted.adapter.label().to_owned(),
            dialect: weighted.adapter.dialect(),
            weight: weighted.weight,
            targets: count(place),
            content: roots[place].clone(),
        };
        let (norm, error, from_sum) = made.each.iter().fold((0.0, 0.0, 0.0), |(norm, error, from_sum), each| {
            (norm + each.norm.powi(2), error + each.error_squared, from_sum + each.from_sum_squared)
        });
        let share = |part: f64| if norm > 0.0 { (part / norm).sqrt() } else { part.sqrt() };
        let report = CombineReport {
            adapters: adapters.iter().enumerate().map(combined).collect(),
            method: options.method.name(),
            output: None,
            to: None,
            error: share(error),
            from_sum: share(from_sum),
            dtype: dtypes(&made.adapter),
            parameters: made.adapter.parameters(),
            bytes: 0,
            content: String::new(),
            targets: made.each.into_iter().map(|each| each.report()).collect(),
            decided: mixed.decided.iter().map(Note::from).collect(),
            losses: Vec::new(),
            warnings: warnings.iter().map(Note::from).collect(),
        };
        let step = step(adapters, &roots, options);
        let inputs = all.into_iter().cloned().collect();
        Ok(Combination { adapter: made.adapter, report, base, step, inputs })
    }

    /// The result. Its factors are computed, or read from a file without a name, when they are read.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// What was combined and what it lost.
    pub fn report(&self) -> &CombineReport {
        &self.report
    }

    /// Writes the result; `progress` counts the bytes of the tensors.
    ///
    /// # Errors
    /// `U-002`, `U-003`, `E-002` for the output; `A-008`, `A-031`, `E-001`, `E-004`, `E-006`. On any error the output is what it was before.
    pub fn write(self, output: &Path, to: ConvertTo, overwrite: Overwrite, progress: &dyn Progress) -> Result<CombineReport> {
        let (kind, dialect) = write::kind(to);
        let inputs: Vec<&Path> = self.inputs.iter().map(|adapter| Path::new(adapter.label())).collect();
        check_output(output, kind, &inputs, overwrite)?;
        progress.expect(self.adapter.factors().map(|factor| factor.info().bytes()).fold(0, u64::saturating_add));
        let unchanged = || self.inputs.iter().try_for_each(Adapter::unchanged);
        let written = write::write(&self.adapter, &self.base, self.step, (output, to, overwrite), unchanged, progress)?;
        Ok(CombineReport {
            output: Some(output.display().to_string()),
            to: Some(dialect),
            bytes: written.bytes,
            content: written.content,
            losses: written.losses.iter().map(Note::from).collect(),
            ..self.report
        })
    }
}

/// An adapter that can be stored, and what is known of its targets.
struct Made {
    adapter: Adapter,
    each: Vec<Each>,
    warnings: Vec<Diagnostic>,
}

/// What is known of a target.
struct Each {
    tensor: String,
    adapters: u64,
    rank_sum: u64,
    rank: u64,
    norm: f64,
    error_squared: f64,
    from_sum_squared: f64,
}

impl Each {
    fn new(sum: &Sum, rank: u64, norm: f64, error_squared: f64) -> Self {
        Each {
            tensor: sum.tensor.clone(),
            adapters: sum.parts.len() as u64,
            rank_sum: sum.rank(),
            rank,
            norm,
            error_squared,
            from_sum_squared: error_squared,
        }
    }

    fn report(self) -> CombinedTarget {
        let share = |squared: f64| if self.norm > 0.0 { squared.sqrt() / self.norm } else { squared.sqrt() };
        CombinedTarget {
            error: share(self.error_squared),
            from_sum: share(self.from_sum_squared),
            tensor: self.tensor,
            adapters: self.adapters,
            rank_sum: self.rank_sum,
            rank: self.rank,
            norm: self.norm,
        }
    }
}

impl Made {
    fn cut(sums: &[Sum], cut: Cut) -> Self {
        let each = sums
            .iter()
            .zip(&cut.resized)
            .map(|(sum, resized)| Each::new(sum, resized.report.rank, resized.norm_squared.sqrt(), resized.error_squared));
        Made { each: each.collect(), adapter: cut.adapter, warnings: cut.warnings }
    }
}

/// Norms, and what rounding costs.
fn measured(
    sums: &[Sum],
    exact: &[Target],
    stored: &[Target],
    layout: &Layout,
    options: &CombineOptions,
    progress: &dyn Progress,
) -> Result<Vec<Each>> {
    let sizes: Vec<u64> = exact.iter().map(|target| target.a.info().bytes() + target.b.info().bytes()).collect();
    progress.expect(sizes.iter().sum());
    exec::on_threads(&options.exec, || {
        crew::each(&sizes, |i| {
            progress.advance(sizes[i]);
            if progress.cancelled() {
                return Err(exec::interrupted());
            }
            let norm = measure::norm_squared(&exact[i])?.sqrt();
            let error = if layout.is_exact { 0.0 } else { measure::distance_squared(&stored[i], &exact[i])? };
            Ok(Each::new(&sums[i], sums[i].rank(), norm, error))
        })
    })
}

impl CombineOptions {
    /// The rule for ranks, if they do not just add up.
    fn rule(&self, sums: &[Sum]) -> Option<RankRule> {
        let highest = || sums.iter().flat_map(|sum| &sum.parts).map(|part| part.target.scaling.rank).max().unwrap_or(1);
        match self.method {
            CombineMethod::Svd => Some(self.rank.unwrap_or_else(|| RankRule::Fixed(highest()))),
            _ => self.rank,
        }
    }
}

/// The names of everything that an adapter changes.
fn tensors(adapter: &Adapter) -> Vec<&str> {
    let whole =
        adapter.replacements().iter().map(|it| it.tensor.as_str()).chain(adapter.rows().iter().map(|it| it.tensor.as_str()));
    let names = adapter.targets().iter().map(|it| it.tensor.as_str()).chain(whole);
    names.chain(adapter.rescalings().iter().map(|it| it.tensor.as_str())).collect()
}

/// The content roots, which are held against what the files state.
fn roots(adapters: &[&Adapter], progress: &dyn Progress) -> Result<Vec<String>> {
    let go_on = || if progress.cancelled() { Err(exec::interrupted()) } else { Ok(()) };
    let of = |adapter: &&Adapter| {
        let root = content(adapter, go_on)?;
        verify(adapter, &root)?;
        Ok(root.finish())
    };
    adapters.iter().map(of).collect()
}

/// The order in which adapters are added: by what they are, and not by where they stand.
fn order(adapters: &[Weighted<'_>], roots: &[String]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..adapters.len()).collect();
    order.sort_by(|x, y| roots[*x].cmp(&roots[*y]).then(adapters[*x].weight.total_cmp(&adapters[*y].weight)));
    order
}

/// Refuses ranks that add up to more than the limit.
fn check_ranks(sums: &[Sum], options: &CombineOptions) -> Result<()> {
    let limit = options.limits.rank;
    let Some(sum) = sums.iter().find(|sum| sum.rank() > limit) else { return Ok(()) };
    let message = format!(
        "the ranks of {} adapters in {:?} add up to {}, over the limit of {limit}",
        sum.parts.len(),
        sum.tensor,
        sum.rank()
    );
    Err(Error::new(rules::RANK_LIMIT, message)
        .tensor(&sum.tensor)
        .help("combine fewer at a time with --rank R, and then the results"))
}

/// Adapters whose content was given before.
fn repeated(adapters: &[&Adapter], roots: &[String]) -> Vec<Diagnostic> {
    let again = |place: &usize| roots.iter().take(*place).any(|root| *root == roots[*place]);
    let of = |place: usize| {
        let message = "the same adapter is given twice: its weights add up";
        Diagnostic::new(rules::ADAPTER_ONCE, message)
            .file(adapters[place].label())
            .help("give it once with the sum of the weights")
    };
    (0..adapters.len()).filter(again).map(of).collect()
}

/// What all adapters say of their history, each step once.
fn history(adapters: &[&Adapter], order: &[usize]) -> Vec<Lineage> {
    let mut steps: Vec<Lineage> = Vec::new();
    for step in order.iter().flat_map(|place| adapters[*place].lineage()) {
        if !steps.contains(step) {
            steps.push(step.clone());
        }
    }
    steps
}

fn dtypes(adapter: &Adapter) -> String {
    let mut names: Vec<String> = adapter.targets().iter().map(|target| target.a.info().dtype.to_string()).collect();
    names.sort_unstable();
    names.dedup();
    names.join(", ")
}

/// What stands in the lineage: enough to do it again.
fn step(adapters: &[Weighted<'_>], roots: &[String], options: &CombineOptions) -> Lineage {
    let input = |(weighted, root): (&Weighted<'_>, &String)| LineageInput {
        role: "adapter".into(),
        dialect: weighted.adapter.dialect().into(),
        content: root.clone(),
    };
    let layer = |layer: &LayerWeight| json!({ "adapter": layer.adapter, "factor": layer.factor, "pattern": layer.pattern });
    Lineage {
        op: "combine".to_owned(),
        tool: format!("loratool {}", env!("CARGO_PKG_VERSION")),
        inputs: adapters.iter().zip(roots).map(input).collect(),
        parameters: json!({
            "dtype": options.dtype.map(|dtype| dtype.to_string()),
            "for": options.loader.map(|loader| format!("{loader:?}").to_lowercase()),
            "layers": options.layers.iter().map(layer).collect::<Vec<Value>>(),
            "method": options.method.described(),
            "names": adapters.iter().map(|weighted| name(Path::new(weighted.adapter.label()))).collect::<Vec<_>>(),
            "parts": options.parts.name(),
            "rank": options.rank.map(RankRule::described),
            "split": options.split.name(),
            "weights": adapters.iter().map(|weighted| weighted.weight).collect::<Vec<_>>(),
        })
        .to_string(),
    }
}
