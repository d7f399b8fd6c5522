//! `bake`: an adapter as the plainest one that computes the same. One scale for all targets, one rank, no pattern, no variant, names and
//! config as PEFT has them: what every reader of the format understands. What that cannot say is refused by name.
//!
//! Scales that differ by a power of two are folded into B without a loss; others are rounded once to the factor's dtype, and the report
//! says what it cost. Ranks are made equal by zeros, which add nothing.

mod measure;
mod refuse;
mod scale;
mod source;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::account::ratio;
use super::digests::{content, verify};
use super::plain as plain_file;
use crate::adapter::{Adapter, AdapterParts, Factor, Scaling, ScalingRule, Target};
use crate::dialect::peft::plain;
use crate::error::{Diagnostic, Error, Result};
use crate::exec::{self, Progress};
use crate::io::{Durability, OutputKind, Overwrite, Staging, check_output};
use crate::limits::Limits;
use crate::loader::{self, Files, Loader, Subject};
use crate::report::{BakeReport, Note, WorstTarget};
use crate::rules;
use crate::tensor::{Dtype, Shape, TensorInfo, TensorSource};

use measure::{Norms, Pair};
use scale::Common;
use source::{Baked, Entry};

/// How to bake.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct BakeOptions {
    /// The rank of all targets. Default: the highest that one of them has.
    pub rank: Option<u64>,
    /// What to do if the output exists. Default: refuse.
    pub overwrite: Overwrite,
    /// Bounds on input.
    pub limits: Limits,
}

/// Writes `adapter` as a plain PEFT folder. `progress` counts the bytes of the tensors that are written.
///
/// # Errors
/// `U-007` for every part that a plain adapter cannot say; `U-001` for a rank that is too low, `A-003` for one over the limit; `A-008` if a
/// value is not finite, `A-031` if one is not in its new dtype; `C-037` if a stated digest does not match; `U-002`, `U-003`, `E-002` for
/// the output; `E-006` if `progress` cancels. On any error the output is what it was before.
pub fn bake(adapter: &Adapter, output: &Path, options: &BakeOptions, progress: &dyn Progress) -> Result<BakeReport> {
    check_output(output, OutputKind::Folder, &[Path::new(adapter.label())], options.overwrite)?;
    refuse::check(adapter)?;
    let common = Common::of(adapter.targets(), options.rank).map_err(|error| error.file(adapter.label()))?;
    let go_on = || if progress.cancelled() { Err(exec::interrupted()) } else { Ok(()) };
    verify(adapter, &content(adapter, go_on)?)?;
    let pairs: Vec<Pair<'_>> = adapter.targets().iter().map(|target| pair(target, &common)).collect::<Result<_>>()?;
    let cost = measure(&pairs, &common, &go_on)?;
    let baked = baked(adapter, &pairs, &common, &options.limits)?;

    let modules: Vec<&str> = baked.targets().iter().filter_map(refuse::module).collect();
    let (config, mut losses) = plain::config(&baked, &modules, common.rank, common.alpha);
    losses.extend(left_behind(adapter));
    progress.expect(baked.factors().map(|factor| factor.info().bytes()).fold(0, u64::saturating_add));
    let staging = Staging::new(output, OutputKind::Folder, options.overwrite)?;
    let name = "adapter_model.safetensors";
    let factors = baked.factors().map(|factor| (factor.name().to_owned(), factor.clone())).collect();
    let written = plain_file::write(&factors, &staging.create(name)?, &staging.target_of(name), |bytes| {
        progress.advance(bytes);
        go_on()
    })?;
    staging.write("adapter_config.json", config.as_bytes())?;
    staging.sync()?;
    adapter.unchanged()?;
    go_on()?;
    staging.publish(Durability::Synced)?;

    let (read_by, not_read_by) = loaders(&baked, config);
    let count = |is_so: &dyn Fn(&Pair<'_>) -> bool| pairs.iter().filter(|pair| is_so(pair)).count() as u64;
    Ok(BakeReport {
        input: adapter.label().to_owned(),
        from: adapter.dialect(),
        output: output.display().to_string(),
        targets: pairs.len() as u64,
        rank: common.rank,
        alpha: common.alpha,
        scale: common.scale,
        padded: count(&|pair| pair.target.scaling.rank < common.rank),
        folded: count(&|pair| pair.b.times != 1.0),
        retyped: count(&|pair| [&pair.a, &pair.b].iter().any(|entry| entry.info.dtype != entry.from.info().dtype)),
        rounded: cost.rounded,
        exact: cost.rounded == 0,
        error: cost.error,
        worst: cost.worst,
        bytes: written.bytes,
        content: written.content,
        read_by,
        not_read_by,
        losses: losses.iter().map(Note::from).collect(),
        warnings: adapter.warnings().iter().map(Note::from).collect(),
    })
}

/// What the factors of a target become.
fn pair<'a>(target: &'a Target, common: &Common) -> Result<Pair<'a>> {
    let dtype = dtype(target.a.info().dtype, target.b.info().dtype);
    let (out, inner) = target.out_in();
    let entry = |from: &Factor, dims: [u64; 2], times: f64| -> Result<Entry> {
        let shape = Shape::new(dims.to_vec()).filter(|shape| shape.bytes(dtype).is_some()).ok_or_else(|| {
            let message = format!("{:?} with rank {} is larger than any file", from.name(), common.rank);
            Error::new(rules::RANK_LIMIT, message).tensor(from.name())
        })?;
        Ok(Entry { info: TensorInfo { dtype, shape }, from: from.clone(), times })
    };
    Ok(Pair {
        target,
        a: entry(&target.a, [common.rank, inner], 1.0)?,
        b: entry(&target.b, [out, common.rank], common.fold(target))?,
    })
}

