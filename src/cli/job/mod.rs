//! From the arguments as typed to what is to be done: numbers read, pairs split, the library's options filled in. Everything that can
//! be refused without opening a model is refused here.

mod combine;
mod compare;
mod extract;
mod model;
mod rank;
mod resize;

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::num::NonZeroU64;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::args::{
    BakeArgs, BindArgs, ConvertArgs, ExpertAxes, InspectArgs, MergeArgs, OpenArgs, OutputDtype, RecoverArgs, RoundingArg, To,
    UnmergeArgs, ValidateArgs, Verb, VerifyArgs,
};
use super::number;
use super::render::plot;
use crate::{
    BakeOptions, BindOptions, ConvertTo, Dtype, Durability, Error, ExecOptions, InspectOptions, Loader, MergeOptions,
    OpenOptions, Orientation, OutputOptions, Overwrite, ReadMode, RecoverOptions, Result, Rounding, Values, VerifyOptions, rules,
};

pub(super) use combine::CombineJob;
pub(super) use compare::CompareJob;
pub(super) use extract::ExtractJob;
pub(super) use model::{EvalJob, ModelJob, PredictJob, Rows};
pub(super) use resize::ResizeJob;

/// A resolved command.
#[derive(Debug)]
pub(super) enum Job {
    Inspect(InspectJob),
    Validate(ValidateJob),
    Merge(MergeJob),
    Verify(VerifyJob),
    Recover(RecoverJob),
    Unmerge(UnmergeJob),
    Convert(ConvertJob),
    Bake(BakeJob),
    Extract(ExtractJob),
    Resize(ResizeJob),
    Combine(CombineJob),
    Compare(CompareJob),
    Eval(EvalJob),
    Predict(PredictJob),
}

#[derive(Debug)]
pub(super) struct InspectJob {
    pub path: PathBuf,
    pub base: Option<PathBuf>,
    /// The singular values of an adapter's updates are wanted.
    pub spectrum: bool,
    /// Where to draw them.
    pub plot: Option<PathBuf>,
    pub open: OpenOptions,
    pub bind: BindOptions,
    pub options: InspectOptions,
}

#[derive(Debug)]
pub(super) struct ValidateJob {
    pub path: PathBuf,
    pub base: Option<PathBuf>,
    /// What an initialisation took out of the base is taken out here.
    pub recompute: bool,
    pub open: OpenOptions,
    pub bind: BindOptions,
    pub values: Values,
    /// The loaders to hold an adapter against.
    pub loaders: Vec<Loader>,
}

#[derive(Debug)]
pub(super) struct MergeJob {
    pub base: PathBuf,
    /// Adapters with the weight that each gets.
    pub adapters: Vec<(PathBuf, f64)>,
    /// Where the result goes; `None` is the base's own files.
    pub output: Option<PathBuf>,
    /// Where the tensors as they were go, if the output is the base's own files.
    pub undo_log: Option<PathBuf>,
    /// An output for each adapter, inside `output`.
    pub each: bool,
    pub dry_run: bool,
    /// What an initialisation took out of the base is taken out here.
    pub recompute: bool,
    pub open: OpenOptions,
    pub options: MergeOptions,
}

#[derive(Debug)]
pub(super) struct VerifyJob {
    pub merged: PathBuf,
    /// `None` checks the digests that the checkpoint states.
    pub base: Option<PathBuf>,
    /// Adapters with the weight that each was given.
    pub adapters: Vec<(PathBuf, f64)>,
    /// Text lists every tensor.
    pub all: bool,
    /// What an initialisation took out of the base is taken out here.
    pub recompute: bool,
    pub open: OpenOptions,
    pub options: VerifyOptions,
}

#[derive(Debug)]
pub(super) struct RecoverJob {
    pub path: PathBuf,
    pub options: RecoverOptions,
}

#[derive(Debug)]
pub(super) struct UnmergeJob {
    pub merged: PathBuf,
    /// What to put back; `None` subtracts the adapters.
    pub undo_log: Option<PathBuf>,
    /// Adapters with the weight that each was given.
    pub adapters: Vec<(PathBuf, f64)>,
    /// Where the result goes; `None` is the checkpoint's own files.
    pub output: Option<PathBuf>,
    pub open: OpenOptions,
    pub options: MergeOptions,
}

