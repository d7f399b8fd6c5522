//! Weights that a model keeps once under several names: the embedding and the output head of most small language models. Safetensors
//! has no aliases, so a file holds one of the names and the program that loads it fills in the others. Changing one name alone then
//! changes them all, or is lost on loading. Names and defaults are those of transformers 5.23 (`_tied_weights_keys` of the model
//! classes, `tie_word_embeddings` of the config classes).

use super::Checkpoint;
use crate::tensor::TensorSource;

/// Names of one tensor.
struct Group {
    /// One tensor whatever the config says.
    always: &'static [&'static str],
    /// Joined to the first by `tie_word_embeddings`.
    heads: &'static [&'static str],
}

const fn group(always: &'static [&'static str], heads: &'static [&'static str]) -> Group {
    Group { always, heads }
}

const GROUPS: &[Group] = &[
    // Decoders: Llama, Mistral, Qwen, Gemma, Phi and most others; then as the language model of a multimodal one, now and before 5.0.
    group(&["model.embed_tokens.weight"], &["lm_head.weight"]),
    group(&["model.language_model.embed_tokens.weight"], &["lm_head.weight"]),
    group(&["language_model.model.embed_tokens.weight"], &["language_model.lm_head.weight"]),
    group(&["model.text_model.embed_tokens.weight"], &["lm_head.weight"]),
    // GPT-2, GPT-J, CodeGen; the first GPT-2 on the Hub has no prefix.
    group(&["transformer.wte.weight"], &["lm_head.weight"]),
    group(&["wte.weight"], &["lm_head.weight"]),
    group(&["transformer.tokens_embed.weight"], &["lm_head.weight"]),
    // Bloom, Falcon; Mamba; GPT-NeoX.
    group(&["transformer.word_embeddings.weight"], &["lm_head.weight"]),
    group(&["word_embeddings.weight"], &["lm_head.weight"]),
    group(&["backbone.embeddings.weight"], &["lm_head.weight"]),
    group(&["gpt_neox.embed_in.weight"], &["embed_out.weight"]),
    group(&["gpt_neox.embed_in.weight"], &["lm_head.weight"]),
    // T5 and relatives, where the config decides about the head alone; BART, mBART, Marian; OPT; Whisper.
    group(&["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"], &["lm_head.weight"]),
    group(
        &["model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"],
        &["lm_head.weight"],
    ),
    group(&["model.decoder.embed_tokens.weight"], &["lm_head.weight"]),
    group(&["model.decoder.embed_tokens.weight"], &["proj_out.weight"]),
    // Masked language models: BERT, RoBERTa and relatives.
    group(&["bert.embeddings.word_embeddings.weight"], &["cls.predictions.decoder.weight"]),
    group(&["deberta.embeddings.word_embeddings.weight"], &["cls.predictions.decoder.weight"]),
    group(&["mobilebert.embeddings.word_embeddings.weight"], &["cls.predictions.decoder.weight"]),
    group(&["roberta.embeddings.word_embeddings.weight"], &["lm_head.decoder.weight"]),
    group(&["mpnet.embeddings.word_embeddings.weight"], &["lm_head.decoder.weight"]),
    group(&["esm.embeddings.word_embeddings.weight"], &["lm_head.decoder.weight"]),
    group(&["distilbert.embeddings.word_embeddings.weight"], &["vocab_projector.weight"]),
    group(&["electra.embeddings.word_embeddings.weight"], &["generator_lm_head.weight"]),
    group(&["albert.embeddings.word_embeddings.weight"], &["predictions.decoder.weight"]),
    group(&["model.embeddings.tok_embeddings.weight"], &["decoder.weight"]),
    group(&["cls.predictions.bias", "cls.predictions.decoder.bias"], &[]),
    group(&["lm_head.bias", "lm_head.decoder.bias"], &[]),
    group(&["predictions.bias", "predictions.decoder.bias"], &[]),
];

/// Model types that tie if the config does not say.
#[rustfmt::skip]
const TIED: &[&str] = &[
    "albert", "bart", "bert", "bigbird_pegasus", "big_bird", "biogpt", "blenderbot", "blenderbot-small", "bloom", "camembert",
    "cohere", "cohere2", "convbert", "ctrl", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "ernie4_5", "ernie4_5_moe",
    "esm", "falcon", "falcon_mamba", "florence2", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4",
    "gemma4_text", "gpt2", "gpt_bigcode", "gpt_neo", "jetmoe", "led", "lfm2", "lfm2_moe", "longformer", "longt5", "m2m_100", "mamba",
    "marian", "mbart", "megatron-bert", "minicpm3", "mobilebert", "modernbert", "modernbert-decoder", "mpnet", "mpt", "mt5", "mvp",
    "nllb-moe", "openai-gpt", "opt", "paligemma", "pegasus", "pegasus_x", "plbart", "prophetnet", "recurrent_gemma", "roberta",
    "roformer", "smollm3", "speech_to_text", "speecht5", "squeezebert", "starcoder2", "switch_transformers", "t5", "t5gemma", "umt5",
    "vaultgemma", "whisper", "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "zamba", "zamba2",
];

