//! The few facts of `config.json` that a change of weights depends on: the model type, tied weights, quantisation. A config that
//! cannot be read costs these facts and a warning, not the run: transformers itself writes `Infinity` into some, which is no JSON.

use std::collections::HashSet;
use std::path::Path;

use serde_json::value::RawValue;

use super::links;
use crate::codec::safetensors::{Member, members};
use crate::error::{Diagnostic, Error, Result};
use crate::io;
use crate::limits::Limits;
use crate::rules;

const NAME: &str = "config.json";

/// Facts from `config.json`. All are absent if there is none.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ModelConfig {
    /// `model_type`, such as `llama`.
    pub model_type: Option<String>,
    /// `model_type` of `text_config`: the language model within a multimodal one.
    pub text_model_type: Option<String>,
    /// `architectures`: the classes that the weights were saved from.
    pub architectures: Vec<String>,
    /// `tie_word_embeddings` as stated, at the top or else in `text_config`. What absence means depends on the model type; see
    /// [`Checkpoint::tied`](super::Checkpoint::tied).
    pub tie_word_embeddings: Option<bool>,
    /// `quant_method` of `quantization_config`; `unnamed` if there is a config without one.
    pub quantization: Option<String>,
    /// `weight_block_size` of `quantization_config`: rows and columns of a weight that share a scale.
    pub weight_block: Option<(u64, u64)>,
    /// `hidden_size` or the model type's own word for it.
    pub hidden_size: Option<u64>,
    /// `vocab_size`.
    pub vocab_size: Option<u64>,
    text: Option<String>,
}

impl ModelConfig {
    /// The whole file as it stands, for writing an edited copy.
    pub fn text(&self) -> Option<&str> {
        self.text.as_deref()
    }

    /// The text with `tie_word_embeddings` set to false wherever it stands, and at the top; every other byte as it was. `None`
    /// without a config.
    pub(crate) fn untied(&self) -> Option<String> {
        const KEY: &str = "tie_word_embeddings";
        let text = self.text.as_deref()?;
        let (mut edited, at_top) = replaced(text, KEY, "false")?;
        if !at_top {
            let brace = edited.find('{')?;
            let comma = if members(text).ok()?.is_empty() { "" } else { "," };
            edited.insert_str(brace + 1, &format!("\n  \"{KEY}\": false{comma}"));
        }
        Some(edited)
    }

    /// The facts without the text: the config of a folder of which one file alone is read, and so not written either.
    pub(super) fn facts_alone(self) -> Self {
        ModelConfig { text: None, ..self }
    }

    /// Reads the config of a folder. What is wrong with it goes into `warnings`.
    pub(super) fn read(folder: &Path, limits: &Limits, warnings: &mut Vec<Diagnostic>) -> Self {
        let path = folder.join(NAME);
        if std::fs::symlink_metadata(&path).is_err() {
            return Self::default();
        }
        let found = links::admit(folder, Path::new(NAME)).and_then(|()| Self::read_file(&path, limits));
        found.unwrap_or_else(|error| {
            warnings.extend(error.into_diagnostics().into_iter().map(|d| d.help("what it says of the model is not known here")));
            Self::default()
        })
    }

    fn read_file(path: &Path, limits: &Limits) -> Result<Self> {
        let fail = |rule, message: String| Error::new(rule, message).file(path);
        let Some(bytes) = io::read_small(path, limits.config_bytes)? else {
            return Err(fail(
                rules::CONFIG_READABLE,
                format!("the config has more than {} bytes, the limit", limits.config_bytes),
            ));
        };
        let text = String::from_utf8(bytes).map_err(|_| fail(rules::CONFIG_READABLE, "the config is not UTF-8".into()))?;
        let mut config = Self::parse(&text).map_err(|(rule, message)| fail(rule, message))?;
        config.text = Some(text);
        Ok(config)
    }

