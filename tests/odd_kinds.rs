//! Adapters of every kind that PEFT would not write, or that do not fit their base: each is refused by name, or merged as it says.

mod common;

use common::scene::{Scene, Tensor, f32s, some};
use loratool::{MergeOptions, Weighted, merge, open_adapter, open_checkpoint};
use safetensors::tensor::Dtype;

const LORA: &str =
    r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "peft_version": "0.21.2", "target_parameters": ["experts.down_proj"]}"#;

/// `mlp.experts.N.{gate,up,down}_proj` of so many experts.
fn single_experts(count: usize) -> Vec<Tensor> {
    let names = ["gate_proj", "up_proj", "down_proj"];
    let of =
        |i: usize| names.map(|n| some(&format!("mlp.experts.{i}.{n}.weight"), if n == "down_proj" { &[4, 6] } else { &[6, 4] }));
    (0..count).flat_map(of).collect()
}

#[test]
fn a_stack_of_fewer_or_more_experts_than_the_base_is_refused() {
    let factors = [some("mlp.experts.lora_A.weight", &[6, 6]), some("mlp.experts.lora_B.weight", &[4, 6])];
    assert!(Scene::new(&single_experts(3), LORA, &factors).merged(|_| {}).is_ok());
    Scene::new(&single_experts(4), LORA, &factors).refused("A-023");
    Scene::new(&single_experts(2), LORA, &factors).refused("A-021");
}

#[test]
fn single_experts_become_a_part_of_the_stack_each_once() {
    let config = r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 0.1, "target_modules": ["gate_proj", "w1", "down_proj"]}"#;
    let base = [some("mlp.experts.gate_up_proj", &[2, 12, 4]), some("mlp.experts.down_proj", &[2, 4, 6])];
    let pair = |module: &str, out: usize, inner: usize| {
        [some(&format!("{module}.lora_A.weight"), &[1, inner]), some(&format!("{module}.lora_B.weight"), &[out, 1])]
    };
    let adapter = [pair("mlp.experts.1.gate_proj", 6, 4), pair("mlp.experts.0.down_proj", 4, 6)].concat();
    let after = Scene::new(&base, config, &adapter).merged(|_| {}).unwrap();
    let before = |name: &str| base.iter().find(|(n, ..)| n == name).map(|(.., b)| b.clone()).unwrap();
    let was: Vec<f64> = before("mlp.experts.gate_up_proj")
        .chunks_exact(4)
        .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
        .collect();
    let value = |i: usize| f64::from(0.25 + (i as f32 * 0.37).sin());
    for (i, (m, w)) in after["mlp.experts.gate_up_proj"].data.iter().zip(&was).enumerate() {
        let (expert, row, col) = (i / 48, i % 48 / 4, i % 4);
        // Gates are the first half of the rows.
        let delta = if expert == 1 && row < 6 { 0.1 * value(row) * value(col) } else { 0.0 };
        assert_eq!(*m, f64::from((w + delta) as f32), "[{expert}, {row}, {col}]");
    }
    let twice = [pair("mlp.experts.1.gate_proj", 6, 4), pair("block_sparse_moe.experts.1.w1", 6, 4)].concat();
    Scene::new(&base, config, &twice).refused("A-009");
}

#[test]
fn integers_are_no_factors_of_any_method() {
    let config = r#"{"peft_type": "LOHA", "r": 2, "alpha": 2, "target_modules": ["q"]}"#;
    let part = |name: &str, shape: &[usize]| some(&format!("q.hada_{name}"), shape);
    let mut adapter = vec![part("w1_a", &[4, 2]), part("w1_b", &[2, 3]), part("w2_a", &[4, 2]), part("w2_b", &[2, 3])];
    let base = [some("q.weight", &[4, 3])];
    assert!(Scene::new(&base, config, &adapter).merged(|_| {}).is_ok());
    adapter[3] = ("q.hada_w2_b".to_owned(), Dtype::I16, vec![2, 3], vec![1; 12]);
    Scene::new(&base, config, &adapter).refused("A-005");
    // Two long vectors make a matrix that no memory holds.
    let long = |name: &str| some(&format!("q.lokr_{name}"), &[60_000, 1]);
    let lokr = r#"{"peft_type": "LOKR", "r": 2, "alpha": 2, "target_modules": ["q"]}"#;
    Scene::new(&base, lokr, &[long("w1"), long("w2")]).refused("P-005");
}

