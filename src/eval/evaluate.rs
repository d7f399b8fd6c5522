//! `eval`: how good a model is on labelled data, and how far it is from another one on the same rows. Rows are run by both at once, so that
//! the differences are paired and no logits are kept.

use rayon::prelude::*;

use super::data::{Data, Row};
use super::measure::{Measured, Truth, truth};
use super::metrics::bleu::Bleu;
use super::metrics::bootstrap;
use super::metrics::chrf::Chrf;
use super::metrics::confusion::Confusion;
use super::metrics::divergence::{self, Summary};
use super::metrics::interval::Interval;
use super::metrics::mcnemar::mcnemar;
use super::metrics::share::Share;
use super::metrics::squad;
use super::task::{Runner, Task};
use crate::error::{Error, Result};
use crate::exec::{Progress, interrupted};
use crate::report::{Compared, ConfusionReport, LabelReport, Measure, Scores};
use crate::rules;

/// Seed of the resampling.
const SEED: u64 = 20;

/// How good a model is, and how far from another.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluated {
    /// Of the first model.
    pub scores: Scores,
    /// Of the other one, and the two beside each other.
    pub against: Option<Compared>,
}

/// One row, of one model or two.
struct Seen {
    truth: Truth,
    one: Kept,
    other: Option<Kept>,
    /// KL(one ‖ other) of each decision, and whether both decide the same.
    divergences: Vec<(f64, bool)>,
}

/// What is kept of a [`Measured`].
struct Kept {
    class: usize,
    text: String,
    likelihood: Option<(f64, f64)>,
}

/// Runs all rows through `runner`, and through `other` if there is one. Rows are shared among the threads of the current pool. `progress` counts
/// rows.
///
/// # Errors
/// `U-012` if a row has no truth, before anything is run; as [`Runner::ask`], the first by the order of the rows; `E-006` if `progress` cancels.
pub fn evaluate(runner: &Runner, other: Option<&Runner>, data: &Data, progress: &dyn Progress) -> Result<Evaluated> {
    let truths = data.rows.iter().map(|row| truth(runner, data, row)).collect::<Result<Vec<_>>>()?;
    progress.expect(data.rows.len() as u64);
    let rows: Vec<(&Row, Truth)> = data.rows.iter().zip(truths).collect();
    let one = |(row, truth): (&Row, Truth)| -> Result<Seen> {
        if progress.cancelled() {
            return Err(interrupted());
        }
        let one = runner.measure(data, row, &truth)?;
        let other = other.map(|other| other.measure(data, row, &truth)).transpose()?;
        let divergences = other.as_ref().map_or(Ok(Vec::new()), |other| divergences(&one, other))?;
        progress.advance(1);
        Ok(Seen { truth, one: one.into(), other: other.map(Kept::from), divergences })
    };
    let seen: Vec<Result<Seen>> = rows.into_par_iter().map(one).collect();
    let seen = seen.into_iter().collect::<Result<Vec<_>>>()?;
    let scores = scores(runner, &seen, |seen| Some(&seen.one))?;
    let against = other.map(|other| compared(other, &seen)).transpose()?;
    Ok(Evaluated { scores, against })
}

impl From<Measured> for Kept {
    fn from(measured: Measured) -> Self {
        Kept { class: measured.class, text: measured.said.text, likelihood: measured.likelihood }
    }
}

fn divergences(one: &Measured, other: &Measured) -> Result<Vec<(f64, bool)>> {
    let pair = |(one, other): (&Vec<f32>, &Vec<f32>)| {
        let (one, other) = (divergence::Row::new(one)?, divergence::Row::new(other)?);
        Some((one.kl(&other)?, one.top() == other.top()))
    };
    let pairs: Option<Vec<_>> = one.decisions.iter().zip(&other.decisions).map(pair).collect();
    pairs.ok_or_else(|| Error::new(rules::COMPUTED, "the models' outputs are not finite, or not of one shape"))
}

