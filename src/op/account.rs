//! What a merge will do, and what it did, as its report says it: the checks that need no output, the counts that balance, the figures.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::digests::verify_stated;
use super::identity;
use super::lineage::{self, Merged, RECORD, Record, Step};
use super::merge::MergeOptions;
use crate::adapter::{Adapter, Factor};
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Error, Result};
use crate::kernel::Sums;
use crate::plan::{Change, Origin, OutShard, Plan, Weighted};
use crate::report::text::{count, plural};
use crate::report::{
    AdapterUse, Balance, ContributionReport, Converted, FileLeft, IgnoredReport, MergeReport, Narrowed, Note, TensorReport,
};
use crate::rules;
use crate::tensor::{Dtype, TensorSource};

/// Below this share of the update, the report warns that rounding has eaten into it.
const GAIN_WARNING: f64 = 0.9;

/// A merge that is understood and not begun.
pub(super) struct Understood<'a> {
    pub(super) plan: Plan<'a>,
    pub(super) report: MergeReport,
    /// What was merged into the base before.
    record: Record,
    /// This merge.
    pub(super) step: Step,
}

impl Understood<'_> {
    /// Was something merged into the base before, by its record?
    pub(super) fn is_merged_already(&self) -> bool {
        !self.record.is_empty()
    }

    /// The text of the record that the output gets, with the digests of its tensors if they are known; empty for a single file, and where
    /// nothing is left in the checkpoint.
    pub(super) fn record(&self, digests: Option<lineage::Digests>) -> String {
        if self.plan.base.is_folder() { self.record.with(&self.step, digests) } else { String::new() }
    }
}

/// What a merge will do, wherever it goes: all checks but those of the output. What is done is recorded as `entries` if they are given, and
/// otherwise as the merge of the adapters.
pub(super) fn understand<'a>(
    base: &'a Checkpoint,
    adapters: &[Weighted<'a>],
    entries: Option<Vec<Merged>>,
    output: &Path,
    options: &MergeOptions,
) -> Result<Understood<'a>> {
    if adapters.is_empty() {
        return Err(Error::new(rules::ARGUMENT, "no adapter is given"));
    }
    for weighted in adapters {
        if !weighted.weight.is_finite() {
            return Err(Error::new(
                rules::ARGUMENT,
                format!("the weight {} of {:?} is not finite", weighted.weight, weighted.adapter.label()),
            ));
        }
    }
    let plan = Plan::with_output(base, adapters, &options.bind, &options.output, &options.limits)?;
    let record = Record::of(base)?;
    let entries = match entries {
        Some(entries) => {
            if !options.allow_repeat {
                record.refuse_parts_again(&entries)?;
            }
            entries
        }
        None => {
            let entries = lineage::entries(adapters)?;
            if !options.allow_repeat {
                refuse_repeats(adapters, &entries)?;
                record.refuse_again(adapters, &entries)?;
            }
            entries
        }
    };
    let mut uses = Vec::new();
    let mut warnings: Vec<Diagnostic> = base.warnings().to_vec();
    warnings.extend(record.strangers(adapters, &entries));
    for (index, weighted) in adapters.iter().enumerate() {
        verify_stated(weighted.adapter)?;
        warnings.extend(weighted.adapter.warnings().iter().cloned());
        uses.push(adapter_use(base, &plan, index, *weighted, options, &mut warnings)?);
    }
    warnings.extend(plan.warnings().iter().cloned());
    let mut report = MergeReport {
        base: base.path().display().to_string(),
        output: output.display().to_string(),
        dry_run: false,
        in_place: false,
        undo_log: None,
        adapters: uses,
        balance: balance(&plan, adapters)?,
        tensors: Vec::new(),
        ignored: plan.ignored().iter().map(|i| IgnoredReport { tensor: i.tensor.clone(), flag: i.flag.to_owned() }).collect(),
        files_copied: Vec::new(),
        files_left: Vec::new(),
        bytes: plan.bytes(),
        memory: 0,
        survived: None,
        untied: plan.untied,
        method: options.method.name(),
        rounding: lineage::name_of(options.output.rounding),
        converted: None,
        content: None,
        resumed: Vec::new(),
        warnings: warnings.iter().map(Note::from).collect(),
    };
    for shard in &plan.shards {
        report.tensors.extend(shard.changes.iter().map(|change| tensor_report(change, &shard.file_name)));
    }
    for companion in base.companions().iter().filter(|companion| companion.relative != Path::new(RECORD)) {
        let name = companion.relative.display().to_string();
        match companion.copy {
            true => report.files_copied.push(name),
            false => report.files_left.push(FileLeft { file: name, reason: companion.why.to_owned() }),
        }
    }
    let step = Step::new(&plan, entries, options, report.balance)?;
    Ok(Understood { plan, report, record, step })
}

