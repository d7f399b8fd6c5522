//! BERT and RoBERTa (Devlin et al. 2019; transformers 5.23, `modeling_bert.py`, `modeling_roberta.py`): post-norm encoders with learned
//! positions, and the heads for classes of sequences and for spans of answers.

use candle_core::{D, Device, Tensor};

use super::act::{Act, softmax};
use super::computed;
use super::config::{Config, Family};
use super::layers::{Embedding, Linear, Names, Norm, join_heads, split_heads};
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::rules;

/// What stands on top of an encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Head {
    /// The last hidden state, `(batch, time, hidden)`.
    None,
    /// Logits of classes, `(batch, classes)`.
    Classes,
    /// Logits of the beginning and the end of an answer, `(batch, time, 2)`.
    Span,
}

/// An encoder that runs.
pub struct Encoder {
    words: Embedding,
    positions: Embedding,
    types: Embedding,
    norm: Norm,
    layers: Vec<Layer>,
    top: Top,
    /// Position of the first token, and the id of padding, where positions begin after it.
    after_padding: Option<u32>,
    max_positions: usize,
    vocabulary: usize,
}

enum Top {
    None,
    /// BERT: tanh of the pooler, then the classifier; RoBERTa: the same under other names.
    Classes {
        pooler: Linear,
        classifier: Linear,
    },
    Span(Linear),
}

struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attended: Linear,
    attended_norm: Norm,
    up: Linear,
    down: Linear,
    norm: Norm,
    act: Act,
    heads: usize,
}

impl Encoder {
    /// # Errors
    /// `U-010` if the checkpoint is no encoder of this kind, or lacks the head.
    pub fn new(weights: &Weights<'_>, head: Head) -> Result<Self> {
        let config = weights.config()?;
        if !matches!(config.family, Family::Bert | Family::Roberta) {
            return Err(config.refuse(format!("a model of type {:?} is no encoder", config.model_type)));
        }
        let position = config.text("position_embedding_type").unwrap_or("absolute");
        if position != "absolute" {
            return Err(config.refuse(format!("positions of type {position:?} are not known")));
        }
        let hidden = config.size("hidden_size")?;
        let eps = config.number("layer_norm_eps", 1e-12)?;
        let max_positions = config.size_or("max_position_embeddings", Some(512))?;
        let vocabulary = config.size("vocab_size")?;
        let names = Names::new(weights, &["", "bert.", "roberta."], "embeddings.word_embeddings.weight");
        let embeddings = names.at("embeddings");
        let layers =
            (0..config.size("num_hidden_layers")?).map(|i| Layer::new(&names.at("encoder.layer").at(i), &config, hidden, eps));
        let padding = config.get("pad_token_id").and_then(serde_json::Value::as_u64).unwrap_or(1);
        Ok(Encoder {
            words: embeddings.at("word_embeddings").embedding(vocabulary, hidden)?,
            positions: embeddings.at("position_embeddings").embedding(max_positions, hidden)?,
            types: embeddings.at("token_type_embeddings").embedding(config.size_or("type_vocab_size", Some(2))?, hidden)?,
            norm: embeddings.at("LayerNorm").layer_norm(hidden, eps)?,
            layers: layers.collect::<Result<_>>()?,
            top: Top::new(&names, &config, head, hidden)?,
            after_padding: (config.family == Family::Roberta).then_some(padding as u32),
            max_positions,
            vocabulary,
        })
    }

    /// The longest sequence.
    pub fn longest(&self) -> usize {
        self.max_positions - self.after_padding.map_or(0, |padding| padding as usize + 1)
    }

    /// How many classes the head tells apart; 0 if it tells none.
    pub fn classes(&self) -> usize {
        match &self.top {
            Top::Classes { classifier, .. } => classifier.outputs(),
            Top::None | Top::Span(_) => 0,
        }
    }

    /// The output of the head. All are `(batch, time)`: ids and types u32, mask 1 for tokens and 0 for padding.
    ///
    /// # Errors
    /// `U-010` for an id beyond the vocabulary or a sequence that is too long; `E-013`.
    pub fn forward(&self, ids: &Tensor, mask: &Tensor, types: &Tensor) -> Result<Tensor> {
        let time = ids.dim(D::Minus1).map_err(computed)?;
        if time > self.longest() {
            let message = format!("a sequence of {time} tokens, and the model takes {}", self.longest());
            return Err(Error::new(rules::RUNNABLE, message));
        }
        in_vocabulary(ids, self.vocabulary)?;
        self.run(ids, mask, types).map_err(computed)
    }

    fn run(&self, ids: &Tensor, mask: &Tensor, types: &Tensor) -> candle_core::Result<Tensor> {
        let positions = self.positions.forward(&self.positions_of(ids)?)?;
        let x = ((self.words.forward(ids)? + self.types.forward(types)?)? + positions)?;
        let mut x = self.norm.forward(&x)?;
        let mask = additive(mask)?;
        for layer in &self.layers {
            x = layer.forward(&x, &mask)?;
        }
        match &self.top {
            Top::None => Ok(x),
            Top::Classes { pooler, classifier } => {
                let first = x.narrow(1, 0, 1)?.squeeze(1)?;
                classifier.forward(&pooler.forward(&first)?.tanh()?)
            }
            Top::Span(span) => span.forward(&x),
        }
    }