#[test]
fn no_part_of_a_method_is_passed_over_or_taken_twice() {
    let base = [some("a.weight", &[4, 3])];
    let ia3_of = |names: &[&str]| names.iter().map(|name| some(&format!("a.{name}"), &[4, 1])).collect::<Vec<_>>();
    let config = ia3("").replace("[\"q\"]", "[\"a\"]");
    assert!(Scene::new(&base, &config, &ia3_of(&["ia3_l"])).merged(|_| {}).is_ok());
    Scene::new(&base, &config, &ia3_of(&["ia3_l", "ia3_l.other"])).refused("P-012");
    Scene::new(&base, &config, &ia3_of(&["ia3_l.one", "ia3_l.two"])).refused("P-012");
    let vera = r#"{"peft_type": "VERA", "r": 2, "fan_in_fan_out": false, "target_modules": ["a"]}"#;
    let lambdas =
        [some("a.vera_lambda_b", &[4]), some("a.vera_lambda_d", &[2]), some("vera_A", &[2, 5]), some("vera_B", &[4, 2])];
    assert!(Scene::new(&base, vera, &lambdas).merged(|_| {}).is_ok());
    let stray = [&lambdas[..], &[some("a.vera_B", &[4, 2])]].concat();
    Scene::new(&base, vera, &stray).refused("A-001");
}

#[test]
fn a_vocabulary_is_resized_and_nothing_else() {
    let config =
        r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"], "modules_to_save": ["score", "lm_head"]}"#;
    let base = [some("q.weight", &[4, 3]), some("score.weight", &[2, 3]), some("lm_head.weight", &[5, 3])];
    let pair = [some("q.lora_A.weight", &[1, 3]), some("q.lora_B.weight", &[4, 1])];
    let with = |more: &[Tensor]| Scene::new(&base, config, &[&pair[..], more].concat());
    let resize = |o: &mut MergeOptions| o.bind.resize_vocabulary = true;
    with(&[some("lm_head.weight", &[7, 3])]).merged(resize).unwrap();
    with(&[some("lm_head.weight", &[7, 3])]).refused("A-011");
    let error = with(&[some("score.weight", &[3, 3])]).merged(resize).unwrap_err();
    assert_eq!(error.diagnostics()[0].rule().id, "A-011", "{error}");
}

fn ia3(feedforward: &str) -> String {
    format!(r#"{{"peft_type": "IA3", "target_modules": ["q"], "feedforward_modules": [{feedforward}], "fan_in_fan_out": false}}"#)
}

#[test]
fn outputs_of_a_convolution_are_no_inputs() {
    let by = |count: usize| [some("q.ia3_l", &[1, count, 1, 1])];
    let base = [some("q.weight", &[6, 4, 3, 3])];
    assert!(Scene::new(&base, &ia3(""), &by(6)).merged(|_| {}).is_ok());
    assert!(Scene::new(&base, &ia3("\"q\""), &by(4)).merged(|_| {}).is_ok());
    Scene::new(&base, &ia3(""), &by(4)).refused("A-023");
    Scene::new(&base, &ia3("\"q\""), &by(6)).refused("A-023");
}

#[test]
fn a_layer_without_bias_is_multiplied_and_a_negative_zero_stays() {
    let base = [f32s("x.q.weight", &[2, 2], &[-0.0, 1.0, 2.0, -3.0])];
    let after = Scene::new(&base, &ia3(""), &[f32s("x.q.ia3_l", &[2, 1], &[2.0, 0.5])]).merged(|_| {}).unwrap();
    let bits: Vec<u64> = after["x.q.weight"].data.iter().map(|x| x.to_bits()).collect();
    assert_eq!(bits, [-0.0f64, 2.0, 1.0, -1.5].map(f64::to_bits));
    // PEFT compares the end of the path, which need not begin at a dot.
    let inputs = Scene::new(&base, &ia3("\".q\""), &[f32s("x.q.ia3_l", &[1, 2], &[2.0, 0.5])]).merged(|_| {}).unwrap();
    assert_eq!(inputs["x.q.weight"].data, [-0.0, 0.5, 4.0, -1.5]);
}

#[test]
fn factors_of_lora_under_another_method_are_refused() {
    let adapter = [some("q.ia3_l", &[4, 1]), some("v.lora_A.weight", &[2, 3]), some("v.lora_B.weight", &[4, 2])];
    let base = [some("q.weight", &[4, 3]), some("v.weight", &[4, 3])];
    Scene::new(&base, &ia3(""), &adapter).refused("P-011");
}

#[test]
fn a_row_without_a_norm_is_an_error_and_no_row_of_zeros() {
    let config =
        r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "use_dora": true, "fan_in_fan_out": false, "target_modules": ["q"]}"#;
    let factors = |b: [f32; 2]| {
        [
            f32s("q.lora_A.weight", &[1, 2], &[1.0, 1.0]),
            f32s("q.lora_B.weight", &[2, 1], &b),
            some("q.lora_magnitude_vector", &[2]),
        ]
    };
    let infinite = [f32s("q.weight", &[2, 2], &[1.0, f32::INFINITY, 1.0, 2.0])];
    let error = Scene::new(&infinite, config, &factors([1.0, 1.0])).merged(|o| o.bind.allow_nonfinite_base = true).unwrap_err();
    assert_eq!(error.diagnostics()[0].rule().id, "A-030", "{error}");
    let zero = [f32s("q.weight", &[2, 2], &[-1.0, -1.0, 1.0, 2.0])];
    Scene::new(&zero, config, &factors([1.0, 1.0])).refused("A-031");
}

