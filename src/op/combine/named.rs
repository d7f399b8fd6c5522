//! Methods by their names, with the numbers that each takes. A number that a method does not take is a mistake, and not passed over.

use super::method::CombineMethod;
use super::peft::{MajoritySign, PeftCombination, PeftKind};
use crate::error::{Error, Result};
use crate::rules;

/// The numbers that methods take; those that are not given have defaults.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct MethodNumbers {
    /// The share of values that is kept. Default: 0.2 of `ties`, `knots` and `core-space`, 0.85 of `breadcrumbs`, otherwise 0.5; PEFT has none.
    pub density: Option<f64>,
    /// By how much the chances of the largest and the smallest value of a row differ. Default 0.2.
    pub epsilon: Option<f64>,
    /// The share of the largest values that are dropped. Default 0.01.
    pub outliers: Option<f64>,
    /// Of the chance. Default 0.
    pub seed: Option<u64>,
    /// What decides a sign in PEFT's types. Default: the sum.
    pub majority: Option<MajoritySign>,
}

impl CombineMethod {
    /// The names of all methods, but for those of PEFT.
    pub const NAMES: [&str; 14] = [
        "linear",
        "cat",
        "svd",
        "slerp",
        "ties",
        "magnitude-prune",
        "dare-linear",
        "dare-ties",
        "della",
        "breadcrumbs",
        "knots",
        "core-space",
        "tsv",
        "iso-c",
    ];

    /// The method of a name: one of [`NAMES`](Self::NAMES), or `peft:` and one of PEFT's combination types.
    ///
    /// # Errors
    /// `U-001` for an unknown name, and for a number that the method does not take, or that means nothing to it.
    pub fn named(name: &str, numbers: &MethodNumbers) -> Result<CombineMethod> {
        let density = |default: f64| numbers.density.unwrap_or(default);
        let seed = numbers.seed.unwrap_or(0);
        let method = match name {
            "linear" => CombineMethod::Linear,
            "cat" => CombineMethod::Cat,
            "svd" => CombineMethod::Svd,
            "slerp" => CombineMethod::Slerp,
            "ties" => CombineMethod::Ties { density: density(0.2) },
            "magnitude-prune" => CombineMethod::MagnitudePrune { density: density(0.5) },
            "dare-linear" => CombineMethod::DareLinear { density: density(0.5), seed },
            "dare-ties" => CombineMethod::DareTies { density: density(0.5), seed },
            "della" => CombineMethod::Della { density: density(0.5), epsilon: numbers.epsilon.unwrap_or(0.2), seed },
            "breadcrumbs" => CombineMethod::Breadcrumbs { density: density(0.85), outliers: numbers.outliers.unwrap_or(0.01) },
            "knots" => CombineMethod::Knots { density: density(0.2) },
            "core-space" => CombineMethod::CoreSpace { density: density(0.2) },
            "tsv" => CombineMethod::Tsv,
            "iso-c" => CombineMethod::IsoC,
            other => peft(other, numbers)?,
        };
        method.refuse_unused(numbers)?;
        method.check()?;
        Ok(method)
    }

    fn refuse_unused(self, numbers: &MethodNumbers) -> Result<()> {
        let takes = |wanted: &str| self.numbers().iter().any(|(name, _)| *name == wanted);
        let majority = matches!(self, CombineMethod::Peft(peft) if peft.kind.takes_majority());
        let unused = [
            ("density", numbers.density.is_some() && !takes("density")),
            ("epsilon", numbers.epsilon.is_some() && !takes("epsilon")),
            ("outliers", numbers.outliers.is_some() && !takes("outliers")),
            ("seed", numbers.seed.is_some() && self.seed().is_none()),
            ("majority sign", numbers.majority.is_some() && !majority),
        ];
        match unused.iter().find(|(_, is_unused)| *is_unused) {
            None => Ok(()),
            Some((what, _)) => {
                let message = format!("{} does not take a {what}", self.name());
                Err(Error::new(rules::ARGUMENT, message).help("leave it out"))
            }
        }
    }
}

fn peft(name: &str, numbers: &MethodNumbers) -> Result<CombineMethod> {
    let Some(kind) = PeftKind::ALL.into_iter().find(|kind| kind.name() == name) else {
        let message = format!("{name:?} is not a method");
        return Err(Error::new(rules::ARGUMENT, message).help(format!("there are {}", CombineMethod::NAMES.join(", "))));
    };
    let density = match numbers.density {
        Some(density) => density,
        None if kind.takes_density() => {
            let message = format!("{name} takes a density, for which PEFT has no default");
            return Err(Error::new(rules::ARGUMENT, message).help("give one, such as 0.5"));
        }
        None => 1.0,
    };
    let majority = numbers.majority.unwrap_or(MajoritySign::Total);
    Ok(CombineMethod::Peft(PeftCombination { kind, density, majority, seed: numbers.seed.unwrap_or(0) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_that_of_its_method() {
        let none = MethodNumbers::default();
        for name in CombineMethod::NAMES {
            assert_eq!(CombineMethod::named(name, &none).unwrap().name(), name);
        }
        let half = MethodNumbers { density: Some(0.5), ..none };
        for kind in PeftKind::ALL {
            let numbers = if kind.takes_density() { half } else { none };
            assert_eq!(CombineMethod::named(kind.name(), &numbers).unwrap().name(), kind.name());
        }
        for (name, numbers) in [
            ("average", none),
            ("peft:ties", none),
            ("linear", half),
            ("ties", MethodNumbers { seed: Some(1), ..none }),
            ("della", MethodNumbers { outliers: Some(0.1), ..none }),
            ("dare-ties", MethodNumbers { majority: Some(MajoritySign::Total), ..none }),
            ("ties", MethodNumbers { density: Some(0.0), ..none }),
        ] {
            assert_eq!(CombineMethod::named(name, &numbers).unwrap_err().class().exit_code(), 2, "{name}");
        }
    }
}
