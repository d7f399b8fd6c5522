//! From an [`Adapter`] of any dialect to PEFT's names and an `adapter_config.json` with which PEFT applies exactly the same update.
//! The config that the adapter came with is kept, byte for byte, while it still describes it; otherwise one is written with the
//! fields that every PEFT since 0.9 knows. Patterns are whole, escaped names (`^model\.layers\.0\.q_proj`), so that their order
//! says nothing, and modules are listed by whole path.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};

use super::config::PeftConfig;
use super::full::{self, Announced};
use super::methods::Method;
use super::packed;
use super::patterns::{Modules, ends};
use super::rescaling;
use super::scaling;
use super::uniform::{self, Uniform};
use crate::adapter::{Adapter, Kind, Orientation, RowReplacement, ScalingRule, Target};
use crate::error::{Diagnostic, Error, Result};
use crate::limits::Limits;
use crate::rules;

/// PEFT's value for an adapter that only replaces tensors (`DUMMY_TARGET_MODULES`).
const NO_TARGETS: &str = "dummy-target-modules";

/// Fields that are carried over from the config that the adapter came with: they say nothing about the weights.
const CARRIED: &[&str] = &["auto_mapping", "revision", "task_type"];

/// The text of `adapter_config.json`, and what it could not say.
///
/// # Errors
/// `P-006` or `P-011` for an adapter that PEFT's format cannot hold.
pub(crate) fn config_json(adapter: &Adapter) -> Result<(String, Vec<Diagnostic>)> {
    let limits = Limits::default();
    if adapter.targets().is_empty() && adapter.replacements().is_empty() && adapter.rows().is_empty() {
        return rescaling::config_json(adapter, &limits);
    }
    match adapter.origin_config() {
        Some(origin) if describes(origin, adapter, &limits).is_some() => Ok((readable(origin), Vec::new())),
        origin => compose(adapter, origin),
    }
}

/// A config on one line, as a container keeps it, laid out as PEFT does; any other as it stands.
pub(super) fn readable(origin: &str) -> String {
    let laid_out = |text: &str| serde_json::to_string_pretty(&serde_json::from_str::<Value>(text).ok()?).ok();
    if origin.contains('\n') { origin.to_owned() } else { laid_out(origin).unwrap_or_else(|| origin.to_owned()) }
}

/// The module whose weight is the target, by the name that patterns are matched against.
fn module_of<'t>(adapter: &Adapter, target: &'t Target) -> Result<&'t str> {
    if let Some(attention) = adapter.attention_of(target) {
        return Ok(attention);
    }
    // The name of a parameter is its own.
    if packed::is_parameter(adapter, target) {
        return Ok(&target.tensor);
    }
    target.tensor.strip_suffix(".weight").filter(|module| !module.is_empty()).ok_or_else(|| {
        let message = format!("{:?} is not the weight of a module, so PEFT has no name for its factors", target.tensor);
        Error::new(rules::KEY_GRAMMAR, message).tensor(&target.tensor)
    })
}

