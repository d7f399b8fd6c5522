//! What is asked of a model: a class, an answer, a translation, a reply. A [`Runner`] is a model with its tokenizer that answers one row at a time, so
//! that no answer depends on what else is in a batch.

use candle_core::{DType, Tensor};
use serde_json::Value;
use tokenizers::Encoding;

use super::computed;
use super::data::{Data, Row};
use super::decoder::Decoder;
use super::encoder::{Encoder, Head};
use super::greedy;
use super::t5::T5;
use super::text::{Text, row};
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::io::read_small;
use crate::rules;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Task {
    /// The class of a text (`text`, and `text_pair` if there are two).
    Classify,
    /// The part of `context` that answers `question`.
    Answer,
    /// The translation of `source`.
    Translate,
    /// What comes after `prompt`.
    Reply,
    /// How likely `text` is.
    Perplexity,
}

/// How a row is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct AskOptions {
    /// Cut what is too long at its end, instead of refusing it. Default false.
    pub truncate: bool,
    /// Tokens of a translation or a reply, at most. Default 32.
    pub max_new_tokens: usize,
    /// Tokens of an answer, at most. Default 30, as in the script of SQuAD.
    pub max_answer_tokens: usize,
}

impl Default for AskOptions {
    fn default() -> Self {
        AskOptions { truncate: false, max_new_tokens: 32, max_answer_tokens: 30 }
    }
}

/// What a model says of a row.
#[derive(Debug, Clone, PartialEq)]
pub struct Said {
    /// A label, an answer, a translation or a reply.
    pub text: String,
    /// The logits that it was decided by: of all classes, or of the beginning and the end of an answer; else empty.
    pub decisions: Vec<Vec<f32>>,
    /// Tokens that went in.
    pub tokens: usize,
}

/// A model that answers.
pub struct Runner {
    model: Model,
    text: Text,
    task: Task,
    options: AskOptions,
    /// Names of the classes, by number.
    labels: Vec<String>,
    /// Tokens that end a text.
    ends: Vec<u32>,
    /// The token that a translation begins with.
    start: u32,
}

enum Model {
    Encoder(Encoder),
    Decoder(Decoder),
    T5(T5),
}

impl Runner {
    /// # Errors
    /// `U-010` if the model is not one for the task.
    pub fn new(weights: &Weights<'_>, text: Text, task: Task, options: AskOptions) -> Result<Self> {
        let config = weights.config()?;
        let model = match task {
            Task::Classify => Model::Encoder(Encoder::new(weights, Head::Classes)?),
            Task::Answer => Model::Encoder(Encoder::new(weights, Head::Span)?),
            Task::Translate => Model::T5(T5::new(weights)?),
            Task::Reply | Task::Perplexity => Model::Decoder(Decoder::new(weights)?),
        };
        let classes = match &model {
            Model::Encoder(encoder) => encoder.classes(),
            _ => 0,
        };
        let named = |i: usize| config.get("id2label").and_then(|names| names.get(i.to_string())).and_then(Value::as_str);
        let labels = (0..classes).map(|i| named(i).map_or_else(|| format!("LABEL_{i}"), str::to_owned)).collect();
        let generation = generation_config(weights)?;
        let get = |key: &str| generation.get(key).filter(|value| !value.is_null()).or_else(|| config.get(key)).cloned();
        let ids = |value: Option<Value>| match value {
            Some(Value::Array(ids)) => ids.iter().filter_map(Value::as_u64).map(|id| id as u32).collect(),
            Some(id) => id.as_u64().map(|id| id as u32).into_iter().collect(),
            None => Vec::new(),
        };
        let start = ids(get("decoder_start_token_id").or_else(|| get("pad_token_id"))).first().copied().unwrap_or(0);
        Ok(Runner { model, text, task, options, labels, ends: ids(get("eos_token_id")), start })
    }