#[test]
fn several_lists_of_layers_are_not_repeated_by_guess() {
    let config =
        r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "layer_replication": [[0, 1], [0, 1]], "target_modules": ["q"]}"#;
    let adapter = [some("model.layers.1.q.lora_A.weight", &[1, 3]), some("model.layers.1.q.lora_B.weight", &[4, 1])];
    let body = some("model.layers.0.q.weight", &[4, 3]);
    let scene = Scene::new(std::slice::from_ref(&body), config, &adapter);
    let base = open_checkpoint(scene.at("base")).unwrap().replicated(&[(0, 1), (0, 1)]).unwrap();
    let adapter_read = open_adapter(scene.at("adapter")).unwrap();
    let report = merge(&base, &[Weighted::full(&adapter_read)], &scene.at("out"), &MergeOptions::default(), &()).unwrap();
    assert_eq!((report.balance.base_tensors, report.balance.modified, report.balance.copied), (2, 1, 1));
    let two = Scene::new(&[body, some("vision.layers.0.q.weight", &[4, 3])], config, &adapter);
    let error = open_checkpoint(two.at("base")).unwrap().replicated(&[(0, 1), (0, 1)]).unwrap_err();
    assert_eq!(error.diagnostics()[0].rule().id, "P-006");
}

#[test]
fn lists_of_the_config_are_repeated_with_the_layers_or_named() {
    let config =
        r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "layer_replication": [[0, 2], [1, 2]], "target_modules": ["q"]}"#;
    let adapter = [some("model.layers.2.q.lora_A.weight", &[1, 3]), some("model.layers.2.q.lora_B.weight", &[4, 1])];
    let layers = ["0", "1"].map(|i| some(&format!("model.layers.{i}.q.weight"), &[4, 3]));
    let scene = Scene::new(&layers, config, &adapter);
    let text = r#"{"layer_types": ["a", "b"], "text_config": {"num_hidden_layers": 2, "no_rope_layers": [0, 1]}, "windows": [4, 8],
        "eos_token_id": [1, 2]}"#;
    std::fs::write(scene.at("base/config.json"), text).unwrap();
    let base = open_checkpoint(scene.at("base")).unwrap().replicated(&[(0, 2), (1, 2)]).unwrap();
    let repeated =
        text.replace(r#"["a", "b"]"#, r#"["a","b","b"]"#).replace("[0, 1]", "[0,1,1]").replace("layers\": 2", "layers\": 3");
    assert_eq!(base.config().text().unwrap(), repeated);
    let warned: Vec<String> = base.warnings().iter().map(ToString::to_string).collect();
    assert!(warned.iter().any(|w| w.contains("windows")) && !warned.iter().any(|w| w.contains("eos")), "{warned:?}");
}
