//! One row with its truth: what a model says of it, how likely it finds the truth, and the logits by which two models are compared.

use serde_json::Value;

use super::computed;
use super::data::{Data, Row};
use super::metrics::divergence;
use super::task::{Runner, Said, Task};
use super::text::row as one_row;
use crate::error::{Error, Result};
use crate::rules;

/// What is known of a row and a model after it was run.
pub(super) struct Measured {
    pub(super) said: Said,
    /// The predicted class.
    pub(super) class: usize,
    /// Logits of every decision: of the classes, of the beginning and the end of an answer, of each token of a text.
    pub(super) decisions: Vec<Vec<f32>>,
    /// −Σ log p of the tokens of the true text, and how many they are.
    pub(super) likelihood: Option<(f64, f64)>,
}

/// What a row says is right.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Truth {
    Class(usize),
    Texts(Vec<String>),
    /// The text itself.
    None,
}

/// The truth of a row.
///
/// # Errors
/// `U-012` if there is none, or a label that the model does not know.
pub(super) fn truth(runner: &Runner, data: &Data, row: &Row) -> Result<Truth> {
    let texts = |names: &[&str]| {
        let found = names.iter().find_map(|name| row.get(name));
        let list = match found {
            Some(Value::String(text)) => Some(vec![text.clone()]),
            Some(Value::Array(all)) => all.iter().map(|one| one.as_str().map(str::to_owned)).collect(),
            // SQuAD's own layout.
            Some(Value::Object(members)) => members
                .get("text")
                .and_then(Value::as_array)
                .and_then(|all| all.iter().map(|one| one.as_str().map(str::to_owned)).collect()),
            _ => None,
        };
        let list = list.filter(|list| !list.is_empty());
        list.ok_or_else(|| {
            data.refuse(row, &format!("there is no text, nor a list of texts, {:?}", names.first().unwrap_or(&"")))
        })
    };
    match runner.task() {
        Task::Classify => class(runner, data, row).map(Truth::Class),
        Task::Answer => texts(&["answers", "answer"]).map(Truth::Texts),
        Task::Translate => texts(&["target", "targets"]).map(Truth::Texts),
        Task::Reply | Task::Perplexity => Ok(Truth::None),
    }
}

/// A label by its name or its number.
fn class(runner: &Runner, data: &Data, row: &Row) -> Result<usize> {
    let labels = runner.labels();
    let known = || labels.iter().enumerate().map(|(i, name)| format!("{i} {name}")).collect::<Vec<_>>().join(", ");
    let found = match row.get("label") {
        Some(Value::Number(number)) => number.as_u64().and_then(|n| usize::try_from(n).ok()),
        Some(Value::String(text)) => labels.iter().position(|name| name == text).or_else(|| text.trim().parse().ok()),
        Some(_) => None,
        None => return Err(data.refuse(row, "there is no \"label\"").help(format!("state one of: {}", known()))),
    };
    let stated = row.get("label").cloned().unwrap_or_default();
    found.filter(|label| *label < labels.len()).ok_or_else(|| {
        let message = format!("the label {stated} is not one of the model's {}", labels.len());
        data.refuse(row, &message).help(format!("labels are names or numbers of: {}", known()))
    })
}

impl Runner {
    /// Asks, and keeps what two models are compared by.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub(super) fn measure(&self, data: &Data, row: &Row, truth: &Truth) -> Result<Measured> {
        let measured = match self.task() {
            Task::Classify | Task::Answer => {
                let said = self.ask(data, row)?;
                let class = super::task::largest(said.decisions.first().map_or(&[][..], Vec::as_slice));
                let decisions = said.decisions.clone();
                return Ok(Measured { said, class, decisions, likelihood: None });
            }
            Task::Translate => self.translated(data, row, truth),
            Task::Reply | Task::Perplexity => self.read(data, row),
        };
        measured.map_err(|error| super::task::located(error, data, row))
    }

    fn translated(&self, data: &Data, row: &Row, truth: &Truth) -> Result<Measured> {
        let said = self.ask(data, row)?;
        let target = match truth {
            Truth::Texts(texts) => texts.first().map_or("", String::as_str),
            Truth::Class(_) | Truth::None => "",
        };
        let source = self.text().encode(row.text(data, "source")?)?;
        let wanted = self.text().encode(target)?;
        let model = self.translator()?;
        let mask = one_row(&vec![1; source.len()])?;
        let over = model.encode(&one_row(source.get_ids())?, &mask)?;
        let before: Vec<u32> = std::iter::once(self.start()).chain(wanted.get_ids().iter().copied()).take(wanted.len()).collect();
        let logits = model.decode(&one_row(&before)?, &over, &mask)?;
        let decisions = logits.squeeze(0).and_then(|logits| logits.to_vec2::<f32>()).map_err(computed)?;
        let likelihood = Some(likelihood(&decisions, wanted.get_ids())?);
        Ok(Measured { said, class: 0, decisions, likelihood })
    }

    fn read(&self, data: &Data, row: &Row) -> Result<Measured> {
        let model = self.decoder()?;
        let encoded = self.fitted(self.text().encode(row.text(data, "text")?)?, model.longest())?;
        let ids = encoded.get_ids();
        if ids.len() < 2 {
            return Err(Error::new(rules::DATA, "a text of less than two tokens has no likelihood"));
        }
        let logits = model.forward(&one_row(ids)?)?;
        let mut decisions = logits.squeeze(0).and_then(|logits| logits.to_vec2::<f32>()).map_err(computed)?;
        // What comes after the last token is not known.
        decisions.pop();
        let likelihood = Some(likelihood(&decisions, ids.get(1..).unwrap_or_default())?);
        let said = Said { text: String::new(), decisions: Vec::new(), tokens: ids.len() };
        Ok(Measured { said, class: 0, decisions, likelihood })
    }
}

/// −Σ log p of the tokens, and how many they are.
fn likelihood(decisions: &[Vec<f32>], ids: &[u32]) -> Result<(f64, f64)> {
    let mut sum = 0.0;
    for (logits, id) in decisions.iter().zip(ids) {
        let log = divergence::Row::new(logits).and_then(|row| row.log_softmax_at(*id as usize));
        sum -= log.ok_or_else(|| Error::new(rules::COMPUTED, "the model's output is not finite"))?;
    }
    Ok((sum, ids.len() as f64))
}