/// `Some` if `origin` says of every target and replacement exactly what the adapter says.
fn describes(origin: &str, adapter: &Adapter, limits: &Limits) -> Option<()> {
    let config = PeftConfig::parse(origin.as_bytes(), Path::new("adapter_config.json"), limits).ok()?;
    let modules: Vec<&str> = adapter.targets().iter().map(|target| module_of(adapter, target)).collect::<Result<_>>().ok()?;
    let index = Modules::new(&modules);
    let (mut problems, mut warnings) = (Vec::new(), Vec::new());
    let resolved = scaling::resolve(&config, &index, &modules, limits, &mut problems, &mut warnings);
    let parameters: Vec<bool> = adapter.targets().iter().map(|target| packed::is_parameter(adapter, target)).collect();
    let is_module = |i: &usize| !parameters.get(*i).copied().unwrap_or(false);
    let named = |module: &str| ends(module).any(|end| config.target_parameters.iter().any(|name| name == end));
    let uncovered = index.uncovered(&config.target_modules, limits);
    let covered = uncovered.is_ok_and(|uncovered| !uncovered.iter().any(is_module))
        && parameters.iter().zip(&modules).all(|(is_parameter, module)| *is_parameter == named(module));
    let scaled = resolved.iter().zip(adapter.targets()).all(|(stated, target)| stated.scaling == target.scaling);
    let shaped = adapter.targets().iter().all(|target| match target.kind {
        // PEFT takes the projections of an attention for what they are.
        Kind::Linear(_) if adapter.attention_of(target).is_some() => target.bias.is_none(),
        Kind::Linear(_) if packed::is_parameter(adapter, target) => target.bias.is_none(),
        Kind::Linear(orientation) => {
            let agrees = match orientation {
                Orientation::InOut => config.orientation == Orientation::InOut,
                Orientation::OutIn => config.orientation != Orientation::InOut,
                Orientation::Undeclared => true,
            };
            agrees && target.bias.is_some() == config.lora_bias
        }
        Kind::Embedding => target.bias.is_none(),
        Kind::Conv => target.bias.is_some() == config.lora_bias,
        Kind::Experts(_) => target.bias.is_none(),
        Kind::Flat | Kind::Shared(_) => false,
    });
    let with_magnitudes = adapter.targets().iter().all(|target| target.magnitude.is_some() == config.dora);
    let stated = |rows: &RowReplacement| {
        config.tokens.iter().any(|(module, ids)| {
            let path = rows.tensor.strip_suffix(".weight").unwrap_or(&rows.tensor);
            ids == &rows.rows && (module.is_empty() || ends(path).any(|end| end == module))
        })
    };
    let tokens = config.tokens.len() == adapter.rows().len() && adapter.rows().iter().all(stated);

    let targets: BTreeSet<&str> = modules.iter().copied().collect();
    let announced = |tensor: &str| full::unannounced(tensor, tensor, Some(&config), &targets).is_none();
    let replaced = adapter.replacements().iter().all(|r| full::is_own_weight(&r.tensor, &targets) || announced(&r.tensor));
    // PEFT fails on a module that it finds in the base and is to load, but that the file lacks.
    let saved = adapter.replacements().iter().any(|r| full::saved(&config.modules_to_save, &r.tensor));
    let nothing_lost = saved || config.modules_to_save.is_empty();
    let based = adapter.base().name == config.base_name;
    let is_plain = config.method == Method::Lora && config.block_diagonal.is_none() && config.group.is_none() && !config.kasa;
    let is_plain = is_plain && config.replication == adapter.replication();
    let is_same = is_plain && problems.is_empty() && covered && scaled && shaped && with_magnitudes && tokens;
    (is_same && replaced && nothing_lost && based).then_some(())
}

/// What PEFT's format can hold and is not written, or what it cannot hold.
///
/// # Errors
/// `P-006`.
fn unwritten(adapter: &Adapter) -> Result<()> {
    let refuse = |message: String, tensor: &str| Err(Error::new(rules::CONFIG_METHOD, message).tensor(tensor));
    if let Some(target) = adapter.targets().iter().find(|target| matches!(target.kind, Kind::Flat | Kind::Shared(_))) {
        let message = format!("the kind of layer of {:?} is the base's, and PEFT's tensors depend on it", target.tensor);
        return Err(Error::new(rules::CONFIG_METHOD, message)
            .tensor(&target.tensor)
            .help("settle it by the base: loratool convert --base BASE"));
    }
    if let Some(rescaling) = adapter.rescalings().first() {
        let message = format!("{:?} is multiplied beside other changes, and PEFT has no method that does both", rescaling.tensor);
        return refuse(message, &rescaling.tensor);
    }
    if !adapter.replication().is_empty() {
        let message = "the adapter belongs to a base whose layers are repeated, which only its own config says";
        return Err(Error::new(rules::CONFIG_METHOD, message).file(adapter.label()));
    }
    if let Some(why) = adapter.residual() {
        let message = format!(
            "the adapter belongs to another base than the published one ({}), which only its own config says",
            why.message()
        );
        let help = "take out what the initialisation took, with --recompute-residual and --base, or keep the container";
        return Err(Error::new(rules::CONFIG_METHOD, message).file(adapter.label()).help(help));
    }
    let (with, without): (Vec<_>, Vec<_>) = adapter.targets().iter().partition(|target| target.magnitude.is_some());
    match (with.first(), without.first()) {
        (Some(_), Some(target)) => {
            let message = format!("{:?} has no magnitudes and other targets have, and PEFT's use_dora is for all", target.tensor);
            refuse(message, &target.tensor)
        }
        _ => Ok(()),
    }
}

