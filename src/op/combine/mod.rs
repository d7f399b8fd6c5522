//! `combine`: several adapters as one. The sum is exact: factors are put side by side, and A and B of different adapters are never added to
//! each other, which would add products of one's B with another's A. A lower rank is the best one, by the singular values of the whole, and
//! says what it costs before anything is written.

mod align;
mod arc;
mod base;
mod blend;
mod blended;
mod compat;
mod fused;
mod lineage;
mod made;
mod maker;
mod measure;
mod method;
mod mixed;
mod named;
mod options;
mod peft;
mod prefix;
mod recipe;
mod stacked;
mod wanted;
mod weights;

use std::collections::BTreeMap;
use std::path::Path;

use super::digests::{content, verify};
use super::spool::Spool;
use super::write;
use crate::adapter::{Adapter, AdapterParts, Axis, BaseIdentity, Kind, Lineage, Rescaling, Target};
use crate::error::{Diagnostic, Error, Result};
use crate::exec::{self, Progress};
use crate::io::{Overwrite, check_output};
use crate::op::ConvertTo;
use crate::plan::Weighted;
use crate::report::text::plural;
use crate::report::{CombineReport, CombinedAdapter, Note};
use crate::rules;

pub(super) use align::{Sum, align};
use made::{Each, share};
use maker::Maker;
pub(super) use measure::Pair;
pub use method::CombineMethod;
pub use named::MethodNumbers;
pub use options::{CombineOptions, LayerWeight, PartsPolicy, Stated};
pub use peft::{MajoritySign, PeftCombination, PeftKind};
pub(super) use prefix::renamed;
pub use recipe::{Recipe, RecipeAdapter, StagedRecipe};
use wanted::Layout;
pub(super) use weights::Weights;

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
        let named: Vec<Adapter> = match &options.prefix {
            None => adapters.iter().map(|weighted| weighted.adapter.clone()).collect(),
            Some((from, to)) => {
                let renamed = |one: &Weighted<'_>| renamed(one.adapter, (from, to), &options.limits);
                adapters.iter().map(renamed).collect::<Result<_>>()?
            }
        };
        let all: Vec<&Adapter> = named.iter().collect();
        let weights = Weights::new(adapters.iter().map(|weighted| weighted.weight).collect(), &options.layers)?;
        weights.check_used(&all.iter().map(|adapter| tensors(adapter)).collect::<Vec<_>>())?;
        let (base, mut warnings) = base::agree(&all, options.allow_base_mismatch)?;
        let roots = roots(&all, progress)?;
        let scalings: Vec<String> = all.iter().map(|adapter| scaling(adapter)).collect();
        expected(&all, &roots, &scalings, &options.stated)?;
        let order = order(&roots, &scalings, &weights);
        let sums = align(&all, &order, &weights)?;
        check_ranks(&sums, options)?;
        let counts = align::counts(all.len(), &sums);
        warnings.extend(align::left_out(&all, &counts, &weights));
        warnings.extend(repeated(&all, &roots, &scalings));
        warnings.extend(all.iter().flat_map(|adapter| adapter.warnings().iter().cloned()));
        let mixed = mixed::mix(&all, &order, &sums, &weights, options, Spool::new(beside)?)?;

        let wide = Layout::wide(&sums);
        let exact = wanted::side_by_side(&sums, &wide, &mixed, beside)?;
        let parts = AdapterParts {
            label: "(combination)".to_owned(),
            dialect: "memory",
            replacements: mixed.replacements.clone(),
            rows: mixed.rows.clone(),
            rescalings: mixed.rescalings.clone(),
            replication: all.first().map(|adapter| adapter.replication().to_vec()).unwrap_or_default(),
            base: base.clone(),
            lineage: lineage::history(&all, &order),
            ..AdapterParts::default()
        };
        let spool = || Spool::new(beside);
        let maker = Maker {
            adapters: adapters.len(),
            sums: &sums,
            mixed: &mixed,
            exact: &exact,
            roots: &roots,
            beside,
            options,
            progress,
        };
        let made = maker.made(parts, &wide, &spool)?;
        warnings.extend(made.warnings);
        let gone = made.each.iter().filter(|each| each.sum_squared == 0.0).count() as u64;
        if gone > 0 {
            let message = format!("the updates of {} cancel: their sum is 0", plural(gone, "target"));
            warnings.push(Diagnostic::new(rules::ADAPTER_NOT_EMPTY, message));
        }
        // Of factors that are computed nobody has a file; where their ranks come from, the report says.
        let warned = made.adapter.warnings().iter().filter(|told| told.rule().id != rules::RANK_LIMIT.id);
        warnings.extend(warned.cloned());
        let combined = |(place, weighted): (usize, &Weighted<'_>)| CombinedAdapter {
            path: weighted.adapter.label().to_owned(),
            dialect: weighted.adapter.dialect(),
            weight: weighted.weight,
            targets: counts[place],
            content: roots[place].clone(),
            scaling: scalings[place].clone(),
        };
        let total = |of: fn(&Each) -> f64| made.each.iter().map(of).sum::<f64>();
        let error = share(total(|each| each.error_squared), total(|each| each.wanted_squared));
        let from_sum = share(total(|each| each.from_sum_squared), total(|each| each.sum_squared));
        let report = CombineReport {
            adapters: adapters.iter().enumerate().map(combined).collect(),
            method: options.method.name(),
            output: None,
            to: None,
            error,
            from_sum,
            dtype: dtypes(&made.adapter),
            parameters: made.adapter.parameters(),
            bytes: 0,
            content: String::new(),
            targets: made.each.into_iter().map(Each::report).collect(),
            decided: mixed.decided.iter().map(Note::from).collect(),
            losses: Vec::new(),
            warnings: warnings.iter().map(Note::from).collect(),
        };
        let step = lineage::step(adapters, &roots, options);
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

