//! How to combine.

use crate::error::{Error, Result};
use crate::exec::ExecOptions;
use crate::io::Overwrite;
use crate::limits::Limits;
use crate::loader::Loader;
use crate::op::ConvertTo;
use crate::op::extract::Split;
use crate::op::rank::RankRule;
use crate::rules;
use crate::tensor::Dtype;

use super::method::CombineMethod;
use super::peft::{PeftCombination, PeftKind};

/// What becomes of what is not low rank and is in several adapters: full tensors, rows, magnitudes, multipliers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PartsPolicy {
    /// Taken where it is plain what it has to be: one adapter has it, with weight 1, or all have the same and their weights add up to 1.
    /// Refused otherwise (default).
    Refuse,
    /// That of the first adapter that has it, in the order in which they were given.
    First,
    /// The mean of those that have it, by their weights.
    Average,
}

impl PartsPolicy {
    /// As the command line and the lineage spell it.
    pub(super) fn name(self) -> &'static str {
        match self {
            PartsPolicy::Refuse => "error",
            PartsPolicy::First => "first",
            PartsPolicy::Average => "average",
        }
    }
}

/// A factor for the weights of some targets.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerWeight {
    /// Which adapter, by its place among those that are given, from 0 on; `None` for all.
    pub adapter: Option<usize>,
    /// Which targets: a glob over whole parts of their names, such as `layers.[0-7].*` or `q_proj`.
    pub pattern: String,
    /// Multiplies the adapter's weight. Where several patterns match, the last one counts.
    pub factor: f64,
}

/// What an adapter has to be, where that was written down.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stated {
    /// The content root of its tensors.
    pub content: Option<String>,
    /// The digest of what its tensors do not say: [`CombinedAdapter::scaling`](crate::report::CombinedAdapter::scaling).
    pub scaling: Option<String>,
}

/// How to combine.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CombineOptions {
    /// What becomes of the updates. Default: their sum.
    pub method: CombineMethod,
    /// Weights by layer. Default none.
    pub layers: Vec<LayerWeight>,
    /// Put the second string in the place of the first at the start of all names that have it; an empty first one is put before all that do not
    /// begin with the second. Default none: names are what they are.
    pub prefix: Option<(String, String)>,
    /// What each adapter has to be, in their order. Default: anything.
    pub stated: Vec<Stated>,
    /// How the rank of each target is chosen. Default: that of the method; the sum keeps all ranks, which add up.
    pub rank: Option<RankRule>,
    /// Bring all ranks up to the next size that this loader makes room for anyway. Default none.
    pub loader: Option<Loader>,
    /// Which factor takes the singular values, where there are some.
    pub split: Split,
    /// Dtype of the factors. Default: that of the adapters where all have one and nothing is rounded, F32 otherwise.
    pub dtype: Option<Dtype>,
    /// What becomes of what is not low rank.
    pub parts: PartsPolicy,
    /// Combine adapters that name different bases by their digests. Default false: they are refused.
    pub allow_base_mismatch: bool,
    /// What to write.
    pub to: ConvertTo,
    /// What to do if the output exists. Default: refuse.
    pub overwrite: Overwrite,
    /// Threads.
    pub exec: ExecOptions,
    /// Bounds on input.
    pub limits: Limits,
}

impl Default for CombineOptions {
    fn default() -> Self {
        CombineOptions {
            method: CombineMethod::Linear,
            layers: Vec::new(),
            prefix: None,
            stated: Vec::new(),
            rank: None,
            loader: None,
            split: Split::Sqrt,
            dtype: None,
            parts: PartsPolicy::Refuse,
            allow_base_mismatch: false,
            to: ConvertTo::Peft,
            overwrite: Overwrite::Refuse,
            exec: ExecOptions::default(),
            limits: Limits::default(),
        }
    }
}

impl CombineOptions {
    /// Refuses what cannot be carried out.
    ///
    /// # Errors
    /// `U-001`.
    pub(super) fn check(&self) -> Result<()> {
        let refuse = |message: &str, help: &str| Err(Error::new(rules::ARGUMENT, message).help(help));
        self.method.check()?;
        if let Some(rule) = self.rank {
            rule.check()?;
            if rule == RankRule::Auto {
                let message = "the noise of rounding is that of a checkpoint, and adapters have none";
                return refuse(message, "give a rank, a share or a budget");
            }
            if self.method == CombineMethod::Cat {
                return refuse("with cat the ranks add up", "leave out the rank, or give --method svd");
            }
            if self.method.is_by_value() && matches!(rule, RankRule::Parameters(_) | RankRule::Bytes(_)) {
                let message =
                    format!("a budget takes all singular values of all targets, of which {} has too many", self.method.name());
                return refuse(&message, "give a rank or a share, and loratool resize --budget the result");
            }
        }
        if let CombineMethod::Peft(peft) = self.method {
            self.check_peft(peft)?;
        }
        if self.loader.is_some() && self.rank.is_none() {
            return refuse("a loader's room is a rule for ranks that are chosen", "give a rank or a share with --for");
        }
        if self.loader.is_some() && self.method.is_by_value() {
            let message = format!("ranks of {} are not brought up", self.method.name());
            return refuse(&message, "give a rank that the loader has room for");
        }
        if let Some(dtype) = self.dtype.filter(|dtype| !matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16)) {
            return refuse(&format!("factors are F32, BF16 or F16, and not {dtype}"), "give one of them");
        }
        Ok(())
    }

    /// Refuses what PEFT's type says by itself.
    fn check_peft(&self, peft: PeftCombination) -> Result<()> {
        let has_rank = !peft.kind.is_by_factor() && peft.kind != PeftKind::Cat;
        let given = [
            ("rank", self.rank.is_some() && !has_rank),
            ("dtype", self.dtype.is_some() && peft.kind.is_by_factor()),
            ("split", self.split != Split::Sqrt),
        ];
        let Some((what, _)) = given.into_iter().find(|(_, is_given)| *is_given) else { return Ok(()) };
        let message = format!("{} has a {what} of its own, which is a part of what PEFT does", peft.kind.name());
        Err(Error::new(rules::ARGUMENT, message).help("leave it out, or resize the result"))
    }
}
