//! The manifest as a value. Fields stand in canonical order, so serialising it gives the canonical text (`C-040`, section 5.3 of the
//! specification): no white space, sorted maps, numbers in their shortest form.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

use crate::adapter::{Kind, Orientation, ScalingRule};

/// The version that is written.
pub(super) const VERSION: &str = "1.0";
/// The feature of a target with a bias update.
pub(super) const LORA_BIAS: &str = "lora_bias";
/// The feature of an adapter with replacements.
pub(super) const REPLACEMENTS: &str = "replacements";
/// Every feature that this reader implements.
pub(super) const FEATURES: [&str; 4] = ["embedding", "linear_transposed", LORA_BIAS, REPLACEMENTS];

#[derive(Debug, Clone, Serialize)]
pub(super) struct Manifest {
    pub(super) container: String,
    pub(super) required: BTreeSet<String>,
    pub(super) optional: BTreeSet<String>,
    pub(super) base: Base,
    pub(super) targets: Vec<TargetEntry>,
    pub(super) replacements: Vec<ReplacementEntry>,
    pub(super) digests: BTreeMap<String, String>,
    pub(super) content: String,
    pub(super) lineage: Vec<Record>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) origin: Option<Origin>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Base {
    pub(super) name: Option<String>,
    pub(super) structure: Option<String>,
    pub(super) targets: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct TargetEntry {
    pub(super) tensor: String,
    pub(super) kind: EntryKind,
    pub(super) shape: Vec<u64>,
    pub(super) a: String,
    pub(super) b: String,
    pub(super) rank: u64,
    pub(super) alpha: f64,
    #[serde(serialize_with = "rule_name")]
    pub(super) scaling: ScalingRule,
    pub(super) scale: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bias: Option<BiasEntry>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct BiasEntry {
    pub(super) tensor: String,
    pub(super) delta: String,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct ReplacementEntry {
    pub(super) tensor: String,
    pub(super) with: String,
}

/// One step of the lineage.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Record {
    pub(super) op: String,
    pub(super) tool: String,
    pub(super) inputs: Vec<Input>,
    pub(super) parameters: Box<RawValue>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Input {
    pub(super) role: String,
    pub(super) dialect: String,
    pub(super) content: String,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Origin {
    pub(super) dialect: String,
    pub(super) config: Box<RawValue>,
}

/// The kinds that are implemented. The specification has more; a file that uses one of those requires a feature of that name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EntryKind {
    Linear,
    LinearTransposed,
    Embedding,
}

impl EntryKind {
    const ALL: [EntryKind; 3] = [EntryKind::Linear, EntryKind::LinearTransposed, EntryKind::Embedding];

    pub(super) fn name(self) -> &'static str {
        match self {
            EntryKind::Linear => "linear",
            EntryKind::LinearTransposed => "linear_transposed",
            EntryKind::Embedding => "embedding",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The feature that a reader needs, or `None` for what every reader implements.
    pub(super) fn feature(self) -> Option<&'static str> {
        (self != EntryKind::Linear).then(|| self.name())
    }

    /// `None` if the orientation is not declared.
    pub(super) fn of(kind: Kind) -> Option<Self> {
        match kind {
            Kind::Linear(Orientation::OutIn) => Some(EntryKind::Linear),
            Kind::Linear(Orientation::InOut) => Some(EntryKind::LinearTransposed),
            Kind::Linear(Orientation::Undeclared) => None,
            Kind::Embedding => Some(EntryKind::Embedding),
        }
    }

    pub(super) fn kind(self) -> Kind {
        match self {
            EntryKind::Linear => Kind::Linear(Orientation::OutIn),
            EntryKind::LinearTransposed => Kind::Linear(Orientation::InOut),
            EntryKind::Embedding => Kind::Embedding,
        }
    }

    /// Shape of the base tensor for `(out, in)` of the factors: rows of B, columns of A. An embedding's A has a column per row of the
    /// table.
    pub(super) fn base_shape(self, (out, inner): (u64, u64)) -> [u64; 2] {
        match self {
            EntryKind::Linear => [out, inner],
            EntryKind::LinearTransposed | EntryKind::Embedding => [inner, out],
        }
    }
}

impl Serialize for EntryKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

fn rule_name<S: Serializer>(rule: &ScalingRule, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(rule.name())
}

impl Manifest {
    /// Every feature that the content uses.
    pub(super) fn used_features(targets: &[TargetEntry], replacements: &[ReplacementEntry]) -> BTreeSet<String> {
        let kinds = targets.iter().filter_map(|target| target.kind.feature());
        let bias = targets.iter().any(|target| target.bias.is_some()).then_some(LORA_BIAS);
        let replaced = (!replacements.is_empty()).then_some(REPLACEMENTS);
        kinds.chain(bias).chain(replaced).map(str::to_owned).collect()
    }

    /// Every tensor of the file that a target or a replacement names, repetitions included.
    pub(super) fn named_tensors(&self) -> impl Iterator<Item = &str> {
        let factors = self.targets.iter().flat_map(|t| [Some(&t.a), Some(&t.b), t.bias.as_ref().map(|bias| &bias.delta)]);
        factors.flatten().chain(self.replacements.iter().map(|r| &r.with)).map(String::as_str)
    }
}
