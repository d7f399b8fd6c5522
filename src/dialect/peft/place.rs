//! Which base tensor a wrapped module stands for. Mostly it is the module's weight. PEFT also wraps the fused input projection and the
//! output projection of `nn.MultiheadAttention` apart, and bare parameters such as stacks of experts one around the other, and stores of
//! the latter neither the name nor the place but how deep they lie (`tuners/lora/layer.py`, `MultiheadAttention`, `ParamWrapper`).

use std::collections::{BTreeMap, BTreeSet};

use super::config::PeftConfig;
use super::keys::MERGE_IN_PEFT;
use super::patterns::ends;
use crate::error::Diagnostic;
use crate::rules;

/// What a module's factors belong to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// The base tensor.
    pub(super) tensor: String,
    /// The name that `rank_pattern` and `alpha_pattern` are matched against.
    pub(super) name: String,
    /// It is a parameter that was named by `target_parameters`.
    pub(super) parameter: bool,
}

/// The order in which known modules register their parameters. The first one is wrapped first, and so lies deepest (transformers 5.23:
/// `MixtralExperts`, `Qwen3MoeExperts`, `GptOssExperts`, `Llama4TextExperts`).
const REGISTERED: &[&[&str]] = &[
    &["gate_up_proj", "down_proj"],
    &["gate_proj", "up_proj", "down_proj"],
    &["w1", "w2", "w3"],
    &["w1", "v1", "w2"],
    &["input_linear", "output_linear"],
];

/// What PEFT puts around what it wraps.
const WRAPPED: &str = ".base_layer";

/// The places of modules, by their paths as the file has them, or what is wrong with them. `order` is that in which modules register
/// their parameters, where a user states it.
pub(super) fn places<'a>(
    paths: &[&'a str],
    config: Option<&PeftConfig>,
    order: &[String],
    problems: &mut Vec<Diagnostic>,
) -> BTreeMap<&'a str, Place> {
    let attentions: BTreeSet<&str> = paths.iter().filter_map(|path| path.strip_suffix(".base_layer.out_proj")).collect();
    let mut stacks: BTreeMap<&str, Vec<&'a str>> = BTreeMap::new();
    let mut found = BTreeMap::new();
    for &path in paths {
        let module = path.trim_end_matches(WRAPPED);
        let own = |tensor: String| Place { tensor, name: module.to_owned(), parameter: false };
        if let Some(attention) = path.strip_suffix(".base_layer.out_proj") {
            let place = Place { name: attention.to_owned(), ..own(format!("{attention}.out_proj.weight")) };
            found.insert(path, place);
        } else if module.contains(WRAPPED) {
            let message = format!("module {path:?} lies in a wrapper that is not known");
            problems.push(Diagnostic::new(rules::METHOD_SUPPORTED, message).tensor(path).help(MERGE_IN_PEFT));
        } else if attentions.contains(path) {
            found.insert(path, own(format!("{path}.in_proj_weight")));
        } else if module != path || !parameters(module, config).is_empty() {
            stacks.entry(module).or_default().push(path);
        } else {
            found.insert(path, own(format!("{path}.weight")));
        }
    }
    for (module, mut paths) in stacks {
        // The deepest first.
        paths.sort_by_key(|path| std::cmp::Reverse(path.len()));
        let depth = |path: &str| (path.len() - module.len()) / WRAPPED.len();
        if paths.iter().rev().enumerate().any(|(wanted, path)| depth(path) != wanted) {
            let message = format!("the factors of {module:?} lie in wrappers of which some are missing");
            let help = "the file is incomplete; save the adapter again";
            problems.push(Diagnostic::new(rules::FACTORS_PAIRED, message).tensor(module).help(help));
            continue;
        }
        match registered(module, paths.len(), config, order) {
            Ok(parameters) => {
                for (path, parameter) in paths.into_iter().zip(parameters) {
                    let tensor = format!("{module}.{parameter}");
                    found.insert(path, Place { name: tensor.clone(), tensor, parameter: true });
                }
            }
            Err(message) => {
                let help = "PEFT stores no names of parameters; state in which order the module registers them: --parameter-order NAME,NAME";
                problems.push(Diagnostic::new(rules::METHOD_SUPPORTED, message).tensor(module).help(help));
            }
        }
    }
    found
}

