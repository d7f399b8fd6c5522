//! The arguments as they are typed: no file is looked at here. Numbers stay strings where the message for a bad one matters, and are
//! read in [`super::job`].

mod combine;
mod compare;
mod extract;
mod model;
mod rank;
mod resize;

use std::ffi::OsString;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ColorChoice, Parser, Subcommand, ValueEnum};

use super::signals::OnSignal;
use crate::Loader;

pub(super) use combine::{CombineArgs, MajoritySignArg, MethodArgs, PartsArg};
pub(super) use compare::CompareArgs;
pub(super) use extract::{ExtractArgs, FactorDtype, MethodArg, RestArg, SplitArg};
pub(super) use model::{AgainstArg, EvalArgs, EvalTask, ModelArgs, PredictArgs, PredictTask};
pub(super) use rank::RankArgs;
pub(super) use resize::ResizeArgs;

/// Inspect, validate, merge, verify, extract, combine and convert LoRA adapters: exactly, or refused by name.
#[derive(Debug, Parser)]
#[command(name = "loratool", version, color = ColorChoice::Never, max_term_width = 80, arg_required_else_help = true)]
#[command(subcommand_required = true, propagate_version = false, after_help = MAIN_EXAMPLES)]
pub(super) struct Cli {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub verb: Verb,
}

const MAIN_EXAMPLES: &str = "\
Examples:
  loratool inspect ./adapter
  loratool validate ./adapter --base ./model
  loratool merge ./model --adapter ./adapter -o ./merged
  loratool verify ./merged --base ./model --adapter ./adapter
  loratool unmerge ./merged --adapter ./adapter -o ./restored
  loratool convert ./adapter -o adapter.safetensors --to container
  loratool bake ./adapter -o ./plain
  loratool extract --base ./model --tuned ./tuned --rank 16 -o ./adapter
  loratool resize ./adapter --rank 8 -o ./small
  loratool combine ./a:0.7 ./b:-0.3 -o ./ab
  loratool compare ./a ./b
  loratool eval --model ./model -a ./adapter --task classify --data test.jsonl
  loratool predict --model ./model -a ./adapter --task classify --text 'Good.'

Exit codes:
  0 done             4 files do not fit together   7 a limit is reached
  1 the answer is no (verify, validate --for)
  2 usage            5 values (NaN, overflow)      8 the output is in use
  3 a file's format  6 input or output             9 a digest does not match
  70 a bug           128 + signal number: interrupted, after cleaning up";

#[derive(Debug, Args)]
#[command(next_help_heading = "What is printed")]
pub(super) struct Common {
    /// Print one JSON object on standard output, for success and for errors
    #[arg(long, global = true)]
    pub json: bool,
    /// Print no report and no progress; warnings and errors remain
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    Inspect(InspectArgs),
    Validate(ValidateArgs),
    Merge(Box<MergeArgs>),
    Verify(Box<VerifyArgs>),
    Recover(RecoverArgs),
    Unmerge(Box<UnmergeArgs>),
    Convert(ConvertArgs),
    Bake(BakeArgs),
    Extract(Box<ExtractArgs>),
    Resize(Box<ResizeArgs>),
    Combine(Box<CombineArgs>),
    Compare(Box<CompareArgs>),
    Eval(Box<EvalArgs>),
    Predict(Box<PredictArgs>),
}

impl Verb {
    /// The name in JSON output.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Verb::Inspect(_) => "inspect",
            Verb::Validate(_) => "validate",
            Verb::Merge(_) => "merge",
            Verb::Verify(_) => "verify",
            Verb::Recover(_) => "recover",
            Verb::Unmerge(_) => "unmerge",
            Verb::Convert(_) => "convert",
            Verb::Bake(_) => "bake",
            Verb::Extract(_) => "extract",
            Verb::Resize(_) => "resize",
            Verb::Combine(_) => "combine",
            Verb::Compare(_) => "compare",
            Verb::Eval(_) => "eval",
            Verb::Predict(_) => "predict",
        }
    }

    /// A verb that writes nothing has nothing to clean up.
    pub(super) fn on_signal(&self) -> OnSignal {
        match self {
            Verb::Inspect(_) | Verb::Validate(_) | Verb::Verify(_) | Verb::Compare(_) | Verb::Eval(_) | Verb::Predict(_) => {
                OnSignal::ExitAtOnce
            }
            Verb::Merge(_)
            | Verb::Recover(_)
            | Verb::Unmerge(_)
            | Verb::Convert(_)
            | Verb::Bake(_)
            | Verb::Extract(_)
            | Verb::Resize(_)
            | Verb::Combine(_) => OnSignal::CleanUp,
        }
    }
}

