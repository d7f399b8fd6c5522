//! The manifest as a value. Fields stand in canonical order, so serialising it gives the canonical text (`C-040`, section 5.3 of the
//! specification): no white space, sorted maps, numbers in their shortest form.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

use crate::adapter::{Axis, Kind, Orientation, Removed, ScalingRule, Target};

/// The version that is written.
pub(super) const VERSION: &str = "1.0";
/// The feature of a target with a bias update.
pub(super) const LORA_BIAS: &str = "lora_bias";
/// The feature of an adapter with replacements.
pub(super) const REPLACEMENTS: &str = "replacements";
/// The feature of a target with magnitudes.
pub(super) const DORA: &str = "dora";
/// The feature of an adapter that replaces rows.
pub(super) const ROWS: &str = "rows";
/// The feature of an adapter that multiplies tensors.
pub(super) const RESCALINGS: &str = "rescalings";
/// The feature of an adapter for repeated layers.
pub(super) const REPLICATION: &str = "replication";
/// The feature of an adapter that belongs to another base than the published one.
pub(super) const RESIDUAL: &str = "residual";
/// The feature of a replacement of a parameter under all of its names.
pub(super) const SHARED: &str = "shared";
/// Every feature that this reader implements.
pub(super) const FEATURES: [&str; 15] = [
    "conv1d",
    "conv2d",
    "conv3d",
    DORA,
    "embedding",
    "experts",
    "flat",
    "linear_transposed",
    LORA_BIAS,
    REPLACEMENTS,
    REPLICATION,
    RESCALINGS,
    RESIDUAL,
    ROWS,
    SHARED,
];

#[derive(Debug, Clone, Serialize)]
pub(super) struct Manifest {
    pub(super) container: String,
    pub(super) required: BTreeSet<String>,
    pub(super) optional: BTreeSet<String>,
    pub(super) base: Base,
    pub(super) targets: Vec<TargetEntry>,
    pub(super) replacements: Vec<ReplacementEntry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) rows: Vec<RowsEntry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) rescalings: Vec<RescalingEntry>,
    /// Ranges of the base's layers that stand one after the other.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) replication: Vec<[u64; 2]>,
    /// Why the published base is not the one that was trained on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) residual: Option<ResidualEntry>,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) axes: Option<Axes>,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) magnitude: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) singular_values: Option<Vec<f64>>,
}

/// What the last two dimensions of a stack of experts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Axes {
    InOut,
    OutIn,
}

impl Axes {
    pub(super) fn from_name(name: &str) -> Option<Self> {
        match name {
            "in_out" => Some(Axes::InOut),
            "out_in" => Some(Axes::OutIn),
            _ => None,
        }
    }
}

/// Rows of a tensor that are replaced.
#[derive(Debug, Clone, Serialize)]
pub(super) struct RowsEntry {
    pub(super) tensor: String,
    pub(super) rows: Vec<u64>,
    pub(super) with: String,
}

/// A tensor that is multiplied.
#[derive(Debug, Clone, Serialize)]
pub(super) struct RescalingEntry {
    pub(super) tensor: String,
    #[serde(serialize_with = "axis_name")]
    pub(super) axis: Axis,
    /// The weight is stored as (in, out).
    pub(super) transposed: bool,
    /// A base without the tensor is passed over.
    pub(super) if_there: bool,
    pub(super) by: String,
}

fn axis_name<S: Serializer>(axis: &Axis, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(match axis {
        Axis::Output => "output",
        Axis::Input => "input",
    })
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
    /// The parameter itself, under all names that it is tied to.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) shared: bool,
}

/// Why the published base is not the one that was trained on, and what was taken out of it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ResidualEntry {
    pub(super) why: String,
    #[serde(serialize_with = "removed_name")]
    pub(super) removed: Removed,
}

/// What an initialisation took out, by the names of the format.
pub(super) const REMOVED: [(&str, Removed); 4] = [
    ("leading_columns", Removed::LeadingColumns),
    ("leading_components", Removed::LeadingComponents),
    ("trailing_components", Removed::TrailingComponents),
    ("unknown", Removed::Unknown),
];

fn removed_name<S: Serializer>(removed: &Removed, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(REMOVED.iter().find(|(_, known)| known == removed).map_or("unknown", |(name, _)| name))
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
    /// With so many kernel sizes: 1, 2 or 3.
    Conv(usize),
    Experts,
    Flat,
}

