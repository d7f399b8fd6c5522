//! The record of what was merged into a checkpoint folder, which travels with it: `loratool.merge.json`. It names adapters by the
//! digest of their content, so that the same adapter is not merged twice, whatever its file is called.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::digests::content;
use super::merge::MergeOptions;
use crate::checkpoint::Checkpoint;
use crate::error::{Class, Diagnostic, Error, Result};
use crate::exec::sha256;
use crate::io::{ContentRoot, parent_of, read_small};
use crate::plan::{BindOptions, Plan, Rounding, Weighted};
use crate::report::Balance;
use crate::rules;

/// The record's name in the folder.
pub(super) const RECORD: &str = "loratool.merge.json";
const VERSION: u32 = 1;
/// Bytes: some hundreds of merges of a large model, and the digests of all its tensors.
const LIMIT: u64 = 64 << 20;

/// An adapter that was merged, or taken out if the weight is negative.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Merged {
    /// Name of its file or folder, for people.
    pub(crate) adapter: String,
    /// The content root of its tensors.
    pub(crate) content: String,
    pub(crate) weight: f64,
    /// What it was made of, if it was made for this merge by a method other than the sum.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) by: Option<Made>,
}

/// What a method made of several adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Made {
    /// Its name and numbers.
    pub(crate) method: Value,
    pub(crate) of: Vec<Merged>,
}

impl Merged {
    /// With what weight an adapter is in it.
    fn weight_of(&self, content: &str) -> f64 {
        let own = if self.content == content { self.weight } else { 0.0 };
        let parts = self.by.iter().flat_map(|by| &by.of).map(|part| self.weight * part.weight_of(content));
        own + parts.sum::<f64>()
    }
}

/// One merge, or one unmerging: what went in, how, and the counts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Step {
    /// Program and version.
    tool: String,
    base: BaseState,
    adapters: Vec<Merged>,
    rounding: String,
    /// The dtype that all floats were given, if they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dtype: Option<String>,
    /// The flags that relaxed a check.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    flags: Vec<String>,
    counts: Counts,
}

/// The balance of a merge, as the record has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Counts {
    adapter_tensors: u64,
    applied: u64,
    ignored: u64,
    base_tensors: u64,
    copied: u64,
    modified: u64,
    converted: u64,
    added: u64,
}

/// What was merged into.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BaseState {
    /// Name of the folder, for people.
    name: String,
    /// The structure root: names, dtypes and shapes of all tensors.
    structure: String,
    /// SHA-256 of the header of each file.
    headers: BTreeMap<String, String>,
}

/// Digests of the tensors of a checkpoint as the last merge left them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Digests {
    /// The content root over the tensors.
    pub(super) content: String,
    pub(super) tensors: BTreeMap<String, String>,
}

/// All that was merged, oldest first.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    version: u32,
    merges: Vec<Step>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) digests: Option<Digests>,
}

impl Digests {
    pub(super) fn of(tensors: BTreeMap<String, String>) -> Digests {
        let mut root = ContentRoot::default();
        tensors.iter().for_each(|(name, digest)| root.insert(name, digest.clone()));
        Digests { content: root.finish(), tensors }
    }
}

impl Step {
    /// # Errors
    /// `E-001`, `E-004` if a header cannot be read.
    pub(super) fn new(plan: &Plan<'_>, adapters: Vec<Merged>, options: &MergeOptions, counts: Balance) -> Result<Step> {
        let Balance { adapter_tensors, applied, ignored, base_tensors, copied, modified, converted, added } = counts;
        let base = plan.base;
        let mut headers = BTreeMap::new();
        for shard in base.shards() {
            let mut header = vec![0; usize::try_from(shard.file.header().data_start.saturating_sub(8)).unwrap_or(usize::MAX)];
            shard.file.read_bytes(8, &mut header)?;
            headers.insert(shard.file_name.clone(), sha256(&header));
        }
        let name = base.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Step {
            tool: concat!("loratool ", env!("CARGO_PKG_VERSION")).to_owned(),
            base: BaseState { name, structure: base.structure_root(), headers },
            adapters,
            rounding: name_of(options.output.rounding),
            dtype: options.output.dtype.map(|dtype| dtype.to_string()),
            flags: flags(options),
            counts: Counts { adapter_tensors, applied, ignored, base_tensors, copied, modified, converted, added },
        })
    }
}