/// Say what an adapter or a checkpoint is, from its header
#[derive(Debug, Args)]
#[command(after_help = INSPECT_EXAMPLES)]
pub(super) struct InspectArgs {
    /// An adapter or a checkpoint: a folder or a .safetensors file
    pub path: PathBuf,
    /// Also say how the adapter fits this base
    #[arg(long, value_name = "BASE")]
    pub base: Option<PathBuf>,
    /// Read the factors and state the norm of each update
    #[arg(long)]
    pub norms: bool,
    /// Read the factors and state the singular values of each update: how much of its rank is used; with --base how large it is
    #[arg(long)]
    pub spectrum: bool,
    /// Also draw the spectrum: how much each layer changes, and what the first components keep; .svg or .png
    #[arg(long, value_name = "FILE", requires = "spectrum")]
    pub plot: Option<PathBuf>,
    /// List every tensor, under its full name
    #[arg(long)]
    pub tensors: bool,
    #[command(flatten)]
    pub open: OpenArgs,
    #[command(flatten)]
    pub bind: BindArgs,
}

const INSPECT_EXAMPLES: &str = "\
Examples:
  loratool inspect ./adapter                 what the adapter changes, by kind of layer
  loratool inspect ./adapter --norms         and by how much
  loratool inspect ./adapter --spectrum      and how much of its ranks is used
  loratool inspect ./adapter --spectrum --plot adapter.svg   as a picture
  loratool inspect ./adapter --base ./model  and whether it fits
  loratool inspect ./model --tensors         every tensor of a checkpoint
  loratool inspect ./adapter --json | jq '.report.targets[].rank'";

/// Check everything that can be checked without running the model
#[derive(Debug, Args)]
#[command(after_help = VALIDATE_EXAMPLES)]
pub(super) struct ValidateArgs {
    /// An adapter or a checkpoint: a folder or a .safetensors file
    pub path: PathBuf,
    /// Also check that the adapter fits this base
    #[arg(long, value_name = "BASE")]
    pub base: Option<PathBuf>,
    /// For an adapter: also say what this program would make of it; may be repeated
    #[arg(long = "for", value_name = "LOADER", value_parser = loader_parser())]
    pub loaders: Vec<Loader>,
    /// For a checkpoint: read all values and name the tensors that hold NaN or infinity
    #[arg(long)]
    pub values: bool,
    #[command(flatten)]
    pub open: OpenArgs,
    #[command(flatten)]
    pub bind: BindArgs,
}

const VALIDATE_EXAMPLES: &str = "\
Examples:
  loratool validate ./adapter
  loratool validate ./adapter --base ./model   is this the model that it fits?
  loratool validate ./model --values           is every weight a number?
  loratool validate ./adapter --for vllm --for sglang   will they serve it?

The exit code is 0 if everything that was checked is in order, and otherwise
says what kind of thing is not: see loratool --help. It is 1 if a loader that
--for names would refuse the adapter or compute something else, by what is known
of the version that the report names. docs/loaders.md is all that is known.";

/// A loader by its name.
fn loader_parser() -> impl TypedValueParser<Value = Loader> {
    let names = PossibleValuesParser::new(Loader::ALL.map(Loader::name));
    names.try_map(|name| Loader::from_name(&name).ok_or("no such loader"))
}

