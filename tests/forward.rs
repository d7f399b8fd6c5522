//! Forward passes against `transformers` with `peft`: the same logits from the same files, with the adapter on the fly, and from the merged view.

#![cfg(feature = "eval")]

mod common;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::fixture;
use loratool::eval::{Base, Decoder, Encoder, Head, T5, View, Weights};
use loratool::{BindOptions, Limits, Weighted, open_adapter, open_checkpoint};

/// The promise of the forward pass, in absolute value.
const CLOSE: f32 = 1e-4;

fn golden(path: &Path) -> std::collections::HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn ids(tensor: &Tensor) -> Tensor {
    tensor.to_dtype(DType::U32).unwrap()
}

fn off(found: &Tensor, wanted: &Tensor) -> f32 {
    assert_eq!(found.dims(), wanted.dims());
    let difference = (found - wanted.to_dtype(DType::F32).unwrap()).unwrap().abs().unwrap();
    difference.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// The outputs of the base, with the adapter on the fly, and merged.
fn three(model: &str, adapter: &str, forward: impl Fn(&Weights<'_>) -> Tensor) -> [Tensor; 3] {
    let base = Base::new(open_checkpoint(fixture(model)).unwrap());
    let adapter = open_adapter(fixture(adapter)).unwrap();
    let view = |view| {
        let adapters = [Weighted::full(&adapter)];
        forward(&Weights::adapted(&base, &adapters, view, &BindOptions::default(), &Limits::default()).unwrap())
    };
    [forward(&Weights::base(&base)), view(View::OnTheFly), view(View::Merged)]
}

fn check([base, on_the_fly, merged]: [Tensor; 3], wanted: &Tensor) {
    assert!(off(&on_the_fly, wanted) < CLOSE, "on the fly: off by {}", off(&on_the_fly, wanted));
    assert!(off(&merged, wanted) < CLOSE, "merged: off by {}", off(&merged, wanted));
    assert!(off(&base, wanted) > 10.0 * CLOSE, "the base alone is as close: this test proves nothing");
}

fn ones(like: &Tensor) -> Tensor {
    ids(like).ones_like().unwrap()
}

#[test]
fn the_tiny_llama_has_the_logits_of_peft() {
    let golden = golden(&fixture("goldens/llama-qv-r8--llama-tiny-f32/forward.safetensors"));
    let logits = three("models/llama-tiny-f32", "adapters/llama-qv-r8", |weights| {
        Decoder::new(weights).unwrap().forward(&ids(&golden["input_ids"])).unwrap()
    });
    check(logits, &golden["logits"]);
}

#[test]
fn the_tiny_bert_has_the_hidden_states_of_peft() {
    let golden = golden(&fixture("goldens/bert-qv--bert-tiny/forward.safetensors"));
    let input = &golden["input_ids"];
    let hidden = three("models/bert-tiny", "adapters/bert-qv", |weights| {
        let types = ids(input).zeros_like().unwrap();
        Encoder::new(weights, Head::None).unwrap().forward(&ids(input), &ones(input), &types).unwrap()
    });
    check(hidden, &golden["last_hidden_state"]);
}

#[test]
fn the_tiny_t5_has_the_logits_of_peft() {
    let golden = golden(&fixture("goldens/t5-qv--t5-tiny/forward.safetensors"));
    let (input, output) = (&golden["input_ids"], &golden["decoder_input_ids"]);
    let logits = three("models/t5-tiny", "adapters/t5-qv", |weights| {
        let model = T5::new(weights).unwrap();
        let encoded = model.encode(&ids(input), &ones(input)).unwrap();
        model.decode(&ids(output), &encoded, &ones(input)).unwrap()
    });
    check(logits, &golden["logits"]);
}

#[test]
fn a_classifier_whose_head_the_adapter_brings_has_the_logits_of_peft() {
    let golden = golden(&fixture("uses/classify/golden.safetensors"));
    let base = Base::new(open_checkpoint(fixture("uses/classify/model")).unwrap());
    let adapter = open_adapter(fixture("uses/classify/adapter")).unwrap();
    for row in 0..4 {
        let [input, mask, types] = ["input_ids", "attention_mask", "token_type_ids"]
            .map(|name| ids(&golden[&format!("{row}.{name}")]).reshape((1, ())).unwrap());
        let logits =
            |weights: &Weights<'_>| Encoder::new(weights, Head::Classes).unwrap().forward(&input, &mask, &types).unwrap();
        let adapted =
            Weights::adapted(&base, &[Weighted::full(&adapter)], View::OnTheFly, &BindOptions::default(), &Limits::default());
        let wanted = |which: &str| golden[&format!("{which}.{row}.logits")].reshape((1, ())).unwrap();
        let (plain, adapted) = (logits(&Weights::base(&base)), logits(&adapted.unwrap()));
        assert!(off(&plain, &wanted("base")) < CLOSE);
        assert!(off(&adapted, &wanted("adapted")) < CLOSE);
        assert!(off(&adapted, &wanted("base")) > 0.1);
    }
}

#[test]
fn adapters_share_the_memory_of_the_base() {
    let base = Base::new(open_checkpoint(fixture("models/llama-tiny-f32")).unwrap());
    let adapters =
        ["llama-qv-r8", "llama-all-r4", "llama-r1"].map(|name| open_adapter(fixture(&format!("adapters/{name}"))).unwrap());
    let _plain = Decoder::new(&Weights::base(&base)).unwrap();
    let alone = base.bytes();
    let models = adapters.each_ref().map(|adapter| {
        let weights =
            Weights::adapted(&base, &[Weighted::full(adapter)], View::OnTheFly, &BindOptions::default(), &Limits::default());
        Decoder::new(&weights.unwrap()).unwrap()
    });
    assert_eq!(models.len(), 3);
    assert_eq!(base.bytes(), alone);
}

#[test]
fn what_cannot_be_run_is_refused_by_name() {
    let refused = |model: &str, how: fn(&Weights<'_>) -> loratool::Result<()>| {
        let base = Base::new(open_checkpoint(fixture(model)).unwrap());
        let error = how(&Weights::base(&base)).unwrap_err();
        assert_eq!(error.diagnostics()[0].rule().id, "U-010");
        error.to_string()
    };
    let decoder = refused("models/gpt2-tiny", |weights| Decoder::new(weights).map(drop));
    assert!(decoder.contains("\"gpt2\""), "{decoder}");
    let head = refused("models/bert-tiny", |weights| Encoder::new(weights, Head::Classes).map(drop));
    assert!(head.contains("no head for classes"), "{head}");
    let long = refused("models/bert-tiny", |weights| {
        let ids = Tensor::zeros((1, 33), DType::U32, &Device::Cpu).unwrap();
        Encoder::new(weights, Head::None)?.forward(&ids, &ids, &ids).map(drop)
    });
    assert!(long.contains("33 tokens"), "{long}");
    let beyond = refused("models/bert-tiny", |weights| {
        let ids = Tensor::full(128_u32, (1, 3), &Device::Cpu).unwrap();
        Encoder::new(weights, Head::None)?.forward(&ids, &ids, &ids).map(drop)
    });
    assert!(beyond.contains("token 128"), "{beyond}");
}

/// all-MiniLM-L6-v2, fetched; the head comes with the adapter.
#[test]
fn a_real_encoder_has_the_logits_of_peft() {
    let cache = std::env::var_os("LORATOOL_CACHE").map_or_else(|| fixture("../target/fetched"), std::path::PathBuf::from);
    let folder = cache.join("all-MiniLM-L6-v2");
    if !folder.is_dir() {
        println!("skipped: fixtures/fetch.sh gets the model");
        return;
    }
    let golden = golden(&fixture("goldens/minilm-reviews/forward.safetensors"));
    let [input, mask, types] = ["input_ids", "attention_mask", "token_type_ids"].map(|name| ids(&golden[name]));
    let base = Base::new(open_checkpoint(folder).unwrap());
    let adapter = open_adapter(fixture("adapters/minilm-reviews")).unwrap();
    for view in [View::OnTheFly, View::Merged] {
        let adapters = [Weighted::full(&adapter)];
        let weights = Weights::adapted(&base, &adapters, view, &BindOptions::default(), &Limits::default()).unwrap();
        let logits = Encoder::new(&weights, Head::Classes).unwrap().forward(&input, &mask, &types).unwrap();
        assert!(off(&logits, &golden["logits"]) < CLOSE, "{view:?}: off by {}", off(&logits, &golden["logits"]));
    }
}

/// What a golden of a family holds for inputs with padding, with the adapter on the fly and without. Padded positions are zero there.
fn family(name: &str, folder: &str, forward: impl Fn(&Weights<'_>, &std::collections::HashMap<String, Tensor>) -> Tensor) {
    let golden = golden(&fixture(&format!("goldens/forward/{name}.safetensors")));
    let base = Base::new(open_checkpoint(fixture(&format!("{folder}/base"))).unwrap());
    let adapter = open_adapter(fixture(&format!("{folder}/adapter"))).unwrap();
    let adapted =
        Weights::adapted(&base, &[Weighted::full(&adapter)], View::OnTheFly, &BindOptions::default(), &Limits::default());
    let outputs = [("base", forward(&Weights::base(&base), &golden)), ("adapted", forward(&adapted.unwrap(), &golden))];
    for (which, found) in &outputs {
        let wanted = &golden[*which];
        let padded = found.dims().len() == 3 && !golden.contains_key("decoder_input_ids");
        let found = match padded {
            true => found.broadcast_mul(&golden["attention_mask"].to_dtype(DType::F32).unwrap().unsqueeze(2).unwrap()).unwrap(),
            false => found.clone(),
        };
        assert!(off(&found, wanted) < CLOSE, "{name}, {which}: off by {}", off(&found, wanted));
    }
    assert!(off(&outputs[1].1, &outputs[0].1) > CLOSE, "{name}: the adapter does nothing");
}

#[test]
fn decoders_of_all_families_have_the_logits_of_peft() {
    let decoder = |weights: &Weights<'_>, golden: &std::collections::HashMap<String, Tensor>| {
        Decoder::new(weights).unwrap().forward(&ids(&golden["input_ids"])).unwrap()
    };
    for name in ["llama", "mistral", "qwen2", "qwen3"] {
        family(name, &format!("families/{name}"), decoder);
    }
    family("llama3-rope", "goldens/forward/models/llama3-rope", decoder);
}

#[test]
fn encoders_of_all_families_have_the_outputs_of_peft() {
    let encoder = |head| {
        move |weights: &Weights<'_>, golden: &std::collections::HashMap<String, Tensor>| {
            let input = ids(&golden["input_ids"]);
            let types = golden.get("token_type_ids").map_or_else(|| input.zeros_like().unwrap(), ids);
            Encoder::new(weights, head).unwrap().forward(&input, &ids(&golden["attention_mask"]), &types).unwrap()
        }
    };
    family("bert", "families/bert", encoder(Head::None));
    family("roberta", "families/roberta", encoder(Head::Classes));
    family("bert-qa", "goldens/forward/models/bert-qa", encoder(Head::Span));
    family("roberta-cls", "goldens/forward/models/roberta-cls", encoder(Head::Classes));
}

#[test]
fn both_kinds_of_t5_have_the_logits_of_peft() {
    let t5 = |weights: &Weights<'_>, golden: &std::collections::HashMap<String, Tensor>| {
        let model = T5::new(weights).unwrap();
        let mask = ids(&golden["attention_mask"]);
        let encoded = model.encode(&ids(&golden["input_ids"]), &mask).unwrap();
        model.decode(&ids(&golden["decoder_input_ids"]), &encoded, &mask).unwrap()
    };
    family("t5", "families/t5", t5);
    family("t5-gated-untied", "goldens/forward/models/t5-gated-untied", t5);
}
