//! From an adapter to PEFT's names and config, and back.

use std::collections::BTreeSet;

use super::super::config::Selection;
use super::super::keys::PREFIX;
use super::super::{PeftOptions, config_json, read};
use super::*;
use crate::adapter::{Adapter, AdapterParts, BiasDelta, Factor, Kind, Orientation, Replacement, Scaling, ScalingRule, Target};

/// A target of rank `rank` in memory.
fn target(module: &str, scaling: Scaling, kind: Kind) -> Target {
    let name = |end: &str| format!("{module}.{end}");
    let (a, b) = (name("a"), name("b"));
    let source = source(&[(&a, &[scaling.rank, 60]), (&b, &[40, scaling.rank]), (&name("bias"), &[40])]);
    let factor = |name: &str| Factor::new(&source, name).unwrap();
    Target {
        tensor: name("weight"),
        kind,
        a: factor(&a),
        b: factor(&b),
        scaling,
        bias: None,
        magnitude: None,
        singular_values: None,
    }
}

fn scaling(rank: u64, alpha: f64) -> Scaling {
    Scaling { rank, alpha, rule: ScalingRule::Standard }
}

const LINEAR: Kind = Kind::Linear(Orientation::OutIn);

fn adapter(targets: Vec<Target>, replaced: &[&str]) -> Adapter {
    let replacement = |tensor: &&str| {
        let source = source(&[(tensor, &[4])]);
        Replacement { tensor: (*tensor).to_owned(), with: Factor::new(&source, tensor).unwrap(), shared: false }
    };
    let replacements = replaced.iter().map(replacement).collect();
    Adapter::new(AdapterParts { dialect: "memory", targets, replacements, ..AdapterParts::default() }, &Limits::default())
        .unwrap()
}

/// Every tensor of the adapter with the name that PEFT gives it, sorted by that name.
fn tensor_names(adapter: &Adapter) -> Vec<(String, &Factor)> {
    let mut names = Vec::new();
    let mut modules = BTreeSet::new();
    for target in adapter.targets() {
        let module = target.tensor.strip_suffix(".weight").unwrap();
        modules.insert(module);
        let (a, b) = match target.kind {
            Kind::Embedding => ("lora_embedding_A", "lora_embedding_B"),
            _ => ("lora_A.weight", "lora_B.weight"),
        };
        names.push((format!("{PREFIX}{module}.{a}"), &target.a));
        names.push((format!("{PREFIX}{module}.{b}"), &target.b));
        names.extend(target.bias.iter().map(|bias| (format!("{PREFIX}{module}.lora_B.bias"), &bias.delta)));
    }
    for replacement in adapter.replacements() {
        // A module with a LoRA wraps the layer that was there, and its own parameters with it.
        let name = match replacement.tensor.rsplit_once('.') {
            Some((module, own @ ("weight" | "bias"))) if modules.contains(module) => format!("{PREFIX}{module}.base_layer.{own}"),
            _ => format!("{PREFIX}{}", replacement.tensor),
        };
        names.push((name, &replacement.with));
    }
    names.sort_by(|(x, _), (y, _)| x.cmp(y));
    names
}

/// Writes names and config, and reads them again.
fn again(adapter: &Adapter) -> (Adapter, String) {
    let (text, _) = config_json(adapter).unwrap();
    let names = tensor_names(adapter);
    let tensors: Vec<(&str, &[u64])> = names.iter().map(|(name, f)| (name.as_str(), f.info().shape.dims())).collect();
    let config = parse(&text).unwrap();
    assert_eq!(ids(&config.warnings), [""; 0], "{text}");
    let read = read(source(&tensors), Some(&config), &PeftOptions::default(), &Limits::default()).unwrap();
    assert_eq!(ids(read.warnings()), [""; 0], "{text}");
    (read, text)
}

fn assert_same(x: &Adapter, y: &Adapter) {
    let facts = |a: &Adapter| {
        let targets: Vec<_> = a
            .targets()
            .iter()
            .map(|t| (t.tensor.clone(), t.kind, t.scaling.rank, t.scaling.effective(), t.bias.is_some()))
            .collect();
        let replaced: Vec<_> = a.replacements().iter().map(|r| r.tensor.clone()).collect();
        (targets, replaced)
    };
    assert_eq!(facts(x), facts(y));
}