    /// Names of the classes, by number; empty unless the task is to classify.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    pub(super) fn task(&self) -> Task {
        self.task
    }

    pub(super) fn text(&self) -> &Text {
        &self.text
    }

    pub(super) fn start(&self) -> u32 {
        self.start
    }

    pub(super) fn translator(&self) -> Result<&T5> {
        match &self.model {
            Model::T5(model) => Ok(model),
            Model::Encoder(_) | Model::Decoder(_) => Err(Error::new(rules::RUNNABLE, "the model has no encoder and decoder")),
        }
    }

    pub(super) fn decoder(&self) -> Result<&Decoder> {
        match &self.model {
            Model::Decoder(model) => Ok(model),
            Model::Encoder(_) | Model::T5(_) => Err(Error::new(rules::RUNNABLE, "the model is no decoder")),
        }
    }

    /// # Errors
    /// `U-012` if the row has not what the task needs, `U-010` if it is too long; `E-013`.
    pub fn ask(&self, data: &Data, row: &Row) -> Result<Said> {
        let text = |name: &str| row.text(data, name);
        let said = match (&self.model, self.task) {
            (Model::Encoder(encoder), Task::Classify) => {
                let encoded = match row.get("text_pair") {
                    None => self.text.encode(text("text")?)?,
                    Some(_) => self.text.encode((text("text")?, text("text_pair")?))?,
                };
                self.classify(encoder, encoded)
            }
            (Model::Encoder(encoder), _) => {
                let (question, context) = (text("question")?, text("context")?);
                self.answer(encoder, self.text.encode((question, context))?, context)
            }
            (Model::T5(model), _) => self.translate(model, &self.text.encode(text("source")?)?),
            (Model::Decoder(model), _) => self.reply(model, self.text.encode(text("prompt")?)?),
        };
        said.map_err(|error| match error.place().file {
            // Which row it was is half of what helps.
            None => located(error, data, row),
            Some(_) => error,
        })
    }

    fn classify(&self, encoder: &Encoder, encoded: Encoding) -> Result<Said> {
        let encoded = self.fitted(encoded, encoder.longest())?;
        let logits = run(encoder, &encoded)?.flatten_all().and_then(|logits| logits.to_vec1::<f32>()).map_err(computed)?;
        finite(&logits)?;
        let text = self.labels.get(largest(&logits)).cloned().unwrap_or_default();
        Ok(Said { text, decisions: vec![logits], tokens: encoded.len() })
    }

    /// The span of the context with the largest sum of logits of its beginning and its end (Devlin et al. 2019, section 4.2).
    fn answer(&self, encoder: &Encoder, encoded: Encoding, context: &str) -> Result<Said> {
        let encoded = self.fitted(encoded, encoder.longest())?;
        let logits = run(encoder, &encoded)?.squeeze(0).and_then(|logits| logits.to_vec2::<f32>()).map_err(computed)?;
        let (from, to): (Vec<f32>, Vec<f32>) = logits.iter().filter_map(|pair| Some((*pair.first()?, *pair.get(1)?))).unzip();
        finite(&from)?;
        finite(&to)?;
        let of_context: Vec<bool> = encoded.get_sequence_ids().iter().map(|sequence| *sequence == Some(1)).collect();
        let mut best: Option<(f32, usize, usize)> = None;
        for (i, first) in from.iter().enumerate().filter(|(i, _)| of_context.get(*i) == Some(&true)) {
            let ends = to.iter().enumerate().skip(i).take(self.options.max_answer_tokens);
            for (j, last) in ends.filter(|(j, _)| of_context.get(*j) == Some(&true)) {
                if best.is_none_or(|(sum, _, _)| first + last > sum) {
                    best = Some((first + last, i, j));
                }
            }
        }
        let offsets = encoded.get_offsets();
        let span = best.and_then(|(_, i, j)| Some((offsets.get(i)?.0, offsets.get(j)?.1)));
        let text = span.map_or_else(String::new, |(from, to)| context.chars().skip(from).take(to.saturating_sub(from)).collect());
        Ok(Said { text, decisions: vec![from, to], tokens: encoded.len() })
    }

    fn translate(&self, model: &T5, encoded: &Encoding) -> Result<Said> {
        let ids = row(encoded.get_ids())?;
        let mask = row(&vec![1; encoded.len()])?;
        let over = model.encode(&ids, &mask)?;
        let next = |ids: &[u32]| last(&model.decode(&row(ids)?, &over, &mask)?);
        let ids = greedy::continued(&[self.start], &self.ends, self.options.max_new_tokens, next)?;
        Ok(Said { text: self.text.decode(&ids)?, decisions: Vec::new(), tokens: encoded.len() })
    }

    fn reply(&self, model: &Decoder, encoded: Encoding) -> Result<Said> {
        let room = model.longest().saturating_sub(self.options.max_new_tokens);
        let encoded = self.fitted(encoded, room)?;
        let next = |ids: &[u32]| last(&model.forward(&row(ids)?)?);
        let ids = greedy::continued(encoded.get_ids(), &self.ends, self.options.max_new_tokens, next)?;
        Ok(Said { text: self.text.decode(&ids)?, decisions: Vec::new(), tokens: encoded.len() })
    }

    /// What the model has room for: all of it, or what is left if cutting is allowed.
    pub(super) fn fitted(&self, mut encoded: Encoding, longest: usize) -> Result<Encoding> {
        if encoded.len() <= longest {
            return Ok(encoded);
        }
        if !self.options.truncate {
            let message = format!("the text is {} tokens long, and there is room for {longest}", encoded.len());
            return Err(Error::new(rules::RUNNABLE, message).help("shorten it, or let --truncate cut its end"));
        }
        encoded.truncate(longest, 0, tokenizers::TruncationDirection::Right);
        Ok(encoded)
    }
}

