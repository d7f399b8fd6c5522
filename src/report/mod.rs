//! What the verbs found out, as plain values. Text and JSON are two renderings of the same value; nothing here prints. The JSON
//! form is a documented protocol (`docs/json.md`): members are added, never renamed or removed, within one schema number.

mod bake;
mod combine;
mod compare;
mod convert;
mod eval;
mod extract;
mod inspect;
mod loader;
mod merge;
mod predict;
mod recover;
mod resize;
mod spectrum;
pub(crate) mod text;
mod unmerge;
mod validate;
mod verify;

pub use bake::{BakeReport, WorstTarget};
pub use combine::{CombineReport, CombinedAdapter, CombinedTarget};
pub use compare::{CompareReport, ComparedTarget, Overlap, Truncation};
pub use convert::ConvertReport;
pub use eval::{Compared, ConfusionReport, EvalReport, LabelReport, Measure, Scores};
pub use extract::{ExtractReport, ExtractedTarget, OmittedTarget, RestTensor};
pub use inspect::{
    AdapterReport, CheckpointReport, DtypeReport, FactorDtypes, FileReport, InspectReport, ListedTensor, ReplacementReport,
    RescalingReport, RowsReport, TargetReport, TiedReport,
};
pub use loader::{LoaderFinding, LoaderReport};
pub use merge::{
    AdapterUse, Balance, ContributionReport, Converted, FileLeft, IgnoredReport, MergeEachReport, MergeReport, Narrowed,
    TensorReport,
};
pub use predict::{ClassShare, PredictReport, Prediction, UsedAdapter};
pub use recover::RecoverReport;
pub use resize::{ResizeReport, ResizedTarget};
pub use spectrum::{EnergyRanks, Smaller, SpectrumReport, UpdateSpectrum};
pub use unmerge::UnmergeReport;
pub use validate::{Check, ValidateReport};
pub use verify::{DifferingTensor, DigestReport, StructureFinding, Ulps, Untouched, Verdict, VerifiedTensor, VerifyReport};

use serde::Serialize;

use crate::error::Diagnostic;

/// A warning, or one of the things that an error consists of.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Note {
    /// Rule id.
    pub rule: &'static str,
    /// What was found.
    pub message: String,
    /// File, as the caller named it.
    pub file: Option<String>,
    /// Tensor or JSON key.
    pub tensor: Option<String>,
    /// Byte offset.
    pub offset: Option<u64>,
    /// What to do.
    pub help: Option<String>,
}

impl From<&Diagnostic> for Note {
    fn from(diagnostic: &Diagnostic) -> Self {
        Note {
            rule: diagnostic.rule().id,
            message: diagnostic.message().to_owned(),
            file: diagnostic.place().file.as_ref().map(|f| f.display().to_string()),
            tensor: diagnostic.place().tensor.clone(),
            offset: diagnostic.place().offset,
            help: diagnostic.help_text().map(str::to_owned),
        }
    }
}
