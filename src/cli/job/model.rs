//! `predict` and `eval`, from the arguments as typed.

use std::path::PathBuf;

use super::super::args::{AgainstArg, EvalArgs, EvalTask, ModelArgs, PredictArgs, PredictTask};
use super::{bind, open, refuse_repeats, weighted};
use crate::eval::{AskOptions, Task};
use crate::{BindOptions, Error, ExecOptions, OpenOptions, ReadMode, Result, rules};

/// A model that runs, and what is put on it.
#[derive(Debug)]
pub(in super::super) struct ModelJob {
    pub model: PathBuf,
    /// Adapters with the weight that each gets.
    pub adapters: Vec<(PathBuf, f64)>,
    /// Weights as a merge rounds them.
    pub merged: bool,
    pub tokenizer: PathBuf,
    /// Rows to take.
    pub limit: Option<u64>,
    pub open: OpenOptions,
    pub bind: BindOptions,
    pub exec: ExecOptions,
    pub ask: AskOptions,
}

#[derive(Debug)]
pub(in super::super) struct PredictJob {
    pub task: Task,
    pub rows: Rows,
    pub run: ModelJob,
}

/// What is asked about.
#[derive(Debug)]
pub(in super::super) enum Rows {
    File(PathBuf),
    /// Names and texts of one row.
    One(Vec<(&'static str, String)>),
}

#[derive(Debug)]
pub(in super::super) struct EvalJob {
    pub task: Task,
    pub data: PathBuf,
    pub against: Option<AgainstArg>,
    pub run: ModelJob,
}

pub(super) fn predict(args: PredictArgs) -> Result<PredictJob> {
    let task = match args.task {
        PredictTask::Classify => Task::Classify,
        PredictTask::Qa => Task::Answer,
        PredictTask::Translate => Task::Translate,
        PredictTask::Reply => Task::Reply,
    };
    let rows = match (args.data, args.text) {
        (Some(path), _) => Rows::File(path),
        (None, text) => {
            let text = text.unwrap_or_default();
            Rows::One(match (args.task, args.question) {
                (PredictTask::Qa, Some(question)) => vec![("question", question), ("context", text)],
                (PredictTask::Qa, None) => {
                    let error = Error::new(rules::ARGUMENT, "a text is given, and no question about it");
                    return Err(error.help("give it with --question"));
                }
                (_, Some(_)) => return Err(Error::new(rules::ARGUMENT, "--question belongs to --task qa")),
                (PredictTask::Classify, None) => vec![("text", text)],
                (PredictTask::Translate, None) => vec![("source", text)],
                (PredictTask::Reply, None) => vec![("prompt", text)],
            })
        }
    };
    Ok(PredictJob { task, rows, run: model(args.run)? })
}

pub(super) fn eval(args: EvalArgs) -> Result<EvalJob> {
    let task = match args.task {
        EvalTask::Classify => Task::Classify,
        EvalTask::Qa => Task::Answer,
        EvalTask::Translate => Task::Translate,
        EvalTask::Perplexity => Task::Perplexity,
    };
    if args.run.merged && args.against == Some(AgainstArg::Merged) {
        let message = "--merged --against merged compares a model with itself";
        return Err(Error::new(rules::ARGUMENT, message).help("leave --merged out"));
    }
    Ok(EvalJob { task, data: args.data, against: args.against, run: model(args.run)? })
}

fn model(args: ModelArgs) -> Result<ModelJob> {
    let adapters = weighted(&args.adapter, None)?;
    refuse_repeats(&adapters)?;
    let tokenizer = args.tokenizer.unwrap_or_else(|| match args.model.is_dir() {
        true => args.model.clone(),
        false => args.model.with_file_name("tokenizer.json"),
    });
    let mut ask = AskOptions::default();
    (ask.truncate, ask.max_new_tokens) = (args.truncate, args.max_new_tokens.get());
    Ok(ModelJob {
        model: args.model,
        adapters,
        merged: args.merged,
        tokenizer,
        limit: args.limit.map(|limit| limit.get()),
        open: open(&args.open, ReadMode::Read)?,
        bind: bind(args.bind)?,
        exec: ExecOptions { threads: args.threads, ..Default::default() },
        ask,
    })
}