/// The rounding in reports and records.
pub(super) fn name_of(rounding: Rounding) -> String {
    match rounding {
        Rounding::Nearest => "nearest".to_owned(),
        Rounding::Peft => "peft".to_owned(),
        Rounding::PeftSafe => "peft-safe".to_owned(),
        Rounding::Stochastic { seed } => format!("stochastic, seed {seed}"),
    }
}

/// The flags that relaxed a check, as the command line spells them.
fn flags(options: &MergeOptions) -> Vec<String> {
    let BindOptions {
        prefix,
        allow_missing,
        skip_replacements,
        add_new_tensors,
        untie,
        resize_vocabulary,
        residual_base,
        allow_nonfinite_base,
        allow_base_mismatch,
    } = &options.bind;
    let named = [
        (*skip_replacements, "--skip-replacements"),
        (*add_new_tensors, "--add-new-tensors"),
        (*untie, "--untie"),
        (*resize_vocabulary, "--resize-vocab"),
        (*residual_base, "--residual-base"),
        (*allow_nonfinite_base, "--allow-nonfinite-base"),
        (*allow_base_mismatch, "--allow-base-mismatch"),
        (options.allow_repeat, "--allow-repeat"),
    ];
    let mut flags: Vec<String> = named.iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag.to_string()).collect();
    flags.extend(prefix.iter().map(|(from, to)| format!("--prefix {from}={to}")));
    flags.extend(allow_missing.iter().map(|pattern| format!("--allow-missing {pattern}")));
    flags
}

/// What an adapter is called: its file, or the folder of a PEFT adapter.
pub(super) fn name(label: &Path) -> String {
    let name = match label.file_name() {
        Some(name) if name == "adapter_model.safetensors" => label.parent().and_then(Path::file_name).unwrap_or(name),
        Some(name) => name,
        None => label.as_os_str(),
    };
    name.to_string_lossy().into_owned()
}

/// What `adapters` are by their content.
///
/// # Errors
/// `A-008`, `E-001`, `E-004`.
pub(super) fn entries(adapters: &[Weighted<'_>]) -> Result<Vec<Merged>> {
    let entry = |weighted: &Weighted<'_>| {
        let content = match &weighted.adapter.parts().made_of {
            Some(content) => content.clone(),
            None => content(weighted.adapter, || Ok(()))?.finish(),
        };
        Ok(Merged { adapter: name(Path::new(weighted.adapter.label())), content, weight: weighted.weight, by: None })
    };
    adapters.iter().map(entry).collect()
}

impl Record {
    /// That of a folder, or of the folder that a single file lies in; empty if it has none.
    ///
    /// # Errors
    /// `A-032` if it cannot be understood; `E-001`.
    pub(super) fn of(base: &Checkpoint) -> Result<Record> {
        let path = if base.is_folder() { base.path() } else { parent_of(base.path()) }.join(RECORD);
        if path.symlink_metadata().is_err() {
            return Ok(Record::default());
        }
        let text = read_small(&path, LIMIT)?.unwrap_or_default();
        let record = serde_json::from_slice::<Record>(&text).ok().filter(|record| record.version == VERSION);
        record.ok_or_else(|| {
            Error::new(rules::ADAPTER_ONCE, "the record of what was merged into the base cannot be read")
                .class_of(Class::Format)
                .file(&path)
                .help("get the checkpoint again, or remove the record if you know what is in the weights")
        })
    }