/// Merge adapters into a base checkpoint
#[derive(Debug, Args)]
#[command(after_help = MERGE_EXAMPLES)]
pub(super) struct MergeArgs {
    /// The base checkpoint: a folder or a .safetensors file
    pub base: PathBuf,
    /// An adapter and its weight, 1 if none is given; may be repeated
    #[arg(long, short, required = true, value_name = "PATH[:WEIGHT]")]
    pub adapter: Vec<OsString>,
    /// What to write: a folder if the base is one, otherwise a file
    #[arg(long, short, value_name = "OUT", required_unless_present = "in_place")]
    pub output: Option<PathBuf>,
    /// Change the base's own files instead; a journal lets `recover` complete what is interrupted
    #[arg(long, conflicts_with_all = ["output", "overwrite"])]
    pub in_place: bool,
    /// With --in-place: write the tensors as they were to this new file, for `unmerge`
    #[arg(long, value_name = "FILE", requires = "in_place", conflicts_with = "dry_run")]
    pub undo_log: Option<PathBuf>,
    /// Multiply all weights by this number
    #[arg(long, value_name = "S", allow_hyphen_values = true)]
    pub scale: Option<String>,
    /// Merge each adapter by itself: OUT becomes a folder with a checkpoint for each, and the base is read once
    #[arg(long, conflicts_with = "in_place")]
    pub each: bool,
    /// Say what would be done, and write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Replace the output if it exists, in one step, once the new one is complete
    #[arg(long)]
    pub overwrite: bool,
    /// Allow the same adapter twice
    #[arg(long)]
    pub allow_repeat: bool,
    /// The dtype of all floats of the output [default: each tensor keeps its own]
    #[arg(long, value_name = "DTYPE", value_enum, help_heading = "What the output is like", conflicts_with = "in_place")]
    pub dtype: Option<OutputDtype>,
    /// Bytes of tensors in one file, such as 5GB [default: the base's files]
    #[arg(long, value_name = "BYTES", help_heading = "What the output is like", conflicts_with = "in_place")]
    pub max_shard_size: Option<String>,
    /// How a sum becomes a value of the output's dtype
    #[arg(long, value_enum, default_value_t = RoundingArg::Nearest, help_heading = "What the output is like")]
    pub rounding: RoundingArg,
    /// With --rounding stochastic, and methods that leave something to chance: the same seed gives the same bytes [default: 0]
    #[arg(long, value_name = "N", help_heading = "What the output is like")]
    pub seed: Option<u64>,
    #[command(flatten)]
    pub method: MethodArgs,
    /// Record the digest of every tensor, for `verify`; costs about as much as the merge
    #[arg(long, help_heading = "What the output is like", conflicts_with = "in_place")]
    pub digests: bool,
    #[command(flatten)]
    pub open: OpenArgs,
    #[command(flatten)]
    pub bind: BindArgs,
    /// Go on with what an interrupted run of this command has completed, and keep what this one completes; by whole files
    #[arg(long, help_heading = "How it runs", conflicts_with_all = ["in_place", "no_sync", "dry_run"])]
    pub resume: bool,
    /// Threads to compute on [default: one per core]
    #[arg(long, value_name = "N", visible_alias = "cores", help_heading = "How it runs")]
    pub threads: Option<NonZeroUsize>,
    /// Bytes that buffers may take, such as 16MiB; tiles get smaller to fit
    #[arg(long, value_name = "BYTES", help_heading = "How it runs")]
    pub memory: Option<String>,
    /// Do not force the result to disk before it gets its name: faster, but a power cut may lose it
    #[arg(long, help_heading = "How it runs")]
    pub no_sync: bool,
    /// Map the input files into memory instead of reading them; no other program may shorten them meanwhile
    #[arg(long, help_heading = "How it runs")]
    pub mmap: bool,
    /// Bytes of weights that one thread works on at a time, such as 1MiB
    #[arg(long, value_name = "BYTES", hide = true)]
    pub tile: Option<String>,
    /// Use the portable kernels even where the machine has better ones
    #[arg(long, hide = true)]
    pub portable: bool,
}

