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
mod made;
mod measure;
mod method;
mod mixed;
mod named;
mod options;
mod prefix;
mod recipe;
mod stacked;
mod wanted;
mod weights;

use std::collections::HashSet;
use std::path::Path;

use serde_json::{Value, json};

use super::digests::{content, verify};
use super::lineage::name;
use super::rank::RankRule;
use super::resize::{ResizeOptions, cut};
use super::spool::Spool;
use super::write;
use crate::adapter::{Adapter, AdapterParts, BaseIdentity, Lineage, LineageInput, Target};
use crate::error::{Diagnostic, Error, Result};
use crate::exec::{self, Progress};
use crate::io::{Overwrite, check_output};
use crate::op::ConvertTo;
use crate::op::extract::Split;
use crate::plan::Weighted;
use crate::report::{CombineReport, CombinedAdapter, Note};
use crate::rules;
use crate::tensor::Dtype;

pub(super) use align::{Sum, align};
pub use compat::{MajoritySign, PeftCombination, PeftKind};
use made::{Each, Made, share};
pub(super) use measure::Pair;
pub use method::CombineMethod;
use mixed::Mixed;
pub use named::MethodNumbers;
pub use options::{CombineOptions, LayerWeight, PartsPolicy};
pub(super) use prefix::renamed;
pub use recipe::{Recipe, RecipeAdapter};
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
        expected(&all, &roots, &options.contents)?;
        let order = order(adapters, &roots);
        let sums = align(&all, &order, &weights)?;
        check_ranks(&sums, options)?;
        let counts = align::counts(all.len(), &sums);
        warnings.extend(align::left_out(&all, &counts, &weights));
        warnings.extend(repeated(&all, &roots));
        warnings.extend(all.iter().flat_map(|adapter| adapter.warnings().iter().cloned()));
        let mixed = mixed::mix(&all, &order, &sums, &weights, options.parts, Spool::new(beside)?)?;

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
            lineage: history(&all, &order),
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
        warnings.extend(made.adapter.warnings().iter().cloned());
        let combined = |(place, weighted): (usize, &Weighted<'_>)| CombinedAdapter {
            path: weighted.adapter.label().to_owned(),
            dialect: weighted.adapter.dialect(),
            weight: weighted.weight,
            targets: counts[place],
            content: roots[place].clone(),
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

/// What a method works on.
struct Maker<'m> {
    /// How many there are.
    adapters: usize,
    sums: &'m [Sum],
    mixed: &'m Mixed,
    /// The plain sums, in f64.
    exact: &'m [Target],
    roots: &'m [String],
    beside: &'m Path,
    options: &'m CombineOptions,
    progress: &'m dyn Progress,
}

