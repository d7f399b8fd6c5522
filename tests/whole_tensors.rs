//! What adapters replace whole, beside their updates: embeddings, heads and biases, and the names that they are found under.

mod common;

use common::scene::{Scene, Tensor, f32s, some};
use loratool::{BindOptions, Limits, MergeOptions, Plan, Weighted, open_adapter, open_checkpoint};

const EMBED: &str = "model.embed_tokens.weight";
const PAIR: &str = r#""peft_type": "LORA", "r": 1, "lora_alpha": 1, "peft_version": "0.21.2""#;

fn pair(module: &str) -> [Tensor; 2] {
    [some(&format!("{module}.lora_A.weight"), &[1, 3]), some(&format!("{module}.lora_B.weight"), &[4, 1])]
}

fn of(shape: &[usize], value: f32, name: &str) -> Tensor {
    f32s(name, shape, &vec![value; shape.iter().product()])
}

fn untie(options: &mut MergeOptions) {
    options.bind.untie = true;
}

/// The base of the tied models: one stored embedding, and a layer.
fn tied_base() -> [Tensor; 2] {
    [of(&[5, 3], 1.0, EMBED), some("model.layers.0.q.weight", &[4, 3])]
}

#[test]
fn a_head_that_is_untied_keeps_what_the_embedding_was() {
    // PEFT replaces the embedding alone; the head is still the old one, with its own update.
    let config = format!(r#"{{{PAIR}, "target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}}"#);
    let update = [of(&[1, 3], 1.0, "lm_head.lora_A.weight"), of(&[5, 1], 0.5, "lm_head.lora_B.weight")];
    let adapter = [&update[..], &[of(&[5, 3], 7.0, EMBED)]].concat();
    let scene = Scene::new(&tied_base(), &config, &adapter).tied();
    scene.refused("A-026");
    let after = scene.merged(untie).unwrap();
    assert!(after[EMBED].data.iter().all(|x| *x == 7.0));
    assert!(after["lm_head.weight"].data.iter().all(|x| *x == 1.5), "{:?}", after["lm_head.weight"].data);
}

#[test]
fn two_copies_of_a_tied_tensor_become_two_tensors() {
    // Two copies by modules_to_save, or two that PEFT saved unasked because the vocabulary was resized.
    for saved in [r#"["embed_tokens", "lm_head"]"#, "null"] {
        let config = format!(r#"{{{PAIR}, "target_modules": ["q"], "modules_to_save": {saved}}}"#);
        let copies = [of(&[5, 3], 7.0, EMBED), of(&[5, 3], 8.0, "lm_head.weight")];
        let scene = Scene::new(&tied_base(), &config, &[&pair("model.layers.0.q")[..], &copies].concat()).tied();
        assert!(scene.merged(|_| {}).is_err());
        let after = scene.merged(untie).unwrap();
        assert!(after[EMBED].data.iter().all(|x| *x == 7.0));
        assert!(after["lm_head.weight"].data.iter().all(|x| *x == 8.0));
    }
}

#[test]
fn full_tensors_tell_which_renaming_is_meant() {
    // Every target has its exact name in both; only the biases tell that this is a ViT whose modules have other names in memory.
    let config = format!(r#"{{{PAIR}, "target_modules": ["classifier"], "bias": "all"}}"#);
    let stored = "vit.encoder.layer.0.attention.attention.query.bias";
    let base = [some("classifier.weight", &[4, 3]), of(&[3], 1.0, stored)];
    let bias = of(&[3], 7.0, "vit.layers.0.attention.q_proj.bias");
    let scene = Scene::new(&base, &config, &[&pair("classifier")[..], &[bias]].concat());
    assert!(scene.merged(|_| {}).unwrap()[stored].data.iter().all(|x| *x == 7.0));
}

#[test]
fn a_vocabulary_is_resized_as_a_whole() {
    // The head has a row for each token too, and would keep the old number of rows.
    let config = format!(r#"{{{PAIR}, "target_modules": ["q"], "modules_to_save": ["embed_tokens"]}}"#);
    let layer = some("model.layers.0.q.weight", &[4, 3]);
    let (embed, head) = (of(&[5, 3], 1.0, EMBED), of(&[5, 3], 1.0, "lm_head.weight"));
    let adapter = [&pair("model.layers.0.q")[..], &[of(&[7, 3], 7.0, EMBED)]].concat();
    let resize = |o: &mut MergeOptions| o.bind.resize_vocabulary = true;
    let scene = Scene::new(&[layer.clone(), embed.clone(), head], &config, &adapter);
    let error = scene.merged(resize).unwrap_err();
    assert_eq!(error.diagnostics()[0].rule().id, "A-011", "{error}");
    assert!(error.to_string().contains("lm_head"), "{error}");
    // With no other such tensor nothing stays behind.
    let after = Scene::new(&[layer, embed], &config, &adapter).merged(resize).unwrap();
    assert_eq!(after[EMBED].shape, [7, 3]);
}

#[test]
fn second_copies_of_a_saved_embedding_are_left_out_by_name() {
    let config = format!(r#"{{{PAIR}, "target_modules": ["q"], "modules_to_save": ["embed_tokens"]}}"#);
    let copies = [
        of(&[5, 3], 7.0, EMBED),
        of(&[5, 3], 7.0, "model.embed_tokens.modules_to_save.weight"),
        of(&[5, 3], 1.0, "model.embed_tokens.original_module.weight"),
    ];
    let base = [some("model.layers.0.q.weight", &[4, 3]), of(&[5, 3], 1.0, EMBED)];
    let scene = Scene::new(&base, &config, &[&pair("model.layers.0.q")[..], &copies].concat());
    let adapter = open_adapter(scene.at("adapter")).unwrap();
    let warned: Vec<String> = adapter.warnings().iter().map(ToString::to_string).collect();
    for copy in ["modules_to_save.weight", "original_module.weight"] {
        assert!(warned.iter().any(|w| w.contains(copy)), "{warned:?}");
    }
    assert!(scene.merged(|_| {}).unwrap()[EMBED].data.iter().all(|x| *x == 7.0));
    // Alone, either is nobody's copy.
    Scene::new(&base, &config, &[&pair("model.layers.0.q")[..], &copies[1..2]].concat()).refused("P-011");
}

#[test]
fn patterns_of_another_method_are_about_its_own_modules() {
    let config = |key: &str| {
        format!(r#"{{"peft_type": "LOHA", "r": 4, "alpha": 2, "target_modules": ["q"], "rank_pattern": {{"{key}": 2}}}}"#)
    };
    let part = |name: &str, shape: &[usize]| some(&format!("q.hada_{name}"), shape);
    let adapter = [part("w1_a", &[4, 2]), part("w1_b", &[2, 3]), part("w2_a", &[4, 2]), part("w2_b", &[2, 3])];
    let base = [some("q.weight", &[4, 3])];
    Scene::new(&base, &config("q"), &adapter).merged(|_| {}).unwrap();
    Scene::new(&base, &config("k"), &adapter).refused("P-009");
}

#[test]
fn what_cannot_be_computed_again_is_not_recommended() {
    let advice = |init: &str| {
        let config = format!(r#"{{{PAIR}, "target_modules": ["q"], "init_lora_weights": {init}}}"#);
        let scene = Scene::new(&[some("q.weight", &[4, 3])], &config, &pair("q"));
        scene.merged(|_| {}).unwrap_err().diagnostics()[0].help_text().unwrap_or_default().to_owned()
    };
    assert!(advice("\"pissa\"").contains("--recompute-residual"));
    for init in ["\"corda\"", "\"lora_ga\"", "\"loftq\""] {
        let help = advice(init);
        assert!(help.contains("--residual-base") && !help.contains("--recompute-residual"), "{init}: {help}");
    }
}

#[test]
fn two_copies_of_a_tied_embedding_are_one_if_they_are_equal() {
    // A vocabulary was resized, and PEFT saved unasked what is one tensor under both of its names.
    let config = format!(r#"{{{PAIR}, "target_modules": ["q"]}}"#);
    let with = |head: f32| {
        let copies = [of(&[7, 3], 7.0, EMBED), of(&[7, 3], head, "lm_head.weight")];
        Scene::new(&tied_base(), &config, &[&pair("model.layers.0.q")[..], &copies].concat()).tied()
    };
    let resize = |o: &mut MergeOptions| o.bind.resize_vocabulary = true;
    let after = with(7.0).merged(resize).unwrap();
    assert_eq!((after[EMBED].shape.as_slice(), after.contains_key("lm_head.weight")), (&[7, 3][..], false));
    let error = with(8.0).merged(resize).unwrap_err();
    assert_eq!(error.diagnostics()[0].rule().id, "A-009", "{error}");
}

#[test]
fn rows_of_a_replaced_embedding_are_those_of_one_adapter() {
    let config = format!(r#"{{{PAIR}, "target_modules": ["q"], "trainable_token_indices": {{"embed_tokens": [6, 0]}}}}"#);
    let rows = of(&[2, 3], 9.0, "model.embed_tokens.token_adapter.trainable_tokens_delta");
    let whole = of(&[7, 3], 7.0, "model.embed_tokens.token_adapter.base_layer.weight");
    let both = Scene::new(&tied_base(), &config, &[&pair("model.layers.0.q")[..], &[rows.clone(), whole]].concat()).tied();
    let after = both.merged(|o| o.bind.resize_vocabulary = true).unwrap();
    let rows_of: Vec<f64> = after[EMBED].data.chunks(3).map(|row| row[0]).collect();
    assert_eq!(rows_of, [9.0, 7.0, 7.0, 7.0, 7.0, 7.0, 9.0]);
    // The row that was added is not there without the whole.
    let alone = Scene::new(&tied_base(), &config, &[&pair("model.layers.0.q")[..], &[rows]].concat()).tied();
    alone.refused("A-011");
    // Nor is another adapter's embedding the one that rows are of.
    let of_old = config.replace("[6, 0]", "[1, 0]");
    let rows = of(&[2, 3], 9.0, "model.embed_tokens.token_adapter.trainable_tokens_delta");
    let first = Scene::new(&tied_base(), &of_old, &[&pair("model.layers.0.q")[..], &[rows]].concat());
    let plain = format!(r#"{{{PAIR}, "target_modules": ["q"]}}"#);
    let second = Scene::new(&tied_base(), &plain, &[&pair("model.layers.0.q")[..], &[of(&[7, 3], 8.0, EMBED)]].concat());
    let base = open_checkpoint(both.at("base")).unwrap();
    let (first, second) = (open_adapter(first.at("adapter")).unwrap(), open_adapter(second.at("adapter")).unwrap());
    let mut bind = BindOptions::default();
    bind.resize_vocabulary = true;
    for pair in [[&first, &second], [&second, &first]] {
        let error = Plan::new(&base, &pair.map(Weighted::full), &bind, &Limits::default()).unwrap_err();
        assert_eq!(error.diagnostics()[0].rule().id, "A-009", "{error}");
    }
}
