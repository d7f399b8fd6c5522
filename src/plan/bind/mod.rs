//! Binding: the proof that each part of an adapter fits one tensor of a base, or every mismatch at once. Rules of
//! `spec/adapter-model.md`.

mod names;
mod rescalings;
mod targets;
mod whole;

pub(super) use whole::is_resized;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::options::{BindOptions, Weighted};
use super::rename::Renaming;
use super::shape::{Contribution, Panel};
use super::tied;
use crate::adapter::{Factor, RowReplacement, Target};
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Error, Result};
use crate::limits::Limits;
use crate::rules;
use crate::tensor::{TensorInfo, TensorSource};
pub(super) use whole::is_vocabulary;

/// An adapter tensor that is left out because the user named a flag.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Ignored {
    /// The tensor in the adapter's file.
    pub tensor: String,
    /// The flag that asked for it.
    pub flag: &'static str,
}

/// The proof that an adapter fits a base. Only this module makes one.
#[derive(Debug)]
pub struct Binding<'a> {
    pub(in crate::plan) index: usize,
    pub(in crate::plan) renaming: Renaming,
    /// Base tensor of each target.
    names: HashMap<String, String>,
    /// By base tensor, sorted.
    pub(in crate::plan) updates: BTreeMap<String, Contribution>,
    /// By base tensor, sorted; those that the base lacks are to be added.
    pub(in crate::plan) replacements: BTreeMap<String, &'a Factor>,
    /// Base tensors that are replaced under all names that they are tied to.
    pub(in crate::plan) shared: BTreeSet<String>,
    /// What is equal to another tensor of the adapter that is applied: PEFT saves a tied weight under both of its names.
    pub(in crate::plan) copies: Vec<&'a Factor>,
    /// Rows that are replaced, by base tensor.
    pub(in crate::plan) rows: BTreeMap<String, &'a RowReplacement>,
    pub(in crate::plan) ignored: Vec<Ignored>,
    pub(in crate::plan) warnings: Vec<Diagnostic>,
}

impl<'a> Binding<'a> {
    /// Binds one adapter. `index` is its place in the order of adapters.
    ///
    /// # Errors
    /// P-006 if the layers of the base are not repeated as the adapter's, P-007 if it belongs to another base than the published one;
    /// otherwise every broken rule among, at once.
    pub fn new(base: &Checkpoint, weighted: Weighted<'a>, index: usize, options: &BindOptions, limits: &Limits) -> Result<Self> {
        let adapter = weighted.adapter;
        let mut binder = Binder {
            base,
            options,
            renaming: Renaming::identity(),
            problems: Vec::new(),
            binding: Binding {
                index,
                renaming: Renaming::identity(),
                names: HashMap::new(),
                updates: BTreeMap::new(),
                replacements: BTreeMap::new(),
                shared: BTreeSet::new(),
                copies: Vec::new(),
                rows: BTreeMap::new(),
                ignored: Vec::new(),
                warnings: Vec::new(),
            },
        };
        binder.check_roles()?;
        binder.check_structure(weighted)?;
        binder.check_residual(weighted)?;
        let targets = adapter.targets().iter().map(|t| t.tensor.as_str());
        let rescaled = adapter.rescalings().iter().filter(|r| !r.if_there).map(|r| r.tensor.as_str());
        let rows = adapter.rows().iter().map(|r| r.tensor.as_str());
        let whole: Vec<&str> = adapter.replacements().iter().map(|r| r.tensor.as_str()).collect();
        binder.choose_renaming(targets.chain(rescaled).chain(rows).collect(), &whole, adapter.label(), limits)?;
        binder.bind_replacements(weighted);
        binder.bind_targets(weighted);
        binder.bind_rescalings(weighted);
        binder.bind_rows(weighted);
        // One tensor may have several uses.
        let mut seen = HashSet::new();
        binder.binding.ignored.retain(|ignored| seen.insert(ignored.tensor.clone()));
        let problems =
            binder.problems.into_iter().map(|p| if p.place().file.is_some() { p } else { p.file(adapter.label()) }).collect();
        Error::check(problems)?;
        Ok(binder.binding)
    }

    /// What is worth saying of the fit.
    pub fn warnings(&self) -> &[Diagnostic] {
        &self.warnings
    }

    /// The renaming that was used.
    pub fn renaming(&self) -> &Renaming {
        &self.renaming
    }

    /// The factors of the adapter's target as they lie on its base tensor, and that tensor, for targets that leave open what the base
    /// decides.
    pub(crate) fn settled(&self, target: &str) -> Option<(&str, &Contribution)> {
        let name = self.names.get(target)?;
        Some((name.as_str(), self.updates.get(name)?))
    }

