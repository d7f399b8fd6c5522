//! What is refused by name, as data: PEFT methods that are not LoRA, config fields that make more of a LoRA than `s·B·A`, and
//! initialisations after which the published base is not the base that was trained on. Each entry says why, and the way out.
//! Facts from PEFT 0.21.2: `tuners/lora/config.py`, `tuners/lora/layer.py` and `tuners/*/model.py`.

use super::json::Json;
use super::methods::Method;
use crate::adapter::Removed;
use crate::error::Diagnostic;
use crate::rules;

/// The way out for methods that PEFT itself can turn into an ordinary model.
const MERGE_IN_PEFT: &str = "merge it with PEFT (merge_and_unload) and use the merged model";
/// The way out for methods whose layers implement PEFT's conversion to LoRA (since 0.19).
const CONVERT_IN_PEFT: &str = "convert it with PEFT 0.19 or later (peft.save_as_lora), or merge it there (merge_and_unload)";
/// The way out for methods that leave nothing to merge.
const SERVE_IN_PEFT: &str = "there are no weights to merge or convert; use it with PEFT";

/// `(peft_type, what the method does, the way out)`.
const METHODS: &[(&str, &str, &str)] = &[
    ("PROMPT_TUNING", "puts learned vectors before the input and changes no weight", SERVE_IN_PEFT),
    ("MULTITASK_PROMPT_TUNING", "puts learned vectors before the input and changes no weight", SERVE_IN_PEFT),
    ("P_TUNING", "puts learned vectors before the input and changes no weight", SERVE_IN_PEFT),
    ("PREFIX_TUNING", "puts learned keys and values into the attention and changes no weight", SERVE_IN_PEFT),
    ("CPT", "puts learned vectors before the input and changes no weight", SERVE_IN_PEFT),
    ("CARTRIDGE", "puts learned keys and values into the attention and changes no weight", SERVE_IN_PEFT),
    ("ADAPTION_PROMPT", "adds learned prompts with a gate to the attention and changes no weight", SERVE_IN_PEFT),
    ("OFT", "multiplies the weight by an orthogonal matrix", MERGE_IN_PEFT),
    ("BOFT", "multiplies the weight by an orthogonal matrix", MERGE_IN_PEFT),
    ("HRA", "multiplies the weight by Householder reflections", MERGE_IN_PEFT),
    ("ROAD", "rotates the outputs of a layer", MERGE_IN_PEFT),
    ("PSOFT", "rotates within a principal subspace of the weight", CONVERT_IN_PEFT),
    ("PVERA", "samples around frozen random matrices that are shared by all layers", MERGE_IN_PEFT),
    ("RANDLORA", "combines frozen random matrices that are shared by all layers", CONVERT_IN_PEFT),
    ("VBLORA", "builds its factors from a bank of vectors that all layers share", CONVERT_IN_PEFT),
    ("UNILORA", "builds its factors from one vector that all layers share", CONVERT_IN_PEFT),
    ("TINYLORA", "trains a few numbers inside an SVD of the base", CONVERT_IN_PEFT),
    ("FOURIERFT", "updates by an inverse Fourier transform of a few coefficients", CONVERT_IN_PEFT),
    ("WAVEFT", "updates by an inverse wavelet transform of a few coefficients", CONVERT_IN_PEFT),
    ("C3A", "updates by a block-circular convolution", CONVERT_IN_PEFT),
    ("MISS", "updates by one matrix that is shared by shards of the weight", CONVERT_IN_PEFT),
    ("BONE", "updates by one block that is repeated over the weight", "merge it with the PEFT version that trained it"),
    ("SHIRA", "updates a sparse set of entries at full rank", CONVERT_IN_PEFT),
    ("SUPERTUNING", "updates a sparse set of entries at full rank", MERGE_IN_PEFT),
    ("HIRA", "multiplies the base element by element with a low-rank product", CONVERT_IN_PEFT),
    ("DELORA", "normalises the directions of its factors and learns a strength", CONVERT_IN_PEFT),
    ("GRALORA", "has one pair of factors per block of the weight", CONVERT_IN_PEFT),
    ("GLORA", "scales, shifts and updates weight and bias together", MERGE_IN_PEFT),
    ("ADAMSS", "trains within clusters of singular vectors of the base", MERGE_IN_PEFT),
    ("LILY", "routes over factors that layers share", SERVE_IN_PEFT),
    ("POLY", "mixes several LoRA adapters per task", SERVE_IN_PEFT),
    ("XLORA", "mixes several LoRA adapters per token", "merge the LoRA adapters that it mixes one by one"),
    ("SHADOW", "runs a second network beside the model", SERVE_IN_PEFT),
    ("PEANUT", "computes its update by a network from the base weight", MERGE_IN_PEFT),
    ("OSF", "trains the singular vectors of the base itself", MERGE_IN_PEFT),
    ("DEFT", "projects the base and injects new directions", MERGE_IN_PEFT),
    ("FROD", "rotates a joint decomposition of the base", MERGE_IN_PEFT),
    ("BEFT", "trains biases only", MERGE_IN_PEFT),
    ("LN_TUNING", "trains normalisation layers and has no factors", MERGE_IN_PEFT),
];