#[test]
fn mixed_ranks_and_alphas_come_back_exactly() {
    let adapter = adapter(
        vec![
            target("model.layers.0.q_proj", scaling(8, 16.0), LINEAR),
            target("model.layers.1.q_proj", scaling(4, 16.0), LINEAR),
            target("model.layers.10.q_proj", scaling(8, 0.1), LINEAR),
            target("model.layers.2.q_proj", scaling(8, 16.0), LINEAR),
            target("odd-name.v+x", scaling(2, 3.0), LINEAR),
        ],
        &[],
    );
    let (read, text) = again(&adapter);
    assert_same(&adapter, &read);
    assert!(text.contains(r#""^model\\.layers\\.1\\.q_proj": 4"#), "{text}");
    assert!(text.contains("\"lora_alpha\": 16,") && text.contains("\"r\": 8,"), "{text}");
    assert!(text.starts_with("{\n  \"alpha_pattern\": {\n    ") && text.ends_with('}'), "{text}");
}

#[test]
fn mixed_rules_are_folded_into_alphas_or_refused() {
    let stabilized = Scaling { rank: 16, alpha: 8.0, rule: ScalingRule::RankStabilized };
    let mixed = adapter(vec![target("a", scaling(16, 8.0), LINEAR), target("b", stabilized, LINEAR)], &[]);
    let (read, text) = again(&mixed);
    assert_same(&mixed, &read);
    assert!(text.contains("\"use_rslora\": false"), "{text}");
    assert_eq!(ids(&config_json(&mixed).unwrap().1), ["P-006"]);
    let all = adapter(vec![target("a", stabilized, LINEAR)], &[]);
    let (read, text) = again(&all);
    assert_same(&all, &read);
    assert!(text.contains("\"use_rslora\": true"), "{text}");
}

#[test]
fn replacements_are_announced() {
    let with = |replaced: &[&str]| {
        let adapter = adapter(vec![target("m.q", scaling(8, 8.0), LINEAR)], replaced);
        let (read, text) = again(&adapter);
        assert_same(&adapter, &read);
        text
    };
    assert!(with(&[]).contains("\"modules_to_save\": null"));
    assert!(with(&["m.q.bias"]).contains("\"bias\": \"lora_only\""));
    // The weight of a layer that has a LoRA as well travels under the wrapped layer's name, and needs no announcement.
    assert!(with(&["m.q.weight"]).contains("\"modules_to_save\": null"));
    assert!(with(&["m.q.bias", "m.k.bias"]).contains("\"bias\": \"all\""));
    let text = with(&["head.weight", "head.bias"]);
    assert!(text.contains("\"bias\": \"none\"") && text.contains("\"head\""), "{text}");
    let captured = adapter(vec![target("m.head.q", scaling(8, 8.0), LINEAR)], &["head.weight"]);
    assert_eq!(rules(&config_json(&captured)), ["P-006"]);
}

#[test]
fn embeddings_transposed_layers_and_bias_updates_are_written() {
    let mut linear = target("m.q", scaling(8, 8.0), LINEAR);
    linear.bias = Some(BiasDelta { tensor: "m.q.bias".to_owned(), delta: Factor::new(linear.a.source(), "m.q.bias").unwrap() });
    let biased = adapter(vec![linear.clone()], &[]);
    assert_same(&biased, &again(&biased).0);
    let embedding = target("m.embed", scaling(8, 8.0), Kind::Embedding);
    assert_eq!(rules(&config_json(&adapter(vec![linear, embedding.clone()], &[]))), ["P-006"]);
    let transposed = adapter(vec![embedding, target("m.c", scaling(8, 8.0), Kind::Linear(Orientation::InOut))], &[]);
    assert_same(&transposed, &again(&transposed).0);
    let names: Vec<String> = tensor_names(&transposed).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names.last().unwrap(), "base_model.model.m.embed.lora_embedding_B");
    let undeclared = adapter(vec![target("m.c", scaling(8, 8.0), Kind::Linear(Orientation::Undeclared))], &[]);
    assert_eq!(ids(&config_json(&undeclared).unwrap().1), ["A-024"]);
}

#[test]
fn a_config_that_still_describes_the_adapter_is_kept() {
    let text = lora(r#""target_modules": ["q"], "fan_in_fan_out": false, "peft_version": "0.21.2""#);
    let config = parse(&text).unwrap();
    let adapter = read(adapter_source(&["m.q"], &[]), Some(&config), &PeftOptions::default(), &Limits::default()).unwrap();
    let (written, losses) = config_json(&adapter).unwrap();
    assert_eq!(
        (serde_json::from_str::<serde_json::Value>(&written).unwrap(), losses.len()),
        (serde_json::from_str(&text).unwrap(), 0)
    );
    // The same config on an adapter with another alpha does not.
    let mut targets = adapter.targets().to_vec();
    targets[0].scaling.alpha = 4.0;
    let parts = AdapterParts { targets, origin_config: Some(text.clone()), ..AdapterParts::default() };
    let changed = Adapter::new(parts, &Limits::default()).unwrap();
    let (written, _) = config_json(&changed).unwrap();
    assert_ne!(written, text);
    assert!(written.contains("\"lora_alpha\": 4,"), "{written}");
}

#[test]
fn the_text_is_ascii() {
    let mut parts = AdapterParts { targets: vec![target("q", scaling(8, 8.0), LINEAR)], ..AdapterParts::default() };
    parts.base.name = Some("modèle/𝄞".to_owned());
    let (text, _) = config_json(&Adapter::new(parts, &Limits::default()).unwrap()).unwrap();
    assert!(text.is_ascii() && text.contains(r#""mod\u00e8le/\ud834\udd1e""#), "{text}");
    assert_eq!(parse(&text).unwrap().base_name.as_deref(), Some("modèle/𝄞"));
}

#[test]
fn a_bare_parameter_is_named_as_one_and_anything_else_is_refused() {
    let mut bare = target("m.q", scaling(8, 8.0), LINEAR);
    bare.tensor = "m.experts.gate_up_proj".to_owned();
    let (text, _) = config_json(&adapter(vec![bare.clone(), target("m.q", scaling(8, 8.0), LINEAR)], &[])).unwrap();
    let config = parse(&text).unwrap();
    assert_eq!(config.target_parameters, ["m.experts.gate_up_proj"]);
    assert_eq!(config.target_modules, Selection::Names(vec!["m.q".to_owned()]));
    bare.kind = Kind::Embedding;
    assert_eq!(rules(&config_json(&adapter(vec![bare], &[]))), ["P-011"]);
}
