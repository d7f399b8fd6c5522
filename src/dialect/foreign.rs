//! Dialects that are recognised but not read: other tools' tensor names, and whole models in an adapter's place. Naming the format
//! is worth more than "unknown tensor" five hundred times. Recognition is by names alone; a name counts only if PEFT cannot have
//! written it, so that a module called `alpha_proj` or `lora_unet` does not turn a PEFT file into another tool's.

use crate::error::Diagnostic;
use crate::rules;

/// The way out for MLX, whose configs are recognised too.
pub(crate) const MLX_HELP: &str = "MLX factors are the transposes of PEFT's and its scale stands in the config; fuse the adapter with mlx_lm.fuse, or transpose and rename";

/// A format: its name, which names are its own, and what to do.
struct Format {
    name: &'static str,
    owns: fn(&str) -> bool,
    help: &'static str,
}

/// In the order of asking: the first that owns a name gets it.
const FORMATS: &[Format] = &[
    Format {
        name: "LyCORIS",
        owns: |n| !peft(n) && (n.starts_with("lycoris_") || any_in(n, &[".hada_w1_", ".hada_w2_", ".lokr_w1", ".lokr_w2"])),
        help: "apply it with LyCORIS; its products are not B·A",
    },
    Format {
        name: "kohya sd-scripts",
        owns: |n| {
            ["lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_"]
                .iter()
                .any(|p| n.starts_with(p))
                || (!peft(n) && any_in(n, &[".lora_down.weight", ".lora_up.weight", ".lora_mid.weight"]))
        },
        help: "it stores alpha per tensor and flattens names; convert it to PEFT's format with diffusers",
    },
    Format {
        name: "diffusers",
        owns: |n| {
            let old = ["lora.down.weight", "lora.up.weight", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"];
            let pipeline = ["unet.", "text_encoder.", "text_encoder_2.", "transformer.transformer_blocks."];
            let single = "transformer.single_transformer_blocks.";
            old.iter().any(|end| n.ends_with(end))
                || (factor(n) && (pipeline.iter().any(|p| n.starts_with(p)) || n.starts_with(single)))
        },
        help: "load it in diffusers and save the model's adapter with PEFT (save_lora_adapter), which writes alpha down",
    },
    Format {
        name: "GGUF (llama.cpp)",
        owns: |n| n.ends_with(".weight.lora_a") || n.ends_with(".weight.lora_b"),
        help: "its names are those of llama.cpp; start from the adapter that it was converted from",
    },
    Format { name: "MLX", owns: |n| n.ends_with(".lora_a") || n.ends_with(".lora_b"), help: MLX_HELP },
    Format {
        name: "torchtune",
        owns: |n| n.ends_with(".lora_a.weight") || n.ends_with(".lora_b.weight"),
        help: "save the adapter with torchtune's PEFT-compatible checkpointer",
    },
    Format {
        name: "loralib",
        owns: |n| !peft(n) && (n.ends_with(".lora_A") || n.ends_with(".lora_B")),
        help: "its file states neither rank nor alpha; rename the tensors to PEFT's (.lora_A.weight) and write an adapter_config.json",
    },
    Format {
        name: "NeMo",
        owns: |n| any_in(n, &[".adapter_layer.", ".adapter.linear_in.weight", ".adapter.linear_out.weight"]),
        help: "export it from NeMo to Hugging Face's PEFT format",
    },
    Format {
        name: "XLabs (Flux)",
        owns: |n| ["_lora1.", "_lora2.", "_lora."].iter().any(|m| any_in(n, &[m])) && any_in(n, &[".down.weight", ".up.weight"]),
        help: "convert it to PEFT's format with diffusers",
    },
];

/// `P-018` if the names are another tool's, wholly or in part; `A-029` if they are those of a whole model.
pub(crate) fn recognise(names: &[&str]) -> Option<Diagnostic> {
    let mut owned: Vec<(usize, &str)> = vec![(0, ""); FORMATS.len()];
    for &name in names {
        if let Some((count, example)) = FORMATS.iter().position(|format| (format.owns)(name)).and_then(|i| owned.get_mut(i)) {
            *count += 1;
            if example.is_empty() {
                *example = name;
            }
        }
    }
    let most = FORMATS.iter().zip(&owned).filter(|(_, (count, _))| *count > 0).max_by_key(|(_, (count, _))| *count);
    if let Some((format, (count, example))) = most {
        let peft = names.iter().filter(|n| peft(n)).count();
        let message = if peft > 0 {
            format!("{count} of {} names are of the format of {}, and {peft} are PEFT's", names.len(), format.name)
        } else {
            format!("the adapter is in the format of {}, which is not read by this version", format.name)
        };
        return Some(Diagnostic::new(rules::FOREIGN_DIALECT, message).tensor(*example).help(format.help));
    }
    whole_model(names)
}

/// No name of PEFT and none of any adapter that is known, but weights with the names of layers.
fn whole_model(names: &[&str]) -> Option<Diagnostic> {
    let adapter = names.iter().any(|n| peft(n) || any_in(n, &["lora", "adapter", "prompt", "trainable_tokens"]));
    let weights = names.iter().filter(|n| n.ends_with(".weight") || n.ends_with(".bias")).count();
    // More than half: a whole model has little else.
    if adapter || weights * 2 <= names.len() {
        return None;
    }
    let message = format!("none of the {} tensors is a LoRA factor: this is a whole model, not an adapter", names.len());
    let help = "check the order of the arguments: are base and adapter swapped?";
    Some(Diagnostic::new(rules::ROLES, message).tensor(names.first().copied().unwrap_or_default()).help(help))
}

/// PEFT's prefix, which no other tool writes.
fn peft(name: &str) -> bool {
    name.starts_with("base_model.model.")
}

/// A factor with PEFT's own suffix, but without its prefix.
fn factor(name: &str) -> bool {
    !peft(name) && (name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight"))
}

fn any_in(name: &str, parts: &[&str]) -> bool {
    parts.iter().any(|part| name.contains(part))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn named(names: &[&str]) -> String {
        recognise(names).map(|d| format!("{} {}", d.rule().id, d.message())).unwrap_or_default()
    }

    #[test]
    fn each_format_is_named() {
        let cases: &[(&str, &str)] = &[
            ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "kohya"),
            ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "kohya"),
            ("lycoris_blocks_0_attn.lokr_w1", "LyCORIS"),
            ("lora_unet_x.hada_w1_a", "LyCORIS"),
            ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_k_lora.down.weight", "diffusers"),
            ("unet.up_blocks.1.attentions.0.proj_in.lora_A.weight", "diffusers"),
            ("transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight", "diffusers"),
            ("model.layers.20.self_attn.q_proj.lora_a", "MLX"),
            ("blk.0.attn_q.weight.lora_a", "GGUF"),
            ("layers.0.attn.q_proj.lora_a.weight", "torchtune"),
            ("transformer.h.0.attn.c_attn.lora_A", "loralib"),
            ("model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight", "NeMo"),
            ("double_blocks.0.processor.proj_lora1.down.weight", "XLabs"),
        ];
        for (name, format) in cases {
            let found = named(&[name]);
            assert!(found.starts_with("P-018") && found.contains(format), "{name}: {found}");
        }
    }

    #[test]
    fn peft_names_are_nobody_elses() {
        for name in [
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.alpha_proj.lora_B.weight",
            "base_model.model.unet.proj.lora_A.weight",
            "base_model.model.layers.0.q.hada_w1_a",
            "transformer.h.0.attn.c_attn.lora_A.weight",
        ] {
            assert_eq!(named(&[name]), "", "{name}");
        }
    }

    #[test]
    fn a_mixed_file_is_refused_with_both_counts() {
        let found = named(&["base_model.model.q.lora_A.weight", "lora_unet_x.lora_down.weight", "lora_unet_x.alpha"]);
        assert!(found.contains("2 of 3 names") && found.contains("1 are PEFT's"), "{found}");
    }

    #[test]
    fn a_whole_model_is_not_an_adapter() {
        let found = named(&["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]);
        assert!(found.starts_with("A-029"), "{found}");
        assert_eq!(named(&[]), "");
    }
}
