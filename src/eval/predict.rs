//! `predict`: what a model, with or without adapters, says of each row.

use rayon::prelude::*;

use super::data::Data;
use super::task::{Runner, Said};
use crate::error::{Error, Result};
use crate::exec::{Progress, interrupted};
use crate::report::{ClassShare, Prediction};

/// What the model says of every row, in their order. Rows are shared among the threads of the current pool. `progress` counts rows.
///
/// # Errors
/// As [`Runner::ask`], the first by the order of the rows; `E-006` if `progress` cancels.
pub fn predict(runner: &Runner, data: &Data, progress: &dyn Progress) -> Result<Vec<Prediction>> {
    progress.expect(data.rows.len() as u64);
    let one = |row| -> Result<Prediction> {
        if progress.cancelled() {
            return Err(interrupted());
        }
        let said = runner.ask(data, row)?;
        progress.advance(1);
        let classes = shares(runner, &said);
        Ok(Prediction { line: row.line, text: said.text, tokens: said.tokens as u64, classes })
    };
    let all: Vec<Result<Prediction, Error>> = data.rows.par_iter().map(one).collect();
    all.into_iter().collect()
}

/// exp(logit) / Σ exp(logit), the likeliest first.
fn shares(runner: &Runner, said: &Said) -> Vec<ClassShare> {
    let logits = said.decisions.first().map_or(&[][..], Vec::as_slice);
    let largest = logits.iter().fold(f64::NEG_INFINITY, |largest, logit| largest.max(f64::from(*logit)));
    let powers: Vec<f64> = logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).collect();
    let sum: f64 = powers.iter().sum();
    let named = runner.labels().iter().zip(logits).zip(powers);
    let mut shares: Vec<ClassShare> = named
        .map(|((label, logit), power)| ClassShare { label: label.clone(), probability: power / sum, logit: *logit })
        .collect();
    shares.sort_by(|one, other| other.probability.total_cmp(&one.probability));
    shares
}
