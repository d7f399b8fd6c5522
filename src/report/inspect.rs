//! The report of `inspect`.

use serde::Serialize;

use super::Note;

/// What a file or folder is.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
#[non_exhaustive]
pub enum InspectReport {
    /// An adapter.
    Adapter(AdapterReport),
    /// A checkpoint.
    Checkpoint(CheckpointReport),
}

/// What an adapter is.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct AdapterReport {
    /// The file of weights that was read.
    pub path: String,
    /// Its dialect.
    pub dialect: &'static str,
    /// What people call the method: `LoRA`, `DoRA`, `LoHa`, ….
    pub method: String,
    /// Families of models whose modules have these names; many share one set.
    pub family: Option<&'static str>,
    /// What has to be there or asked for before it can be applied.
    pub needs: Vec<String>,
    /// Name of the base that the trainer wrote, for people.
    pub base_name: Option<String>,
    /// Structure root of the base, if the adapter states it.
    pub base_structure: Option<String>,
    /// Parameters in all factors and replacements.
    pub parameters: u64,
    /// Bytes of all factors and replacements.
    pub bytes: u64,
    /// Low-rank updates, sorted by tensor.
    pub targets: Vec<TargetReport>,
    /// Full tensors, sorted by tensor.
    pub replacements: Vec<ReplacementReport>,
    /// Rows that are replaced, sorted by tensor.
    pub rows: Vec<RowsReport>,
    /// Tensors that are multiplied, sorted.
    pub rescalings: Vec<RescalingReport>,
    /// The steps of its history: verb and tool.
    pub lineage: Vec<String>,
    /// What is worth saying.
    pub warnings: Vec<Note>,
}

/// One low-rank update.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct TargetReport {
    /// The base tensor.
    pub tensor: String,
    /// `linear`, `linear_transposed`, `linear_undeclared`, `embedding`, `conv`, `experts_out_in`, `experts_in_out` or
    /// `experts_undeclared`.
    pub kind: &'static str,
    /// Outputs of the layer: rows of B.
    pub out: u64,
    /// Inputs of the layer: columns of A.
    #[serde(rename = "in")]
    pub inner: u64,
    /// Rank.
    pub rank: u64,
    /// Alpha.
    pub alpha: f64,
    /// Scaling rule.
    pub rule: &'static str,
    /// Effective scale.
    pub scale: f64,
    /// Dtype of A and B.
    pub dtype: FactorDtypes,
    /// The adapter updates the bias of the layer as well.
    pub bias: bool,
    /// DoRA: each output has a magnitude.
    pub magnitudes: bool,
    /// Matrices in a stack of experts.
    pub experts: Option<u64>,
    /// ‖scale · B·A‖ (Frobenius); only on request, since the factors must be read.
    pub norm: Option<f64>,
}

/// The dtypes of the factors of an update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct FactorDtypes {
    /// Of A.
    pub a: String,
    /// Of B.
    pub b: String,
}

/// One full tensor.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ReplacementReport {
    /// The base tensor.
    pub tensor: String,
    /// Dtype.
    pub dtype: String,
    /// Shape.
    pub shape: Vec<u64>,
}

/// Rows of a tensor that are replaced.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RowsReport {
    /// The base tensor.
    pub tensor: String,
    /// Which rows, in the order of the new ones.
    pub rows: Vec<u64>,
    /// Dtype of the new rows.
    pub dtype: String,
}

/// A tensor that is multiplied.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RescalingReport {
    /// The base tensor.
    pub tensor: String,
    /// What has a factor of its own: `output` or `input`.
    pub axis: &'static str,
    /// How many factors there are.
    pub factors: u64,
    /// Dtype of the factors.
    pub dtype: String,
}

/// What a checkpoint is.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct CheckpointReport {
    /// As given.
    pub path: String,
    /// `model_type` of config.json.
    pub model_type: Option<String>,
    /// Files of weights.
    pub files: Vec<FileReport>,
    /// Tensors in all files.
    pub tensors: u64,
    /// Parameters in all files.
    pub parameters: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// What is stored in each dtype; most parameters first.
    pub dtypes: Vec<DtypeReport>,
    /// The names of the tied embedding, if the model ties it.
    pub tied: Option<TiedReport>,
    /// How the weights are quantised, by config.json.
    pub quantization: Option<String>,
    /// Rows and columns of a weight that share a scale, by config.json.
    pub quantization_block: Option<[u64; 2]>,
    /// Structure root.
    pub structure: String,
    /// Every tensor, in the order of the files. Only on request.
    pub listing: Option<Vec<ListedTensor>>,
    /// What is worth saying.
    pub warnings: Vec<Note>,
}

/// One file of weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct FileReport {
    /// Its name in the folder.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// Tensors in it.
    pub tensors: u64,
}

/// What a checkpoint stores in one dtype.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DtypeReport {
    /// The dtype.
    pub dtype: String,
    /// Tensors.
    pub tensors: u64,
    /// Parameters in them.
    pub parameters: u64,
}

/// An embedding that is stored once and used under several names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct TiedReport {
    /// The name that it is stored under.
    pub stored: String,
    /// The names that share it.
    pub shared_by: Vec<String>,
}

/// One tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ListedTensor {
    /// Its name.
    pub tensor: String,
    /// Its dtype.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<u64>,
}