#[derive(Debug)]
pub(super) struct ConvertJob {
    pub source: PathBuf,
    pub output: PathBuf,
    pub to: ConvertTo,
    pub base: Option<PathBuf>,
    /// What an initialisation took out of the base is taken out here.
    pub recompute: bool,
    pub open: OpenOptions,
    pub bind: BindOptions,
    pub overwrite: Overwrite,
}

#[derive(Debug)]
pub(super) struct BakeJob {
    pub source: PathBuf,
    pub output: PathBuf,
    pub open: OpenOptions,
    pub options: BakeOptions,
}

/// Resolves what was typed.
///
/// # Errors
/// `U-001` for a value that is not of its kind, `A-032` for an adapter that is given twice.
pub(super) fn resolve(verb: Verb) -> Result<Job> {
    Ok(match verb {
        Verb::Inspect(args) => Job::Inspect(inspect(args)?),
        Verb::Validate(args) => Job::Validate(validate(args)?),
        Verb::Merge(args) => Job::Merge(merge(*args)?),
        Verb::Verify(args) => Job::Verify(verify(*args)?),
        Verb::Recover(args) => Job::Recover(recover(args)),
        Verb::Unmerge(args) => Job::Unmerge(unmerge(*args)?),
        Verb::Convert(args) => Job::Convert(convert(args)?),
        Verb::Extract(args) => Job::Extract(extract::extract(*args)?),
        Verb::Resize(args) => Job::Resize(resize::resize(*args)?),
        Verb::Combine(args) => Job::Combine(combine::combine(*args)?),
        Verb::Compare(args) => Job::Compare(compare::compare(*args)?),
        Verb::Eval(args) => Job::Eval(model::eval(*args)?),
        Verb::Predict(args) => Job::Predict(model::predict(*args)?),
        Verb::Bake(args) => Job::Bake(bake(args)?),
    })
}

fn inspect(args: InspectArgs) -> Result<InspectJob> {
    args.plot.as_deref().map(plot::check).transpose()?;
    Ok(InspectJob {
        path: args.path,
        base: args.base,
        spectrum: args.spectrum,
        plot: args.plot,
        open: open(&args.open, ReadMode::Read)?,
        bind: bind(args.bind)?,
        options: InspectOptions { norms: args.norms, listing: args.tensors },
    })
}

fn validate(args: ValidateArgs) -> Result<ValidateJob> {
    Ok(ValidateJob {
        path: args.path,
        base: args.base,
        recompute: args.bind.recompute_residual,
        open: open(&args.open, ReadMode::Read)?,
        bind: bind(args.bind)?,
        values: if args.values { Values::Read } else { Values::Skip },
        loaders: args.loaders,
    })
}

fn merge(args: MergeArgs) -> Result<MergeJob> {
    let adapters = weighted(&args.adapter, args.scale.as_deref())?;
    if !args.allow_repeat {
        refuse_repeats(&adapters)?;
    }
    if let Some(log) = args.undo_log.as_ref().filter(|_| !args.in_place) {
        let message = "an undo log is of a merge in place, and this one writes elsewhere";
        return Err(Error::new(rules::ARGUMENT, message).file(log).help("leave out --undo-log: the base stays as it is"));
    }
    let mut exec = ExecOptions { threads: args.threads, portable: args.portable, ..Default::default() };
    if let Some(tile) = &args.tile {
        exec.tile_bytes = number::bytes(tile, "tile")?;
    }
    if let Some(memory) = &args.memory {
        exec.memory = Some(number::bytes(memory, "memory")? as u64);
    }
    // One seed is for the rounding or for the method, whichever leaves something to chance.
    let name = args.method.method.as_str();
    let by_chance = combine::method(name, &args.method, None, None)?.seed().is_some();
    let method = combine::method(name, &args.method, args.seed.filter(|_| by_chance), None)?;
    let output = OutputOptions {
        dtype: match args.dtype {
            None | Some(OutputDtype::Keep) => None,
            Some(OutputDtype::F32) => Some(Dtype::F32),
            Some(OutputDtype::F16) => Some(Dtype::F16),
            Some(OutputDtype::Bf16) => Some(Dtype::BF16),
        },
        max_shard_bytes: args
            .max_shard_size
            .as_deref()
            .map(|text| number::bytes(text, "shard size"))
            .transpose()?
            .map(|n| n as u64),
        rounding: rounding(args.rounding, args.seed.filter(|_| !by_chance))?,
        ..Default::default()
    };
    Ok(MergeJob {
        base: args.base,
        adapters,
        output: args.output,
        undo_log: args.undo_log,
        each: args.each,
        dry_run: args.dry_run,
        recompute: args.bind.recompute_residual,
        open: open(&args.open, if args.mmap { ReadMode::Map } else { ReadMode::Read })?,
        options: MergeOptions {
            bind: bind(args.bind)?,
            output,
            method,
            exec,
            digests: args.digests,
            resume: args.resume,
            overwrite: overwrite(args.overwrite),
            durability: durability(args.no_sync),
            allow_repeat: args.allow_repeat,
            ..Default::default()
        },
    })
}