/// The logits of an encoder's head for one row.
fn run(encoder: &Encoder, encoded: &Encoding) -> Result<Tensor> {
    let ids = row(encoded.get_ids())?;
    let mask = row(&vec![1; encoded.len()])?;
    encoder.forward(&ids, &mask, &row(encoded.get_type_ids())?)
}

/// The logits of the last token.
fn last(logits: &Tensor) -> Result<Vec<f32>> {
    let of_last = || {
        let time = logits.dim(1)?;
        logits.narrow(1, time - 1, 1)?.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()
    };
    let logits = of_last().map_err(computed)?;
    finite(&logits)?;
    Ok(logits)
}

fn finite(logits: &[f32]) -> Result<()> {
    if logits.iter().all(|logit| logit.is_finite()) {
        return Ok(());
    }
    let message = "the model's output is not finite";
    Err(Error::new(rules::COMPUTED, message).help("check the weights: loratool validate --values"))
}

/// The first of the largest.
pub(super) fn largest(logits: &[f32]) -> usize {
    logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, logit)| if *logit > best.1 { (i, *logit) } else { best }).0
}

/// The error with the row that it is about.
pub(super) fn located(error: Error, data: &Data, row: &Row) -> Error {
    let class = error.class();
    let place = |one: crate::error::Diagnostic| {
        let message = format!("line {}: {}", row.line, one.message());
        let diagnostic = crate::error::Diagnostic::new(one.rule(), message).file(&data.label);
        match one.help_text() {
            Some(help) => diagnostic.help(help),
            None => diagnostic,
        }
    };
    match Error::check(error.into_diagnostics().into_iter().map(place).collect()) {
        Err(error) => error.class_of(class),
        Ok(()) => Error::new(rules::COMPUTED, "nothing is said of what failed"),
    }
}

/// `generation_config.json` beside the model, or nothing.
fn generation_config(weights: &Weights<'_>) -> Result<Value> {
    let path = weights.checkpoint().path().join("generation_config.json");
    if !path.is_file() {
        return Ok(Value::Null);
    }
    let bytes = read_small(&path, 1 << 20)?.unwrap_or_default();
    serde_json::from_slice(&bytes).map_err(|error| Error::new(rules::RUNNABLE, format!("it is no JSON: {error}")).file(path))
}