    fn positions_of(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        let (batch, time) = ids.dims2()?;
        let Some(padding) = self.after_padding else {
            return Tensor::arange(0, time as u32, &Device::Cpu)?.broadcast_as((batch, time))?.contiguous();
        };
        let rows = ids.to_vec2::<u32>()?;
        let of_row = |row: &Vec<u32>| {
            let count = row.iter().scan(0, |count, id| {
                let is_token = *id != padding;
                *count += u32::from(is_token);
                Some(if is_token { *count + padding } else { padding })
            });
            count.collect::<Vec<u32>>()
        };
        Tensor::new(rows.iter().map(of_row).collect::<Vec<_>>(), &Device::Cpu)
    }
}

impl Top {
    fn new(names: &Names<'_, '_>, config: &Config<'_>, head: Head, hidden: usize) -> Result<Self> {
        let root = names.root();
        let missing = |what: &str| {
            let help = "give --adapter one that brings the head, or a model that was saved with it";
            config.refuse(format!("the model has no {what}")).help(help)
        };
        Ok(match head {
            Head::None => Top::None,
            Head::Span if !root.has("qa_outputs.weight") => return Err(missing("head for answers (qa_outputs)")),
            Head::Span => Top::Span(root.at("qa_outputs").linear(hidden, 2)?),
            Head::Classes if config.family == Family::Roberta => {
                if !root.has("classifier.out_proj.weight") {
                    return Err(missing("head for classes (classifier.dense, classifier.out_proj)"));
                }
                let classes = root.rows("classifier.out_proj.weight")?;
                let classifier = root.at("classifier").at("out_proj").linear(hidden, classes)?;
                Top::Classes { pooler: root.at("classifier").at("dense").linear(hidden, hidden)?, classifier }
            }
            Head::Classes => {
                if !root.has("classifier.weight") {
                    return Err(missing("head for classes (classifier)"));
                }
                let classes = root.rows("classifier.weight")?;
                let pooler = names.at("pooler").at("dense").linear(hidden, hidden)?;
                Top::Classes { pooler, classifier: root.at("classifier").linear(hidden, classes)? }
            }
        })
    }
}

impl Layer {
    fn new(names: &Names<'_, '_>, config: &Config<'_>, hidden: usize, eps: f64) -> Result<Self> {
        let inner = config.size("intermediate_size")?;
        let (attention, output) = (names.at("attention"), names.at("output"));
        let own = attention.at("self");
        Ok(Layer {
            query: own.at("query").linear(hidden, hidden)?,
            key: own.at("key").linear(hidden, hidden)?,
            value: own.at("value").linear(hidden, hidden)?,
            attended: attention.at("output").at("dense").linear(hidden, hidden)?,
            attended_norm: attention.at("output").at("LayerNorm").layer_norm(hidden, eps)?,
            up: names.at("intermediate").at("dense").linear(hidden, inner)?,
            down: output.at("dense").linear(inner, hidden)?,
            norm: output.at("LayerNorm").layer_norm(hidden, eps)?,
            act: config.act("hidden_act", "gelu")?,
            heads: config.heads(hidden)?.0,
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor) -> candle_core::Result<Tensor> {
        let heads = |linear: &Linear| split_heads(&linear.forward(x)?, self.heads);
        let (query, key, value) = (heads(&self.query)?, heads(&self.key)?, heads(&self.value)?);
        let scale = 1.0 / (query.dim(D::Minus1)? as f64).sqrt();
        let scores = (query.matmul(&key.transpose(2, 3)?.contiguous()?)? * scale)?;
        let attended = join_heads(&softmax(&scores.broadcast_add(mask)?)?.matmul(&value)?)?;
        let x = self.attended_norm.forward(&(self.attended.forward(&attended)? + x)?)?;
        let inner = self.act.forward(&self.up.forward(&x)?)?;
        self.norm.forward(&(self.down.forward(&inner)? + x)?)
    }
}

/// What is added to scores: nothing for tokens, the lowest number for padding. `(batch, time)` to `(batch, 1, 1, time)`.
pub(super) fn additive(mask: &Tensor) -> candle_core::Result<Tensor> {
    let (batch, time) = mask.dims2()?;
    let mask = mask.to_dtype(candle_core::DType::F32)?;
    mask.affine(f64::from(-f32::MIN), f64::from(f32::MIN))?.reshape((batch, 1, 1, time))
}

/// # Errors
/// `U-010` for an id beyond the vocabulary: the tokenizer is of another model.
pub(super) fn in_vocabulary(ids: &Tensor, vocabulary: usize) -> Result<()> {
    let largest = ids.flatten_all().and_then(|ids| ids.max(0)).and_then(|id| id.to_scalar::<u32>()).map_err(computed)?;
    if largest as usize >= vocabulary {
        let message = format!("token {largest} is beyond the model's vocabulary of {vocabulary}");
        return Err(Error::new(rules::RUNNABLE, message).help("use the tokenizer of this model"));
    }
    Ok(())
}
