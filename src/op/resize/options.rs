//! How to resize.

use crate::adapter::{Adapter, Kind};
use crate::error::{Error, Result};
use crate::exec::ExecOptions;
use crate::io::Overwrite;
use crate::limits::Limits;
use crate::loader::{Loader, VLLM_RANKS};
use crate::op::ConvertTo;
use crate::op::extract::Split;
use crate::op::rank::RankRule;
use crate::rules;
use crate::tensor::Dtype;

/// How to resize.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ResizeOptions {
    /// How the rank of each target is chosen; none is higher than what a target has. Default: 16.
    pub rank: RankRule,
    /// Bring all ranks up to the next size that this loader makes room for anyway, as far as the targets have it. Default none.
    pub loader: Option<Loader>,
    /// Which factor takes the singular values.
    pub split: Split,
    /// Dtype of the factors: F32, BF16 or F16. Default: that of each target.
    pub dtype: Option<Dtype>,
    /// What to write.
    pub to: ConvertTo,
    /// What to do if the output exists. Default: refuse.
    pub overwrite: Overwrite,
    /// Threads.
    pub exec: ExecOptions,
    /// Bounds on input.
    pub limits: Limits,
}

impl Default for ResizeOptions {
    fn default() -> Self {
        ResizeOptions {
            rank: RankRule::Fixed(16),
            loader: None,
            split: Split::Sqrt,
            dtype: None,
            to: ConvertTo::Peft,
            overwrite: Overwrite::Refuse,
            exec: ExecOptions::default(),
            limits: Limits::default(),
        }
    }
}

impl ResizeOptions {
    /// Refuses what cannot be carried out, or would not be an approximation of the adapter.
    ///
    /// # Errors
    /// `U-001`, `A-010`, `A-012`, `P-007`.
    pub(super) fn check(&self, adapter: &Adapter) -> Result<()> {
        self.rank.check()?;
        let refuse = |rule, message: &str, help: &str| Err(Error::new(rule, message).file(adapter.label()).help(help));
        if self.rank == RankRule::Auto {
            let message = "the noise of rounding is that of a checkpoint, and an adapter has none";
            return refuse(rules::ARGUMENT, message, "give a rank, a share or a budget");
        }
        if self.loader.is_some_and(|loader| loader != Loader::Vllm) {
            return refuse(rules::ARGUMENT, "only vllm makes room for a few ranks alone", "leave out --for");
        }
        if self.loader.is_some() && matches!(self.rank, RankRule::Parameters(_) | RankRule::Bytes(_)) {
            let message = "one rank for all, as vllm makes room for, and a budget are two rules";
            return refuse(rules::ARGUMENT, message, "give a rank or a share with --for, or a budget without it");
        }
        if let (Some(_), RankRule::Fixed(rank)) = (self.loader, self.rank)
            && rank > VLLM_RANKS[VLLM_RANKS.len() - 1]
        {
            return refuse(rules::ARGUMENT, &format!("vllm has no room for rank {rank}"), "give 512 at most");
        }
        if let Some(dtype) = self.dtype.filter(|dtype| !matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16)) {
            return refuse(rules::ARGUMENT, &format!("factors are F32, BF16 or F16, and not {dtype}"), "give one of them");
        }
        if adapter.targets().is_empty() {
            return refuse(rules::ADAPTER_NOT_EMPTY, "the adapter has no low-rank updates", "there is nothing to resize");
        }
        if let Some(why) = adapter.residual() {
            let message = format!("the initialisation is a part of the factors ({}), and would be cut with them", why.message());
            return refuse(
                rules::INIT_CHANGES_BASE,
                &message,
                "take it out first: loratool convert --base BASE --recompute-residual",
            );
        }
        if let Some(target) = adapter.targets().iter().find(|target| matches!(target.kind, Kind::Shared(_))) {
            let message = format!("which columns of A belong to {:?} is known by its base alone", target.tensor);
            return refuse(rules::METHOD_SUPPORTED, &message, "settle it first: loratool convert --base BASE");
        }
        Ok(())
    }
}
