//! `inspect` of every adapter among the fixtures tells a person what it is: the family, the method, ranks, scales, size, base and needs.
//! What is expected comes from the config that PEFT wrote, from the name that `transformers` gives the family, and from the reference reader.
#![cfg(feature = "cli")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::fixture;
use serde_json::Value;

/// The text that a person sees.
fn shown(args: &[&str]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_loratool")).arg("inspect").args(args).output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// What stands behind a label; an empty text if there is no such line.
fn said<'t>(text: &'t str, label: &str) -> &'t str {
    let labelled = |line: &&str| line.strip_prefix("  ").and_then(|line| line.split("  ").next()) == Some(label);
    text.lines().find(labelled).map_or("", |line| line[2 + label.len()..].trim())
}

/// Every folder of the fixtures with a config of PEFT, but for those that are refused.
fn adapters() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![fixture("adapters"), fixture("kinds"), fixture("families"), fixture("fp8")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
            let is_refused = entry.ends_with("refused") || entry.ends_with("lokr-conv1d-full");
            match entry.join("adapter_config.json").exists() {
                true => found.push(entry),
                false if !is_refused => folders.push(entry),
                false => {}
            }
        }
    }
    found
}

fn config_of(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap()).unwrap()
}

/// What people call the method of a config.
fn method_of(config: &Value) -> &'static str {
    let is_on = |field: &str| !matches!(config.get(field), None | Some(Value::Null | Value::Bool(false)));
    let init = config.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
    match config["peft_type"].as_str().unwrap() {
        "LORA" if is_on("use_dora") => "DoRA",
        "LORA" if is_on("use_bdlora") => "BD-LoRA",
        "LORA" if is_on("use_qalora") => "QALoRA",
        "LORA" if is_on("kasa_config") => "KaSA",
        "LORA" if is_on("use_rslora") => "rsLoRA",
        "LORA" if init.starts_with("pissa") => "PiSSA",
        "LORA" if init == "olora" => "OLoRA",
        "LORA" if init == "corda" => "CorDA",
        "LORA" if init == "lora_ga" => "LoRA-GA",
        "LORA" if init == "loftq" => "LoftQ",
        "LORA" => "LoRA",
        "ADALORA" => "AdaLoRA",
        "LOHA" => "LoHa",
        "LOKR" => "LoKr",
        "VERA" => "VeRA",
        "IA3" => "IA3",
        "TRAINABLE_TOKENS" => "trained tokens",
        other => panic!("{other}"),
    }
}