const MERGE_EXAMPLES: &str = "\
Examples:
  loratool merge ./model --adapter ./adapter -o ./merged --dry-run
  loratool merge ./model --adapter ./adapter -o ./merged
  loratool merge ./model --adapter ./style:0.7 --adapter ./task -o ./merged
  loratool merge ./merged --adapter ./adapter:-1 -o ./restored
  loratool merge ./model --adapter ./adapter --in-place --undo-log undo.safetensors
  loratool merge ./model -a ./french -a ./german --each -o ./merged
  loratool merge ./model -a ./adapter -o ./merged --dtype bf16 --max-shard-size 5GB

The weight is what follows the last ':' of PATH[:WEIGHT], unless a file of that
whole name exists. Weight -1 subtracts an adapter, up to rounding. The output
appears whole or not at all; the base and the adapters are only read. With
--in-place the base itself becomes the result: writing takes as long as what
changes, and an interrupted run is completed by loratool recover.";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum OutputDtype {
    /// Each tensor keeps its own
    Keep,
    F32,
    F16,
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum RoundingArg {
    /// To the nearest value, once
    Nearest,
    /// As PEFT's merge_and_unload, bit for bit
    Peft,
    /// As PEFT's merge_and_unload(safe_merge=True)
    PeftSafe,
    /// Up or down by chance, right on average
    Stochastic,
}

/// Complete a merge in place that was interrupted
#[derive(Debug, Args)]
#[command(after_help = RECOVER_EXAMPLES)]
pub(super) struct RecoverArgs {
    /// The checkpoint: a folder or a .safetensors file
    pub path: PathBuf,
    /// Threads to compute on [default: one per core]
    #[arg(long, value_name = "N", visible_alias = "cores", help_heading = "How it runs")]
    pub threads: Option<NonZeroUsize>,
}

const RECOVER_EXAMPLES: &str = "\
Examples:
  loratool recover ./model

The journal beside the weights says what is left to do; neither the adapter nor
the options of the merge are needed. Where no merge is pending nothing is done.
The weights are then the same, byte for byte, as without the interruption.";

/// Take adapters out of a checkpoint that they were merged into
#[derive(Debug, Args)]
#[command(after_help = UNMERGE_EXAMPLES)]
#[command(override_usage = "loratool unmerge [OPTIONS] <MERGED> <-o <OUT>|--in-place>\n           \
    <--undo-log <FILE>|--adapter <PATH[:WEIGHT]>>")]
#[command(group = clap::ArgGroup::new("by").required(true).args(["undo_log", "adapter"]))]
#[command(group = clap::ArgGroup::new("to").required(true).args(["output", "in_place"]))]
pub(super) struct UnmergeArgs {
    /// The merged checkpoint: a folder or a .safetensors file
    pub merged: PathBuf,
    /// Put back what `merge --undo-log` kept: bit for bit
    #[arg(long, value_name = "FILE")]
    pub undo_log: Option<PathBuf>,
    /// Subtract this adapter, with the weight that it was merged with; may be repeated
    #[arg(long, short, value_name = "PATH[:WEIGHT]")]
    pub adapter: Vec<OsString>,
    /// What to write: a folder if the checkpoint is one, otherwise a file
    #[arg(long, short, value_name = "OUT")]
    pub output: Option<PathBuf>,
    /// Change the checkpoint's own files instead
    #[arg(long, conflicts_with = "overwrite")]
    pub in_place: bool,
    /// Multiply all weights by this number
    #[arg(long, value_name = "S", allow_hyphen_values = true)]
    pub scale: Option<String>,
    /// Replace the output if it exists, in one step, once the new one is complete
    #[arg(long)]
    pub overwrite: bool,
    #[command(flatten)]
    pub open: OpenArgs,
    #[command(flatten)]
    pub bind: BindArgs,
    /// Threads to compute on [default: one per core]
    #[arg(long, value_name = "N", visible_alias = "cores", help_heading = "How it runs")]
    pub threads: Option<NonZeroUsize>,
    /// Do not force the result to disk before it gets its name: faster, but a power cut may lose it
    #[arg(long, help_heading = "How it runs")]
    pub no_sync: bool,
}