fn rounding(typed: RoundingArg, seed: Option<u64>) -> Result<Rounding> {
    match (typed, seed) {
        (RoundingArg::Stochastic, seed) => Ok(Rounding::Stochastic { seed: seed.unwrap_or(0) }),
        (_, Some(_)) => {
            let message = "a seed is given, but nothing is left to chance";
            Err(Error::new(rules::ARGUMENT, message).help("add --rounding stochastic, or leave out --seed"))
        }
        (RoundingArg::Nearest, None) => Ok(Rounding::Nearest),
        (RoundingArg::Peft, None) => Ok(Rounding::Peft),
        (RoundingArg::PeftSafe, None) => Ok(Rounding::PeftSafe),
    }
}

fn verify(args: VerifyArgs) -> Result<VerifyJob> {
    let adapters = weighted(&args.adapter, args.scale.as_deref())?;
    if !args.allow_repeat {
        refuse_repeats(&adapters)?;
    }
    Ok(VerifyJob {
        merged: args.merged,
        base: args.base,
        adapters,
        all: args.all,
        recompute: args.bind.recompute_residual,
        open: open(&args.open, if args.mmap { ReadMode::Map } else { ReadMode::Read })?,
        options: VerifyOptions {
            bind: bind(args.bind)?,
            exec: ExecOptions { threads: args.threads, ..Default::default() },
            sample: args.sample.as_deref().map(|text| number::finite(text, "sample")).transpose()?,
            allow_repeat: args.allow_repeat,
            ..Default::default()
        },
    })
}

fn recover(args: RecoverArgs) -> RecoverJob {
    let exec = ExecOptions { threads: args.threads, ..Default::default() };
    RecoverJob { path: args.path, options: RecoverOptions { exec, ..Default::default() } }
}

/// Adapters with their weights, each times `scale`.
fn weighted(typed: &[OsString], scale: Option<&str>) -> Result<Vec<(PathBuf, f64)>> {
    let scale = scale.map_or(Ok(1.0), |text| number::finite(text, "scale"))?;
    let mut adapters = Vec::new();
    for typed in typed {
        let (path, weight) = number::path_and_weight(typed, |path| path.symlink_metadata().is_ok())?;
        let scaled = weight * scale;
        if !scaled.is_finite() {
            let message = format!("the weight {weight} times the scale {scale} is not a finite number");
            return Err(Error::new(rules::ARGUMENT, message).file(path));
        }
        adapters.push((path, scaled));
    }
    Ok(adapters)
}

fn convert(args: ConvertArgs) -> Result<ConvertJob> {
    Ok(ConvertJob {
        source: args.source,
        output: args.output,
        to: match args.to {
            To::Container => ConvertTo::Container,
            To::Peft => ConvertTo::Peft,
        },
        base: args.base,
        recompute: args.bind.recompute_residual,
        open: open(&args.open, ReadMode::Read)?,
        bind: bind(args.bind)?,
        overwrite: overwrite(args.overwrite),
    })
}

fn bake(args: BakeArgs) -> Result<BakeJob> {
    let rank = args.rank.map(NonZeroU64::get);
    Ok(BakeJob {
        source: args.source,
        output: args.output,
        open: open(&args.open, ReadMode::Read)?,
        options: BakeOptions { rank, overwrite: overwrite(args.overwrite), ..Default::default() },
    })
}

