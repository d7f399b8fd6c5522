//! The arguments of `predict` and `eval`.

use std::ffi::OsString;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{BindArgs, OpenArgs};

/// A model that runs, and what is put on it.
#[derive(Debug, Args)]
pub(in super::super) struct ModelArgs {
    /// The model: a folder with config.json, weights and tokenizer.json
    #[arg(long, value_name = "MODEL")]
    pub model: PathBuf,
    /// An adapter to put on it, or several; with a weight behind a colon if it is not 1
    #[arg(long, short, value_name = "ADAPTER[:WEIGHT]")]
    pub adapter: Vec<OsString>,
    /// Round the weights as a merge would, instead of applying the adapters on the fly
    #[arg(long, requires = "adapter")]
    pub merged: bool,
    /// The tokenizer [default: tokenizer.json of the model]
    #[arg(long, value_name = "PATH")]
    pub tokenizer: Option<PathBuf>,
    /// Cut the end of texts that are too long for the model, instead of refusing them
    #[arg(long)]
    pub truncate: bool,
    /// Tokens of a translation or a reply, at most
    #[arg(long, value_name = "N", default_value = "32")]
    pub max_new_tokens: NonZeroUsize,
    /// Rows to take, from the first on [default: all]
    #[arg(long, value_name = "N")]
    pub limit: Option<NonZeroU64>,
    #[command(flatten)]
    pub open: OpenArgs,
    #[command(flatten)]
    pub bind: BindArgs,
    /// Threads to compute on [default: one per core]
    #[arg(long, value_name = "N", visible_alias = "cores", help_heading = "How it runs")]
    pub threads: Option<NonZeroUsize>,
}

/// Say what a model answers, with or without adapters
#[derive(Debug, Args)]
#[command(after_help = PREDICT_EXAMPLES)]
#[command(override_usage = "loratool predict [OPTIONS] --model <MODEL> --task <TASK> <--text <TEXT>|--data <FILE>>")]
pub(in super::super) struct PredictArgs {
    /// What to ask
    #[arg(long, value_enum)]
    pub task: PredictTask,
    /// One text: to classify, to translate, to answer a question about, or to reply to
    #[arg(long, value_name = "TEXT", required_unless_present = "data", conflicts_with = "data")]
    pub text: Option<String>,
    /// The question, where the text is what answers it
    #[arg(long, value_name = "TEXT", requires = "text")]
    pub question: Option<String>,
    /// Many rows: JSON Lines, or a .csv with a header
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    #[command(flatten)]
    pub run: ModelArgs,
}

const PREDICT_EXAMPLES: &str = "\
Examples:
  loratool predict --model ./model -a ./adapter --task classify --text 'It works.'
  loratool predict --model ./model --task qa --question 'Where?' --text 'Here.'
  loratool predict --model ./model -a ./adapter --task reply --data chats.jsonl

Members of a row: text, text_pair (classify); question, context (qa); source
(translate); prompt (reply).";

/// Measure how good a model is on labelled data, with or without adapters
#[derive(Debug, Args)]
#[command(after_help = EVAL_EXAMPLES)]
#[command(override_usage = "loratool eval [OPTIONS] --model <MODEL> --task <TASK> --data <FILE>")]
pub(in super::super) struct EvalArgs {
    /// What to ask
    #[arg(long, value_enum)]
    pub task: EvalTask,
    /// Rows with what is right: JSON Lines, or a .csv with a header
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Also run this view on the same rows, and say how far the two are apart
    #[arg(long, value_enum, value_name = "VIEW", requires = "adapter")]
    pub against: Option<AgainstArg>,
    #[command(flatten)]
    pub run: ModelArgs,
}

const EVAL_EXAMPLES: &str = "\
Examples:
  loratool eval --model ./model -a ./adapter --task classify --data test.jsonl
  loratool eval --model ./model -a ./adapter --task perplexity --data chats.jsonl \\
      --against merged

Members of a row: text, text_pair, label (classify); question, context, answers
(qa); source, target (translate); text (perplexity).";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in super::super) enum PredictTask {
    /// The class of a text
    Classify,
    /// The part of a text that answers a question
    Qa,
    /// A text in another language
    Translate,
    /// What comes after a text
    Reply,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in super::super) enum EvalTask {
    /// Accuracy, F1, confusion matrix
    Classify,
    /// Exact match and F1, by SQuAD's rules
    Qa,
    /// BLEU, chrF and perplexity of the translation
    Translate,
    /// Perplexity of a text
    Perplexity,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in super::super) enum AgainstArg {
    /// The weights that a merge writes: what merging loses
    Merged,
    /// The model without adapters: what they change
    Base,
}
