//! `adapter_config.json`: what it says about the weights, with PEFT's own defaults and types and without its leniency. A file
//! is read once, every problem is reported at once, and what changes the meaning of the weights is honoured or refused.

use std::path::{Path, PathBuf};

use super::fields::{Fields, number_of, rank_of};
use super::json::{self, Json};
use super::methods::Method;
use super::methods::variant::BlockDiagonal;
use super::refuse;
use crate::adapter::{Orientation, Removed, ScalingRule};
use crate::error::{Diagnostic, Error, Result};
use crate::limits::Limits;
use crate::rules;

/// PEFT's default of `lora_alpha`.
const DEFAULT_ALPHA: f64 = 8.0;

/// Fields that say nothing about the finished weights: records of training, selection of modules (the tensors decide), and
/// what loaders of other libraries keep here. Fields that are read or refused are listed where that happens.
const HARMLESS: &[&str] = &[
    "auto_mapping",
    "corda_config",
    "eva_config",
    "beta1",
    "beta2",
    "d_initial",
    "decompose_both",
    "decompose_factor",
    "deltaT",
    "exclude_modules",
    "inference_mode",
    "init_ia3_weights",
    "init_lora_weights",
    "init_r",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "module_dropout",
    "monteclora_config",
    "orth_reg_weight",
    "peft_type",
    "projection_prng_key",
    "qalora_group_size",
    "r",
    "rank_dropout",
    "rank_dropout_scale",
    "rank_pattern",
    "revision",
    "runtime_config",
    "save_projection",
    "target_modules",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
    "use_effective_conv2d",
    "velora_config",
    "vera_dropout",
];

/// Which modules were chosen for training. The tensors decide; this is cross-checked.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Selection {
    /// PEFT's table per architecture, or all linear layers: nothing to check against.
    Automatic,
    /// A regular expression for the whole path of a module.
    Pattern(String),
    /// Paths, or ends of paths.
    Names(Vec<String>),
}

/// Which biases were trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bias {
    None,
    All,
    LoraOnly,
}

/// A checked `adapter_config.json` of a plain LoRA.
#[derive(Debug, Clone)]
pub(crate) struct PeftConfig {
    pub(super) file: PathBuf,
    pub(super) text: String,
    pub(super) method: Method,
    pub(super) rank: u64,
    /// AdaLoRA's first rank, by which it divides.
    pub(super) init_rank: u64,
    /// IA3: modules whose inputs are multiplied.
    pub(super) feedforward_modules: Vec<String>,
    pub(super) block_diagonal: Option<BlockDiagonal>,
    /// Ranges of layers that were repeated.
    pub(super) replication: Vec<(u64, u64)>,
    /// Why the published base is not the one that was trained on, if it is not.
    pub(super) residual: Option<(Diagnostic, Removed)>,
    /// A diagonal stands between B and A.
    pub(super) kasa: bool,
    /// QALoRA: inputs of a group.
    pub(super) group: Option<u64>,
    pub(super) alpha: f64,
    pub(super) rule: ScalingRule,
    pub(super) rank_pattern: Vec<(String, u64)>,
    pub(super) alpha_pattern: Vec<(String, f64)>,
    pub(super) target_modules: Selection,
    /// Includes what PEFT adds for the task of the adapter.
    pub(super) modules_to_save: Vec<String>,
    pub(super) bias: Bias,
    pub(super) lora_bias: bool,
    /// The LoRA or the saved copy of an embedding is shared with the tied head.
    pub(super) ensure_weight_tying: bool,
    pub(super) orientation: Orientation,
    /// Every target has magnitudes.
    pub(super) dora: bool,
    /// Bare parameters that were adapted, as paths or ends of paths.
    pub(super) target_parameters: Vec<String>,
    /// The rows that were trained of each embedding, by the end of its path.
    pub(super) tokens: Vec<(String, Vec<u64>)>,
    /// The version that wrote the file; since 0.18.
    pub(super) peft_version: Option<String>,
    pub(super) base_name: Option<String>,
    pub(super) warnings: Vec<Diagnostic>,
}