    /// Does the update of the adapter's target lie transposed on the base tensor? `None` if the adapter has no such target.
    pub(crate) fn is_transposed(&self, target: &str) -> Option<bool> {
        let contribution = self.updates.get(self.names.get(target)?)?;
        Some(matches!(contribution.left, Panel::Transposed(_)))
    }

    /// Names of the base tensors that the adapter changes, sorted.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        let all = self.updates.keys().chain(self.replacements.keys()).chain(self.rows.keys());
        let names: HashSet<&str> = all.map(String::as_str).collect();
        let mut names: Vec<&str> = names.into_iter().collect();
        names.sort_unstable();
        names.into_iter()
    }
}

struct Binder<'a, 'b> {
    base: &'b Checkpoint,
    options: &'b BindOptions,
    renaming: Renaming,
    problems: Vec<Diagnostic>,
    binding: Binding<'a>,
}

impl<'a> Binder<'a, '_> {
    /// A base that consists of adapter tensors is an adapter.
    fn check_roles(&self) -> Result<()> {
        match self.base.names().find(|name| name.contains(".lora_A.") || name.contains(".lora_embedding_A")) {
            None => Ok(()),
            Some(name) => Err(Error::new(
                rules::ROLES,
                format!("the base holds {name:?}: it is an adapter, not a model; arguments swapped?"),
            )
            .file(self.base.path())
            .tensor(name)
            .help("the base comes first: merge BASE --adapter ADAPTER")),
        }
    }

    fn check_structure(&mut self, weighted: Weighted<'_>) -> Result<()> {
        let Some(wanted) = &weighted.adapter.base().structure else { return Ok(()) };
        let found = self.base.structure_root();
        if *wanted == found {
            return Ok(());
        }
        let message = format!("different base: the adapter names one of structure {wanted:.12}…, this one has {found:.12}…");
        let diagnostic = Diagnostic::new(rules::BASE_IDENTITY, message)
            .file(self.base.path())
            .help("use the base that the adapter was made for, or pass --allow-base-mismatch");
        if self.options.allow_base_mismatch {
            self.binding.warnings.push(diagnostic);
            return Ok(());
        }
        Err(diagnostic.into())
    }

    fn check_residual(&self, weighted: Weighted<'_>) -> Result<()> {
        if weighted.adapter.replication() != self.base.replication() {
            let message = match self.base.replication().is_empty() {
                true => "the adapter belongs to a base whose layers are repeated, and numbers its layers as there",
                false => "the layers of the base are repeated as another adapter asks, and this one numbers them otherwise",
            };
            let help =
                "repeat the layers of the base first, which the program does for one adapter, or adapters of one kind, by itself";
            return Err(Error::new(rules::CONFIG_METHOD, message).file(weighted.adapter.label()).help(help));
        }
        match weighted.adapter.residual().filter(|_| !self.options.residual_base) {
            None => Ok(()),
            Some(why) if why.place().file.is_some() => Err(why.clone().into()),
            Some(why) => Err(why.clone().file(weighted.adapter.label()).into()),
        }
    }

    /// Records that the factors of a target are not applied.
    fn leave_out(&mut self, target: &Target, flag: &'static str) {
        self.binding.ignored.extend(target.factors().map(|f| Ignored { tensor: f.name().to_owned(), flag }));
    }

    /// The base tensor of an adapter name: its name in the base, and what is there (for a missing tied twin, what it is tied to).
    fn locate(&self, name: &str) -> Option<(String, TensorInfo)> {
        let name = self.renaming.apply(name, &|n| self.exists(n));
        let info = self.base.info(&name).or_else(|| tied::stored_twin(self.base, &name).and_then(|twin| self.base.info(twin)))?;
        Some((name, info.clone()))
    }

    fn insert(&mut self, name: String, contribution: Contribution, key: &str) {
        if self.binding.updates.insert(name.clone(), contribution).is_some() {
            let message = format!("two targets of the adapter land on the base tensor {name:?}");
            self.problems.push(Diagnostic::new(rules::TARGETS_UNIQUE, message).tensor(key));
        }
    }
}

/// The base has the numbers of a tensor in another tensor, where this change has no place.
fn elsewhere(tensor: &str, name: &str) -> Diagnostic {
    let message =
        format!("{tensor:?} is not in the base under that name, and what the adapter does to it has no place in what is there");
    let help = "use the base as it was saved by the version of transformers that the adapter was trained with";
    Diagnostic::new(rules::METHOD_SUPPORTED, message).tensor(name).help(help)
}
