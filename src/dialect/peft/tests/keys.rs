//! The grammar of tensor names.

use super::super::keys::{Key, Role, parse};

fn read(name: &str) -> Key<'_> {
    parse(name, &|_| false)
}

#[test]
fn every_name_that_peft_writes_is_read() {
    let cases: &[(&str, &str, Role, Option<&str>)] = &[
        ("base_model.model.model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj", Role::A, None),
        ("base_model.model.model.layers.0.q_proj.lora_B.weight", "model.layers.0.q_proj", Role::B, None),
        ("base_model.model.q.lora_A.default.weight", "q", Role::A, Some("default")),
        ("base_model.model.q.lora_B.default.weight", "q", Role::B, Some("default")),
        ("base_model.model.q.lora_B.bias", "q", Role::BiasDelta, None),
        ("base_model.model.q.lora_B.x.bias", "q", Role::BiasDelta, Some("x")),
        ("base_model.model.embed_tokens.lora_embedding_A", "embed_tokens", Role::EmbeddingA, None),
        ("base_model.model.embed_tokens.lora_embedding_B", "embed_tokens", Role::EmbeddingB, None),
        ("base_model.model.embed_tokens.lora_embedding_A.default", "embed_tokens", Role::EmbeddingA, Some("default")),
        ("base_model.model.q.base_layer.bias", "q", Role::BaseBias, None),
        ("base_model.model.lm_head.base_layer.weight", "lm_head", Role::BaseWeight, None),
        ("base_model.model.classifier.weight", "classifier.weight", Role::Full, None),
        ("base_model.model.classifier.modules_to_save.default.dense.bias", "classifier.dense.bias", Role::Full, Some("default")),
        ("base_model.model.base_model.model.q.lora_A.weight", "q", Role::A, None),
        ("q.lora_A.weight", "q", Role::A, None),
    ];
    for (name, path, role, adapter) in cases {
        let key = read(name);
        assert_eq!((key.path.as_str(), key.role, key.adapter), (*path, *role, *adapter), "{name}");
        assert_eq!(key.prefixed, name.starts_with("base_model"), "{name}");
    }
}

#[test]
fn modules_may_be_called_like_factors() {
    let key = read("base_model.model.alpha_proj.lora_A.weight");
    assert_eq!((key.path.as_str(), key.role), ("alpha_proj", Role::A));
    let key = read("base_model.model.lora_A.lora_B.weight");
    assert_eq!((key.path.as_str(), key.role, key.adapter), ("lora_A", Role::B, None));
    let key = read("base_model.model.lora_A.proj.lora_A.weight");
    assert_eq!((key.path.as_str(), key.role), ("lora_A.proj", Role::A));
    let key = read("base_model.model.lora_A.lora_A.default.weight");
    assert_eq!((key.path.as_str(), key.role, key.adapter), ("lora_A", Role::A, Some("default")));
}

#[test]
fn an_adapter_may_be_called_like_a_factor() {
    let file = ["base_model.model.q.lora_A.lora_A.weight", "base_model.model.q.lora_B.lora_A.weight"];
    let exists = |name: &str| file.contains(&name);
    let [a, b] = file.map(|name| parse(name, &exists));
    assert_eq!((a.path.as_str(), a.role, a.adapter), ("q", Role::A, Some("lora_A")));
    assert_eq!((b.path.as_str(), b.role, b.adapter), ("q", Role::B, Some("lora_A")));
    let file = ["base_model.model.q.lora_A.lora_A.weight", "base_model.model.q.lora_A.lora_B.weight"];
    let [a, b] = file.map(|name| parse(name, &|n| file.contains(&n)));
    assert_eq!((a.path.as_str(), a.role, a.adapter), ("q.lora_A", Role::A, None));
    assert_eq!((b.path.as_str(), b.role), ("q.lora_A", Role::B));
}

#[test]
fn parts_of_other_methods_are_refused_by_name() {
    for (name, method) in [
        ("base_model.model.q.lora_E", "AdaLoRA"),
        ("base_model.model.q.lora_A", "AdaLoRA"),
        ("base_model.model.q.hada_w1_a", "LoHa"),
        ("base_model.model.q.lokr_w1", "LoKr"),
        ("base_model.model.q.oft_R.weight", "OFT"),
        ("base_model.model.q.ia3_l", "IA3"),
        ("base_model.model.q.vera_lambda_b", "VeRA"),
        ("base_model.vera_A", "VeRA"),
        ("prompt_embeddings", "prompt"),
        ("base_model.model.classifier.original_module.weight", "own copy"),
    ] {
        match read(name).role {
            Role::Refused(what, _) => assert!(what.contains(method), "{name}: {what}"),
            other => panic!("{name}: {other:?}"),
        }
    }
    for (name, path, role) in [
        ("base_model.model.q.lora_magnitude_vector", "q", Role::Magnitude),
        ("base_model.model.q.lora_magnitude_vector.default.weight", "q", Role::Magnitude),
        ("base_model.model.q.lora_magnitude_vector.weight", "q", Role::Magnitude),
        ("base_model.model.q.lora_diag", "q", Role::Diagonal),
        ("base_model.model.embed_tokens.token_adapter.trainable_tokens_delta", "embed_tokens", Role::Rows),
        ("base_model.model.embed_tokens.trainable_tokens_delta", "embed_tokens", Role::Rows),
        ("base_model.model.mha.base_layer.out_proj.lora_A.weight", "mha.base_layer.out_proj", Role::A),
        ("base_model.model.experts.base_layer.lora_B.weight", "experts.base_layer", Role::B),
    ] {
        let key = read(name);
        assert_eq!((key.path.as_str(), key.role), (path, role), "{name}");
    }
    assert!(matches!(read("base_model.model.q.lora_velora_embed").role, Role::Training(_)));
    for name in ["base_model.model.lora_A.weight", "stray", "base_model.model.c.modules_to_save.default"] {
        assert_eq!(read(name).role, Role::Unknown, "{name}");
    }
}
