//! `combine`, from the arguments as typed.

use std::path::PathBuf;

use super::super::args::{CombineArgs, CombineMethodArg, PartsArg};
use super::super::number;
use super::extract::{budget, by_name, dtype, split};
use super::{open, overwrite, weighted};
use crate::{
    CombineMethod, CombineOptions, Error, ExecOptions, LayerWeight, OpenOptions, PartsPolicy, RankRule, ReadMode, Result, rules,
};

#[derive(Debug)]
pub(in super::super) struct CombineJob {
    /// Adapters with the weight of each.
    pub adapters: Vec<(PathBuf, f64)>,
    /// `None` only computes.
    pub output: Option<PathBuf>,
    pub open: OpenOptions,
    pub options: CombineOptions,
}

pub(super) fn combine(args: CombineArgs) -> Result<CombineJob> {
    let output = args.output.clone().unwrap_or_else(|| PathBuf::from("."));
    let options = CombineOptions {
        method: method(&args)?,
        layers: args.weight.iter().map(|text| layer(text)).collect::<Result<_>>()?,
        rank: rule(&args)?,
        loader: args.loader,
        split: split(args.split),
        dtype: args.dtype.map(dtype),
        parts: match args.parts {
            PartsArg::Error => PartsPolicy::Refuse,
            PartsArg::First => PartsPolicy::First,
            PartsArg::Average => PartsPolicy::Average,
        },
        allow_base_mismatch: args.allow_base_mismatch,
        to: by_name(args.to, &output),
        overwrite: overwrite(args.overwrite),
        exec: ExecOptions { threads: args.threads, ..Default::default() },
        ..Default::default()
    };
    Ok(CombineJob {
        adapters: weighted(&args.adapters, None)?,
        output: args.output.filter(|_| !args.dry_run),
        open: open(&args.open, ReadMode::Read)?,
        options,
    })
}

fn method(args: &CombineArgs) -> Result<CombineMethod> {
    let method = match args.method {
        CombineMethodArg::Linear => CombineMethod::Linear,
        CombineMethodArg::Cat => CombineMethod::Cat,
        CombineMethodArg::Svd => CombineMethod::Svd,
    };
    if args.density.is_some() {
        let message = format!("a density is given, and {} keeps all values", method.name());
        return Err(Error::new(rules::ARGUMENT, message).help("leave out --density"));
    }
    Ok(method)
}

/// At most one of them is given.
fn rule(args: &CombineArgs) -> Result<Option<RankRule>> {
    if let Some(text) = &args.energy {
        return Ok(Some(RankRule::Energy(number::finite(text, "share of the energy")?)));
    }
    if let Some(text) = &args.error {
        return Ok(Some(RankRule::Error(number::finite(text, "relative error")?)));
    }
    match (&args.budget, args.rank) {
        (Some(text), _) => budget(text).map(Some),
        (None, rank) => Ok(rank.map(|rank| RankRule::Fixed(rank.get()))),
    }
}

/// `[N:]GLOB=W`.
fn layer(text: &str) -> Result<LayerWeight> {
    let bad = |message: String| {
        Error::new(rules::ARGUMENT, message).help("write it as GLOB=WEIGHT, such as 'layers.[0-7].*=0.5', or 2:GLOB=WEIGHT")
    };
    let (pattern, factor) = text.rsplit_once('=').ok_or_else(|| bad(format!("the weight {text:?} has no \"=\"")))?;
    let factor = number::finite(factor, "weight")?;
    let (adapter, pattern) = match pattern.split_once(':') {
        Some((place, pattern)) => match place.parse::<usize>().ok().and_then(|place| place.checked_sub(1)) {
            Some(place) => (Some(place), pattern),
            None => return Err(bad(format!("{place:?} is not the place of an adapter, from 1 on"))),
        },
        None => (None, pattern),
    };
    if pattern.is_empty() {
        return Err(bad(format!("the weight {text:?} has no pattern")));
    }
    Ok(LayerWeight { adapter, pattern: pattern.to_owned(), factor })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_of_layers_is_a_pattern_and_a_number() {
        let of = |adapter, pattern: &str, factor| LayerWeight { adapter, pattern: pattern.to_owned(), factor };
        assert_eq!(layer("layers.[0-7].*=0.5").unwrap(), of(None, "layers.[0-7].*", 0.5));
        assert_eq!(layer("2:mlp=-1e-3").unwrap(), of(Some(1), "mlp", -1e-3));
        for bad in ["layers", "=1", "layers=", "layers=nan", "0:q=1", "x:q=1", "1:=2", "q=0,5"] {
            assert_eq!(layer(bad).unwrap_err().class().exit_code(), 2, "{bad}");
        }
    }
}