/// Two adapters with the same tensors are one adapter under two names.
pub(super) fn check_repeats(adapters: &[Weighted<'_>]) -> Result<()> {
    if adapters.len() < 2 { Ok(()) } else { refuse_repeats(adapters, &lineage::entries(adapters)?) }
}

pub(super) fn refuse_repeats(adapters: &[Weighted<'_>], entries: &[Merged]) -> Result<()> {
    let mut seen: HashMap<&str, &str> = HashMap::new();
    for (weighted, entry) in adapters.iter().zip(entries) {
        let label = weighted.adapter.label();
        if let Some(first) = seen.insert(&entry.content, label) {
            let message = format!("the adapter is the same as {first:?}, by its content");
            let help = "to apply it twice, pass --allow-repeat; to apply more of it, give it a weight";
            return Err(Error::new(rules::ADAPTER_ONCE, message).file(label).help(help));
        }
    }
    Ok(())
}

fn adapter_use(
    base: &Checkpoint,
    plan: &Plan<'_>,
    index: usize,
    weighted: Weighted<'_>,
    options: &MergeOptions,
    warnings: &mut Vec<Diagnostic>,
) -> Result<AdapterUse> {
    let (identity, warning) = identity::check(base, weighted.adapter, &options.bind, &options.limits)?;
    warnings.extend(warning);
    Ok(AdapterUse {
        path: weighted.adapter.label().to_owned(),
        dialect: weighted.adapter.dialect(),
        weight: weighted.weight,
        renaming: plan.renamings().get(index).filter(|r| !r.is_identity()).cloned(),
        base_identity: identity.name(),
    })
}

/// The balance law: what goes in comes out. Both sides are counted by themselves, from the files and from the plan.
///
/// # Errors
/// `E-009` if they differ, which is a mistake of this program.
fn balance(plan: &Plan<'_>, adapters: &[Weighted<'_>]) -> Result<Balance> {
    // One tensor may give several rows, or several updates.
    let mut applied: HashSet<(Option<usize>, &Path, &str)> = HashSet::new();
    for change in plan.changes() {
        let updates = change.contributions.iter().flat_map(|c| c.tensors.iter().map(|name| (Some(c.adapter), name.as_str())));
        applied.extend(updates.map(|(adapter, name)| (adapter, Path::new(""), name)));
        let whole = match change.origin {
            Origin::Adapter(factor) => Some(factor),
            Origin::Base { .. } => None,
        };
        let whole = whole.into_iter().chain(change.patches.iter().map(|patch| patch.with));
        applied.extend(whole.map(|factor| (None, factor.source().label(), factor.name())));
    }
    applied.extend(plan.copies().iter().map(|copy| (None, copy.source().label(), copy.name())));
    let balance = Balance {
        adapter_tensors: adapters.iter().map(|w| distinct(w.adapter)).sum(),
        applied: applied.len() as u64,
        ignored: plan.ignored().len() as u64,
        base_tensors: plan.base().names().count() as u64,
        copied: plan.shards.iter().map(OutShard::copied).sum(),
        modified: plan.changes().filter(|c| !c.added && !is_conversion(c)).count() as u64,
        converted: plan.changes().filter(|c| is_conversion(c)).count() as u64,
        added: plan.added().count() as u64,
    };
    let even = balance.applied + balance.ignored == balance.adapter_tensors
        && balance.copied + balance.modified + balance.converted == balance.base_tensors;
    if even {
        Ok(balance)
    } else {
        Err(Error::new(rules::BALANCE, format!("the counts do not balance: {balance:?}")).help("please report this"))
    }
}

/// Tensors of an adapter. One may have several uses.
fn distinct(adapter: &Adapter) -> u64 {
    adapter.factors().map(Factor::name).collect::<HashSet<_>>().len() as u64
}

/// Nothing but the dtype changes.
fn is_conversion(change: &Change<'_>) -> bool {
    let as_it_was = change.contributions.is_empty() && change.patches.is_empty();
    !change.added && as_it_was && change.quantised.is_none() && matches!(change.origin, Origin::Base { .. })
}

fn tensor_report(change: &Change<'_>, file: &str) -> TensorReport {
    let replaced = matches!(change.origin, Origin::Adapter(_));
    let action = match (replaced, change.contributions.is_empty()) {
        _ if change.is_of_scales() => "requantise",
        (false, true) if !change.patches.is_empty() => "replace rows",
        (false, false) if change.contributions.iter().all(|c| c.rank == 0) => "rescale",
        (false, false) => "update",
        (true, true) if !change.patches.is_empty() => "replace+rows",
        (true, true) => "replace",
        (true, false) => "replace+update",
        (false, true) if is_conversion(change) => "convert",
        (false, true) => "untie",
    };
    TensorReport {
        tensor: change.name.clone(),
        file: file.to_owned(),
        dtype: change.info.dtype.to_string(),
        converted_from: base_dtype(change).filter(|dtype| *dtype != change.info.dtype).map(|dtype| dtype.to_string()),
        shape: change.info.shape.dims().to_vec(),
        action,
        added: change.added,
        contributions: change
            .contributions
            .iter()
            .map(|c| ContributionReport { adapter: c.adapter, rank: c.rank, scale: c.scale })
            .collect(),
        relative_norm: None,
        gain: None,
        changed: None,
        changed_if_narrowed: None,
        elements: change.info.shape.elements(),
        block: change.quantised.as_ref().map(|how| [how.block.0, how.block.1]),
    }
}

/// The dtype that the tensor has in the base.
fn base_dtype(change: &Change<'_>) -> Option<Dtype> {
    match &change.origin {
        Origin::Base { info, .. } => Some(info.dtype),
        Origin::Adapter(_) => None,
    }
}

/// Adds what only the values could tell.
pub(super) fn fill_in(report: &mut MergeReport, plan: &Plan<'_>, found: &[Sums]) {
    let (mut faint, mut whole) = (Vec::new(), Sums::default());
    for ((tensor, sums), change) in report.tensors.iter_mut().zip(found).zip(plan.changes()) {
        // What only takes another's place was not compared with what was there.
        tensor.changed = (!change.contributions.is_empty()).then_some(sums.changed);
        let wide = matches!(change.info.dtype, Dtype::F32 | Dtype::F64) && !change.contributions.is_empty();
        tensor.changed_if_narrowed = wide.then_some(Narrowed { bf16: sums.changed_in.bf16, f16: sums.changed_in.f16 });
        tensor.relative_norm = ratio(sums.delta.sqrt(), sums.base.sqrt());
        if change.contributions.is_empty() {
            continue;
        }
        whole.add(sums);
        tensor.gain = ratio(sums.applied, sums.delta);
        if tensor.gain.is_some_and(|gain| gain < GAIN_WARNING) {
            faint.push((tensor.tensor.clone(), tensor.gain.unwrap_or(0.0)));
        }
    }
    report.survived = ratio(whole.applied, whole.delta);
    report.converted = converted(report, plan, found);
    let updates: Vec<_> = report.tensors.iter().zip(found).filter(|(t, _)| !t.contributions.is_empty()).collect();
    let still: Vec<&str> = updates.iter().filter(|(_, sums)| sums.delta == 0.0).map(|(t, _)| t.tensor.as_str()).collect();
    if let Some(first) = still.first() {
        let (zero, all) = (count(still.len() as u64), count(updates.len() as u64));
        let message = format!("{zero} of {all} updates are zero (the first is {first:?}): they have no effect");
        let help = "a factor of zeros is what an untrained adapter has";
        report.warnings.push(Note::from(&Diagnostic::new(rules::UPDATE_SURVIVES, message).help(help)));
    }
    let kept: u64 = found.iter().map(|sums| sums.kept).sum();
    if kept > 0 {
        let message = format!("{} that are not finite were left as they are", plural(kept, "base value"));
        report.warnings.push(Note::from(&Diagnostic::new(rules::BASE_FINITE, message).file(plan.base.path())));
    }
    if let (Some((first, gain)), Some(survived)) = (faint.first(), report.survived) {
        let message = format!(
            "rounding loses part of the update in {} (the first is {first:?}, of which {:.1} % survives); of the whole update {:.1} % survives",
            plural(faint.len() as u64, "tensor"),
            100.0 * gain,
            100.0 * survived
        );
        let help = "the update is smaller than the steps of the base's dtype; merge into a base of a wider dtype";
        report.warnings.push(Note::from(&Diagnostic::new(rules::UPDATE_SURVIVES, message).help(help)));
    }
}

/// To six digits: more are not the same on every machine, since the sums behind them may be taken in f32.
pub(super) fn ratio(x: f64, y: f64) -> Option<f64> {
    (y > 0.0).then(|| x / y).map(|ratio| format!("{ratio:.5e}").parse().unwrap_or(ratio))
}

/// What the change of dtype cost, if there was one.
fn converted(report: &MergeReport, plan: &Plan<'_>, found: &[Sums]) -> Option<Converted> {
    let dtype = plan.output.dtype?;
    let mut sums = Sums::default();
    let (mut tensors, mut values) = (0, 0);
    for ((tensor, of_tensor), change) in report.tensors.iter().zip(found).zip(plan.changes()) {
        if base_dtype(change).is_some_and(|from| from != change.info.dtype) {
            sums.add(of_tensor);
            tensors += 1;
            values += tensor.elements;
        }
    }
    // The sum before rounding is W + D, and what is wanted of it is its size; W is far the greater part.
    let error = ratio(sums.lost.sqrt(), sums.base.sqrt()).unwrap_or(0.0);
    Some(Converted { dtype: dtype.to_string(), tensors, values, error, zeroed: sums.flushed })
}
