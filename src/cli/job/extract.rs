//! `extract`, from the arguments as typed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::args::{ExtractArgs, FactorDtype, MethodArg, RestArg, SplitArg, To};
use super::super::number;
use super::overwrite;
use super::rank::rule;
use crate::{
    ActStats, ConvertTo, Dtype, ExecOptions, ExtractOptions, Method, OpenOptions, RankRule, ReadMode, RestPolicy, Result,
    SafetensorsFile, Split, Strictness,
};

#[derive(Debug)]
pub(in super::super) struct ExtractJob {
    pub base: Option<PathBuf>,
    pub tuned: PathBuf,
    pub output: PathBuf,
    pub open: OpenOptions,
    pub options: ExtractOptions,
}

pub(super) fn extract(args: ExtractArgs) -> Result<ExtractJob> {
    let mode = if args.mmap { ReadMode::Map } else { ReadMode::Read };
    let mut options = ExtractOptions {
        // Without another rule, `--auto` is given.
        rank: rule(&args.rank)?.unwrap_or(RankRule::Auto),
        method: match args.method {
            MethodArg::Auto => Method::Auto,
            MethodArg::Exact => Method::Exact,
        },
        split: split(args.split),
        dtype: dtype(args.dtype),
        seed: args.seed,
        rest: match args.rest {
            None => RestPolicy::SkipSmall,
            Some(RestArg::Skip) => RestPolicy::Skip,
            Some(RestArg::Store) => RestPolicy::Store,
            Some(RestArg::Error) => RestPolicy::Refuse,
        },
        base_name: args.base_name,
        targets: args.targets,
        exclude: args.exclude,
        to: by_name(args.to, &args.output),
        overwrite: overwrite(args.overwrite),
        exec: ExecOptions { threads: args.threads, portable: args.portable, ..Default::default() },
        ..Default::default()
    };
    if let Some(rank) = args.max_rank {
        options.max_rank = rank.get();
    }
    if let Some(text) = &args.tolerance {
        options.tolerance = number::finite(text, "tolerance")?;
    }
    let open = OpenOptions { mode, ..Default::default() };
    if let Some(path) = &args.act_stats {
        options.act_stats = Some(ActStats::new(Arc::new(SafetensorsFile::open(path, mode, Strictness::Strict, &open.limits)?)));
    }
    Ok(ExtractJob { base: args.base, tuned: args.tuned, output: args.output, open, options })
}

pub(super) fn split(split: SplitArg) -> Split {
    match split {
        SplitArg::Sqrt => Split::Sqrt,
        SplitArg::B => Split::B,
        SplitArg::A => Split::A,
    }
}

pub(super) fn dtype(dtype: FactorDtype) -> Dtype {
    match dtype {
        FactorDtype::F32 => Dtype::F32,
        FactorDtype::Bf16 => Dtype::BF16,
        FactorDtype::F16 => Dtype::F16,
    }
}

/// What was asked for, or what the name of the output says.
pub(super) fn by_name(to: Option<To>, output: &Path) -> ConvertTo {
    let is_file = output.extension().is_some_and(|extension| extension == "safetensors");
    match to {
        Some(To::Container) => ConvertTo::Container,
        None if is_file => ConvertTo::Container,
        Some(To::Peft) | None => ConvertTo::Peft,
    }
}