    /// Refuses adapters that are in the checkpoint already.
    ///
    /// # Errors
    /// `A-032`.
    pub(super) fn refuse_again(&self, adapters: &[Weighted<'_>], entries: &[Merged]) -> Result<()> {
        let mut all = adapters.iter().zip(entries);
        all.try_for_each(|(weighted, entry)| self.refuse_one(entry, weighted.adapter.label()))
    }

    /// Refuses what a method was made of, if that is in the checkpoint already.
    ///
    /// # Errors
    /// `A-032`.
    pub(super) fn refuse_parts_again(&self, entries: &[Merged]) -> Result<()> {
        let mut parts = entries.iter().filter_map(|entry| entry.by.as_ref()).flat_map(|by| &by.of);
        parts.try_for_each(|part| self.refuse_one(part, &part.adapter))
    }

    fn refuse_one(&self, entry: &Merged, label: &str) -> Result<()> {
        let present = self.weight_of(&entry.content);
        let (what, more) = if entry.weight < 0.0 && self.is_mixed(&entry.content) {
            (
                "is in the base as a part of what a method made of several, and subtracting it leaves another rest",
                "take all of it out by the undo log of that merge, or get the base again",
            )
        } else if present * entry.weight <= 0.0 {
            return Ok(());
        } else if entry.weight > 0.0 {
            ("is in the base already", "to take it out, use loratool unmerge; to apply more of it, pass --allow-repeat")
        } else {
            ("was taken out of the base already", "to put it back, merge it; to take out more of it, merge --allow-repeat")
        };
        let message = format!("the adapter {what}, with weight {present}, by the record of its merges");
        Err(Error::new(rules::ADAPTER_ONCE, message).file(label).help(format!("{RECORD} names it; {more}")))
    }

    /// Did a method make something of it that is in the checkpoint?
    fn is_mixed(&self, content: &str) -> bool {
        let made = self.merges.iter().flat_map(|step| &step.adapters).filter_map(|merged| merged.by.as_ref());
        made.flat_map(|made| &made.of).any(|part| part.content == content)
    }

    /// Adapters that are taken out, and that are not in the checkpoint with that weight.
    pub(super) fn strangers(&self, adapters: &[Weighted<'_>], entries: &[Merged]) -> Vec<Diagnostic> {
        let all = adapters.iter().zip(entries).filter(|(_, entry)| entry.weight < 0.0 && !self.merges.is_empty());
        let of = |(weighted, entry): (&Weighted<'_>, &Merged)| {
            // An empty sum is -0.
            let present = self.weight_of(&entry.content) + 0.0;
            (present + entry.weight < -1e-12).then(|| {
                let message = format!(
                    "by {RECORD} the adapter is in the checkpoint with weight {present}, and {} is taken out",
                    -entry.weight
                );
                Diagnostic::new(rules::ADAPTER_ONCE, message)
                    .file(weighted.adapter.label())
                    .help("give the adapter and the weight that were merged")
            })
        };
        all.filter_map(of).collect()
    }

    /// Is nothing recorded?
    pub(super) fn is_empty(&self) -> bool {
        self.merges.is_empty()
    }

    fn weight_of(&self, content: &str) -> f64 {
        let all = self.merges.iter().flat_map(|step| &step.adapters);
        all.map(|merged| merged.weight_of(content)).sum()
    }

    /// The text of the record with `step` added, and these digests of the result; empty if nothing is left in the checkpoint.
    pub(super) fn with(&self, step: &Step, digests: Option<Digests>) -> String {
        let mut merges = self.merges.clone();
        merges.push(step.clone());
        let mut record = Record { version: VERSION, merges, digests };
        let left: HashSet<String> = {
            let all = record.merges.iter().flat_map(|step| &step.adapters);
            all.filter(|merged| record.weight_of(&merged.content) != 0.0).map(|merged| merged.content.clone()).collect()
        };
        record.merges.iter_mut().for_each(|step| step.adapters.retain(|merged| left.contains(&merged.content)));
        record.merges.retain(|step| !step.adapters.is_empty());
        if record.merges.is_empty() {
            return String::new();
        }
        serde_json::to_string_pretty(&record).map(|text| text + "\n").unwrap_or_default()
    }
}