impl PeftConfig {
    /// Reads the bytes of `adapter_config.json`; `file` is for messages.
    ///
    /// # Errors
    /// `P-001` to `P-007`: the first of encoding, syntax and method, or every problem of the fields at once.
    pub(crate) fn parse(bytes: &[u8], file: &Path, limits: &Limits) -> Result<PeftConfig> {
        if bytes.len() as u64 > limits.config_bytes {
            return Err(Self::too_long(file, limits));
        }
        let (text, members) = json::parse_object(bytes, file)?;
        let get = |name: &str| members.iter().find(|(key, _)| key == name).map(|(_, value)| value);
        if let Some(problem) = refuse::method(get("peft_type"), &members) {
            return Err(problem.file(file).into());
        }
        let name = if let Some(Json::Text(name)) = get("peft_type") { name.as_str() } else { "LORA" };
        let method = Method::from_name(name).unwrap_or(Method::Lora);
        let mut fields = Fields::new(&members);
        let alpha = if matches!(method, Method::LoHa | Method::LoKr) { "alpha" } else { "lora_alpha" };
        let mut config = PeftConfig {
            file: file.to_path_buf(),
            text: text.to_owned(),
            method,
            rank: if method.has_rank() { fields.rank("r", limits) } else { 1 },
            init_rank: if method == Method::AdaLora { fields.rank("init_r", limits) } else { 1 },
            feedforward_modules: if method == Method::Ia3 { fields.names("feedforward_modules") } else { Vec::new() },
            residual: None,
            replication: fields.ranges("layer_replication"),
            kasa: fields.is_set("kasa_config"),
            block_diagonal: fields.block_diagonal("use_bdlora"),
            group: fields.flag("use_qalora").filter(|on| *on).map(|_| fields.rank("qalora_group_size", limits)),
            alpha: fields.number(alpha).unwrap_or(DEFAULT_ALPHA),
            rule: match fields.flag("use_rslora") {
                Some(true) => ScalingRule::RankStabilized,
                _ => ScalingRule::Standard,
            },
            // AdaLoRA keeps masks there, which say which ranks are in the file.
            rank_pattern: match method {
                Method::AdaLora => Vec::new(),
                _ => fields.pattern("rank_pattern", |value| rank_of(value, limits)),
            },
            alpha_pattern: fields.pattern("alpha_pattern", number_of),
            target_modules: match method {
                Method::Ia3 | Method::Tokens => Selection::Automatic,
                _ => fields.selection("target_modules"),
            },
            modules_to_save: fields.names("modules_to_save"),
            bias: fields.bias(),
            lora_bias: fields.flag("lora_bias").unwrap_or(false),
            ensure_weight_tying: fields.flag("ensure_weight_tying").unwrap_or(false),
            orientation: match fields.flag("fan_in_fan_out") {
                None => Orientation::Undeclared,
                Some(false) => Orientation::OutIn,
                Some(true) => Orientation::InOut,
            },
            dora: fields.flag("use_dora").unwrap_or(false),
            target_parameters: fields.names("target_parameters"),
            tokens: fields.tokens(if method == Method::Tokens { "token_indices" } else { "trainable_token_indices" }),
            peft_version: fields.text("peft_version"),
            base_name: fields.text("base_model_name_or_path"),
            warnings: Vec::new(),
        };
        let task = fields.text("task_type");
        config.modules_to_save.extend(implied_by_task(task.as_deref()).iter().map(|&name| name.to_owned()));
        let Fields { read, mut problems, .. } = fields;
        problems.extend(refuse::variants(&members));
        let residual = if method == Method::Lora { refuse::initialisation(get("init_lora_weights")) } else { None };
        let kasa = refuse::kasa(get("kasa_config"));
        if residual.is_some() && kasa.is_some() {
            let message = "kasa_config and init_lora_weights both took something out of the base";
            problems.push(
                Diagnostic::new(rules::CONFIG_METHOD, message).tensor("kasa_config").help("PEFT does not combine them either"),
            );
        }
        match residual.or(kasa) {
            Some((problem, removed)) if problem.rule() == rules::INIT_CHANGES_BASE => {
                config.residual = Some((problem.file(file), removed));
            }
            problem => problems.extend(problem.map(|(problem, _)| problem)),
        }
        Error::check(problems.into_iter().map(|p| p.file(file)).collect())?;
        config.warnings.extend(unknown_fields(&members, &read).map(|warning| warning.file(file)));
        Ok(config)
    }

    /// The error for a config that is longer than `limits` allows, for callers that read no further than that.
    #[cold]
    pub(crate) fn too_long(file: &Path, limits: &Limits) -> Error {
        let message = format!("the config is longer than {} bytes", limits.config_bytes);
        Error::new(rules::CONFIG_LIMIT, message).file(file).help("a config of PEFT has a few thousand; is this the right file?")
    }
}

/// What PEFT adds to `modules_to_save` for a task when it loads an adapter; versions before 0.5 did not write it into the config.
fn implied_by_task(task: Option<&str>) -> &'static [&'static str] {
    match task {
        Some("SEQ_CLS" | "TOKEN_CLS") => &["classifier", "score"],
        Some("QUESTION_ANS") => &["qa_outputs"],
        _ => &[],
    }
}

/// One warning that lists the fields that nobody knows: written by a newer PEFT, or by another tool.
fn unknown_fields(members: &[(String, Json)], read: &[&str]) -> Option<Diagnostic> {
    let known = |name: &str| read.contains(&name) || HARMLESS.contains(&name) || refuse::is_variant(name);
    let unknown: Vec<String> =
        members.iter().filter(|(name, _)| !known(name)).map(|(name, value)| format!("{name:?} ({})", value.describe())).collect();
    let message = format!("unknown fields, ignored: {}", unknown.join(", "));
    let help = "a newer PEFT may have written them; if one of them changes the meaning of the weights, the result is wrong";
    (!unknown.is_empty()).then(|| Diagnostic::new(rules::CONFIG_UNKNOWN, message).help(help))
}