/// The dtype of both factors: the one that they have, or F32, which holds all that F16 and BF16 do. No loader is known to take F64.
fn dtype(a: Dtype, b: Dtype) -> Dtype {
    if a == b && a != Dtype::F64 { a } else { Dtype::F32 }
}

/// What baking costs, over all targets.
struct Cost {
    rounded: u64,
    error: f64,
    worst: Option<WorstTarget>,
}

/// Nothing is computed where nothing is rounded.
fn measure(pairs: &[Pair<'_>], common: &Common, go_on: &dyn Fn() -> Result<()>) -> Result<Cost> {
    let mut exact = Vec::with_capacity(pairs.len());
    for pair in pairs {
        go_on()?;
        exact.push(pair.is_exact(common)?);
    }
    let rounded = exact.iter().filter(|exact| !**exact).count() as u64;
    let mut cost = Cost { rounded, error: 0.0, worst: None };
    if rounded == 0 {
        return Ok(cost);
    }
    let (mut errors, mut updates) = (0.0, 0.0);
    for (pair, exact) in pairs.iter().zip(exact) {
        go_on()?;
        let Norms { error, update } = pair.norms(common)?;
        updates += update * update;
        if exact || update == 0.0 {
            continue;
        }
        errors += error * error;
        let own = ratio(error, update).unwrap_or_default();
        if cost.worst.as_ref().is_none_or(|worst| worst.error < own) {
            cost.worst = Some(WorstTarget { tensor: pair.target.tensor.clone(), error: own });
        }
    }
    cost.error = ratio(f64::sqrt(errors), f64::sqrt(updates)).unwrap_or_default();
    Ok(cost)
}

/// The baked adapter, whose factors are computed where they are read.
fn baked(adapter: &Adapter, pairs: &[Pair<'_>], common: &Common, limits: &Limits) -> Result<Adapter> {
    let names = |pair: &Pair<'_>| plain::names(refuse::module(pair.target).unwrap_or_default());
    let mut entries = BTreeMap::new();
    for pair in pairs {
        let (a, b) = names(pair);
        entries.insert(a, pair.a.clone());
        entries.insert(b, pair.b.clone());
    }
    let source: Arc<dyn TensorSource> = Arc::new(Baked::new(adapter.label(), entries));
    let factor = |name: &str| {
        Factor::new(&source, name).ok_or_else(|| Error::new(rules::FACTORS_PAIRED, format!("there is no {name:?}")).tensor(name))
    };
    let scaling = Scaling { rank: common.rank, alpha: common.alpha, rule: ScalingRule::Standard };
    let mut targets = Vec::with_capacity(pairs.len());
    for pair in pairs {
        let (a, b) = names(pair);
        targets.push(Target { a: factor(&a)?, b: factor(&b)?, scaling, singular_values: None, ..pair.target.clone() });
    }
    let parts = AdapterParts {
        label: adapter.label().to_owned(),
        dialect: "peft",
        targets,
        base: adapter.base().clone(),
        origin_config: adapter.origin_config().map(str::to_owned),
        ..AdapterParts::default()
    };
    Adapter::new(parts, limits)
}

/// What a container says and a plain adapter does not.
fn left_behind(adapter: &Adapter) -> Option<Diagnostic> {
    let says = !adapter.stated_digests().is_empty() || !adapter.lineage().is_empty() || adapter.base().structure.is_some();
    let message = "digests, the base's identity and the history of the adapter are not written";
    says.then(|| Diagnostic::new(rules::PORTABLE, message).help("keep the container too"))
}

/// The loaders that nothing is known against, and the others, by name.
fn loaders(baked: &Adapter, config: String) -> (Vec<&'static str>, Vec<&'static str>) {
    let files = Files { config: Some(config), others: Vec::new() };
    let subject = Subject::new(baked, &files);
    let reads = |loader: Loader| !loader::check(loader, &subject).iter().any(|finding| finding.rule.effect.is_wrong());
    let (read_by, not_read_by): (Vec<Loader>, Vec<Loader>) = Loader::ALL.into_iter().partition(|loader| reads(*loader));
    let names = |loaders: Vec<Loader>| loaders.into_iter().map(Loader::name).collect();
    (names(read_by), names(not_read_by))
}
