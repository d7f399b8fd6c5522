//! Families whose modules have other names in memory, and so in an adapter, than their tensors have in a file: transformers 5 renames when
//! it loads and when it saves. Each row turns names of modules into names of a file (transformers 5.23, `conversion_mapping.py`, read from
//! right to left); all rules of a row are applied, each at the first place where its segments stand.

/// One family's rules. A rule that begins with `^` holds at the start of a name only.
pub(super) struct Family {
    pub(super) name: &'static str,
    /// The values of `model_type` of its models.
    types: &'static [&'static str],
    pub(super) rules: &'static [(&'static str, &'static str)],
}

pub(super) const FAMILIES: &[Family] = &[
    // `llava` and the 13 types that are mapped to it: gemma3, paligemma, mistral3, internvl, aya_vision, aria, …
    Family {
        name: "llava",
        types: &[
            "llava",
            "aria",
            "aya_vision",
            "gemma3",
            "got_ocr2",
            "internvl",
            "mistral3",
            "paligemma",
            "pp_chart2table",
            "vipllava",
        ],
        rules: &[
            ("^model.language_model", "language_model.model"),
            ("^model.vision_tower", "vision_tower"),
            ("^model.multi_modal_projector", "multi_modal_projector"),
            ("^lm_head", "language_model.lm_head"),
        ],
    },
    // `Qwen2VLForConditionalGeneration`, also of Qwen2.5-VL; `Qwen2_5OmniThinkerForConditionalGeneration`
    Family {
        name: "qwen2_vl",
        types: &["qwen2_vl", "qwen2_5_vl"],
        rules: &[("^model.language_model", "model"), ("^model.visual", "visual"), ("^model.audio_tower", "audio_tower")],
    },
    // `ViTModel`, also of DeiT, BEiT, AST, ViTMAE, ViTMSN, ViViT, I-JEPA
    Family {
        name: "vit",
        types: &["vit", "audio-spectrogram-transformer", "beit", "deit", "ijepa", "vit_mae", "vit_msn", "vivit"],
        rules: &[
            ("layers", "encoder.layer"),
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ],
    },
    // `Dinov2Model`, also with registers
    Family {
        name: "dinov2",
        types: &["dinov2", "dinov2_with_registers"],
        rules: &[
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
        ],
    },
    // `mixtral`, and the types that are mapped to it: the router beside the experts
    Family { name: "mixtral", types: &["mixtral", "minimax", "minimax_m2"], rules: &[("mlp.gate", "block_sparse_moe.gate")] },
    // `GPTNeoXForCausalLM`
    Family { name: "gpt_neox", types: &["gpt_neox"], rules: &[("^lm_head", "embed_out")] },
];

/// The name that the module of a tensor of a file has in memory, in a model of this type, with the parameter at its end.
pub(crate) fn in_memory(model_type: &str, tensor: &str) -> String {
    let Some(family) = FAMILIES.iter().find(|family| family.types.contains(&model_type)) else { return tensor.to_owned() };
    let mut name = tensor.to_owned();
    for (from, to) in family.rules {
        let (anchored, from) = from.strip_prefix('^').map_or((false, *from), |from| (true, from));
        if let Some(at) = place(&name, to).filter(|at| !anchored || *at == 0) {
            name.replace_range(at..at + to.len(), from);
        }
    }
    // Only if it leads back.
    if apply(family.rules, &name) == tensor { name } else { tensor.to_owned() }
}

/// The name with every rule applied.
pub(super) fn apply(rules: &[(&str, &str)], name: &str) -> String {
    let mut name = name.to_owned();
    for (from, to) in rules {
        let (anchored, from) = from.strip_prefix('^').map_or((false, *from), |from| (true, from));
        if let Some(at) = place(&name, from).filter(|at| !anchored || *at == 0) {
            name.replace_range(at..at + from.len(), to);
        }
    }
    name
}

/// Where whole segments stand in a name.
fn place(name: &str, segments: &str) -> Option<usize> {
    let is_whole = |at: &usize| {
        let before = name.get(..*at).is_some_and(|before| before.is_empty() || before.ends_with('.'));
        let after = name.get(at + segments.len()..).is_some_and(|after| after.is_empty() || after.starts_with('.'));
        before && after
    };
    name.match_indices(segments).map(|(at, _)| at).find(is_whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_segments_are_replaced_once() {
        let vit = |name: &str| apply(FAMILIES.iter().find(|family| family.name == "vit").unwrap().rules, name);
        assert_eq!(vit("vit.layers.0.attention.q_proj.weight"), "vit.encoder.layer.0.attention.attention.query.weight");
        assert_eq!(vit("layers.11.mlp.fc2.weight"), "encoder.layer.11.output.dense.weight");
        assert_eq!(vit("vit.my_layers.0.weight"), "vit.my_layers.0.weight");
        assert_eq!(
            in_memory("vit", "vit.encoder.layer.0.attention.attention.query.weight"),
            "vit.layers.0.attention.q_proj.weight"
        );
        assert_eq!(in_memory("vit", "encoder.layer.1.attention.output.dense.bias"), "layers.1.attention.o_proj.bias");
        assert_eq!(in_memory("vit", "encoder.layer.1.output.dense.bias"), "layers.1.mlp.fc2.bias");
        assert_eq!(in_memory("bert", "encoder.layer.1.output.dense.bias"), "encoder.layer.1.output.dense.bias");
        assert_eq!(in_memory("gemma3", "language_model.lm_head.weight"), "lm_head.weight");
        let llava = |name: &str| apply(FAMILIES[0].rules, name);
        assert_eq!(llava("model.language_model.layers.0.q_proj.weight"), "language_model.model.layers.0.q_proj.weight");
        assert_eq!(llava("x.model.vision_tower.y"), "x.model.vision_tower.y");
    }

    #[test]
    fn the_table_is_the_one_of_the_specification() {
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/spec/adapter-model.md")).unwrap();
        for Family { name, rules, .. } in FAMILIES {
            let rules: Vec<String> = rules.iter().map(|(from, to)| format!("`{from}` → `{to}`")).collect();
            let row = format!("| {name} | {} |", rules.join(", "));
            assert!(text.contains(&row), "{row}");
        }
    }
}