#[test]
fn inspect_of_every_adapter_says_what_it_is() {
    let adapters = adapters();
    for folder in &adapters {
        let place = folder.display();
        let mut args = vec![folder.to_str().unwrap()];
        if place.to_string().contains("experts-2d") {
            args.extend(["--parameter-order", "first,second"]);
        }
        let (text, config) = (shown(&args), config_of(folder));
        let stored = common::read_file(&folder.join("adapter_model.safetensors"));
        let holds = said(&text, "holds");
        if config["peft_type"] == "LORA" && (config["target_modules"] != Value::Array(vec![]) || holds.contains("update")) {
            let method = if holds.contains("update") { method_of(&config) } else { "full tensors" };
            assert!(said(&text, "method").contains(method), "{place}: {text}");
        } else {
            assert_eq!(said(&text, "method"), method_of(&config), "{place}: {text}");
        }
        for label in ["family", "holds", "size"] {
            assert!(!said(&text, label).is_empty(), "{place}: no {label} in {text}");
        }
        let base = config["base_model_name_or_path"].as_str();
        assert_eq!(said(&text, "base"), base.unwrap_or("not named"), "{place}");
        // Ranks are the rows of A, whatever the config says.
        let ranks: Vec<usize> =
            stored.iter().filter(|(name, _)| name.ends_with("lora_A.weight")).map(|(_, a)| a.shape[0]).collect();
        let is_stack = config.get("target_parameters").is_some_and(|p| !p.is_null());
        if let (Some(low), Some(high), false) = (ranks.iter().min(), ranks.iter().max(), is_stack) {
            let range = if low == high { low.to_string() } else { format!("{low}-{high}") };
            assert_eq!(said(&text, "rank"), range, "{place}");
        }
        let plain = ["rank_pattern", "alpha_pattern"].iter().all(|field| config[field].as_object().is_none_or(|o| o.is_empty()));
        if let (true, "LORA", Some(alpha), Some(r)) = (
            plain && !ranks.is_empty(),
            config["peft_type"].as_str().unwrap(),
            config["lora_alpha"].as_f64(),
            config["r"].as_f64(),
        ) {
            let scale = if config["use_rslora"] == true { alpha / r.sqrt() } else { alpha / r };
            let found: f64 = said(&text, "scale").split(' ').next().unwrap().parse().unwrap();
            assert!((found - scale).abs() <= 1e-5 * scale, "{place}: scale {found}, not {scale}");
        }
        let needs = text.lines().skip_while(|line| !line.starts_with("  needs")).collect::<Vec<_>>().join(" ");
        let needs_one = |what: &str, is_so: bool| assert_eq!(needs.contains(what), is_so, "{place}: {what:?} in {text}");
        let init = config.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
        let kasa = config.get("kasa_config").is_some_and(|kasa| !kasa.is_null());
        needs_one("--recompute-residual", ["pissa", "olora"].contains(&init) || kasa);
        needs_one("--residual-base", kasa || !["", "gaussian", "eva", "orthogonal"].contains(&init));
        needs_one("layers repeated", config.get("layer_replication").is_some_and(|layers| !layers.is_null()));
        let once = ["lora_magnitude_vector", "trainable_tokens_delta", "ia3_l"];
        needs_one("not --in-place", stored.keys().any(|name| once.iter().any(|part| name.contains(part))));
        for line in text.lines().skip(1) {
            assert!(line.chars().count() <= 80, "{place}: {line}");
        }
    }
    assert!(adapters.len() > 140, "{}", adapters.len());
}

/// `(family of the fixture, what its modules are called after)`.
const NAMED: &[(&str, &str)] = &[
    ("bert", "BERT"),
    ("bloom", "BLOOM"),
    ("clip", "CLIP"),
    ("falcon", "Falcon"),
    ("gemma2", "Gemma"),
    ("gemma3", "Gemma"),
    ("gemma3-vision", "Gemma 3"),
    ("gpt-neox", "GPT-NeoX"),
    ("gpt2", "GPT-2"),
    ("llama", "Llama"),
    ("llava", "LLaVA"),
    ("mistral", "Mistral"),
    ("mixtral", "Mixtral"),
    ("opt", "OPT"),
    ("phi3", "Phi-3"),
    ("qwen2", "Qwen"),
    ("qwen2-vl", "Qwen2-VL"),
    ("qwen3", "Qwen"),
    ("roberta", "RoBERTa"),
    ("t5", "T5"),
    ("vit", "ViT"),
    ("whisper", "Whisper"),
];

#[test]
fn the_family_is_known_by_its_names_and_exactly_by_its_base() {
    for (family, called) in NAMED {
        let folder = fixture(&format!("families/{family}"));
        let (adapter, base) = (folder.join("adapter"), folder.join("base"));
        let text = shown(&[adapter.to_str().unwrap(), "--base", base.to_str().unwrap()]);
        assert!(said(&text, "family").split(", ").any(|name| name == *called), "{family}: {text}");
        let config: Value = serde_json::from_slice(&std::fs::read(base.join("config.json")).unwrap()).unwrap();
        assert_eq!(said(&text, "model type"), config["model_type"].as_str().unwrap(), "{family}");
    }
    let folders = std::fs::read_dir(fixture("families")).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir());
    assert_eq!(folders.count(), NAMED.len());
}