    fn parse(text: &str) -> Result<Self, (&'static rules::Rule, String)> {
        let top = Facts::of(text)?;
        let inner = top.raw("text_config").filter(|raw| raw.starts_with('{')).map(Facts::of).transpose()?.unwrap_or_default();
        let quantization = top.raw("quantization_config").filter(|raw| raw.starts_with('{')).map(Facts::of).transpose()?;
        let either = |keys: &[&str]| keys.iter().find_map(|key| top.get::<u64>(key).or_else(|| inner.get(key)));
        Ok(ModelConfig {
            model_type: top.get("model_type"),
            text_model_type: inner.get("model_type"),
            architectures: top.get("architectures").unwrap_or_default(),
            tie_word_embeddings: top.get("tie_word_embeddings").or_else(|| inner.get("tie_word_embeddings")),
            weight_block: quantization.as_ref().and_then(|q| q.get("weight_block_size")),
            quantization: quantization.map(|q| q.get("quant_method").unwrap_or_else(|| "unnamed".to_owned())),
            hidden_size: either(&["hidden_size", "n_embd", "d_model"]),
            vocab_size: either(&["vocab_size"]),
            text: None,
        })
    }
}

/// The text of a config with `dtype` for what it says of the dtype of the weights, under transformers' old or new name, wherever that
/// stands; `None` if it says nothing.
pub(crate) fn stored_as(text: &str, dtype: &str) -> Option<String> {
    let raw = format!("\"{dtype}\"");
    let mut edited = text.to_owned();
    for key in ["torch_dtype", "dtype"] {
        edited = replaced(&edited, key, &raw)?.0;
    }
    (edited != text).then_some(edited)
}

/// The text of a config with another size of the vocabulary, wherever it states one; `None` if it states none.
pub(crate) fn with_vocabulary(text: &str, rows: u64) -> Option<String> {
    let edited = replaced(text, "vocab_size", &rows.to_string())?.0;
    (edited != text).then_some(edited)
}

/// What configs call the number of layers.
const LAYER_COUNTS: &[&str] = &["num_hidden_layers", "n_layer", "n_layers", "num_layers"];
/// Lists of transformers 5.23 with one value for each layer.
const PER_LAYER: &[&str] = &["layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "attention_layers"];

impl ModelConfig {
    /// The config of a model whose layer number `i` is the stored layer `stack[i]`, of which there are `count`; and which lists that are as
    /// long, and may hold a value per layer, are left as they are.
    pub(super) fn with_layers(mut self, stack: &[u64], count: u64) -> (Self, Vec<String>) {
        let Some(mut text) = self.text.take() else { return (self, Vec::new()) };
        for key in LAYER_COUNTS {
            text = replaced(&text, key, &stack.len().to_string()).map_or(text, |(counted, _)| counted);
        }
        let mut left = Vec::new();
        for (key, values) in lists(&text).into_iter().filter(|(_, values)| values.len() as u64 == count) {
            if PER_LAYER.contains(&key.as_str()) {
                let repeated: Vec<_> = stack.iter().filter_map(|layer| values.get(*layer as usize)).collect();
                let raw = serde_json::to_string(&repeated).unwrap_or_default();
                text = replaced(&text, &key, &raw).map_or(text, |(repeated, _)| repeated);
            } else if key != "architectures" && !key.ends_with("_token_id") {
                left.push(key);
            }
        }
        self.text = Some(text);
        (self, left)
    }
}

/// The lists of a config, at the top and in `text_config`.
fn lists(text: &str) -> Vec<(String, Vec<Box<RawValue>>)> {
    let top = members(text).unwrap_or_default();
    let inner = top.iter().filter(|m| m.key == "text_config").flat_map(|m| members(m.value.get()).unwrap_or_default());
    let all = top.iter().map(|m| (m.key.to_string(), m.value.get())).chain(inner.map(|m| (m.key.into_owned(), m.value.get())));
    all.filter_map(|(key, raw)| Some((key, serde_json::from_str(raw).ok()?))).collect()
}

/// The text with every value of `key` replaced, at the top and in `text_config`; and whether there is one at the top. `None` if the text
/// is no object.
fn replaced(text: &str, key: &str, raw: &str) -> Option<(String, bool)> {
    let top = members(text).ok()?;
    let nested = top.iter().filter(|m| m.key == "text_config" && m.value.get().starts_with('{'));
    let inner: Vec<_> = nested.filter_map(|m| Some((m.offset, members(m.value.get()).ok()?))).collect();
    let of = |base: usize, found: &[Member<'_>]| -> Vec<(usize, usize)> {
        let named = found.iter().filter(|m| m.key == key);
        named.map(|m| (base + m.offset, base + m.offset + m.value.get().len())).collect()
    };
    let at_top = of(0, &top);
    let mut places: Vec<(usize, usize)> = inner.iter().flat_map(|(base, found)| of(*base, found)).collect();
    places.extend(&at_top);
    places.sort_unstable();
    let mut edited = text.to_owned();
    for (begin, end) in places.into_iter().rev() {
        edited.replace_range(begin..end, raw);
    }
    Some((edited, !at_top.is_empty()))
}

/// The members of one object.
#[derive(Default)]
struct Facts<'a>(Vec<(String, &'a RawValue)>);

