//! The model in the middle: what an adapter is, whatever file it came from. Pure: it sees neither files nor formats; its factors
//! are handles into a [`TensorSource`](crate::TensorSource), so an adapter of any size costs its header until somebody reads a factor.
//!
//! An [`Adapter`] is valid by construction: [`Adapter::new`] checks everything that can be known without a base (factors pair up,
//! ranks agree, scales are sane, targets are unique) and reports all of it at once.

mod build;
mod factor;
mod identity;
mod scaling;
mod target;

use std::sync::Arc;

pub use build::{AdapterParts, Removed};
pub use factor::Factor;
pub use identity::{BaseIdentity, Lineage, LineageInput};
pub use scaling::{Scaling, ScalingRule};
pub use target::{Axis, BiasDelta, Kind, Orientation, Replacement, Rescaling, RowReplacement, Target};

use crate::error::{Diagnostic, Result};

/// A set of low-rank updates, and the full tensors that travel with them, for one base.
#[derive(Clone)]
pub struct Adapter {
    parts: AdapterParts,
}

impl Adapter {
    /// Where it was read from, for messages.
    pub fn label(&self) -> &str {
        &self.parts.label
    }

    /// The dialect that it was read from: `container`, `peft` or `memory`.
    pub fn dialect(&self) -> &'static str {
        self.parts.dialect
    }

    /// The low-rank updates, sorted by the name of the base tensor.
    pub fn targets(&self) -> &[Target] {
        &self.parts.targets
    }

    /// The path of the `nn.MultiheadAttention` that a target is a part of, if it is one: its fused input projection is a target too.
    pub fn attention_of<'t>(&self, target: &'t Target) -> Option<&'t str> {
        if let Some(attention) = target.tensor.strip_suffix(".in_proj_weight") {
            return Some(attention);
        }
        let attention = target.tensor.strip_suffix(".out_proj.weight")?;
        let sibling = format!("{attention}.in_proj_weight");
        self.targets().binary_search_by(|other| other.tensor.as_str().cmp(&sibling)).is_ok().then_some(attention)
    }

    /// Tensors that replace a base tensor, sorted by its name.
    pub fn replacements(&self) -> &[Replacement] {
        &self.parts.replacements
    }

    /// Rows of tensors that are replaced, sorted by the name of the tensor.
    pub fn rows(&self) -> &[RowReplacement] {
        &self.parts.rows
    }

    /// Tensors that are multiplied, sorted by name.
    pub fn rescalings(&self) -> &[Rescaling] {
        &self.parts.rescalings
    }

    /// How the layers of the base are repeated in the model that was trained: see [`Checkpoint::replicated`](crate::Checkpoint::replicated).
    pub fn replication(&self) -> &[(u64, u64)] {
        &self.parts.replication
    }

    /// Why the published base is not the one that the adapter was trained on; `None` if it is.
    pub fn residual(&self) -> Option<&Diagnostic> {
        self.parts.residual.as_ref().map(|(why, _)| why)
    }

    /// What the adapter says of the base that it belongs to.
    pub fn base(&self) -> &BaseIdentity {
        &self.parts.base
    }

    /// How the adapter came about, oldest first; empty if nobody recorded it.
    pub fn lineage(&self) -> &[Lineage] {
        &self.parts.lineage
    }

    /// The config of the dialect that the adapter was read from, as it stood there (a JSON object), or `None`.
    pub fn origin_config(&self) -> Option<&str> {
        self.parts.origin_config.as_deref()
    }

    /// Digests of the file's tensors as the file states them, by name; empty where the dialect has none.
    pub fn stated_digests(&self) -> &std::collections::BTreeMap<String, String> {
        &self.parts.digests
    }

    /// The content root that the file states.
    pub fn stated_content(&self) -> Option<&str> {
        self.parts.content.as_deref()
    }

    /// Every tensor of the adapter: factors, bias updates, magnitudes, replacements, rows and multipliers.
    pub fn factors(&self) -> impl Iterator<Item = &Factor> {
        let targets = self.targets().iter().flat_map(Target::factors);
        let whole = self.replacements().iter().map(|r| &r.with).chain(self.rows().iter().map(|r| &r.with));
        targets.chain(whole).chain(self.rescalings().iter().map(|r| &r.by))
    }

    /// Makes sure that the files of the factors are what they were when they were opened.
    ///
    /// # Errors
    /// `E-004`.
    pub(crate) fn unchanged(&self) -> Result<()> {
        let mut sources: Vec<_> = self.factors().map(Factor::source).collect();
        sources.dedup_by(|one, other| Arc::ptr_eq(one, other));
        sources.into_iter().try_for_each(|source| source.unchanged())
    }

    /// What is worth saying about the file but does not stop anyone.
    pub fn warnings(&self) -> &[Diagnostic] {
        &self.parts.warnings
    }

    /// The same adapter with more warnings, put first: what was found out about the file before it was understood.
    #[must_use]
    pub(crate) fn warned(mut self, before: &[Diagnostic]) -> Self {
        self.parts.warnings.splice(0..0, before.iter().cloned());
        self
    }

    /// The checked parts, for making a changed adapter with [`Adapter::new`].
    pub fn parts(&self) -> &AdapterParts {
        &self.parts
    }

    /// Number of parameters in all factors, bias deltas and replacements.
    pub fn parameters(&self) -> u64 {
        self.factors().map(|factor| factor.info().shape.elements()).fold(0, u64::saturating_add)
    }
}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adapter")
            .field("label", &self.label())
            .field("dialect", &self.dialect())
            .field("targets", &self.targets().len())
            .field("replacements", &self.replacements().len())
            .finish()
    }
}
