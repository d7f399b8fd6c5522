//! What kind of layer a weight belongs to, by its name and shape: all that a checkpoint tells. Names are those of transformers 5.23 and of
//! the originals that it was converted from.

use super::super::shape::{experts_of, is_conv1d};
use crate::adapter::{Kind, Orientation};
use crate::checkpoint::ModelConfig;

/// Modules that look up rows (`nn.Embedding`). Anything else with a weight of two dimensions multiplies.
const EMBEDDINGS: &[&str] = &[
    "embed_in",
    "embed_positions",
    "embed_tokens",
    "embed_tokens_per_layer",
    "embeddings",
    "position_embedding",
    "position_embeddings",
    "positions_embed",
    "relative_attention_bias",
    "shared",
    "tok_embeddings",
    "token_embedding",
    "token_type_embeddings",
    "tokens_embed",
    "word_embeddings",
    "wpe",
    "wte",
];

/// Modules that turn the last hidden state into scores of tokens.
const HEADS: &[&str] = &["embed_out", "lm_head"];

/// Why a tensor gets no factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whole {
    /// It has less than two dimensions: a bias, or a scale of a norm.
    Vector,
    /// The output head, which adapters leave alone unless they are told to change it.
    Head,
    /// The model keeps it under several names, so that an update of one would change another, or none.
    Tied,
    /// Rows of a vocabulary were added or removed.
    Resized,
    /// It has another shape, in which no merge takes it.
    Reshaped,
    /// The base does not have it.
    New,
    /// It is no module's weight, so no reader has a name for its factors.
    Parameter,
    /// A convolution in groups.
    Grouped,
    /// It holds no floats.
    NoFloat,
    /// It holds no values.
    Empty,
    /// It was left out by name.
    Excluded,
}

impl Whole {
    /// For people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Whole::Vector => "bias or norm",
            Whole::Head => "output head",
            Whole::Tied => "tied weight",
            Whole::Resized => "resized vocabulary",
            Whole::Reshaped => "other shape",
            Whole::New => "not in the base",
            Whole::Parameter => "no module's weight",
            Whole::Grouped => "grouped convolution",
            Whole::NoFloat => "no floats",
            Whole::Empty => "no values",
            Whole::Excluded => "excluded",
        }
    }
}

/// The last module of a weight's name.
fn leaf(name: &str) -> Option<&str> {
    name.strip_suffix(".weight")?.rsplit('.').next()
}

/// Whether it is an output head by its name.
pub(super) fn is_head(name: &str) -> bool {
    leaf(name).is_some_and(|leaf| HEADS.contains(&leaf))
}

/// The kind of layer, or why it has none.
pub(super) fn kind(name: &str, dims: &[u64], config: &ModelConfig) -> Result<Kind, Whole> {
    let types = [&config.model_type, &config.text_model_type];
    let of_type = |test: &dyn Fn(&str) -> bool| types.into_iter().flatten().any(|model| test(model));
    match (dims, leaf(name)) {
        ([_, _], Some(leaf)) if EMBEDDINGS.contains(&leaf) => Ok(Kind::Embedding),
        // The heads of GPT-2 are `nn.Linear`.
        ([_, _], Some(_)) if of_type(&is_conv1d) && !is_head(name) && is_block(name) => Ok(Kind::Linear(Orientation::InOut)),
        ([_, _], Some(_)) => Ok(Kind::Linear(Orientation::OutIn)),
        ([_, _], None) if name.ends_with(".in_proj_weight") => Ok(Kind::Linear(Orientation::OutIn)),
        ([_, _, _], None) if name.contains("experts.") => Ok(Kind::Experts(experts_axes(dims, name, config))),
        // Stacks of experts of GraniteMoE and JetMoE, which look like convolutions.
        ([_, _, _], Some("input_linear" | "output_linear")) => Err(Whole::Parameter),
        ([out, inner, kernel @ ..], Some(_)) if (1..=3).contains(&kernel.len()) => match (*out, *inner) {
            // A depthwise convolution: every other number of groups looks like fewer inputs.
            (2.., 1) => Err(Whole::Grouped),
            _ => Ok(Kind::Conv),
        },
        ([] | [_], _) => Err(Whole::Vector),
        _ => Err(Whole::Parameter),
    }
}

/// Whether the module is in a numbered block, where models of GPT-2's kind have their `Conv1D`.
fn is_block(name: &str) -> bool {
    name.split('.').any(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
}

/// Which of the last two dimensions of a stack is the input: by the hidden size if it tells, else by the model type.
fn experts_axes(dims: &[u64], name: &str, config: &ModelConfig) -> Orientation {
    let default = config.model_type.as_deref().map_or(Orientation::OutIn, experts_of);
    let (Some(&[_, rows, cols]), Some(hidden)) = (Some(dims), config.hidden_size) else { return default };
    let reads_hidden = !name.ends_with("down_proj");
    match (rows == hidden, cols == hidden) {
        (true, false) if reads_hidden => Orientation::InOut,
        (false, true) if reads_hidden => Orientation::OutIn,
        (true, false) => Orientation::OutIn,
        (false, true) => Orientation::InOut,
        _ => default,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, dims: &[u64], model_type: &str) -> Result<Kind, Whole> {
        let mut config = ModelConfig::default();
        config.model_type = Some(model_type.to_owned());
        config.hidden_size = Some(64);
        kind(name, dims, &config)
    }

    #[test]
    fn kinds_follow_from_names_and_shapes() {
        use Orientation::{InOut, OutIn};
        for (name, dims, model, wanted) in [
            ("model.layers.0.self_attn.q_proj.weight", &[64, 64][..], "llama", Ok(Kind::Linear(OutIn))),
            ("model.embed_tokens.weight", &[100, 64], "llama", Ok(Kind::Embedding)),
            ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", &[32, 8], "t5", Ok(Kind::Embedding)),
            ("h.0.attn.c_attn.weight", &[64, 192], "gpt2", Ok(Kind::Linear(InOut))),
            ("score.weight", &[2, 64], "gpt2", Ok(Kind::Linear(OutIn))),
            ("wte.weight", &[100, 64], "gpt2", Ok(Kind::Embedding)),
            ("encoder.layers.0.self_attn.in_proj_weight", &[192, 64], "", Ok(Kind::Linear(OutIn))),
            ("model.layers.0.mlp.experts.gate_up_proj", &[8, 64, 96], "gpt_oss", Ok(Kind::Experts(InOut))),
            ("model.layers.0.mlp.experts.gate_up_proj", &[8, 96, 64], "mixtral", Ok(Kind::Experts(OutIn))),
            ("model.layers.0.mlp.experts.down_proj", &[8, 48, 64], "gpt_oss", Ok(Kind::Experts(InOut))),
            ("model.layers.0.mlp.experts.down_proj", &[8, 64, 64], "gpt_oss", Ok(Kind::Experts(InOut))),
            ("conv1.weight", &[8, 4, 3, 3], "", Ok(Kind::Conv)),
            ("conv1.weight", &[8, 1, 3], "", Err(Whole::Grouped)),
            ("model.norm.weight", &[64], "llama", Err(Whole::Vector)),
            ("cls_token", &[1, 1, 64], "vit", Err(Whole::Parameter)),
            ("position_embedding", &[16, 64], "", Err(Whole::Parameter)),
        ] {
            assert_eq!(of(name, dims, model), wanted, "{name}");
        }
    }
}