/// `P-003` for a `peft_type` that is not applied.
pub(super) fn method(peft_type: Option<&Json>, fields: &[(String, Json)]) -> Option<Diagnostic> {
    let refuse = |message: String, help: &str| Some(Diagnostic::new(rules::PEFT_TYPE, message).tensor("peft_type").help(help));
    let name = match peft_type {
        Some(Json::Text(name)) if Method::from_name(name).is_some() => return None,
        Some(Json::Text(name)) => name,
        None if fields.iter().any(|(key, _)| key == "lora_parameters" || key == "fine_tune_type") => {
            let message = "this is the config of an MLX adapter, not of PEFT";
            return Some(Diagnostic::new(rules::FOREIGN_DIALECT, message).help(super::super::foreign::MLX_HELP));
        }
        None => return refuse("peft_type is missing, so this is not a PEFT config".to_owned(), "state \"peft_type\": \"LORA\""),
        Some(other) => {
            return refuse(format!("peft_type is {}, not \"LORA\"", other.describe()), "state \"peft_type\": \"LORA\"");
        }
    };
    match METHODS.iter().find(|(known, ..)| known == name) {
        Some((_, what, way_out)) => refuse(format!("peft_type is {name:?}, which is not applied: it {what}"), way_out),
        None if name.eq_ignore_ascii_case("LORA") => {
            refuse(format!("peft_type is {name:?}; PEFT writes \"LORA\""), "correct the config")
        }
        None => refuse(format!("peft_type is {name:?}, which is unknown"), MERGE_IN_PEFT),
    }
}

/// `(field, why B·A is not the whole update, the way out)` for fields that change what the weights mean when they are set.
const VARIANTS: &[(&str, &str, &str)] = &[
    (
        "alora_invocation_tokens",
        "an activated LoRA acts only after certain tokens, so no merged weight equals it",
        "there is no merged form; use it with PEFT",
    ),
    (
        "arrow_config",
        "Arrow routes each token to one of several adapters, so no merged weight equals it",
        "merge one of the adapters that it routes to",
    ),
    (
        "megatron_config",
        "the adapter was trained on Megatron's parallel layers, so its factors may be shards",
        "gather the adapter with Megatron and save it again",
    ),
    (
        "enable_lora",
        "PEFT 0.2 updated parts of a fused matrix only",
        "load and save it with PEFT 0.2, which is the last that knows the field",
    ),
];

/// `P-006` for every field of [`VARIANTS`] that is set.
pub(super) fn variants(fields: &[(String, Json)]) -> impl Iterator<Item = Diagnostic> {
    let value = |name: &str| fields.iter().find(|(key, _)| key == name).map(|(_, value)| value).filter(|value| is_set(value));
    VARIANTS.iter().filter_map(move |(name, why, way_out)| {
        value(name)?;
        Some(Diagnostic::new(rules::CONFIG_METHOD, format!("{name} is set: {why}")).tensor(*name).help(*way_out))
    })
}

