//! Carries out `predict` and `eval`: opens model, adapters, tokenizer and rows, and asks.

use super::args::AgainstArg;
use super::job::{EvalJob, ModelJob, PredictJob, Rows};
use super::progress::Watch;
use super::run::{opened, weighted};
use super::signals::Signals;
use crate::eval::{Base, Data, Runner, Task, Text, View, Weights, evaluate, on_threads, predict};
use crate::report::{EvalReport, Note, PredictReport, UsedAdapter};
use crate::{Adapter, Checkpoint, Result, open_adapter_with, open_checkpoint_with};

pub(super) fn run_predict(job: &PredictJob, signals: &Signals, show_progress: bool) -> Result<PredictReport> {
    let data = match &job.rows {
        Rows::File(path) => taken(Data::open(path)?, job.run.limit),
        Rows::One(members) => {
            let members: Vec<(&str, &str)> = members.iter().map(|(name, text)| (*name, text.as_str())).collect();
            Data::of(&members)
        }
    };
    let (base, adapters) = model(&job.run)?;
    let weights = weights(&job.run, &base, &adapters)?;
    let warnings = warnings(&weights);
    let runner = runner(&job.run, &weights, job.task)?;
    let watch = Watch::start(signals, "asking", 0, show_progress);
    let predictions = on_threads(&job.run.exec, || predict(&runner, &data, &watch))?;
    Ok(PredictReport {
        model: job.run.model.display().to_string(),
        adapters: used(&job.run, &adapters),
        view: view(&job.run),
        task: name(job.task),
        predictions,
        warnings,
    })
}

pub(super) fn run_eval(job: &EvalJob, signals: &Signals, show_progress: bool) -> Result<EvalReport> {
    let data = taken(Data::open(&job.data)?, job.run.limit);
    let (base, adapters) = model(&job.run)?;
    let weights = weights(&job.run, &base, &adapters)?;
    let warnings = warnings(&weights);
    let one = runner(&job.run, &weights, job.task)?;
    let other = match job.against {
        None => None,
        Some(AgainstArg::Base) => Some(runner(&job.run, &Weights::base(&base), job.task)?),
        Some(AgainstArg::Merged) => {
            let weighted = weighted(&adapters, &job.run.adapters);
            let merged = Weights::adapted(&base, &weighted, View::Merged, &job.run.bind, &job.run.open.limits)?;
            Some(runner(&job.run, &merged, job.task)?)
        }
    };
    let watch = Watch::start(signals, "asking", 0, show_progress);
    let found = on_threads(&job.run.exec, || evaluate(&one, other.as_ref(), &data, &watch))?;
    Ok(EvalReport {
        model: job.run.model.display().to_string(),
        adapters: used(&job.run, &adapters),
        view: view(&job.run),
        task: name(job.task),
        rows: data.rows.len() as u64,
        data: data.label,
        scores: found.scores,
        against: job.against.map(|against| match against {
            AgainstArg::Base => "base",
            AgainstArg::Merged => "merged",
        }),
        compared: found.against,
        warnings,
    })
}

fn model(job: &ModelJob) -> Result<(Base, Vec<Adapter>)> {
    let adapters = job.adapters.iter().map(|(path, _)| open_adapter_with(path, &job.open)).collect();
    let (checkpoint, adapters): (Checkpoint, _) = opened(open_checkpoint_with(&job.model, &job.open), adapters)?;
    Ok((Base::new(checkpoint), adapters))
}

fn weights<'a>(job: &ModelJob, base: &'a Base, adapters: &'a [Adapter]) -> Result<Weights<'a>> {
    if adapters.is_empty() {
        return Ok(Weights::base(base));
    }
    let view = if job.merged { View::Merged } else { View::OnTheFly };
    Weights::adapted(base, &weighted(adapters, &job.adapters), view, &job.bind, &job.open.limits)
}

fn runner(job: &ModelJob, weights: &Weights<'_>, task: Task) -> Result<Runner> {
    Runner::new(weights, Text::open(&job.tokenizer)?, task, job.ask.clone())
}

fn warnings(weights: &Weights<'_>) -> Vec<Note> {
    weights.plan().map(|plan| plan.warnings().iter().map(Note::from).collect()).unwrap_or_default()
}

fn taken(mut data: Data, limit: Option<u64>) -> Data {
    data.rows.truncate(limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX));
    data
}

fn used(job: &ModelJob, adapters: &[Adapter]) -> Vec<UsedAdapter> {
    let pairs = adapters.iter().zip(&job.adapters);
    pairs.map(|(adapter, (_, weight))| UsedAdapter { path: adapter.label().to_owned(), weight: *weight }).collect()
}

fn view(job: &ModelJob) -> &'static str {
    match (job.adapters.is_empty(), job.merged) {
        (true, _) => "base",
        (false, false) => "on_the_fly",
        (false, true) => "merged",
    }
}

fn name(task: Task) -> &'static str {
    match task {
        Task::Classify => "classify",
        Task::Answer => "qa",
        Task::Translate => "translate",
        Task::Reply => "reply",
        Task::Perplexity => "perplexity",
    }
}
