//! The record of what was merged into a checkpoint folder, which travels with it: `loratool.merge.json`. It names adapters by the
//! digest of their content, so that the same adapter is not merged twice, whatever its file is called.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::digests::content;
use crate::checkpoint::Checkpoint;
use crate::error::{Class, Error, Result};
use crate::io::read_small;
use crate::plan::Weighted;
use crate::rules;

/// The record's name in the folder.
pub(super) const RECORD: &str = "loratool.merge.json";
const VERSION: u32 = 1;
/// Bytes: some thousands of merges.
const LIMIT: u64 = 1 << 20;

/// An adapter that was merged, or taken out if the weight is negative.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Merged {
    /// Name of its file or folder, for people.
    pub(crate) adapter: String,
    /// The content root of its tensors.
    pub(crate) content: String,
    pub(crate) weight: f64,
}

/// All that was merged, oldest first.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    version: u32,
    merges: Vec<Merged>,
}

/// What `adapters` are by their content.
///
/// # Errors
/// `A-008`, `E-001`, `E-004`.
pub(super) fn entries(adapters: &[Weighted<'_>]) -> Result<Vec<Merged>> {
    let entry = |weighted: &Weighted<'_>| {
        let label = Path::new(weighted.adapter.label());
        let name = match label.file_name() {
            Some(name) if name == "adapter_model.safetensors" => label.parent().and_then(Path::file_name).unwrap_or(name),
            Some(name) => name,
            None => label.as_os_str(),
        };
        let content = content(weighted.adapter, || Ok(()))?.finish();
        Ok(Merged { adapter: name.to_string_lossy().into_owned(), content, weight: weighted.weight })
    };
    adapters.iter().map(entry).collect()
}

impl Record {
    /// That of a folder; empty if it has none.
    ///
    /// # Errors
    /// `A-032` if it cannot be understood; `E-001`.
    pub(super) fn of(base: &Checkpoint) -> Result<Record> {
        let path = base.path().join(RECORD);
        if !base.is_folder() || path.symlink_metadata().is_err() {
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
    pub(super) fn refuse_again(&self, base: &Checkpoint, adapters: &[Weighted<'_>], entries: &[Merged]) -> Result<()> {
        for (weighted, entry) in adapters.iter().zip(entries) {
            let present = self.weight_of(&entry.content);
            if present * entry.weight > 0.0 {
                let message = format!("the adapter is in the base already, with weight {present}, by the record of its merges");
                let help = format!(
                    "{:?} names it; to take it out, use loratool unmerge; to apply more of it, pass --allow-repeat",
                    base.path().join(RECORD)
                );
                return Err(Error::new(rules::ADAPTER_ONCE, message).file(weighted.adapter.label()).help(help));
            }
        }
        Ok(())
    }

    fn weight_of(&self, content: &str) -> f64 {
        self.merges.iter().filter(|merged| merged.content == content).map(|merged| merged.weight).sum()
    }

    /// The text of the record with `entries` added; empty if nothing is left in the checkpoint.
    pub(super) fn with(mut self, entries: &[Merged]) -> String {
        self.version = VERSION;
        self.merges.extend_from_slice(entries);
        let gone: Vec<bool> = self.merges.iter().map(|merged| self.weight_of(&merged.content) == 0.0).collect();
        let mut gone = gone.into_iter();
        self.merges.retain(|_| !gone.next().unwrap_or(false));
        if self.merges.is_empty() {
            return String::new();
        }
        serde_json::to_string_pretty(&self).map(|text| text + "\n").unwrap_or_default()
    }
}