/// Whether [`variants`] answers for the field.
pub(super) fn is_variant(name: &str) -> bool {
    VARIANTS.iter().any(|(known, ..)| *known == name)
}

/// Whether a field that is off by default is on. An empty object is on: PEFT makes a sub-config with defaults of it.
fn is_set(value: &Json) -> bool {
    match value {
        Json::Null | Json::Bool(false) => false,
        Json::List(list) => !list.is_empty(),
        _ => true,
    }
}

const CONVERT_INIT: &str = "take it out here, with --recompute-residual; give the base that was trained on, with --residual-base; or save it again in PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA for the published base of it";
/// The way out where what was taken out is random, or from data.
const CONVERT_UNKNOWN: &str = "give the base that was trained on, with --residual-base; or save it again in PEFT with \
                               path_initial_model_for_weight_conversion, which makes a plain LoRA for the published base of it";

/// `(prefix of init_lora_weights, why, the way out, what was taken out)` for initialisations that take something out of the base before training.
const BASE_CHANGING: &[(&str, &str, &str, Removed)] = &[
    (
        "pissa_niter",
        "PiSSA moved singular components of the base, found by a random method, into the factors",
        CONVERT_UNKNOWN,
        Removed::Unknown,
    ),
    (
        "pissa",
        "PiSSA moved the largest singular components of the base into the factors",
        CONVERT_INIT,
        Removed::LeadingComponents,
    ),
    ("olora", "OLoRA moved a part of a QR decomposition of the base into the factors", CONVERT_INIT, Removed::LeadingColumns),
    ("corda", "CorDA moved components of the base into the factors", CONVERT_UNKNOWN, Removed::Unknown),
    ("lora_ga", "LoRA-GA subtracted the initial factors from the base", CONVERT_UNKNOWN, Removed::Unknown),
    (
        "loftq",
        "LoftQ quantised the base before training",
        "give the base that was trained on, dequantised, with --residual-base",
        Removed::Unknown,
    ),
];

/// `P-007` for KaSA, which leaves the smallest singular components out of the base.
pub(super) fn kasa(config: Option<&Json>) -> Option<(Diagnostic, Removed)> {
    config.filter(|value| is_set(value))?;
    let message = "kasa_config is set: KaSA takes the smallest singular components out of the base, so on the published base the \
                   result would be wrong";
    let help = "take them out here, with --recompute-residual, or give the base without them, with --residual-base";
    Some((Diagnostic::new(rules::INIT_CHANGES_BASE, message).tensor("kasa_config").help(help), Removed::TrailingComponents))
}

/// Initialisations after which the base is what it was (`eva` shows in the patterns, `mica` froze B).
const HARMLESS_INITS: &[&str] = &["gaussian", "eva", "orthogonal", "mica"];

/// `P-007` for an initialisation that changes the base, `P-004` for a value that is none. PEFT compares in either case.
pub(super) fn initialisation(value: Option<&Json>) -> Option<(Diagnostic, Removed)> {
    let name = match value {
        None | Some(Json::Null | Json::Bool(_)) => return None,
        Some(Json::Text(name)) => name,
        Some(other) => {
            let message = format!("init_lora_weights is {}, not true, false or a string", other.describe());
            return Some((Diagnostic::new(rules::CONFIG_TYPES, message).tensor("init_lora_weights"), Removed::Unknown));
        }
    };
    let lower = name.to_lowercase();
    if HARMLESS_INITS.contains(&lower.as_str()) {
        return None;
    }
    let unknown = ("an unknown initialisation may have changed the base", CONVERT_UNKNOWN, Removed::Unknown);
    let found = BASE_CHANGING.iter().find(|(prefix, ..)| lower.starts_with(prefix));
    let (why, way_out, removed) = found.map_or(unknown, |(_, why, way_out, removed)| (*why, *way_out, *removed));
    let message = format!("init_lora_weights is {name:?}: {why}, so on the published base the result would be wrong");
    Some((Diagnostic::new(rules::INIT_CHANGES_BASE, message).tensor("init_lora_weights").help(way_out), removed))
}
