//! From the sums to the adapter that is stored: which way each method goes.

use std::path::Path;

use super::align::Sum;
use super::made::Made;
use super::method::CombineMethod;
use super::mixed::Mixed;
use super::options::CombineOptions;
use super::peft::{PeftCombination, PeftKind};
use super::wanted::Layout;
use super::{arc, blended, compat, fused, made, wanted};
use crate::adapter::{Adapter, AdapterParts, Target};
use crate::error::{Error, Result};
use crate::exec::Progress;
use crate::op::extract::Split;
use crate::op::rank::RankRule;
use crate::op::resize::{ResizeOptions, cut};
use crate::op::spool::Spool;
use crate::rules;
use crate::tensor::Dtype;

/// What a method works on.
pub(super) struct Maker<'m> {
    /// How many there are.
    pub(super) adapters: usize,
    pub(super) sums: &'m [Sum],
    pub(super) mixed: &'m Mixed,
    /// The plain sums, in f64.
    pub(super) exact: &'m [Target],
    pub(super) roots: &'m [String],
    pub(super) beside: &'m Path,
    pub(super) options: &'m CombineOptions,
    pub(super) progress: &'m dyn Progress,
}

impl Maker<'_> {
    /// The adapter that is stored; `parts` are those without targets, and `wide` the layout of the plain sums.
    pub(super) fn made(&self, parts: AdapterParts, wide: &Layout, spool: &(dyn Fn() -> Result<Spool> + Sync)) -> Result<Made> {
        let Maker { sums, mixed, exact, roots, beside, options, progress, .. } = *self;
        if sums.is_empty() {
            let beside = parts.replacements.len() + parts.rows.len() + parts.rescalings.len();
            if beside == 0 {
                let message = "nothing is left: the weights of everything that the adapters have are 0";
                return Err(Error::new(rules::ADAPTER_NOT_EMPTY, message).help("give at least one adapter a weight"));
            }
            let adapter = Adapter::new(parts, &options.limits)?;
            return Ok(Made { adapter, each: Vec::new(), warnings: Vec::new() });
        }
        match options.method {
            CombineMethod::Peft(peft) => self.as_peft(compat::settled(peft, self.adapters), parts, wide, spool),
            CombineMethod::Linear | CombineMethod::Cat => self.summed(parts, wide, exact, options.rank, spool),
            CombineMethod::Svd => self.summed(parts, wide, exact, Some(options.rank.unwrap_or(self.highest())), spool),
            CombineMethod::Slerp => {
                let arc = Layout::with(arc::gains(sums)?);
                let wanted = wanted::side_by_side(sums, &arc, mixed, beside)?;
                self.summed(parts, &arc, &wanted, options.rank, spool)?.away_from(exact, options, progress)
            }
            method if method.is_by_value() => {
                let site =
                    blended::Site { mixed, roots, options, method, rule: options.rank, split: options.split, progress, spool };
                site.made(sums, parts)?.away_from(exact, options, progress)
            }
            _ => {
                let wanted = fused::wanted(sums, mixed, spool()?, options, progress)?;
                let rule = options.rank.unwrap_or(RankRule::Fixed(options.limits.rank));
                self.cut(parts, wanted, (rule, options.split), spool()?)?.away_from(exact, options, progress)
            }
        }
    }

    /// As PEFT does it.
    fn as_peft(
        &self,
        peft: PeftCombination,
        parts: AdapterParts,
        wide: &Layout,
        spool: &(dyn Fn() -> Result<Spool> + Sync),
    ) -> Result<Made> {
        let Maker { sums, mixed, exact, roots, options, progress, .. } = *self;
        let rule = options.rank.unwrap_or(self.highest());
        match peft.kind {
            PeftKind::Cat => self.summed(parts, wide, exact, None, spool),
            // PEFT leaves the singular values to B.
            PeftKind::Svd => self.cut(parts, exact.to_vec(), (rule, Split::B), spool()?),
            kind if kind.is_by_factor() => {
                let factors = compat::Factors { peft, mixed, roots, options, progress };
                factors.made(sums, parts, spool()?)?.away_from(exact, options, progress)
            }
            _ => {
                let method = CombineMethod::Peft(peft);
                let site = blended::Site { mixed, roots, options, method, rule: Some(rule), split: Split::B, progress, spool };
                site.made(sums, parts)?.away_from(exact, options, progress)
            }
        }
    }

    /// The highest rank that one of the adapters has.
    fn highest(&self) -> RankRule {
        let ranks = self.sums.iter().flat_map(|sum| &sum.parts).map(|part| part.target.scaling.rank);
        RankRule::Fixed(ranks.max().unwrap_or(1))
    }

    /// Factors side by side, as they are or with other ranks.
    fn summed(
        &self,
        parts: AdapterParts,
        layout: &Layout,
        wanted: &[Target],
        rule: Option<RankRule>,
        spool: &(dyn Fn() -> Result<Spool> + Sync),
    ) -> Result<Made> {
        if let Some(rule) = rule {
            return self.cut(parts, wanted.to_vec(), (rule, self.options.split), spool()?);
        }
        let layout = Layout::stored(self.sums, layout, self.options.dtype);
        let stored = wanted::side_by_side(self.sums, &layout, self.mixed, self.beside)?;
        let each = made::measured(self.sums, wanted, &stored, &layout, self.options, self.progress)?;
        let adapter = Adapter::new(AdapterParts { targets: stored, ..parts }, &self.options.limits)?;
        Ok(Made { adapter, each, warnings: Vec::new() })
    }

    /// The best updates of other ranks.
    fn cut(&self, parts: AdapterParts, wanted: Vec<Target>, (rank, split): (RankRule, Split), spool: Spool) -> Result<Made> {
        let options = self.options;
        let whole = Adapter::new(AdapterParts { targets: wanted, ..parts }, &options.limits)?;
        let resize = ResizeOptions {
            rank,
            loader: options.loader,
            split,
            dtype: Some(options.dtype.unwrap_or(Dtype::F32)),
            exec: options.exec.clone(),
            limits: options.limits.clone(),
            ..Default::default()
        };
        Ok(Made::cut(self.sums, cut(&whole, &resize, spool, self.progress)?))
    }
}