const UNMERGE_EXAMPLES: &str = "\
Examples:
  loratool unmerge ./model --undo-log undo.safetensors --in-place
  loratool unmerge ./merged --adapter ./adapter -o ./restored

The undo log brings back every bit, after it is made sure that the checkpoint
still holds what that merge wrote. Subtracting does not: where the merged value
lies in a coarser part of its format than the value before, digits are gone. The
report says of how many values it is certain that they are what they were, and
how far the others can be off.";

/// Say whether a checkpoint is a base with adapters merged in
#[derive(Debug, Args)]
#[command(after_help = VERIFY_EXAMPLES)]
pub(super) struct VerifyArgs {
    /// The checkpoint to look at: a folder or a .safetensors file
    pub merged: PathBuf,
    /// The base that it is said to come from; without it, the digests that `merge --digests` recorded are checked
    #[arg(long, value_name = "BASE", requires = "adapter")]
    pub base: Option<PathBuf>,
    /// An adapter that is said to be in it, and its weight, 1 if none is given; may be repeated
    #[arg(long, short, requires = "base", value_name = "PATH[:W]")]
    pub adapter: Vec<OsString>,
    /// Multiply all weights by this number
    #[arg(long, value_name = "S", allow_hyphen_values = true)]
    pub scale: Option<String>,
    /// Read about this share of every tensor, such as 0.05, in blocks spread evenly
    #[arg(long, value_name = "SHARE", allow_hyphen_values = true)]
    pub sample: Option<String>,
    /// List every tensor, not only those that are not as they should be
    #[arg(long)]
    pub all: bool,
    /// Allow the same adapter twice
    #[arg(long)]
    pub allow_repeat: bool,
    #[command(flatten)]
    pub open: OpenArgs,
    #[command(flatten)]
    pub bind: BindArgs,
    /// Threads to compute on [default: one per core]
    #[arg(long, value_name = "N", help_heading = "How it runs")]
    pub threads: Option<NonZeroUsize>,
    /// Map the input files into memory instead of reading them; no other program may shorten them meanwhile
    #[arg(long, help_heading = "How it runs")]
    pub mmap: bool,
}

const VERIFY_EXAMPLES: &str = "\
Examples:
  loratool verify ./merged --base ./model --adapter ./adapter
  loratool verify ./merged --base ./model -a ./style:0.7 -a ./task
  loratool verify ./merged --base ./model --adapter ./adapter --sample 0.05
  loratool verify ./merged                  against the digests recorded in it

Only weights are read: no model is run, and nothing is written. Whoever made the
merge, the answer says which share of it is correctly rounded, and a merge that
went wrong is named: not merged, merged twice, another scale, transposed, the
update of another layer. The exit code is 0 for a merge and 1 for anything else.";

/// Write an adapter in another format, bit for bit
#[derive(Debug, Args)]
#[command(after_help = CONVERT_EXAMPLES)]
pub(super) struct ConvertArgs {
    /// The adapter: a folder or a .safetensors file
    pub source: PathBuf,
    /// What to write: a file for a container, a folder for PEFT
    #[arg(long, short, value_name = "OUT")]
    pub output: PathBuf,
    /// The format to write
    #[arg(long, value_enum)]
    pub to: To,
    /// Bind the adapter to this base, and record the base's identity
    #[arg(long, value_name = "BASE")]
    pub base: Option<PathBuf>,
    /// Replace the output if it exists, in one step, once the new one is complete
    #[arg(long)]
    pub overwrite: bool,
    #[command(flatten)]
    pub open: OpenArgs,
    #[command(flatten)]
    pub bind: BindArgs,
}

const CONVERT_EXAMPLES: &str = "\
Examples:
  loratool convert ./adapter -o adapter.safetensors --to container
  loratool convert ./adapter -o adapter.safetensors --to container --base ./model
  loratool convert adapter.safetensors -o ./adapter --to peft";