/// The order in which a known module registers parameters of these names.
pub(super) fn order(names: &[&str]) -> Option<Vec<&'static str>> {
    if let [_] = names {
        return Some(Vec::new());
    }
    let known = REGISTERED.iter().find(|known| names.iter().all(|name| known.contains(name)))?;
    Some(known.to_vec())
}

/// The names of the parameters of a module that `target_parameters` lists.
fn parameters(module: &str, config: Option<&PeftConfig>) -> BTreeSet<String> {
    let entries = config.map_or(&[][..], |config| &config.target_parameters);
    let of_entry = |entry: &String| {
        let parameter = entry.rsplit('.').next().unwrap_or(entry);
        let whole = format!("{module}.{parameter}");
        ends(&whole).any(|end| end == entry).then(|| parameter.to_owned())
    };
    entries.iter().filter_map(of_entry).collect()
}

/// The parameters of a module in the order in which it registers them.
fn registered(module: &str, wrapped: usize, config: Option<&PeftConfig>, order: &[String]) -> Result<Vec<String>, String> {
    let names = parameters(module, config);
    if names.len() != wrapped {
        return Err(format!("{wrapped} parameters of {module:?} have factors, and target_parameters names {}", names.len()));
    }
    if names.len() < 2 {
        return Ok(names.into_iter().collect());
    }
    let stated: Vec<&str> = order.iter().map(String::as_str).collect();
    let known = std::iter::once(&stated[..]).chain(REGISTERED.iter().copied());
    match known.into_iter().find(|known| names.iter().all(|name| known.contains(&name.as_str()))) {
        Some(known) => Ok(known.iter().filter(|name| names.contains(**name)).map(|name| (*name).to_owned()).collect()),
        None => Err(format!("which factors of {module:?} belong to which of its parameters {names:?} is not known")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    use crate::limits::Limits;

    fn placed(paths: &[&str], config: Option<&PeftConfig>) -> (Vec<String>, usize) {
        placed_in_order(paths, config, &[])
    }

    fn placed_in_order(paths: &[&str], config: Option<&PeftConfig>, order: &[&str]) -> (Vec<String>, usize) {
        let mut problems = Vec::new();
        let order: Vec<String> = order.iter().map(|name| (*name).to_owned()).collect();
        let places = places(paths, config, &order, &mut problems);
        (paths.iter().filter_map(|path| Some(places.get(path)?.tensor.clone())).collect(), problems.len())
    }

    #[test]
    fn attention_is_wrapped_in_two_places() {
        let (tensors, _) = placed(&["h.attn", "h.attn.base_layer.out_proj", "h.mlp"], None);
        assert_eq!(tensors, ["h.attn.in_proj_weight", "h.attn.out_proj.weight", "h.mlp.weight"]);
    }

    #[test]
    fn parameters_are_told_apart_by_their_depth() {
        let config = config_of(r#"["experts.down_proj", "mlp.experts.gate_up_proj"]"#);
        let paths = ["l.0.mlp.experts", "l.0.mlp.experts.base_layer", "l.0.q_proj"];
        let (tensors, _) = placed(&paths, Some(&config));
        assert_eq!(tensors, ["l.0.mlp.experts.down_proj", "l.0.mlp.experts.gate_up_proj", "l.0.q_proj.weight"]);
        let one = config_of(r#"["experts.anything"]"#);
        assert_eq!(placed(&["experts"], Some(&one)), (vec!["experts.anything".to_owned()], 0));
        // Neither too few, nor any whose order nobody knows.
        assert_eq!(placed(&["experts", "experts.base_layer"], Some(&one)), (vec![], 1));
        let strange = config_of(r#"["experts.a", "experts.b"]"#);
        assert_eq!(placed(&["experts", "experts.base_layer"], Some(&strange)), (vec![], 1));
        let (tensors, _) = placed_in_order(&["experts", "experts.base_layer"], Some(&strange), &["b", "a"]);
        assert_eq!(tensors, ["experts.a", "experts.b"]);
    }

    fn config_of(list: &str) -> PeftConfig {
        let text = format!(r#"{{"peft_type": "LORA", "r": 8, "target_parameters": {list}}}"#);
        PeftConfig::parse(text.as_bytes(), Path::new("adapter_config.json"), &Limits::default()).unwrap()
    }
}