fn compared(other: &Runner, seen: &[Seen]) -> Result<Compared> {
    let all: Vec<(f64, bool)> = seen.iter().flat_map(|seen| seen.divergences.iter().copied()).collect();
    let agreeing = Share { hits: all.iter().filter(|(_, same)| *same).count() as u64, of: all.len() as u64 };
    let kl = Summary::new(&all.iter().map(|(kl, _)| *kl).collect::<Vec<_>>());
    let kl = kl.ok_or_else(|| Error::new(rules::COMPUTED, "there is nothing to compare"))?;
    let is_right = |kept: &Kept, truth: &Truth| match truth {
        Truth::Class(class) => Some(kept.class == *class),
        Truth::Texts(texts) => Some(squad::exact_match(&kept.text, texts)),
        Truth::None => None,
    };
    let pair = |seen: &Seen| Some((is_right(&seen.one, &seen.truth)?, is_right(seen.other.as_ref()?, &seen.truth)?));
    let right: Vec<(bool, bool)> = seen.iter().filter_map(pair).collect();
    let count = |wanted| right.iter().filter(|pair| **pair == wanted).count() as u64;
    let (only_one, only_other) = (count((true, false)), count((false, true)));
    Ok(Compared {
        scores: scores(other, seen, |seen| seen.other.as_ref())?,
        decisions: agreeing.of,
        agreement: agreeing.wilson().map(Measure::from),
        kl_mean: kl.mean,
        kl_p99: kl.p99,
        kl_max: kl.max,
        only_first_right: only_one,
        only_second_right: only_other,
        mcnemar: (!right.is_empty()).then(|| mcnemar(only_one, only_other)),
    })
}

fn scores(runner: &Runner, seen: &[Seen], of: impl Fn(&Seen) -> Option<&Kept>) -> Result<Scores> {
    let kept: Vec<(&Truth, &Kept)> = seen.iter().filter_map(|seen| Some((&seen.truth, of(seen)?))).collect();
    let mut scores = Scores::default();
    let texts = kept.iter().filter_map(|(truth, kept)| match truth {
        Truth::Texts(texts) => Some((kept.text.as_str(), texts)),
        Truth::Class(_) | Truth::None => None,
    });
    match runner.task() {
        Task::Classify => {
            let pairs = kept.iter().filter_map(|(truth, kept)| match truth {
                Truth::Class(class) => Some((*class, kept.class)),
                Truth::Texts(_) | Truth::None => None,
            });
            let confusion = Confusion::new(runner.labels().len(), pairs);
            let confusion = confusion.ok_or_else(|| Error::new(rules::DATA, "a label is beyond the model's"))?;
            scores.accuracy = confusion.accuracy().wilson().map(Measure::from);
            scores.macro_f1 = confusion.macro_f1();
            scores.confusion = Some(report(runner.labels(), &confusion));
        }
        Task::Answer => {
            let found: Vec<(f64, f64)> = texts
                .map(|(text, golds)| (f64::from(u8::from(squad::exact_match(text, golds))), squad::f1(text, golds)))
                .collect();
            let exact = Share { hits: found.iter().filter(|(exact, _)| *exact > 0.0).count() as u64, of: found.len() as u64 };
            scores.exact_match = exact.wilson().map(Measure::from);
            let overlaps: Vec<f64> = found.iter().map(|(_, f1)| *f1).collect();
            scores.f1 = bootstrap::mean(&overlaps, SEED).map(Measure::from);
        }
        Task::Translate => {
            let (mut bleu, mut chrf) = (Bleu::default(), Chrf::default());
            for (text, golds) in texts {
                bleu.add(text, golds);
                chrf.add(text, golds);
            }
            (scores.bleu, scores.chrf) = (bleu.score(), chrf.score());
        }
        Task::Reply | Task::Perplexity => {}
    }
    let likelihoods: Vec<(f64, f64)> = kept.iter().filter_map(|(_, kept)| kept.likelihood).collect();
    scores.predicted_tokens = likelihoods.iter().map(|(_, tokens)| *tokens as u64).sum();
    scores.perplexity = bootstrap::ratio(&likelihoods, SEED).map(Interval::exp).map(Measure::from);
    Ok(scores)
}

fn report(labels: &[String], confusion: &Confusion) -> ConfusionReport {
    let scores = confusion.per_label();
    let label = |(name, one): (&String, &super::metrics::confusion::LabelScores)| LabelReport {
        label: name.clone(),
        precision: one.precision,
        recall: one.recall,
        f1: one.f1,
        rows: one.support,
    };
    ConfusionReport {
        labels: labels.iter().zip(&scores).map(label).collect(),
        counts: confusion.rows().map(<[u64]>::to_vec).collect(),
    }
}

impl From<Interval> for Measure {
    fn from(interval: Interval) -> Self {
        Measure { value: interval.value, low: interval.low, high: interval.high }
    }
}