/// Write an adapter as a plain PEFT folder, which every loader understands
#[derive(Debug, Args)]
#[command(after_help = BAKE_EXAMPLES)]
pub(super) struct BakeArgs {
    /// The adapter: a folder or a .safetensors file
    pub source: PathBuf,
    /// The folder to write
    #[arg(long, short, value_name = "OUT")]
    pub output: PathBuf,
    /// The rank of all targets; what is lower is padded with zeros [default: the highest of the adapter]
    #[arg(long, value_name = "R")]
    pub rank: Option<NonZeroU64>,
    /// Replace the output if it exists, in one step, once the new one is complete
    #[arg(long)]
    pub overwrite: bool,
    #[command(flatten)]
    pub open: OpenArgs,
}

const BAKE_EXAMPLES: &str = "\
Examples:
  loratool bake ./adapter -o ./plain
  loratool bake ./adapter -o ./plain --rank 16
  loratool validate ./plain --for sglang

The result has one alpha and one rank for all targets, no rsLoRA and no patterns.
Ranks are padded with zeros. Where scales differ, B is multiplied by the
quotient: by a power of two without any loss, and otherwise rounded once to its
dtype; the report then says how far the updates are from what they were. An
adapter with more than B and A of linear layers is refused by name.";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum To {
    /// One file that says everything that is needed to apply it
    Container,
    /// A folder that PEFT loads
    Peft,
}

/// How an adapter is read.
#[derive(Debug, Args)]
#[command(next_help_heading = "What the adapter's files do not say")]
pub(super) struct OpenArgs {
    /// Alpha of an adapter file that has no adapter_config.json
    #[arg(long, value_name = "A", allow_hyphen_values = true)]
    pub alpha: Option<String>,
    /// Whether the base stores the weights of the targets as (in, out)
    #[arg(long, value_name = "true|false")]
    pub fan_in_fan_out: Option<bool>,
    /// How the base stores stacks of experts: (E, out, in) or (E, in, out)
    #[arg(long, value_enum)]
    pub expert_axes: Option<ExpertAxes>,
    /// Add the update of nn.MultiheadAttention's out_proj twice, as PEFT up to 0.21.2 did in training
    #[arg(long)]
    pub attention_twice: bool,
    /// The order in which the model registers bare parameters that were adapted
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',')]
    pub parameter_order: Vec<String>,
}

/// The last two dimensions of a stack of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ExpertAxes {
    OutIn,
    InOut,
}

/// What may be relaxed when an adapter is bound to a base.
#[derive(Debug, Args)]
#[command(next_help_heading = "Fit to the base")]
pub(super) struct BindArgs {
    /// Rename targets that start with FROM so that they start with TO
    #[arg(long, value_name = "FROM=TO")]
    pub prefix: Option<String>,
    /// Targets that may be missing from the base, as a pattern with '*'; may be repeated
    #[arg(long, value_name = "PATTERN")]
    pub allow_missing: Vec<String>,
    /// Leave out full tensors (modules_to_save, trained biases)
    #[arg(long)]
    pub skip_replacements: bool,
    /// Add full tensors that the base does not have
    #[arg(long)]
    pub add_new_tensors: bool,
    /// Write a tied lm_head as a tensor of its own
    #[arg(long)]
    pub untie: bool,
    /// Accept saved embeddings with another number of rows, and write it to config.json
    #[arg(long)]
    pub resize_vocab: bool,
    /// The base is the one that training saw, for adapters that changed it first (PiSSA, OLoRA, KaSA)
    #[arg(long)]
    pub residual_base: bool,
    /// Take out of the base what such an adapter's initialisation took out of it, as far as the base tells
    #[arg(long, conflicts_with = "residual_base")]
    pub recompute_residual: bool,
    /// Leave base values that are NaN or infinite as they are
    #[arg(long)]
    pub allow_nonfinite_base: bool,
    /// Accept a base that is not the one that the adapter names by its digests
    #[arg(long)]
    pub allow_base_mismatch: bool,
}
