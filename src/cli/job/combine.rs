//! `combine`, from the arguments as typed.

use std::path::PathBuf;

use super::super::args::{CombineArgs, CombineMethodArg, MajoritySignArg, MethodArgs, PartsArg};
use super::super::number;
use super::extract::{budget, by_name, dtype, split};
use super::{open, overwrite, weighted};
use crate::{
    CombineMethod, CombineOptions, Error, ExecOptions, LayerWeight, MajoritySign, OpenOptions, PartsPolicy, PeftCombination,
    PeftKind, RankRule, ReadMode, Result, rules,
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
        method: args.compat.map_or_else(|| method(&args.method, args.seed), |kind| peft(kind, &args))?,
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

/// The method with its numbers. A number that it does not take is a mistake.
pub(super) fn method(args: &MethodArgs, seed: Option<u64>) -> Result<CombineMethod> {
    let mut unused = vec![];
    let mut number = |flag: &'static str, typed: &Option<String>, default: Option<f64>| -> Result<f64> {
        match (typed, default) {
            (Some(_), None) => unused.push(flag),
            (Some(text), Some(_)) => return number::finite(text, flag),
            (None, _) => {}
        }
        Ok(default.unwrap_or(0.0))
    };
    use CombineMethodArg as Arg;
    let density = match args.method {
        Arg::Ties | Arg::Knots | Arg::CoreSpace => Some(0.2),
        Arg::DareLinear | Arg::DareTies | Arg::Della | Arg::MagnitudePrune => Some(0.5),
        Arg::Breadcrumbs => Some(0.85),
        Arg::Linear | Arg::Cat | Arg::Svd | Arg::Slerp | Arg::Tsv | Arg::IsoC => None,
    };
    let density = number("density", &args.density, density)?;
    let epsilon = number("epsilon", &args.epsilon, (args.method == Arg::Della).then_some(0.2))?;
    let outliers = number("outliers", &args.outliers, (args.method == Arg::Breadcrumbs).then_some(0.01))?;
    if seed.is_some() && !args.method.leaves_to_chance() {
        unused.push("seed");
    }
    let seed = seed.unwrap_or(0);
    let method = match args.method {
        Arg::Linear => CombineMethod::Linear,
        Arg::Cat => CombineMethod::Cat,
        Arg::Svd => CombineMethod::Svd,
        Arg::Slerp => CombineMethod::Slerp,
        Arg::Ties => CombineMethod::Ties { density },
        Arg::MagnitudePrune => CombineMethod::MagnitudePrune { density },
        Arg::DareLinear => CombineMethod::DareLinear { density, seed },
        Arg::DareTies => CombineMethod::DareTies { density, seed },
        Arg::Della => CombineMethod::Della { density, epsilon, seed },
        Arg::Breadcrumbs => CombineMethod::Breadcrumbs { density, outliers },
        Arg::Knots => CombineMethod::Knots { density },
        Arg::CoreSpace => CombineMethod::CoreSpace { density },
        Arg::Tsv => CombineMethod::Tsv,
        Arg::IsoC => CombineMethod::IsoC,
    };
    match unused.first() {
        None => Ok(method),
        Some(flag) => {
            let message = format!("{} does not take a {flag}", method.name());
            Err(Error::new(rules::ARGUMENT, message).help(format!("leave out --{flag}")))
        }
    }
}

/// As PEFT, which has no default density.
fn peft(kind: PeftKind, args: &CombineArgs) -> Result<CombineMethod> {
    let refuse = |message: String, help: String| Err(Error::new(rules::ARGUMENT, message).help(help));
    let unused = [
        ("density", args.method.density.is_some() && !kind.takes_density()),
        ("seed", args.seed.is_some() && !kind.takes_seed()),
        ("majority-sign", args.majority_sign.is_some() && !kind.takes_majority()),
        ("epsilon", args.method.epsilon.is_some()),
        ("outliers", args.method.outliers.is_some()),
    ];
    if let Some((flag, _)) = unused.iter().find(|(_, is_unused)| *is_unused) {
        return refuse(format!("{} does not take a {flag}", kind.name()), format!("leave out --{flag}"));
    }
    let density = match &args.method.density {
        Some(text) => number::finite(text, "density")?,
        None if kind.takes_density() => {
            return refuse(
                format!("{} takes a density, for which PEFT has no default", kind.name()),
                "give --density 0.5, for example".into(),
            );
        }
        None => 1.0,
    };
    let majority = match args.majority_sign {
        Some(MajoritySignArg::Frequency) => MajoritySign::Frequency,
        _ => MajoritySign::Total,
    };
    Ok(CombineMethod::Peft(PeftCombination { kind, density, majority, seed: args.seed.unwrap_or(0) }))
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