/// Writes a config from the adapter alone.
fn compose(adapter: &Adapter, origin: Option<&str>) -> Result<(String, Vec<Diagnostic>)> {
    unwritten(adapter)?;
    let modules: Vec<&str> = adapter.targets().iter().map(|target| module_of(adapter, target)).collect::<Result<_>>()?;
    let mut losses = Vec::new();
    let uniform = uniform::of(adapter.targets())?;
    let announced = Announced::of(adapter, &modules)?;
    let origin: Option<Value> = origin.and_then(|text| serde_json::from_str(text).ok());
    let mut fields: BTreeMap<&str, Value> = BTreeMap::new();
    for field in CARRIED {
        let carried = origin.as_ref().and_then(|origin| origin.get(*field)).cloned();
        fields.insert(field, carried.unwrap_or(Value::Null));
    }
    fields.insert("alpha_pattern", pattern(&modules, &uniform.alphas, uniform.alpha, number));
    fields.insert("base_model_name_or_path", json!(adapter.base().name));
    fields.insert("bias", json!(announced.bias));
    fields.insert("fan_in_fan_out", json!(fan_in_fan_out(adapter, &mut losses)));
    fields.insert("inference_mode", json!(true));
    fields.insert("init_lora_weights", json!(true));
    fields.insert("lora_alpha", number(uniform.alpha));
    fields.insert("lora_dropout", json!(0.0));
    if lora_bias(adapter)? {
        fields.insert("lora_bias", json!(true));
    }
    let saved = announced.modules_to_save;
    fields.insert("modules_to_save", if saved.is_empty() { Value::Null } else { json!(saved) });
    fields.insert("peft_type", json!("LORA"));
    fields.insert("r", json!(uniform.rank));
    fields.insert("rank_pattern", pattern(&modules, &uniform.ranks, uniform.rank, |rank| json!(rank)));
    let (parameters, wrapped): (Vec<_>, Vec<_>) =
        adapter.targets().iter().zip(&modules).partition(|(target, _)| packed::is_parameter(adapter, target));
    let names = |of: &[(&Target, &&str)]| -> BTreeSet<String> { of.iter().map(|(_, name)| (**name).to_owned()).collect() };
    let nothing = parameters.is_empty() && wrapped.is_empty();
    fields.insert("target_modules", if nothing { json!(NO_TARGETS) } else { json!(names(&wrapped)) });
    if !parameters.is_empty() {
        fields.insert("target_parameters", json!(names(&parameters)));
        let version = origin.as_ref().and_then(|origin| origin.get("peft_version")).cloned();
        fields.insert("peft_version", version.map_or_else(|| layout(&parameters), Ok)?);
    }
    let tokens: BTreeMap<&str, &Vec<u64>> =
        adapter.rows().iter().map(|r| (r.tensor.strip_suffix(".weight").unwrap_or(&r.tensor), &r.rows)).collect();
    if !tokens.is_empty() {
        fields.insert("trainable_token_indices", json!(tokens));
    }
    fields.insert("use_dora", json!(adapter.targets().iter().any(|target| target.magnitude.is_some())));
    fields.insert("use_rslora", json!(uniform.rule == ScalingRule::RankStabilized));
    if let Uniform { folded: count @ 1.., .. } = uniform {
        let message =
            format!("PEFT has one scaling rule per adapter; alpha of {count} targets was restated, with the same scale");
        losses.push(Diagnostic::new(rules::CONFIG_METHOD, message));
    }
    Ok((render(&json!(fields)), losses))
}

