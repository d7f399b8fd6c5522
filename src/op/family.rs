//! Which family of models an adapter was made for, as far as the names of its tensors tell. Many families share one set of names; the
//! base's `model_type` tells them apart.

use crate::adapter::Adapter;

/// `(segments of which one stands in some name, what the family is called)`; the first row that fits is taken. By the module names of
/// transformers 4 and 5 and of diffusers (`modeling_*.py`); each row of the former is held against real names in `tests/inspected.rs`.
const FAMILIES: &[(&[&str], &str)] = &[
    (&["down_blocks", "mid_block", "up_blocks"], "diffusion, a UNet"),
    (&["transformer_blocks", "single_transformer_blocks"], "diffusion, a transformer"),
    (&["visual.blocks"], "Qwen2-VL, Qwen2.5-VL"),
    (&["multi_modal_projector", "vision_tower", "language_model.layers", "language_model.model"], "LLaVA, Gemma 3, PaliGemma, …"),
    (&["vision_model.encoder", "text_model.encoder"], "CLIP, SigLIP"),
    (&["SelfAttention", "EncDecAttention", "DenseReluDense"], "T5"),
    (&["encoder_attn", "model.encoder.layers"], "Whisper, BART"),
    (&["model.decoder.layers"], "OPT"),
    (&["gpt_neox"], "GPT-NeoX, Pythia"),
    (&["transformer.encoder.layers"], "ChatGLM"),
    (&["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h"], "Falcon, BLOOM"),
    (&["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "transformer.wte"], "GPT-2"),
    (&["roberta"], "RoBERTa"),
    (&["distilbert"], "DistilBERT"),
    (&["attention.self", "bert"], "BERT"),
    (&["vit", "attention.attention"], "ViT, DeiT, DINOv2"),
    (&["block_sparse_moe"], "Mixtral"),
    (&["mlp.experts"], "a mixture of experts (Mixtral, Qwen-MoE, …)"),
    (&["self_attn.qkv_proj", "mlp.gate_up_proj"], "Phi-3"),
    (&["model.layers", "model.embed_tokens"], "Llama, Mistral, Mixtral, Qwen, Gemma, …"),
];

/// The families that have modules of these names, or `None` if none is known.
pub(super) fn family(adapter: &Adapter) -> Option<&'static str> {
    let targets = adapter.targets().iter().map(|target| &target.tensor);
    let whole = adapter.replacements().iter().map(|whole| &whole.tensor).chain(adapter.rows().iter().map(|rows| &rows.tensor));
    // Dots on both sides: whole segments alone count.
    let names: Vec<String> =
        targets.chain(whole).chain(adapter.rescalings().iter().map(|r| &r.tensor)).map(|name| format!(".{name}.")).collect();
    let stands = |segments: &&str| names.iter().any(|name| name.contains(&format!(".{segments}.")));
    FAMILIES.iter().find(|(any, _)| any.iter().any(stands)).map(|(_, family)| *family)
}