impl<'a> Facts<'a> {
    fn of(text: &'a str) -> Result<Self, (&'static rules::Rule, String)> {
        let found = members(text).map_err(|e| (rules::CONFIG_READABLE, format!("the config is not a JSON object: {e}")))?;
        let mut seen = HashSet::new();
        if let Some(twice) = found.iter().find(|m| !seen.insert(m.key.as_ref())) {
            return Err((rules::CONFIG_READABLE, format!("{:?} occurs twice in the config", twice.key)));
        }
        drop(seen);
        Ok(Facts(found.into_iter().map(|m| (m.key.into_owned(), m.value)).collect()))
    }

    fn raw(&self, key: &str) -> Option<&'a str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, value)| value.get())
    }

    /// The value, or `None` if it is absent or of another type.
    fn get<T: serde::Deserialize<'a>>(&self, key: &str) -> Option<T> {
        serde_json::from_str(self.raw(key)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_come_from_the_top_or_from_the_language_model_inside() {
        let text = r#"{"model_type":"gemma3","architectures":["A"],"text_config":{"model_type":"gemma3_text","hidden_size":8,
            "tie_word_embeddings":false},"quantization_config":{"bits":4},"time_step_limit":1e400}"#;
        let config = ModelConfig::parse(text).unwrap();
        assert_eq!((config.model_type.as_deref(), config.text_model_type.as_deref()), (Some("gemma3"), Some("gemma3_text")));
        assert_eq!((config.tie_word_embeddings, config.hidden_size, config.vocab_size), (Some(false), Some(8), None));
        assert_eq!((config.architectures, config.quantization.as_deref()), (vec!["A".to_owned()], Some("unnamed")));
    }

    #[test]
    fn untying_changes_that_field_alone() {
        let untied = |text: &str| ModelConfig { text: Some(text.into()), ..Default::default() }.untied().unwrap();
        assert_eq!(untied(r#"{"a":1e-05, "tie_word_embeddings" : true}"#), r#"{"a":1e-05, "tie_word_embeddings" : false}"#);
        assert_eq!(untied(r#"{"a":1}"#), "{\n  \"tie_word_embeddings\": false,\"a\":1}");
        let nested = r#"{"text_config":{"tie_word_embeddings":true},"tie_word_embeddings":true}"#;
        assert_eq!(untied(nested), nested.replace("true", "false"));
    }

    #[test]
    fn a_config_that_cannot_be_read_costs_its_facts_and_a_warning() {
        let folder = tempfile::tempdir().unwrap();
        let limits = Limits { config_bytes: 16, ..Limits::default() };
        let broken = ["{\"a\":Infinity}", "", "{\"a\":1,\"a\":2}", "{\"a\":1}          "];
        for text in broken {
            std::fs::write(folder.path().join(NAME), text).unwrap();
            let mut warnings = Vec::new();
            let config = ModelConfig::read(folder.path(), &limits, &mut warnings);
            assert_eq!((config.text(), warnings[0].rule().id), (None, "K-015"));
        }
    }

    #[test]
    fn untying_changes_one_word_and_nothing_else() {
        let untied = |text: &str| ModelConfig { text: Some(text.to_owned()), ..Default::default() }.untied().unwrap();
        assert_eq!(
            untied("{\"a\": 1.50,\n\"tie_word_embeddings\" : true}\n"),
            "{\"a\": 1.50,\n\"tie_word_embeddings\" : false}\n"
        );
        assert_eq!(untied("{}"), "{\n  \"tie_word_embeddings\": false}");
        assert_eq!(
            untied("{\n  \"text_config\": {\"tie_word_embeddings\": true}\n}"),
            "{\n  \"tie_word_embeddings\": false,\n  \"text_config\": {\"tie_word_embeddings\": false}\n}"
        );
    }
}
