//! The one number that multiplies B·A, and the rule that it follows from.

/// How the effective scale follows from alpha and rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScalingRule {
    /// `alpha / rank` (Hu et al. 2021, section 4.1; PEFT `lora_alpha / r`).
    Standard,
    /// `alpha / sqrt(rank)` (rsLoRA, Kalajdzievski 2023, theorem 3.2; PEFT `use_rslora`).
    RankStabilized,
}

impl ScalingRule {
    /// The name that the container uses.
    pub fn name(self) -> &'static str {
        match self {
            ScalingRule::Standard => "alpha/rank",
            ScalingRule::RankStabilized => "alpha/sqrt(rank)",
        }
    }

    /// The rule of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [ScalingRule::Standard, ScalingRule::RankStabilized].into_iter().find(|rule| rule.name() == name)
    }
}

/// Rank, alpha and rule of one target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scaling {
    /// Rank, at least 1.
    pub rank: u64,
    /// Alpha as the config states it.
    pub alpha: f64,
    /// The rule.
    pub rule: ScalingRule,
}

impl Scaling {
    /// The effective scale: the number that multiplies B·A, in f64.
    pub fn effective(&self) -> f64 {
        let rank = self.rank as f64;
        match self.rule {
            ScalingRule::Standard => self.alpha / rank,
            ScalingRule::RankStabilized => self.alpha / rank.sqrt(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_rules_give_what_peft_gives() {
        let scaling = |rule| Scaling { rank: 64, alpha: 16.0, rule }.effective();
        assert_eq!(scaling(ScalingRule::Standard), 0.25);
        assert_eq!(scaling(ScalingRule::RankStabilized), 2.0);
    }
}
