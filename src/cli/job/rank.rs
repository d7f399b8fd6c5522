//! Which rank a target gets, from the arguments as typed.

use super::super::args::RankArgs;
use super::super::number;
use crate::{Error, RankRule, Result};

/// `None` if none is given; at most one is.
pub(super) fn rule(args: &RankArgs) -> Result<Option<RankRule>> {
    if let Some(text) = &args.energy {
        return Ok(Some(RankRule::Energy(number::finite(text, "share of the energy")?)));
    }
    if let Some(text) = &args.error {
        return Ok(Some(RankRule::Error(number::finite(text, "relative error")?)));
    }
    match &args.budget {
        Some(text) => budget(text).map(Some),
        None => Ok(args.rank.map(|rank| RankRule::Fixed(rank.get()))),
    }
}

/// Bytes if there is a unit, and parameters if there is none.
fn budget(text: &str) -> Result<RankRule> {
    let refuse = |e: Error| e.help("give a number of parameters such as 5000000, or of bytes such as 20MB");
    if text.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(RankRule::Parameters(number::bytes(text, "budget").map_err(refuse)? as u64));
    }
    Ok(RankRule::Bytes(number::bytes(text, "budget").map_err(refuse)? as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_parameters_or_bytes() {
        assert_eq!(budget("5000").unwrap(), RankRule::Parameters(5000));
        assert_eq!(budget("5kB").unwrap(), RankRule::Bytes(5000));
        assert_eq!(budget("5B").unwrap(), RankRule::Bytes(5));
        assert!(budget("0").is_err() && budget("much").is_err() && budget("").is_err());
    }
}