impl Maker<'_> {
    /// The adapter that is stored; `parts` are those without targets, and `wide` the layout of the plain sums.
    fn made(&self, parts: AdapterParts, wide: &Layout, spool: &(dyn Fn() -> Result<Spool> + Sync)) -> Result<Made> {
        let Maker { sums, mixed, exact, roots, beside, options, progress, .. } = *self;
        if sums.is_empty() {
            let adapter = Adapter::new(parts, &options.limits)?;
            return Ok(Made { adapter, each: Vec::new(), warnings: Vec::new() });
        }
        match options.method {
            CombineMethod::Peft(peft) => self.as_peft(compat::settled(peft, self.adapters), parts, wide, spool),
            CombineMethod::Linear | CombineMethod::Cat => self.summed(parts, wide, exact, options.rank, spool),
            CombineMethod::Svd => self.summed(parts, wide, exact, Some(options.rank.unwrap_or(self.highest())), spool),
            CombineMethod::Slerp => {
                let arc = Layout::with(arc::gains(sums)?);
                let wanted = wanted::side_by_side(sums, &arc, mixed, beside)?;
                self.summed(parts, &arc, &wanted, options.rank, spool)?.away_from(exact, options)
            }
            method if method.is_by_value() => {
                let site =
                    blended::Site { mixed, roots, options, method, rule: options.rank, split: options.split, progress, spool };
                site.made(sums, parts)?.away_from(exact, options)
            }
            _ => {
                let wanted = fused::wanted(sums, mixed, spool()?, options, progress)?;
                let rule = options.rank.unwrap_or(RankRule::Fixed(options.limits.rank));
                self.cut(parts, wanted, (rule, options.split), spool()?)?.away_from(exact, options)
            }
        }
    }

    /// As PEFT does it.
    fn as_peft(
        &self,
        peft: PeftCombination,
        parts: AdapterParts,
        wide: &Layout,
        spool: &(dyn Fn() -> Result<Spool> + Sync),
    ) -> Result<Made> {
        let Maker { sums, mixed, exact, roots, options, progress, .. } = *self;
        let rule = options.rank.unwrap_or(self.highest());
        match peft.kind {
            PeftKind::Cat => self.summed(parts, wide, exact, None, spool),
            // PEFT leaves the singular values to B.
            PeftKind::Svd => self.cut(parts, exact.to_vec(), (rule, Split::B), spool()?),
            kind if kind.is_by_factor() => {
                let factors = compat::Factors { peft, mixed, roots, options, progress };
                factors.made(sums, parts, spool()?)?.away_from(exact, options)
            }
            _ => {
                let method = CombineMethod::Peft(peft);
                let site = blended::Site { mixed, roots, options, method, rule: Some(rule), split: Split::B, progress, spool };
                site.made(sums, parts)?.away_from(exact, options)
            }
        }
    }

    /// The highest rank that one of the adapters has.
    fn highest(&self) -> RankRule {
        let ranks = self.sums.iter().flat_map(|sum| &sum.parts).map(|part| part.target.scaling.rank);
        RankRule::Fixed(ranks.max().unwrap_or(1))
    }

    /// Factors side by side, as they are or with other ranks.
    fn summed(
        &self,
        parts: AdapterParts,
        layout: &Layout,
        wanted: &[Target],
        rule: Option<RankRule>,
        spool: &(dyn Fn() -> Result<Spool> + Sync),
    ) -> Result<Made> {
        if let Some(rule) = rule {
            return self.cut(parts, wanted.to_vec(), (rule, self.options.split), spool()?);
        }
        let layout = Layout::stored(self.sums, layout, self.options.dtype);
        let stored = wanted::side_by_side(self.sums, &layout, self.mixed, self.beside)?;
        let each = made::measured(self.sums, wanted, &stored, &layout, self.options, self.progress)?;
        let adapter = Adapter::new(AdapterParts { targets: stored, ..parts }, &self.options.limits)?;
        Ok(Made { adapter, each, warnings: Vec::new() })
    }

    /// The best updates of other ranks.
    fn cut(&self, parts: AdapterParts, wanted: Vec<Target>, (rank, split): (RankRule, Split), spool: Spool) -> Result<Made> {
        let options = self.options;
        let whole = Adapter::new(AdapterParts { targets: wanted, ..parts }, &options.limits)?;
        let resize = ResizeOptions {
            rank,
            loader: options.loader,
            split,
            dtype: Some(options.dtype.unwrap_or(Dtype::F32)),
            exec: options.exec.clone(),
            limits: options.limits.clone(),
            ..Default::default()
        };
        Ok(Made::cut(self.sums, cut(&whole, &resize, spool, self.progress)?))
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

/// Holds the adapters against the content that a recipe states.
///
/// # Errors
/// `C-038`.
fn expected(adapters: &[&Adapter], roots: &[String], contents: &[Option<String>]) -> Result<()> {
    let stated = contents.iter().zip(roots).position(|(stated, root)| stated.as_ref().is_some_and(|stated| stated != root));
    let Some(place) = stated else { return Ok(()) };
    let message = format!("its content root is {}, and not the one that was asked for", roots[place]);
    let help = "it is another adapter, or another state of it; the recipe names the one that was combined";
    Err(Error::new(rules::CONTENT_ROOT, message).file(adapters[place].label()).help(help))
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
    let mut seen = HashSet::new();
    let again = |place: &usize| !seen.insert(&roots[*place]);
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
            "prefix": options.prefix.as_ref().map(|(from, to)| format!("{from}={to}")),
            "rank": options.rank.map(RankRule::described),
            "split": options.split.name(),
            "weights": adapters.iter().map(|weighted| weighted.weight).collect::<Vec<_>>(),
        })
        .to_string(),
    }
}