fn unmerge(args: UnmergeArgs) -> Result<UnmergeJob> {
    Ok(UnmergeJob {
        merged: args.merged,
        undo_log: args.undo_log,
        adapters: weighted(&args.adapter, args.scale.as_deref())?,
        output: args.output,
        open: open(&args.open, ReadMode::Read)?,
        options: MergeOptions {
            bind: bind(args.bind)?,
            exec: ExecOptions { threads: args.threads, ..Default::default() },
            overwrite: overwrite(args.overwrite),
            durability: durability(args.no_sync),
            ..Default::default()
        },
    })
}

fn durability(no_sync: bool) -> Durability {
    if no_sync { Durability::Fast } else { Durability::Synced }
}

fn overwrite(replace: bool) -> Overwrite {
    if replace { Overwrite::Replace } else { Overwrite::Refuse }
}

fn open(args: &OpenArgs, mode: ReadMode) -> Result<OpenOptions> {
    Ok(OpenOptions {
        mode,
        alpha: args.alpha.as_deref().map(|text| number::finite(text, "alpha")).transpose()?,
        orientation: args.fan_in_fan_out.map(|transposed| if transposed { Orientation::InOut } else { Orientation::OutIn }),
        expert_axes: args.expert_axes.map(|axes| match axes {
            ExpertAxes::OutIn => Orientation::OutIn,
            ExpertAxes::InOut => Orientation::InOut,
        }),
        attention_twice: args.attention_twice,
        parameter_order: args.parameter_order.clone(),
        ..Default::default()
    })
}

fn bind(args: BindArgs) -> Result<BindOptions> {
    Ok(BindOptions {
        prefix: args.prefix.as_deref().map(prefix).transpose()?,
        allow_missing: args.allow_missing,
        skip_replacements: args.skip_replacements,
        add_new_tensors: args.add_new_tensors,
        untie: args.untie,
        resize_vocabulary: args.resize_vocab,
        residual_base: args.residual_base,
        allow_nonfinite_base: args.allow_nonfinite_base,
        allow_base_mismatch: args.allow_base_mismatch,
    })
}

/// `FROM=TO`; either may be empty.
fn prefix(text: &str) -> Result<(String, String)> {
    let pair = text.split_once('=').map(|(from, to)| (from.to_owned(), to.to_owned()));
    pair.ok_or_else(|| {
        Error::new(rules::ARGUMENT, format!("the prefix {text:?} is not of the form FROM=TO"))
            .help("give both, such as --prefix model.=language_model.model.")
    })
}

/// The same file under two names is one adapter. Files that do not exist are left for their opener to name.
fn refuse_repeats(adapters: &[(PathBuf, f64)]) -> Result<()> {
    let mut seen: HashMap<(u64, u64), &Path> = HashMap::new();
    for (path, _) in adapters {
        let weights = path.join("adapter_model.safetensors");
        let Ok(found) = fs::metadata(&weights).or_else(|_| fs::metadata(path)) else { continue };
        if let Some(first) = seen.insert((found.dev(), found.ino()), path) {
            let message = match first == path {
                true => "the adapter is given twice".to_owned(),
                false => format!("the adapter is given twice, first as {first:?}"),
            };
            return Err(Error::new(rules::ADAPTER_ONCE, message)
                .file(path)
                .help("give it once with the sum of the weights, or pass --allow-repeat"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_has_two_sides() {
        assert_eq!(prefix("a.=b.c.").unwrap(), ("a.".to_owned(), "b.c.".to_owned()));
        assert_eq!(prefix("=model.").unwrap(), (String::new(), "model.".to_owned()));
        assert_eq!(prefix("model.").unwrap_err().class().exit_code(), 2);
    }

    #[test]
    fn an_adapter_under_two_names_is_given_twice() {
        let folder = tempfile::tempdir().unwrap();
        let weights = folder.path().join("adapter_model.safetensors");
        fs::write(&weights, "").unwrap();
        let repeat = [(folder.path().to_owned(), 1.0), (weights, 0.5)];
        assert_eq!(refuse_repeats(&repeat).unwrap_err().diagnostics()[0].rule().id, "A-032");
        assert!(refuse_repeats(&repeat[..1]).is_ok());
        assert!(refuse_repeats(&[("no/such".into(), 1.0), ("no/such".into(), 1.0)]).is_ok());
    }
}