/// The digest of what the tensors of an adapter do not say: which tensors of the base they change, as what, and with which scales.
fn scaling(adapter: &Adapter) -> String {
    let target = |it: &Target| format!("{} {} {:e}\n", it.tensor, it.kind.name(), it.scaling.effective());
    let rescaling = |it: &Rescaling| {
        let along = if it.axis == Axis::Output { "outputs" } else { "inputs" };
        format!("{} {} {along}\n", it.tensor, Kind::Linear(it.orientation).name())
    };
    let mut said: String = adapter.targets().iter().map(target).collect();
    said.extend(adapter.rescalings().iter().map(rescaling));
    said.extend(adapter.replacements().iter().map(|it| format!("{}\n", it.tensor)));
    said.extend(adapter.rows().iter().map(|it| format!("{} {:?}\n", it.tensor, it.rows)));
    exec::sha256(said.as_bytes())
}

/// Holds the adapters against what a recipe states.
///
/// # Errors
/// `C-038`.
fn expected(adapters: &[&Adapter], roots: &[String], scalings: &[String], all: &[Stated]) -> Result<()> {
    let differs = |stated: &Option<String>, found: &String| stated.as_ref().is_some_and(|stated| stated != found);
    for (place, stated) in all.iter().enumerate().take(adapters.len()) {
        let what = if differs(&stated.content, &roots[place]) {
            "content root"
        } else if differs(&stated.scaling, &scalings[place]) {
            "digest of scales"
        } else {
            continue;
        };
        let message = format!("its {what} is not the one that was asked for");
        let help =
            "it is another adapter, or another state of it, or is read with other flags; the recipe names what was combined";
        return Err(Error::new(rules::CONTENT_ROOT, message).file(adapters[place].label()).help(help));
    }
    Ok(())
}

/// The order in which adapters are added: by what they are, and not by where they stand.
fn order(roots: &[String], scalings: &[String], weights: &Weights<'_>) -> Vec<usize> {
    let mut order: Vec<usize> = (0..roots.len()).collect();
    order.sort_by(|x, y| {
        let what = |place: usize| (&roots[place], &scalings[place]);
        what(*x).cmp(&what(*y)).then_with(|| weights.compared(*x, *y))
    });
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

/// Adapters that are given more than once.
fn repeated(adapters: &[&Adapter], roots: &[String], scalings: &[String]) -> Vec<Diagnostic> {
    let mut places: BTreeMap<(&String, &String), Vec<usize>> = BTreeMap::new();
    roots.iter().zip(scalings).enumerate().for_each(|(place, what)| places.entry(what).or_default().push(place));
    let of = |places: &Vec<usize>| {
        let message = format!("the same adapter is given {} times, and counts as often", places.len());
        Diagnostic::new(rules::ADAPTER_ONCE, message).file(adapters[places[0]].label()).help("give it once if that is not meant")
    };
    places.values().filter(|places| places.len() > 1).map(of).collect()
}

fn dtypes(adapter: &Adapter) -> String {
    let mut names: Vec<String> = adapter.targets().iter().map(|target| target.a.info().dtype.to_string()).collect();
    names.sort_unstable();
    names.dedup();
    names.join(", ")
}