/// Model types that do not.
#[rustfmt::skip]
const UNTIED: &[&str] = &[
    "apertus", "arcee", "bamba", "bitnet", "chameleon", "codegen", "dbrx", "deepseek_v2", "deepseek_v3", "diffllama", "dots1", "emu3",
    "eurobert", "exaone4", "falcon_h1", "flex_olmo", "fuyu", "glm", "glm4", "glm4_moe", "gpt_neox", "gpt_oss", "gptj", "granite",
    "granitemoe", "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "idefics", "idefics2",
    "idefics3", "internlm3", "jamba", "llama", "llama4", "llama4_text", "llava", "llava_next", "llava_onevision", "mamba2", "minimax",
    "ministral", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2",
    "qwen2_5_vl", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_vl", "rembert", "rwkv", "seed_oss", "smolvlm",
    "stablelm",
];

/// Other names of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tie {
    /// Those that the files hold.
    pub present: Vec<&'static str>,
    /// Those that they do not, and that the model gives this tensor's values when it is loaded.
    pub absent: Vec<&'static str>,
    /// Those of them, and the tensor itself, that are one tensor by `tie_word_embeddings` alone: they can be stored apart.
    pub heads: Vec<&'static str>,
    /// Why they are taken for one tensor.
    pub reason: TieReason,
}

/// Why several names are taken for one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TieReason {
    /// The model has no other way, whatever its config says.
    Architecture,
    /// The config says `tie_word_embeddings`.
    Config,
    /// The config does not say, and this is the default of its model type.
    ModelType,
    /// Neither is known, and the files hold one of the names only.
    OneStored,
}

impl Checkpoint {
    /// The other names that the model keeps for `tensor`, or `None` if it stands alone. `tensor` need not be in the files: a head that
    /// only `tie_word_embeddings` creates is asked about too.
    pub fn tied(&self, tensor: &str) -> Option<Tie> {
        let stored = |name: &&str| self.info(name).is_some();
        let count = |names: &[&str]| names.iter().filter(|name| stored(name)).count();
        let both = |g: &Group| count(g.always) + count(g.heads);
        // Several groups share the head's name: the one that the files hold most of; of equal ones the first.
        let of_tensor = GROUPS.iter().filter(|g| g.always.contains(&tensor) || g.heads.contains(&tensor));
        let group = of_tensor.rev().max_by_key(|g| both(g)).filter(|g| both(g) > 0)?;

        // Where nothing is declared, a pair of which one half is stored can only be a tied one.
        let one_stored = count(group.always) == 0 || count(group.heads) == 0;
        let (joined, reason) = self.declared().unwrap_or((one_stored, TieReason::OneStored));
        let heads = if joined { group.heads } else { &[] };
        let is_head = |name: &&str| heads.contains(name);
        if !group.always.contains(&tensor) && !is_head(&tensor) {
            return None;
        }
        let others = group.always.iter().chain(heads).copied().filter(|name| *name != tensor);
        let (present, mut absent): (Vec<_>, Vec<_>) = others.partition(|name| stored(name));
        if self.is_headless() {
            absent.retain(|name| !is_head(name));
        }
        let with_head = is_head(&tensor) || present.iter().chain(&absent).any(is_head);
        let reason = if with_head { reason } else { TieReason::Architecture };
        let is_one = |head: &&&str| **head == tensor || present.contains(*head) || absent.contains(*head);
        let heads = group.heads.iter().filter(is_one).copied().collect();
        (!present.is_empty() || !absent.is_empty()).then_some(Tie { present, absent, heads, reason })
    }

    /// Whether the config ties the head to the embedding, by word or by default; `None` if that is not known.
    fn declared(&self) -> Option<(bool, TieReason)> {
        let config = self.config();
        if let Some(stated) = config.tie_word_embeddings {
            return Some((stated, TieReason::Config));
        }
        let default = |model: &str| {
            let tied = TIED.contains(&model);
            (tied || UNTIED.contains(&model)).then_some((tied, TieReason::ModelType))
        };
        let types = [&config.model_type, &config.text_model_type];
        types.into_iter().flatten().find_map(|model| default(model))
    }

    /// Whether the weights were saved from a class without a language-model head, so that a head that is not stored does not exist.
    fn is_headless(&self) -> bool {
        let headless = |class: &String| {
            let body = class.ends_with("Model") && !class.contains("LMHead") && !class.contains("DoubleHeads");
            body || ["Classification", "QuestionAnswering", "MultipleChoice"].iter().any(|task| class.contains(task))
        };
        let classes = &self.config().architectures;
        !classes.is_empty() && classes.iter().all(headless)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_model_type_has_two_defaults_and_no_group_a_name_twice() {
        assert!(TIED.iter().all(|t| !UNTIED.contains(t)));
        for g in GROUPS {
            assert!(g.heads.iter().all(|h| !g.always.contains(h)));
        }
    }
}
