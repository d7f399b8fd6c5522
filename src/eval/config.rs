//! `config.json` as far as a forward pass depends on it: the fields of `transformers` with its defaults. A value that changes the arithmetic
//! and is not known here is refused by name.

use serde_json::{Map, Value};

use super::act::Act;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::rules;

/// A family of models that share their blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// BERT.
    Bert,
    /// RoBERTa, XLM-RoBERTa, CamemBERT: BERT with positions that begin after the padding.
    Roberta,
    /// Llama, Mistral, Qwen2, Qwen3: pre-norm decoders with rotary positions.
    Llama,
    /// T5, mT5.
    T5,
}

/// The members of a `config.json`.
pub(super) struct Config<'a> {
    members: Map<String, Value>,
    base: &'a Checkpoint,
    pub(super) model_type: String,
    pub(super) family: Family,
}

impl<'a> Config<'a> {
    /// # Errors
    /// `U-010` if there is no config, or it is of another family.
    pub(super) fn new(base: &'a Checkpoint) -> Result<Self> {
        let refuse = |message: String| Error::new(rules::RUNNABLE, message).file(base.path());
        let text = base.config().text().ok_or_else(|| {
            refuse("there is no config.json, which says what the tensors are".to_owned())
                .help("give the folder of the model, with its config.json")
        })?;
        let members: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| refuse(format!("config.json is no object: {error}")))?;
        let model_type = members.get("model_type").and_then(Value::as_str).unwrap_or_default().to_owned();
        let family = match model_type.as_str() {
            "bert" => Family::Bert,
            "roberta" | "xlm-roberta" | "camembert" => Family::Roberta,
            "llama" | "mistral" | "qwen2" | "qwen3" => Family::Llama,
            "t5" | "mt5" => Family::T5,
            other => {
                let help =
                    "run it elsewhere; here run bert, roberta, xlm-roberta, camembert, llama, mistral, qwen2, qwen3, t5 and mt5";
                return Err(refuse(format!("a model of type {other:?} cannot be run here")).help(help));
            }
        };
        Ok(Config { members, base, model_type, family })
    }

    pub(super) fn refuse(&self, message: String) -> Error {
        Error::new(rules::RUNNABLE, message).file(self.base.path().join("config.json"))
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.members.get(key).filter(|value| !value.is_null())
    }

    /// A positive whole number.
    pub(super) fn size(&self, key: &str) -> Result<usize> {
        self.size_or(key, None)
    }

    /// A positive whole number, or what it is without.
    pub(super) fn size_or(&self, key: &str, without: Option<usize>) -> Result<usize> {
        match self.get(key) {
            None => without.ok_or_else(|| self.refuse(format!("{key:?} is not stated"))),
            Some(value) => {
                let number = value.as_u64().filter(|n| (1..1 << 32).contains(n)).and_then(|n| usize::try_from(n).ok());
                number.ok_or_else(|| self.refuse(format!("{key:?} is {value}, which is no size")))
            }
        }
    }

    pub(super) fn number(&self, key: &str, without: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(without),
            Some(value) => value.as_f64().ok_or_else(|| self.refuse(format!("{key:?} is {value}, which is no number"))),
        }
    }

    pub(super) fn flag(&self, key: &str, without: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(without),
            Some(value) => value.as_bool().ok_or_else(|| self.refuse(format!("{key:?} is {value}, neither true nor false"))),
        }
    }

    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    pub(super) fn act(&self, key: &str, without: &str) -> Result<Act> {
        let name = self.text(key).unwrap_or(without);
        Act::from_name(name).ok_or_else(|| self.refuse(format!("{key:?} is {name:?}, an activation that is not known")))
    }

    /// Number of heads and their width.
    pub(super) fn heads(&self, hidden: usize) -> Result<(usize, usize)> {
        let heads = self.size("num_attention_heads")?;
        if !hidden.is_multiple_of(heads) {
            return Err(self.refuse(format!("{heads} heads do not share a width of {hidden}")));
        }
        Ok((heads, hidden / heads))
    }
}
