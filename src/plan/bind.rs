//! Binding: the proof that each part of an adapter fits one tensor of a base, or every mismatch at once. Rules of
//! `spec/adapter-model.md`.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::fused::{self, Gathered, Stacked};
use super::options::{BindOptions, Weighted};
use super::quantised::{self, UNPACKED_BASE, packed_dtype};
use super::rename::{self, Renaming};
use super::shape;
use super::shape::{
    Along, Contribution, Fit, Gain, Over, Panel, contradicted_by_model, contradicts, experts_of, fit, shape_help,
};
use super::tied;
use crate::adapter::{Axis, Factor, Kind, Orientation, Rescaling, RowReplacement, Target};
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Error, Result};
use crate::limits::Limits;
use crate::rules;
use crate::tensor::{Shape, TensorInfo, TensorSource, is_plain_float};

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
    pub(super) index: usize,
    pub(super) renaming: Renaming,
    /// Base tensor of each target.
    names: HashMap<String, String>,
    /// By base tensor, sorted.
    pub(super) updates: BTreeMap<String, Contribution>,
    /// By base tensor, sorted; those that the base lacks are to be added.
    pub(super) replacements: BTreeMap<String, &'a Factor>,
    /// Base tensors that are replaced under all names that they are tied to.
    pub(super) shared: BTreeSet<String>,
    /// Rows that are replaced, by base tensor.
    pub(super) rows: BTreeMap<String, &'a RowReplacement>,
    pub(super) ignored: Vec<Ignored>,
    pub(super) warnings: Vec<Diagnostic>,
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
    fn exists(&self, name: &str) -> bool {
        let elsewhere = || fused::is_apart(self.base, name) || fused::in_stack(self.base, name).is_some();
        self.base.info(name).is_some() || tied::stored_twin(self.base, name).is_some() || elsewhere()
    }

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

    /// Exact names, then the user's prefix, then the known renamings: the one that finds every target, if only one does.
    fn choose_renaming(&mut self, targets: Vec<&str>, whole: &[&str], label: &str, limits: &Limits) -> Result<()> {
        let needed: Vec<&str> = targets.iter().copied().filter(|t| !self.may_be_missing(t)).collect();
        let found = |renaming: &Renaming| {
            let exists = |name: &str| self.exists(name);
            needed.iter().filter(|name| exists(&renaming.apply(name, &exists))).count()
        };
        let candidates = self.candidates();
        if needed.is_empty() {
            // Replacements alone: they carry no proof of a renaming, so they are taken by their exact names or the user's prefix.
            self.adopt(candidates.into_iter().next().unwrap_or_else(Renaming::identity));
            return Ok(());
        }
        let whole_found = |renaming: &Renaming| {
            let exists = |name: &str| self.exists(name);
            whole.iter().filter(|name| exists(&renaming.apply(name, &exists))).count()
        };
        let mut fitting: Vec<Renaming> = candidates.into_iter().filter(|c| found(c) == needed.len()).collect();
        let most = fitting.iter().map(whole_found).max().unwrap_or(0);
        fitting.retain(|renaming| whole_found(renaming) == most);
        if fitting.first().is_some_and(|first| first.is_identity()) {
            fitting.truncate(1);
        }
        let names = || needed.iter().chain(whole);
        let distinct: HashSet<Vec<String>> =
            fitting.iter().map(|renaming| names().map(|name| renaming.apply(name, &|n| self.exists(n))).collect()).collect();
        match (fitting.into_iter().next(), distinct.len()) {
            (Some(renaming), 1) => {
                self.adopt(renaming);
                Ok(())
            }
            (Some(_), _) => {
                Err(Error::new(rules::ONE_RENAMING, format!("{} renamings fit every target: ambiguous", distinct.len()))
                    .file(label)
                    .help("choose one with --prefix FROM=TO"))
            }
            (None, _) => self.explain_missing(&needed, label, limits),
        }
    }

    /// The renamings that may be used, in the order in which they are tried: the user's alone, or exact names and the known ones.
    fn candidates(&self) -> Vec<Renaming> {
        match &self.options.prefix {
            Some((from, to)) => vec![Renaming { from: from.clone(), to: to.clone(), family: None, asked: true }],
            None => std::iter::once(Renaming::identity()).chain(rename::known()).collect(),
        }
    }

    fn adopt(&mut self, renaming: Renaming) {
        self.renaming = renaming.clone();
        self.binding.renaming = renaming;
    }

    fn may_be_missing(&self, name: &str) -> bool {
        self.base.info(name).is_none() && self.options.allow_missing.iter().any(|pattern| rename::matches(pattern, name))
    }

    /// No renaming finds every target. Says which are missing under the best one, with the nearest names and the way out.
    fn explain_missing(&mut self, needed: &[&str], label: &str, limits: &Limits) -> Result<()> {
        let exists = |name: &str| self.exists(name);
        let score = |renaming: &Renaming| needed.iter().filter(|n| exists(&renaming.apply(n, &exists))).count();
        let candidates = self.candidates();
        // The first of the best: exact names win a draw.
        let best = candidates.iter().rev().max_by_key(|c| score(c)).cloned().unwrap_or_else(Renaming::identity);
        let missing: Vec<&str> = needed.iter().copied().filter(|n| !exists(&best.apply(n, &exists))).collect();
        if missing.len() == needed.len() {
            return Err(self.nothing_found(needed, label));
        }
        let mut problems = Vec::new();
        for name in missing.iter().take(limits.problems_shown) {
            problems.push(self.one_missing(name, &best).file(label));
        }
        if missing.len() > limits.problems_shown {
            let message = format!("and {} more of {} targets are missing", missing.len() - limits.problems_shown, needed.len());
            problems.push(Diagnostic::new(rules::EVERY_TARGET, message).file(label));
        }
        Error::check(problems)
    }

    fn one_missing(&self, name: &str, renaming: &Renaming) -> Diagnostic {
        let wanted = renaming.apply(name, &|n| self.exists(n));
        if let Some(packed) = packed_form(self.base, &wanted) {
            return packed;
        }
        let nearest = rename::nearest(&wanted, self.base.names()).map_or(String::new(), |n| format!("; nearest is {n:?}"));
        Diagnostic::new(rules::EVERY_TARGET, format!("adapter target {wanted:?} is not in the base{nearest}"))
            .tensor(name)
            .help(format!("use the base that the adapter was trained on, or leave it out by name: --allow-missing {name:?}"))
    }

    fn nothing_found(&self, needed: &[&str], label: &str) -> Error {
        if let Some(packed) = needed.first().and_then(|name| packed_form(self.base, name)) {
            return packed.file(self.base.path()).into();
        }
        let show = |names: Vec<&str>| names.iter().map(|n| format!("{n:?}")).collect::<Vec<_>>().join(", ");
        if let (Some((from, to)), Some(asked)) = (&self.options.prefix, self.candidates().first()) {
            let renamed: Vec<String> = needed.iter().take(3).map(|n| asked.apply(n, &|n| self.exists(n))).collect();
            let message = format!("no target is in the base under --prefix {from:?}={to:?}: {renamed:?}");
            let help = "leave out --prefix to have exact names and the known renamings tried";
            return Error::new(rules::SOME_TARGET, message).file(label).help(help);
        }
        let first = needed.first().copied().unwrap_or_default();
        let near = rename::nearest(first, self.base.names()).unwrap_or_default();
        let shared = rename::common_suffix(first, near);
        let cut = |name: &str| name.get(..(name.len() + 1).saturating_sub(shared)).unwrap_or_default().to_owned();
        let mut theirs: Vec<&str> = self.base.names().collect();
        theirs.sort_by_key(|name| std::cmp::Reverse((*name == near, rename::common_suffix(first, name))));
        theirs.truncate(3);
        let suffix = near.get((near.len() + 1).saturating_sub(shared)..).unwrap_or_default();
        let message = format!(
            "no target of the adapter is in the base. adapter: {}; base: {}; longest common suffix: {suffix:?}",
            show(needed.iter().copied().take(3).collect()),
            show(theirs)
        );
        let help = if rename::tells_a_layer(suffix) {
            format!("if they are the same layers: --prefix {:?}={:?}", cut(first), cut(near))
        } else {
            "this is not the base that the adapter was trained on".to_owned()
        };
        Error::new(rules::SOME_TARGET, message).file(label).help(help)
    }

    fn bind_targets(&mut self, weighted: Weighted<'a>) {
        let adapter = weighted.adapter;
        let contradicted =
            adapter.targets().iter().find(|t| self.locate(&t.tensor).is_some_and(|(_, info)| contradicts(t, &info.shape)));
        if let Some(target) = contradicted {
            let message = format!("the declared orientation does not fit {:?}; the shape decides", target.tensor);
            self.binding.warnings.push(Diagnostic::new(rules::ORIENTATION, message).tensor(target.a.name()));
        }
        let mut gathered = Gathered::default();
        for target in adapter.targets() {
            let scale = weighted.weight * target.scaling.effective();
            if weighted.weight == 0.0 {
                self.leave_out(target, "weight 0");
                continue;
            }
            if target.magnitude.is_some() && weighted.weight != 1.0 {
                let message = format!(
                    "{:?} has magnitudes (DoRA), and no part of such an update is a multiple of it: weight {} has no meaning",
                    target.tensor, weighted.weight
                );
                let help = "give the adapter the weight 1";
                self.problems.push(Diagnostic::new(rules::METHOD_SUPPORTED, message).tensor(target.a.name()).help(help));
                continue;
            }
            if scale == 0.0 || !scale.is_finite() {
                let message = format!(
                    "weight {} times scale {} of {:?} is {scale}",
                    weighted.weight,
                    target.scaling.effective(),
                    target.tensor
                );
                self.problems.push(Diagnostic::new(rules::ALPHA_SANE, message).tensor(target.a.name()));
                continue;
            }
            if self.may_be_missing(&target.tensor) && self.locate(&target.tensor).is_none() {
                self.leave_out(target, "--allow-missing");
                continue;
            }
            let named = self.renaming.apply(&target.tensor, &|n| self.exists(n));
            if self.base.info(&named).is_none() {
                if let Some(split) = fused::split(self.base, target, &named) {
                    self.bind_split(target, scale, split);
                    continue;
                }
                if let Some(stack) = gathered.take(self.base, &named, target) {
                    self.binding.names.insert(target.tensor.clone(), stack);
                    continue;
                }
            }
            let doubtful = contradicted.is_some() || contradicted_by_model(target, self.base.config().model_type.as_deref());
            self.bind_weight(target, scale, doubtful);
            self.bind_bias(target, scale);
        }
        for stacked in gathered.stacked(self.base) {
            match stacked {
                Ok(Stacked { target, scale, tensors }) => {
                    self.bind_part(&target, weighted.weight * scale, &tensors);
                }
                Err(problem) => self.problems.push(problem),
            }
        }
    }

    /// Binds what a stack of experts is to a base that has them one by one.
    fn bind_split(&mut self, target: &Target, scale: f64, split: Result<Vec<Target>, Diagnostic>) {
        match split {
            Ok(targets) => {
                let first = targets.first().map(|part| part.tensor.clone()).unwrap_or_default();
                self.binding.names.insert(target.tensor.clone(), first);
                targets.iter().for_each(|part| self.bind_part(part, scale, &tensors_of(target)));
            }
            Err(problem) => self.problems.push(problem),
        }
    }

    /// Binds a target that is made of `tensors` of the adapter and named as the base names it.
    fn bind_part(&mut self, target: &Target, scale: f64, tensors: &[String]) {
        let Some(info) = self.base.info(&target.tensor).cloned() else { return };
        let name = target.tensor.clone();
        if let Err(problem) = quantised::accept(self.base, &name, &info) {
            return self.problems.push(problem);
        }
        match fit(target, &info.shape, &name, false, self.of_experts()) {
            Ok(fit) => {
                let contribution = self.contribution(target, scale, fit, tensors.to_vec());
                self.insert(name, contribution, target.a.name());
            }
            Err(problem) => self.problems.push(problem),
        }
    }

    /// How the base's model stores stacks of experts, if it says which model it is.
    fn of_experts(&self) -> Option<Orientation> {
        let config = self.base.config();
        config.text_model_type.as_deref().or(config.model_type.as_deref()).map(experts_of)
    }

    fn contribution(&self, target: &Target, scale: f64, fit: Fit, tensors: Vec<String>) -> Contribution {
        Contribution {
            adapter: self.binding.index,
            tensors,
            left: fit.left,
            right: fit.right,
            rank: target.scaling.rank,
            scale,
            lead: fit.lead,
            gain: target.magnitude.clone().map(|by| Gain { by, along: fit.outputs, over: Over::Norm }),
            rounded_apart: matches!(target.kind, Kind::Embedding | Kind::Experts(_)),
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

    fn bind_weight(&mut self, target: &'a Target, scale: f64, contradicted: bool) {
        let Some((name, info)) = self.locate(&target.tensor) else {
            return self.problems.push(elsewhere(&target.tensor, target.a.name()));
        };
        if let Some(problem) = tied::problem(self.base, &name, self.options.untie) {
            return self.problems.push(problem.tensor(target.a.name()));
        }
        if let Err(problem) = quantised::accept(self.base, &name, &info) {
            return self.problems.push(problem);
        }
        // A full tensor takes the place of the base's first, so the update has its shape.
        let shape = self.binding.replacements.get(&name).map_or(&info.shape, |with| &with.info().shape);
        let cut = match cut(target, shape) {
            Some(cut) => cut,
            None => return self.problems.push(too_narrow(target, &name, shape)),
        };
        let target = &*cut;
        match fit(target, shape, &name, contradicted, self.of_experts()) {
            Ok(fit) => {
                self.binding.names.insert(target.tensor.clone(), name.clone());
                let contribution = self.contribution(target, scale, fit, tensors_of(target));
                self.insert(name, contribution, target.a.name());
            }
            Err(problem) => self.problems.push(problem),
        }
    }

    /// Multipliers: all of them or, at weight 0, none; anything between is no multiple of what was trained.
    fn bind_rescalings(&mut self, weighted: Weighted<'a>) {
        for rescaling in weighted.adapter.rescalings() {
            let by = &rescaling.by;
            if weighted.weight == 0.0 {
                self.binding.ignored.push(Ignored { tensor: by.name().to_owned(), flag: "weight 0" });
            } else if weighted.weight != 1.0 {
                let message = format!("{:?} multiplies a base tensor, which weight {} cannot scale", by.name(), weighted.weight);
                let help = "give the adapter the weight 1";
                self.problems.push(Diagnostic::new(rules::METHOD_SUPPORTED, message).tensor(by.name()).help(help));
            } else if rescaling.if_there && self.locate(&rescaling.tensor).is_none() {
                continue;
            } else if self.may_be_missing(&rescaling.tensor) && self.locate(&rescaling.tensor).is_none() {
                self.binding.ignored.push(Ignored { tensor: by.name().to_owned(), flag: "--allow-missing" });
            } else {
                self.bind_rescaling(rescaling);
            }
        }
    }

    fn bind_rescaling(&mut self, rescaling: &'a Rescaling) {
        let by = &rescaling.by;
        let Some((name, info)) = self.locate(&rescaling.tensor) else {
            return self.problems.push(elsewhere(&rescaling.tensor, by.name()));
        };
        if let Some(problem) = tied::problem(self.base, &name, self.options.untie) {
            return self.problems.push(problem.tensor(by.name()));
        }
        if let Err(problem) = quantised::accept(self.base, &name, &info) {
            return self.problems.push(problem);
        }
        let model = self.base.config().model_type.as_deref();
        let along = match along(rescaling, &info.shape, model) {
            Ok(along) => along,
            Err(problem) => return self.problems.push(problem),
        };
        let contribution = Contribution {
            adapter: self.binding.index,
            tensors: vec![by.name().to_owned()],
            left: Panel::One,
            right: Panel::One,
            rank: 0,
            scale: 1.0,
            lead: 1,
            gain: Some(Gain { by: by.clone(), along, over: Over::One }),
            rounded_apart: false,
        };
        self.insert(name, contribution, by.name());
    }

    fn bind_rows(&mut self, weighted: Weighted<'a>) {
        for rows in weighted.adapter.rows() {
            let with = &rows.with;
            let refuse = |rule, message: String| Diagnostic::new(rule, message).tensor(with.name());
            if self.options.skip_replacements || weighted.weight == 0.0 {
                let flag = if self.options.skip_replacements { "--skip-replacements" } else { "weight 0" };
                self.binding.ignored.push(Ignored { tensor: with.name().to_owned(), flag });
                continue;
            }
            if weighted.weight != 1.0 {
                let message =
                    format!("{:?} replaces rows of a base tensor, which weight {} cannot scale", with.name(), weighted.weight);
                let help = "give the adapter the weight 1, or leave out its full tensors with --skip-replacements";
                self.problems.push(refuse(rules::METHOD_SUPPORTED, message).help(help));
                continue;
            }
            // PEFT replaces the rows under all names that the embedding is tied to, and stores them once.
            let Some((name, info)) = self.locate(&rows.tensor) else {
                self.problems.push(elsewhere(&rows.tensor, with.name()));
                continue;
            };
            let name = tied::stored_twin(self.base, &name).map_or(name, str::to_owned);
            if !is_plain_float(info.dtype) {
                self.problems.push(packed_dtype(&name, &info, self.base));
                continue;
            }
            let (dims, rows_of) = (info.shape.dims(), with.info().shape.dims());
            if dims.get(1..) != rows_of.get(1..) {
                let message = format!("rows for {name:?} are {} but the base has {}", with.info().shape, info.shape);
                self.problems.push(refuse(rules::REPLACEMENT_SHAPE, message));
                continue;
            }
            if let Some(row) = rows.rows.iter().find(|row| dims.first().is_none_or(|count| **row >= *count)) {
                let message = format!("row {row} of {name:?} is replaced, but the base has {}", info.shape);
                let help = "the vocabulary was resized: use the base that the adapter was trained on, resized in the same way";
                self.problems.push(refuse(rules::REPLACEMENT_SHAPE, message).help(help));
                continue;
            }
            let changed = self.binding.updates.contains_key(&name) || self.binding.replacements.contains_key(&name);
            if changed || self.binding.rows.insert(name.clone(), rows).is_some() {
                let message = format!("rows of {name:?} are replaced, and the same adapter changes all of it");
                self.problems.push(refuse(rules::TARGETS_UNIQUE, message));
            }
        }
    }

    fn bind_bias(&mut self, target: &'a Target, scale: f64) {
        let Some(bias) = &target.bias else { return };
        let Some((name, info)) = self.locate(&bias.tensor) else {
            let message = format!("the adapter updates the bias {:?}, which the base does not have", bias.tensor);
            let help = "PEFT refuses this merge too; use the base that the adapter was trained on";
            return self.problems.push(Diagnostic::new(rules::BIAS_PRESENT, message).tensor(bias.delta.name()).help(help));
        };
        if let Some(problem) = tied::problem(self.base, &name, self.options.untie) {
            return self.problems.push(problem.tensor(bias.delta.name()));
        }
        if info.shape != bias.delta.info().shape {
            let message = format!("bias update of {name:?} is {} but the base has {}", bias.delta.info().shape, info.shape);
            return self.problems.push(Diagnostic::new(rules::SHAPE_FITS, message).tensor(bias.delta.name()));
        }
        if !is_plain_float(info.dtype) {
            return self.problems.push(packed_dtype(&name, &info, self.base));
        }
        let contribution = Contribution {
            adapter: self.binding.index,
            tensors: vec![bias.delta.name().to_owned()],
            left: Panel::One,
            right: Panel::Direct(bias.delta.clone()),
            rank: 1,
            scale,
            lead: 1,
            gain: None,
            rounded_apart: false,
        };
        self.insert(name, contribution, bias.delta.name());
    }

    fn insert(&mut self, name: String, contribution: Contribution, key: &str) {
        if self.binding.updates.insert(name.clone(), contribution).is_some() {
            let message = format!("two targets of the adapter land on the base tensor {name:?}");
            self.problems.push(Diagnostic::new(rules::TARGETS_UNIQUE, message).tensor(key));
        }
    }

    /// Is it an embedding or an output layer of which only the numbers of rows differ, and may they?
    fn may_be_resized(&self, name: &str, base: &Shape, with: &Shape) -> bool {
        self.options.resize_vocabulary
            && is_vocabulary(name)
            && base.matrix().zip(with.matrix()).is_some_and(|(base, with)| base.1 == with.1)
    }

    fn bind_replacements(&mut self, weighted: Weighted<'a>) {
        for replacement in weighted.adapter.replacements() {
            let with = &replacement.with;
            if self.options.skip_replacements {
                self.binding.ignored.push(Ignored { tensor: with.name().to_owned(), flag: "--skip-replacements" });
                continue;
            }
            if weighted.weight == 0.0 {
                self.binding.ignored.push(Ignored { tensor: with.name().to_owned(), flag: "weight 0" });
                continue;
            }
            if weighted.weight != 1.0 {
                let message =
                    format!("{:?} takes the place of a base tensor, which weight {} cannot scale", with.name(), weighted.weight);
                let help = "give the adapter the weight 1, or leave out its full tensors with --skip-replacements";
                self.problems.push(Diagnostic::new(rules::METHOD_SUPPORTED, message).tensor(with.name()).help(help));
                continue;
            }
            let located = self.locate(&replacement.tensor);
            let name = located
                .as_ref()
                .map_or_else(|| self.renaming.apply(&replacement.tensor, &|n| self.exists(n)), |(name, _)| name.clone());
            // What is shared changes under all of its names, and is stored under one.
            let shared = replacement.shared && self.base.tied(&name).is_some();
            if let Some(problem) = tied::problem(self.base, &name, self.options.untie).filter(|_| !shared) {
                self.problems.push(problem.tensor(with.name()));
                continue;
            }
            // Untied, each name has the copy that was saved under it, if one was.
            let twin = tied::stored_twin(self.base, &name).filter(|_| shared);
            let both = |twin: &str| {
                let other = weighted.adapter.replacements().iter().filter(|other| other.tensor != replacement.tensor);
                other.filter_map(|other| self.locate(&other.tensor)).any(|(other, _)| other == twin)
            };
            let name = match twin.filter(|twin| !(self.options.untie && both(twin))) {
                Some(twin) => twin.to_owned(),
                None => name,
            };
            match located {
                Some((_, info))
                    if info.shape != with.info().shape && !self.may_be_resized(&name, &info.shape, &with.info().shape) =>
                {
                    let pair = |s: &Shape| s.matrix().unwrap_or((0, 0));
                    let message = format!("replacement of {name:?} is {} but the base has {}", with.info().shape, info.shape);
                    let help = shape_help(pair(&with.info().shape), pair(&info.shape));
                    self.problems.push(Diagnostic::new(rules::REPLACEMENT_SHAPE, message).tensor(with.name()).help(help));
                    continue;
                }
                Some((_, info)) if !is_plain_float(info.dtype) => {
                    self.problems.push(packed_dtype(&name, &info, self.base));
                    continue;
                }
                None if !self.options.add_new_tensors => {
                    let message = format!("the adapter brings {name:?}, which the base does not have");
                    let help = "add it with --add-new-tensors (a head that was trained with the adapter), or leave out all full tensors with --skip-replacements";
                    self.problems.push(Diagnostic::new(rules::NEW_TENSOR, message).tensor(with.name()).help(help));
                    continue;
                }
                _ => {}
            }
            if replacement.shared {
                self.binding.shared.insert(name.clone());
            }
            if self.binding.replacements.insert(name.clone(), with).is_some() {
                let message = format!("two replacements land on the base tensor {name:?}");
                self.problems.push(Diagnostic::new(rules::TARGETS_UNIQUE, message).tensor(with.name()));
            }
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

/// Has the tensor a row for each token?
pub(super) fn is_vocabulary(name: &str) -> bool {
    let leaf = name.strip_suffix(".weight").and_then(|module| module.rsplit('.').next());
    leaf.is_some_and(|leaf| VOCABULARIES.contains(&leaf))
}

/// Modules with a row for each token.
const VOCABULARIES: &[&str] =
    &["embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared", "tok_embeddings", "output"];

/// The names of the tensors that change the weight of a target.
fn tensors_of(target: &Target) -> Vec<String> {
    [Some(&target.a), Some(&target.b), target.magnitude.as_ref()].into_iter().flatten().map(|f| f.name().to_owned()).collect()
}

/// What the factors of a rescaling belong to in a base tensor of this shape.
fn along(rescaling: &Rescaling, shape: &Shape, model: Option<&str>) -> Result<Along, Diagnostic> {
    let count = rescaling.by.info().shape.elements();
    let refuse = |rule, message: String| Diagnostic::new(rule, message).tensor(rescaling.by.name());
    let dim = |i: usize| shape.dims().get(i).copied();
    let is_output = rescaling.axis == Axis::Output;
    let (rows, cols) = (dim(0) == Some(count), dim(1) == Some(count));
    let square = || {
        let message = format!("{:?} is square, and which way round it is stored is not declared", rescaling.tensor);
        Err(refuse(rules::ORIENTATION, message).help("state it: --fan-in-fan-out true for GPT-2's Conv1D, false for Linear"))
    };
    let by_shape = |fits: bool, along| if fits { Some(along) } else { None };
    let found = match (shape.dims().len(), is_output) {
        // A bias has outputs alone.
        (1, true) => by_shape(rows, Along::Cols),
        (0 | 1, _) => None,
        // Convolutions store outputs first, inputs second, whatever a config says of linear layers.
        (3.., true) => by_shape(rows, Along::Rows),
        (3.., false) => by_shape(cols, Along::Cols),
        (2, _) => match (rows, cols, rescaling.orientation) {
            (true, true, Orientation::Undeclared) => return square(),
            (true, true, Orientation::OutIn) if model.is_some_and(shape::is_conv1d) => return square(),
            (true, true, orientation) => {
                Some(if is_output == (orientation == Orientation::OutIn) { Along::Rows } else { Along::Cols })
            }
            (true, false, _) => Some(Along::Rows),
            (false, true, _) => Some(Along::Cols),
            (false, false, _) => None,
        },
    };
    found.ok_or_else(|| {
        let what = if is_output { "output" } else { "input" };
        let (name, tensor) = (rescaling.by.name(), &rescaling.tensor);
        let message = format!("{name:?} has {count} factors, one for each {what}, but the base has {tensor:?} {shape}");
        refuse(rules::SHAPE_FITS, message)
    })
}

/// A target whose A is shared, with as much of it as a base tensor of this shape needs; `None` if there is not so much.
fn cut<'t>(target: &'t Target, shape: &Shape) -> Option<Cow<'t, Target>> {
    let Kind::Shared(orientation) = target.kind else { return Some(Cow::Borrowed(target)) };
    let (rows, cols) = shape.matrix()?;
    let ((out, width), rank) = (target.out_in(), target.scaling.rank);
    // The other side has to be the number of outputs.
    let inner = if rows == out && (cols != out || orientation != Orientation::InOut) { cols } else { rows };
    let a = (inner <= width).then(|| fused::view(&target.a, [rank, inner], 0, width))??;
    Some(Cow::Owned(Target { a, kind: Kind::Linear(orientation), ..target.clone() }))
}

fn too_narrow(target: &Target, name: &str, shape: &Shape) -> Diagnostic {
    let (out, width) = target.out_in();
    let message = format!("{name:?} has {out} outputs and at most {width} inputs in the adapter, but the base has {shape}");
    let help = "this is not the base that the adapter was trained on";
    Diagnostic::new(rules::SHAPE_FITS, message).tensor(target.b.name()).help(help)
}

/// Siblings that tell that a weight is stored packed, with the scheme that packs it so.
const PACKED: &[(&str, &str)] = &[
    ("qweight", "GPTQ or AWQ"),
    ("weight_packed", "compressed-tensors"),
    ("weight.absmax", "bitsandbytes"),
    ("weight_blocks", "MXFP4"),
    ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
];

/// The target is not there, but its packed form is.
fn packed_form(base: &Checkpoint, name: &str) -> Option<Diagnostic> {
    let stem = name.strip_suffix("weight")?;
    let (suffix, scheme) = PACKED.iter().find(|(suffix, _)| base.info(&format!("{stem}{suffix}")).is_some())?;
    let message = format!("the base holds {:?}: it is quantised ({scheme}) and cannot be merged into", format!("{stem}{suffix}"));
    Some(Diagnostic::new(rules::BASE_DTYPE, message).tensor(name).help(UNPACKED_BASE))
}
