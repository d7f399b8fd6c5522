//! From tensors and config to an adapter, or to every reason against it.

use super::super::{PeftOptions, read};
use super::*;
use crate::adapter::{Adapter, Kind, Orientation, ScalingRule};
use crate::error::Class;

fn open(modules: &[&str], more: &[(&str, &[u64])], config: &PeftConfig) -> Result<Adapter> {
    read(adapter_source(modules, more), Some(config), &PeftOptions::default(), &Limits::default())
}

#[test]
fn a_plain_adapter_is_read() {
    let config = config(r#""target_modules": ["q_proj"], "fan_in_fan_out": false, "base_model_name_or_path": "x/y""#);
    let adapter = open(&["layers.0.q_proj", "layers.1.q_proj"], &[], &config).unwrap();
    let target = adapter.targets().first().unwrap();
    assert_eq!(target.tensor, "layers.0.q_proj.weight");
    assert_eq!(target.kind, Kind::Linear(Orientation::OutIn));
    assert_eq!(target.scaling.effective(), 2.0);
    assert_eq!(target.out_in(), (40, 60));
    assert_eq!((adapter.dialect(), adapter.base().name.as_deref()), ("peft", Some("x/y")));
    assert_eq!(ids(adapter.warnings()), [""; 0]);
    assert_eq!(adapter.origin_config(), Some(config.text.as_str()));
}

#[test]
fn embeddings_biases_and_full_tensors_are_read() {
    let config = config(r#""modules_to_save": ["classifier"], "bias": "all", "lora_bias": true"#);
    let more: &[(&str, &[u64])] = &[
        ("base_model.model.q.lora_B.bias", &[40]),
        ("base_model.model.v.lora_B.bias", &[40]),
        ("base_model.model.v.base_layer.bias", &[40]),
        ("base_model.model.norm.bias", &[6]),
        ("base_model.model.classifier.out.weight", &[3, 6]),
        ("base_model.model.embed.lora_embedding_A", &[8, 100]),
        ("base_model.model.embed.lora_embedding_B", &[60, 8]),
    ];
    let adapter = open(&["q", "v"], more, &config).unwrap();
    let names: Vec<&str> = adapter.replacements().iter().map(|r| r.tensor.as_str()).collect();
    assert_eq!(names, ["classifier.out.weight", "norm.bias", "v.bias"]);
    let target = |name: &str| adapter.targets().iter().find(|t| t.tensor == name).unwrap();
    assert_eq!(target("embed.weight").kind, Kind::Embedding);
    assert_eq!(target("q.weight").bias.as_ref().unwrap().tensor, "q.bias");
    assert_eq!(ids(adapter.warnings()), [""; 0]);
    // lora_bias without the tensor of a module.
    let without: Vec<(&str, &[u64])> = more.iter().filter(|(name, _)| !name.contains(".v.lora_B.bias")).copied().collect();
    assert_eq!(rules(&open(&["q", "v"], &without, &config)), ["A-001"]);
}

#[test]
fn patterns_decide_rank_and_alpha_apart() {
    let config = config(r#""rank_pattern": {"layers.0.q": 4}, "alpha_pattern": {"v": 3.5}, "use_rslora": true"#);
    let names = ["layers.0.q", "layers.0.v"];
    let mut tensors = factors(&names);
    tensors[0].1 = vec![4, 60];
    tensors[1].1 = vec![40, 4];
    let tensors: Vec<(&str, &[u64])> = tensors.iter().map(|(n, d)| (n.as_str(), d.as_slice())).collect();
    let adapter = read(source(&tensors), Some(&config), &PeftOptions::default(), &Limits::default()).unwrap();
    let scales: Vec<f64> = adapter.targets().iter().map(|t| t.scaling.effective()).collect();
    assert_eq!(scales, [8.0, 3.5 / 8f64.sqrt()]);
}

#[test]
fn patterns_that_match_nothing_or_depend_on_their_order_are_told() {
    let unused = config(r#""rank_pattern": {"q_prj": 8}, "alpha_pattern": {"k": 1}"#);
    let error = open(&["q_proj"], &[], &unused).unwrap_err();
    assert_eq!(ids(error.diagnostics()), ["P-009", "P-009"]);
    assert_eq!(error.place().file.as_deref(), Some(Path::new("adapter_config.json")));
    let overlap = config(r#""alpha_pattern": {"l.q": 12, "q": 3}"#);
    let adapter = open(&["l.q", "m.q"], &[], &overlap).unwrap();
    assert_eq!(ids(adapter.warnings()), ["P-009"]);
    assert_eq!(adapter.targets().iter().map(|t| t.scaling.alpha).collect::<Vec<_>>(), [12.0, 3.0]);
}

#[test]
fn a_rank_that_the_config_does_not_state_is_refused() {
    let config = parse(r#"{"peft_type": "LORA", "r": 16, "rank_pattern": {"v": 2}}"#).unwrap();
    let error = open(&["q", "v"], &[], &config).unwrap_err();
    assert_eq!(ids(error.diagnostics()), ["P-010", "P-010"]);
    let text = error.to_string();
    assert!(text.contains("rank 8, but r states 16") && text.contains("rank_pattern key \"v\" states 2"), "{text}");
    assert!(text.contains("PEFT itself could not load this"), "{text}");
}

#[test]
fn factors_without_their_partner_are_all_listed() {
    let more: &[(&str, &[u64])] =
        &[("base_model.model.k.lora_A.weight", &[8, 60]), ("base_model.model.v.lora_B.weight", &[40, 8])];
    let error = open(&["q"], more, &config("")).unwrap_err();
    assert_eq!(ids(error.diagnostics()), ["A-001", "A-001"]);
    assert_eq!(error.class(), Class::Mismatch);
}

#[test]
fn full_tensors_that_nobody_announced_are_refused() {
    let more: &[(&str, &[u64])] = &[
        ("base_model.model.norm.weight", &[6]),
        ("base_model.model.norm.bias", &[6]),
        ("base_model.model.q.base_layer.bias", &[40]),
        ("base_model.model.model.embed_tokens.weight", &[9, 6]),
        ("base_model.model.q.lora_C.weight", &[4]),
        ("base_model.model.optimizer.state", &[4]),
    ];
    let error = open(&["q"], more, &config("")).unwrap_err();
    let mut found = ids(error.diagnostics());
    found.sort_unstable();
    // An embedding is saved and loaded unasked.
    assert_eq!(found, ["P-011", "P-013", "P-013", "P-013", "P-013"], "{error}");
    let lora_only = config(r#""bias": "lora_only""#);
    assert_eq!(rules(&open(&["q"], &more[1..3], &lora_only)), ["P-013"]);
    assert!(open(&["q"], &[("base_model.model.q.bias", &[4])], &lora_only).is_ok());
    assert_eq!(rules(&open(&["q"], &[("base_model.model.q.lora_B.bias", &[40])], &lora_only)), ["P-011"]);
}

#[test]
fn a_saved_embedding_replaces_the_base_before_its_update() {
    let more: &[(&str, &[u64])] = &[("base_model.model.lm_head.base_layer.weight", &[40, 60])];
    let adapter = open(&["lm_head"], more, &config("")).unwrap();
    let replaced: Vec<&str> = adapter.replacements().iter().map(|r| r.tensor.as_str()).collect();
    assert_eq!((replaced, adapter.targets().len()), (vec!["lm_head.weight"], 1));
    // Without a LoRA on the module nobody says that the weight is meant.
    assert_eq!(rules(&open(&["q"], more, &config(""))), ["P-013"]);
}

#[test]
fn the_classifier_of_a_task_is_announced_by_the_task() {
    let more: &[(&str, &[u64])] = &[("base_model.model.classifier.weight", &[3, 6])];
    assert!(open(&["q"], more, &config(r#""task_type": "SEQ_CLS""#)).is_ok());
    assert_eq!(rules(&open(&["q"], more, &config(r#""task_type": "CAUSAL_LM""#))), ["P-013"]);
}

#[test]
fn adapter_names_in_keys_are_one_or_none() {
    let named = |name: &str| {
        [
            (format!("base_model.model.q.lora_A.{name}.weight"), [8, 60]),
            (format!("base_model.model.q.lora_B.{name}.weight"), [40, 8]),
        ]
    };
    let open = |tensors: &[(String, [u64; 2])]| {
        let tensors: Vec<(&str, &[u64])> = tensors.iter().map(|(n, d)| (n.as_str(), d.as_slice())).collect();
        read(source(&tensors), Some(&config("")), &PeftOptions::default(), &Limits::default())
    };
    assert_eq!(open(&named("default")).unwrap().targets().len(), 1);
    assert_eq!(open(&named("lora_A")).unwrap().targets().len(), 1);
    let error = open(&[named("a"), named("b")].concat()).unwrap_err();
    assert_eq!(ids(error.diagnostics()), ["P-012", "P-012", "P-012"], "{error}");
    assert!(error.to_string().contains("several adapters"), "{error}");
}

#[test]
fn a_file_without_the_prefix_is_read_with_a_warning_and_a_mixed_one_is_not() {
    let bare: &[(&str, &[u64])] = &[("q.lora_A.weight", &[8, 60]), ("q.lora_B.weight", &[40, 8])];
    let adapter = read(source(bare), Some(&config("")), &PeftOptions::default(), &Limits::default()).unwrap();
    assert_eq!(ids(adapter.warnings()), ["P-011"]);
    assert_eq!(rules(&open(&["v"], bare, &config(""))), ["P-011", "P-011"]);
    // Twice the same target, by two spellings.
    assert_eq!(rules(&open(&["q"], &bare[..1], &config(""))), ["P-011", "P-012"]);
}

#[test]
fn without_a_config_alpha_has_to_be_stated() {
    let options = PeftOptions { alpha: Some(32.0), ..PeftOptions::default() };
    let open = |options: PeftOptions| read(adapter_source(&["q"], &[]), None, &options, &Limits::default());
    assert_eq!(rules(&open(PeftOptions::default())), ["P-017"]);
    let adapter = open(options.clone()).unwrap();
    let target = adapter.targets().first().unwrap();
    assert_eq!((target.scaling.effective(), target.kind), (4.0, Kind::Linear(Orientation::Undeclared)));
    assert_eq!(adapter.origin_config(), None);
    let options = PeftOptions { rule: Some(ScalingRule::RankStabilized), orientation: Some(Orientation::InOut), ..options };
    let adapter = open(options.clone()).unwrap();
    let target = adapter.targets().first().unwrap();
    assert_eq!((target.scaling.effective(), target.kind), (32.0 / 8f64.sqrt(), Kind::Linear(Orientation::InOut)));
    let twice = read(adapter_source(&["q"], &[]), Some(&config("")), &options, &Limits::default());
    assert_eq!(rules(&twice), ["U-001"]);
}

#[test]
fn modules_outside_target_modules_are_applied_with_a_warning() {
    let adapter = open(&["q", "v"], &[], &config(r#""target_modules": ["q"]"#)).unwrap();
    assert_eq!((adapter.targets().len(), ids(adapter.warnings())), (2, vec!["P-016"]));
    assert_eq!(rules(&open(&["q"], &[], &config(r#""target_modules": "[a[b]]""#))), ["P-008"]);
}

#[test]
fn leftovers_of_sharded_training_and_transposed_factors_are_explained() {
    let flat: &[(&str, &[u64])] = &[("base_model.model.q.lora_A.weight", &[0]), ("base_model.model.q.lora_B.weight", &[0])];
    let error = read(source(flat), Some(&config("")), &PeftOptions::default(), &Limits::default()).unwrap_err();
    assert_eq!(ids(error.diagnostics()), ["A-004"]);
    assert!(error.diagnostics()[0].help_text().unwrap().contains("ZeRO-3"));
    let transposed: &[(&str, &[u64])] =
        &[("base_model.model.q.lora_A.weight", &[60, 8]), ("base_model.model.q.lora_B.weight", &[8, 60])];
    let error = read(source(transposed), Some(&config("")), &PeftOptions::default(), &Limits::default()).unwrap_err();
    assert!(error.diagnostics()[0].help_text().unwrap().contains("transposed"), "{error:?}");
}

#[test]
fn other_formats_and_whole_models_are_named() {
    let open = |tensors: &[(&str, &[u64])]| rules(&read(source(tensors), None, &PeftOptions::default(), &Limits::default()));
    assert_eq!(open(&[("lora_unet_x.lora_down.weight", &[4, 4])]), ["P-018"]);
    assert_eq!(open(&[("model.layers.0.q_proj.weight", &[4, 4]), ("lm_head.weight", &[4, 4])]), ["A-029"]);
    assert_eq!(open(&[]), ["A-012"]);
    assert_eq!(open(&[("base_model.model.q.hada_w1_a", &[4, 4])]), ["A-010"]);
}