impl EntryKind {
    const ALL: [EntryKind; 8] = [
        EntryKind::Linear,
        EntryKind::LinearTransposed,
        EntryKind::Embedding,
        EntryKind::Conv(1),
        EntryKind::Conv(2),
        EntryKind::Conv(3),
        EntryKind::Experts,
        EntryKind::Flat,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            EntryKind::Linear => "linear",
            EntryKind::LinearTransposed => "linear_transposed",
            EntryKind::Embedding => "embedding",
            EntryKind::Conv(1) => "conv1d",
            EntryKind::Conv(2) => "conv2d",
            EntryKind::Conv(_) => "conv3d",
            EntryKind::Experts => "experts",
            EntryKind::Flat => "flat",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The feature that a reader needs, or `None` for what every reader implements.
    pub(super) fn feature(self) -> Option<&'static str> {
        (self != EntryKind::Linear).then(|| self.name())
    }

    /// The kind of a target, and the axes of a stack; `None` if the orientation is not declared.
    pub(super) fn of(target: &Target) -> Option<(Self, Option<Axes>)> {
        match target.kind {
            Kind::Linear(Orientation::OutIn) => Some((EntryKind::Linear, None)),
            Kind::Linear(Orientation::InOut) => Some((EntryKind::LinearTransposed, None)),
            Kind::Experts(Orientation::OutIn) => Some((EntryKind::Experts, Some(Axes::OutIn))),
            Kind::Experts(Orientation::InOut) => Some((EntryKind::Experts, Some(Axes::InOut))),
            Kind::Linear(Orientation::Undeclared) | Kind::Experts(Orientation::Undeclared) | Kind::Shared(_) => None,
            Kind::Flat => Some((EntryKind::Flat, None)),
            Kind::Embedding => Some((EntryKind::Embedding, None)),
            Kind::Conv => Some((EntryKind::Conv(target.a.info().shape.dims().len().saturating_sub(2)), None)),
        }
    }
}

impl TargetEntry {
    /// What the entry says of the layer.
    pub(super) fn kind(&self) -> Kind {
        match (self.kind, self.axes) {
            (EntryKind::Linear, _) => Kind::Linear(Orientation::OutIn),
            (EntryKind::LinearTransposed, _) => Kind::Linear(Orientation::InOut),
            (EntryKind::Embedding, _) => Kind::Embedding,
            (EntryKind::Conv(_), _) => Kind::Conv,
            (EntryKind::Flat, _) => Kind::Flat,
            (EntryKind::Experts, Some(Axes::InOut)) => Kind::Experts(Orientation::InOut),
            (EntryKind::Experts, _) => Kind::Experts(Orientation::OutIn),
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
    pub(super) fn used_features(&self) -> BTreeSet<String> {
        let kinds = self.targets.iter().filter_map(|target| target.kind.feature());
        let used = [
            (LORA_BIAS, self.targets.iter().any(|target| target.bias.is_some())),
            (DORA, self.targets.iter().any(|target| target.magnitude.is_some())),
            (REPLACEMENTS, !self.replacements.is_empty()),
            (ROWS, !self.rows.is_empty()),
            (RESCALINGS, !self.rescalings.is_empty()),
            (REPLICATION, !self.replication.is_empty()),
            (RESIDUAL, self.residual.is_some()),
            (SHARED, self.replacements.iter().any(|replacement| replacement.shared)),
        ];
        let used = used.into_iter().filter(|(_, used)| *used).map(|(feature, _)| feature);
        kinds.chain(used).map(str::to_owned).collect()
    }

    /// Every tensor of the file that the manifest names, repetitions included.
    pub(super) fn named_tensors(&self) -> impl Iterator<Item = &str> {
        let factors = self.targets.iter().flat_map(|t| {
            [Some(&t.a), Some(&t.b), t.bias.as_ref().map(|bias| &bias.delta), t.magnitude.as_ref()].into_iter().flatten()
        });
        let whole = self.replacements.iter().map(|r| &r.with).chain(self.rows.iter().map(|r| &r.with));
        // Weight and bias of a module have their multipliers in common.
        let by: BTreeSet<&String> = self.rescalings.iter().map(|r| &r.by).collect();
        factors.chain(whole).chain(by).map(String::as_str)
    }
}
