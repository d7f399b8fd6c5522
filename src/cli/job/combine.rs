//! `combine`, from the arguments as typed.

use std::path::PathBuf;

use super::super::args::{CombineArgs, MajoritySignArg, MethodArgs, PartsArg};
use super::super::number;
use super::extract::{by_name, dtype, split};
use super::rank::rule;
use super::{open, overwrite, prefix, weighted};
use crate::{
    CombineMethod, CombineOptions, Error, ExecOptions, LayerWeight, MajoritySign, MethodNumbers, OpenOptions, PartsPolicy,
    ReadMode, Recipe, RecipeAdapter, Result, rules,
};

#[derive(Debug)]
pub(in super::super) struct CombineJob {
    /// Adapters with the weight of each.
    pub adapters: Vec<(PathBuf, f64)>,
    /// `None` only computes.
    pub output: Option<PathBuf>,
    /// Where to write down what was combined.
    pub save_recipe: Option<PathBuf>,
    pub open: OpenOptions,
    pub options: CombineOptions,
}

pub(super) fn combine(args: CombineArgs) -> Result<CombineJob> {
    let output = args.output.clone().unwrap_or_else(|| PathBuf::from("."));
    if let Some(recipe) = &args.recipe {
        let Recipe { adapters, options } = Recipe::read(recipe)?;
        let options = CombineOptions {
            stated: adapters.iter().map(RecipeAdapter::stated).collect(),
            to: by_name(args.to, &output),
            overwrite: overwrite(args.overwrite),
            exec: ExecOptions { threads: args.threads, ..Default::default() },
            ..options
        };
        return Ok(CombineJob {
            adapters: adapters.into_iter().map(|adapter| (adapter.path, adapter.weight)).collect(),
            output: args.output.filter(|_| !args.dry_run),
            save_recipe: None,
            open: open(&args.open, ReadMode::Read)?,
            options,
        });
    }
    let name = args.compat.map_or_else(|| args.method.method.clone(), |kind| kind.name().to_owned());
    let majority = args.majority_sign.map(|sign| match sign {
        MajoritySignArg::Total => MajoritySign::Total,
        MajoritySignArg::Frequency => MajoritySign::Frequency,
    });
    let options = CombineOptions {
        method: method(&name, &args.method, args.seed, majority)?,
        layers: args.weight.iter().map(|text| layer(text)).collect::<Result<_>>()?,
        rank: rule(&args.rank)?,
        loader: args.loader,
        split: split(args.split),
        dtype: args.dtype.map(dtype),
        parts: match args.parts {
            PartsArg::Error => PartsPolicy::Refuse,
            PartsArg::First => PartsPolicy::First,
            PartsArg::Average => PartsPolicy::Average,
        },
        prefix: args.prefix.as_deref().map(prefix).transpose()?,
        allow_base_mismatch: args.allow_base_mismatch,
        to: by_name(args.to, &output),
        overwrite: overwrite(args.overwrite),
        exec: ExecOptions { threads: args.threads, ..Default::default() },
        ..Default::default()
    };
    Ok(CombineJob {
        adapters: weighted(&args.adapters, None)?,
        output: args.output.filter(|_| !args.dry_run),
        save_recipe: args.save_recipe,
        open: open(&args.open, ReadMode::Read)?,
        options,
    })
}

/// The method with its numbers.
pub(super) fn method(name: &str, args: &MethodArgs, seed: Option<u64>, majority: Option<MajoritySign>) -> Result<CombineMethod> {
    let share = |text: &Option<String>, what: &str| text.as_deref().map(|text| number::finite(text, what)).transpose();
    let numbers = MethodNumbers {
        density: share(&args.density, "density")?,
        epsilon: share(&args.epsilon, "epsilon")?,
        outliers: share(&args.outliers, "share of outliers")?,
        seed,
        majority,
    };
    CombineMethod::named(name, &numbers)
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