/// The version of PEFT that lays stacks of experts out as these are. Of a stack of squares nothing else tells: before 0.19 PEFT took all of
/// them for (E, in, out), and since 0.19.1 as the model has them.
///
/// # Errors
/// `P-006` if there are both.
fn layout(parameters: &[(&Target, &&str)]) -> Result<Value> {
    let stacks = || parameters.iter().map(|(target, _)| *target).filter(|target| matches!(target.kind, Kind::Experts(_)));
    let is_old = |target: &&Target| target.kind == Kind::Experts(Orientation::InOut);
    match (stacks().find(is_old), stacks().find(|target| !is_old(target))) {
        (Some(old), Some(_)) => {
            let message = format!("{:?} is (E, in, out) and other stacks are not, and no version of PEFT has both", old.tensor);
            Err(Error::new(rules::CONFIG_METHOD, message).tensor(&old.tensor).help("write a container"))
        }
        (Some(_), None) => Ok(json!("0.18.0")),
        _ => Ok(json!("0.19.1")),
    }
}

/// The text as Python's `json.dumps(indent=2)` writes it: ASCII, because PEFT opens the file in the encoding of the system.
pub(super) fn render(config: &Value) -> String {
    let text = format!("{config:#}");
    let mut ascii = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() {
            ascii.push(c);
        } else {
            // Only strings of JSON hold other characters, so the escape is right wherever one stands.
            ascii.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    ascii
}

/// The entries that differ from the default, by whole, escaped name.
fn pattern<V: PartialEq + Copy>(modules: &[&str], values: &[V], default: V, value: impl Fn(V) -> Value) -> Value {
    let differ = modules.iter().zip(values).filter(|(_, v)| **v != default);
    let entries: BTreeMap<String, Value> = differ.map(|(m, v)| (format!("^{}", regex::escape(m)), value(*v))).collect();
    json!(entries)
}

/// Whole numbers without a fraction, as PEFT's own type is.
pub(super) fn number(alpha: f64) -> Value {
    // 2^53: beyond it not every whole number is a double.
    if alpha.fract() == 0.0 && alpha.abs() < 9_007_199_254_740_992.0 { json!(alpha as i64) } else { json!(alpha) }
}

/// PEFT has one field for all layers, and corrects it layer by layer from their types.
pub(super) fn fan_in_fan_out(adapter: &Adapter, losses: &mut Vec<Diagnostic>) -> bool {
    let linear = adapter.targets().iter().filter_map(|target| match target.kind {
        Kind::Linear(orientation) => Some(orientation),
        _ => None,
    });
    let (mut out_in, mut in_out, mut undeclared) = (0usize, 0usize, 0usize);
    for orientation in linear {
        match orientation {
            Orientation::OutIn => out_in += 1,
            Orientation::InOut => in_out += 1,
            Orientation::Undeclared => undeclared += 1,
        }
    }
    if undeclared > 0 || (out_in > 0 && in_out > 0) {
        let message = if undeclared > 0 {
            format!("the orientation of {undeclared} targets is not declared, and PEFT's fan_in_fan_out has to be")
        } else {
            format!("{out_in} targets are (out, in) and {in_out} are (in, out), and PEFT has one field for both")
        };
        let help = "PEFT goes by the type of each layer and warns";
        losses.push(Diagnostic::new(rules::ORIENTATION, message).help(help));
    }
    in_out > out_in
}

/// Whether `lora_bias` is to be set; PEFT has it for all layers or for none, and not for embeddings.
fn lora_bias(adapter: &Adapter) -> Result<bool> {
    let with = adapter.targets().iter().filter(|target| target.bias.is_some()).count();
    if with == 0 {
        return Ok(false);
    }
    if let Some(target) = adapter.targets().iter().find(|target| target.kind == Kind::Embedding) {
        let message = format!("{:?} is an embedding, and PEFT has no bias updates in adapters with embeddings", target.tensor);
        return Err(Error::new(rules::CONFIG_METHOD, message).tensor(&target.tensor));
    }
    if let Some(target) = adapter.targets().iter().find(|target| target.bias.is_none()) {
        let message = format!("{:?} has no bias update and other targets have, and PEFT's lora_bias is for all", target.tensor);
        return Err(Error::new(rules::CONFIG_METHOD, message).tensor(&target.tensor));
    }
    Ok(true)
}
