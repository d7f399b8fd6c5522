//! From tensor names and config to an [`Adapter`]. Every tensor ends in exactly one place: a factor, a bias update, a replacement,
//! or a problem; and all problems are reported together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::config::PeftConfig;
use super::keys::{self, Key, PREFIX, Role};
use super::methods::{self, Method, variant};
use super::patterns::{Modules, ends};
use super::place::{self, Place};
use super::scaling;
use super::{experts, full};
use crate::adapter::{
    Adapter, AdapterParts, BaseIdentity, BiasDelta, Factor, Kind, Orientation, Replacement, RowReplacement, Scaling, ScalingRule,
    Target,
};
use crate::dialect::foreign;
use crate::error::{Diagnostic, Error, Result};
use crate::limits::Limits;
use crate::rules;
use crate::tensor::{Derived, TensorSource, read_all};

/// What the caller states in place of the config.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct PeftOptions {
    /// Alpha of every module, for adapters without a config.
    pub(crate) alpha: Option<f64>,
    /// Scaling rule of every module, for adapters without a config. Default [`ScalingRule::Standard`].
    pub(crate) rule: Option<ScalingRule>,
    /// Output projections of `nn.MultiheadAttention` get their update twice, as PEFT up to 0.21.2 gives it in training and merging (PR 3774).
    pub(crate) attention_twice: bool,
    /// The order in which modules register the parameters that were adapted, for modules that are not known.
    pub(crate) parameter_order: Vec<String>,
    /// How stacks of experts lie; overrides what the version of PEFT tells.
    pub(crate) expert_axes: Option<Orientation>,
    /// Orientation of every linear layer; overrides the config, whose field PEFT itself corrects by the type of the layer.
    pub(crate) orientation: Option<Orientation>,
}

/// Reads the adapter in `source`.
///
/// # Errors
/// `P-018` or `A-029` if the file is something else; otherwise every broken rule among `P-008` to `P-013`, `P-017` and those of
/// [`Adapter::new`], at once. `U-001` if `options` state what the config states too.
pub(crate) fn read(
    source: Arc<dyn TensorSource>,
    config: Option<&PeftConfig>,
    options: &PeftOptions,
    limits: &Limits,
) -> Result<Adapter> {
    let label = source.label().to_path_buf();
    let names: Vec<&str> = source.names().collect();
    if let Some(problem) = foreign::recognise(&names) {
        return Err(problem.file(&label).into());
    }
    if config.is_some() && (options.alpha.is_some() || options.rule.is_some()) {
        let message = "alpha and scaling rule are stated by adapter_config.json, and cannot be given as well";
        return Err(Error::new(rules::ARGUMENT, message).file(&label).help("edit the config if it is wrong"));
    }
    let mut reader = Reader { source: &source, problems: Vec::new(), warnings: Vec::new() };
    let method = config.map_or(Method::Lora, |config| config.method);
    let methods::Sorted { modules: parts, others: names, problems } = methods::sorted(method, &names);
    reader.problems.extend(problems);
    let keys: Vec<Key<'_>> = names.iter().map(|name| keys::parse(name, &|n| source.info(n).is_some())).collect();
    reader.check_prefix(&keys);
    reader.check_adapter_names(&keys);
    let modules = reader.group(&keys);
    if let Some(((path, _), _)) = modules.first_key_value().filter(|_| method != Method::Lora) {
        let message = format!("module {path:?} has factors of LoRA, which peft_type does not announce");
        let help = "PEFT would ignore them in silence; this is the config of another adapter, or two were put into one file";
        reader.problem(Diagnostic::new(rules::KEY_GRAMMAR, message).tensor(*path).help(help));
    }
    let mut targets = reader.targets(&modules, config, options, limits);
    let mut rescalings = Vec::new();
    if let Some(config) = config.filter(|_| !parts.is_empty()) {
        let made = reader.made(config, &parts, options, limits);
        targets.extend(made.targets);
        rescalings = made.rescalings;
    }
    let replacements = reader.replacements(&keys, &modules, config);
    let rows = reader.rows(&keys, config);
    reader.check_tying(&targets, &replacements, config);
    let Reader { problems, warnings, .. } = reader;
    let parts = AdapterParts {
        label: label.display().to_string(),
        dialect: "peft",
        targets,
        replacements,
        rows,
        rescalings,
        replication: config.map(|config| config.replication.clone()).unwrap_or_default(),
        residual: config.and_then(|config| config.residual.clone()),
        base: BaseIdentity { name: config.and_then(|c| c.base_name.clone()), ..BaseIdentity::default() },
        origin_config: config.map(|c| c.text.clone()),
        warnings: config.map(|c| c.warnings.clone()).into_iter().flatten().chain(warnings).collect(),
        ..AdapterParts::default()
    };
    let mut problems = problems;
    let whole = parts.replacements.len() + parts.rows.len() + parts.rescalings.len();
    let refused_all = parts.targets.is_empty() && whole == 0 && !problems.is_empty();
    match Adapter::new(parts, limits) {
        Ok(adapter) if problems.is_empty() => return Ok(adapter),
        Err(error) if !refused_all => problems.extend(error.into_diagnostics()),
        _ => {}
    }
    let placed = problems.into_iter().map(|p| if p.place().file.is_some() { p } else { p.file(&label) });
    match Error::check(placed.collect()) {
        Err(error) => Err(error),
        // Not reached: there are problems on every way here. Said as an error rather than as a panic.
        Ok(()) => Err(Error::new(rules::ADAPTER_NOT_EMPTY, "no LoRA pairs in the file: nothing to apply").file(&label)),
    }
}

/// The tensors of one module.
#[derive(Default)]
struct Module<'a> {
    a: Option<&'a Key<'a>>,
    b: Option<&'a Key<'a>>,
    bias_delta: Option<&'a Key<'a>>,
    magnitude: Option<&'a Key<'a>>,
    diagonal: Option<&'a Key<'a>>,
}

/// Modules with a LoRA, by path and by whether they are embeddings.
type ByModule<'a> = BTreeMap<(&'a str, bool), Module<'a>>;

struct Reader<'s> {
    source: &'s Arc<dyn TensorSource>,
    problems: Vec<Diagnostic>,
    warnings: Vec<Diagnostic>,
}

impl Reader<'_> {
    fn problem(&mut self, diagnostic: Diagnostic) {
        self.problems.push(diagnostic);
    }

    /// All names with PEFT's prefix, or none. What is refused by name needs no second reason.
    fn check_prefix(&mut self, keys: &[Key<'_>]) {
        let bare = keys.iter().filter(|key| !key.prefixed && !matches!(key.role, Role::Refused(..)));
        let bare: Vec<&str> = bare.map(|key| key.name).collect();
        let Some(first) = bare.first() else { return };
        if bare.len() == keys.len() {
            let message = format!("no tensor name begins with {PREFIX}; names are taken as paths in the base model");
            let help = "PEFT would not find the tensors; save the adapter with save_pretrained";
            self.warnings.push(Diagnostic::new(rules::KEY_GRAMMAR, message).tensor(*first).help(help));
            return;
        }
        for name in bare {
            let message = format!("{name:?} does not begin with {PREFIX}, but other names of the file do");
            self.problem(Diagnostic::new(rules::KEY_GRAMMAR, message).tensor(name));
        }
    }

    /// Names of factors hold the same adapter name, or none does.
    fn check_adapter_names(&mut self, keys: &[Key<'_>]) {
        let mut seen: BTreeMap<&str, &str> = BTreeMap::new();
        let factors = keys.iter().filter(|key| !matches!(key.role, Role::Refused(..) | Role::Unknown));
        for key in factors {
            // A full tensor or a bias of the base has no adapter name even in files that keep it elsewhere.
            match (key.adapter, key.role) {
                (Some(adapter), _) => seen.entry(adapter).or_insert(key.name),
                (None, Role::Full | Role::BaseBias | Role::BaseWeight) => continue,
                (None, _) => seen.entry("").or_insert(key.name),
            };
        }
        if seen.len() < 2 {
            return;
        }
        let list: Vec<String> = seen
            .iter()
            .map(|(adapter, name)| match *adapter {
                "" => format!("none (as in {name:?})"),
                adapter => format!("{adapter:?} (as in {name:?})"),
            })
            .collect();
        let message = format!("the file holds several adapters, by the names in its tensors: {}", list.join(", "));
        let help = "save each adapter on its own (save_pretrained with selected_adapters)";
        self.problem(Diagnostic::new(rules::ONE_ADAPTER, message).help(help));
    }

    /// Sorts the factors by module; what is no factor and cannot be a full tensor is a problem.
    fn group<'a>(&mut self, keys: &'a [Key<'a>]) -> ByModule<'a> {
        let mut modules = ByModule::new();
        let embeddings: BTreeSet<&str> =
            keys.iter().filter(|key| key.role == Role::EmbeddingA).map(|key| key.path.as_str()).collect();
        for key in keys {
            // Magnitudes have one name for layers of all kinds.
            let is_embedding = |path: &str| embeddings.contains(path);
            let embedding = match key.role {
                Role::EmbeddingA | Role::EmbeddingB => true,
                Role::Magnitude => is_embedding(&key.path),
                _ => false,
            };
            let module = || (key.path.as_str(), embedding);
            let slot = match key.role {
                Role::A | Role::EmbeddingA => &mut modules.entry(module()).or_default().a,
                Role::B | Role::EmbeddingB => &mut modules.entry(module()).or_default().b,
                Role::BiasDelta => &mut modules.entry(module()).or_default().bias_delta,
                Role::Magnitude => &mut modules.entry(module()).or_default().magnitude,
                Role::BaseBias | Role::BaseWeight | Role::Full | Role::Rows => continue,
                Role::Training(what) => {
                    let message = format!("{:?} is {what}, and is left out, as PEFT leaves it out when it merges", key.name);
                    self.warnings.push(Diagnostic::new(rules::KEY_GRAMMAR, message).tensor(key.name));
                    continue;
                }
                Role::Diagonal => &mut modules.entry(module()).or_default().diagonal,
                Role::Refused(what, way_out) => {
                    let message = format!("{:?} is {what}; it is not applied by this version", key.name);
                    self.problem(Diagnostic::new(rules::METHOD_SUPPORTED, message).tensor(key.name).help(way_out));
                    continue;
                }
                Role::Unknown => {
                    let message = format!("{:?} is not a name that PEFT writes for LoRA", key.name);
                    let help = "PEFT would ignore it in silence; remove it, or save the adapter with save_pretrained";
                    self.problem(Diagnostic::new(rules::KEY_GRAMMAR, message).tensor(key.name).help(help));
                    continue;
                }
            };
            if let Some(first) = slot.replace(key) {
                let message = format!("{:?} and {:?} are the same factor of module {:?}", first.name, key.name, key.path);
                let help = "the file holds two adapters, or one under two names; save one on its own";
                self.problem(Diagnostic::new(rules::ONE_ADAPTER, message).tensor(key.name).help(help));
            }
        }
        modules
    }

    /// What the tensors of a method that is not LoRA amount to.
    fn made(
        &mut self,
        config: &PeftConfig,
        parts: &BTreeMap<String, BTreeMap<&str, &str>>,
        options: &PeftOptions,
        limits: &Limits,
    ) -> methods::Made {
        let paths: Vec<&str> = parts.keys().map(String::as_str).filter(|path| !path.is_empty()).collect();
        let placed = vec![None; paths.len()];
        let resolved = self.resolve(config, &paths, &placed, limits);
        let scales = |module: &str| {
            let at = paths.iter().position(|path| *path == module);
            at.and_then(|at| resolved.get(at)).map_or(1.0, |resolved| resolved.scaling.effective())
        };
        let config = PeftConfig { orientation: options.orientation.unwrap_or(config.orientation), ..config.clone() };
        let mut made = methods::make(&config, parts, self.source, &scales);
        self.problems.append(&mut made.problems);
        self.warnings.append(&mut made.warnings);
        made
    }

    fn targets(
        &mut self,
        modules: &ByModule<'_>,
        config: Option<&PeftConfig>,
        options: &PeftOptions,
        limits: &Limits,
    ) -> Vec<Target> {
        let paths: Vec<&str> = modules.keys().map(|(path, _)| *path).collect();
        let places = place::places(&paths, config, &options.parameter_order, &mut self.problems);
        let placed: Vec<Option<&Place>> = paths.iter().map(|path| places.get(path)).collect();
        // Of another method, the patterns are about modules that are not here.
        let own = config.filter(|config| config.method == Method::Lora);
        let resolved = own.map(|config| self.resolve(config, &paths, &placed, limits));
        if resolved.is_none() && options.alpha.is_none() && !modules.is_empty() {
            let message = "there is no adapter_config.json, so the scale of the update is not known";
            let help = "put adapter_config.json beside the weights, or state alpha: --alpha NUMBER";
            self.problem(Diagnostic::new(rules::CONFIG_PRESENT, message).help(help));
        }
        let orientation = options.orientation.or(config.map(|c| c.orientation)).unwrap_or(Orientation::Undeclared);
        let mut targets = Vec::with_capacity(modules.len());
        for (i, (&(path, embedding), module)) in modules.iter().enumerate() {
            let Some((a, b)) = self.pair(path, module) else { continue };
            let Some(place) = placed.get(i).copied().flatten() else { continue };
            let Some((a, b)) = self.written_out(path, (a, b), module.diagonal, config) else { continue };
            let stated = resolved.as_ref().and_then(|resolved| resolved.get(i));
            let scaling = match stated {
                Some(stated) => stated.scaling,
                None => Scaling {
                    rank: a.info().shape.matrix().map_or(1, |(rank, _)| rank),
                    alpha: options.alpha.unwrap_or(1.0),
                    rule: options.rule.unwrap_or(ScalingRule::Standard),
                },
            };
            let mut kind = match (embedding, a.info().shape.dims().len()) {
                (true, _) => Kind::Embedding,
                (false, 3..) => Kind::Conv,
                // Parameters are used as they are stored, whatever the layers of the model do.
                (false, _) if place.parameter || place.tensor.ends_with(".in_proj_weight") => Kind::Linear(Orientation::OutIn),
                (false, _) => Kind::Linear(orientation),
            };
            let (mut a, mut b, mut scaling) = (a, b, scaling);
            if let Some((ours_a, ours_b)) = self.unpacked(place, &a, &b, stated) {
                (a, b) = (ours_a, ours_b);
                self.check_square_experts(place, (&a, &b), config, options);
                kind = Kind::Experts(options.expert_axes.or(config.and_then(expert_axes)).unwrap_or(Orientation::Undeclared));
                scaling = stated.map_or(scaling, |stated| stated.scaling);
            } else if let Some(stated) = stated {
                scaling = self.check_rank(path, &a, &b, stated);
            }
            if options.attention_twice && path.ends_with(".base_layer.out_proj") {
                scaling.alpha *= 2.0;
            }
            let bias = module.bias_delta.and_then(|key| self.factor(key));
            self.check_lora_bias(path, module, embedding, config);
            self.check_magnitude(path, module, config);
            let bias_of = |module: &str| format!("{module}.bias");
            let of_bias = place
                .tensor
                .strip_suffix(".weight")
                .map_or_else(|| place.tensor.replace("in_proj_weight", "in_proj_bias"), bias_of);
            targets.push(Target {
                tensor: place.tensor.clone(),
                kind,
                a,
                b,
                scaling,
                bias: bias.map(|delta| BiasDelta { tensor: of_bias, delta }),
                magnitude: module.magnitude.and_then(|key| self.factor(key)),
            });
        }
        targets
    }

    fn resolve(
        &mut self,
        config: &PeftConfig,
        paths: &[&str],
        placed: &[Option<&Place>],
        limits: &Limits,
    ) -> Vec<scaling::Resolved> {
        let names: Vec<&str> =
            paths.iter().zip(placed).map(|(path, place)| place.map_or(*path, |place| place.name.as_str())).collect();
        let paths = names.as_slice();
        let index = Modules::new(paths);
        let mut problems = Vec::new();
        let mut warnings = Vec::new();
        let resolved = scaling::resolve(config, &index, paths, limits, &mut problems, &mut warnings);
        match index.uncovered(&config.target_modules, limits) {
            Err(problem) => problems.push(problem),
            Ok(uncovered) => {
                let is_parameter = |i: &usize| placed.get(*i).copied().flatten().is_some_and(|place| place.parameter);
                let uncovered: Vec<usize> = uncovered.into_iter().filter(|i| !is_parameter(i)).collect();
                if let Some(first) = uncovered.first().and_then(|&i| paths.get(i)) {
                    let message = format!(
                        "target_modules does not cover {} of {} modules, such as {first:?}",
                        uncovered.len(),
                        paths.len()
                    );
                    let help = "PEFT would not load them; here the tensors decide, and they are applied";
                    warnings.push(Diagnostic::new(rules::TARGETS_COVERED, message).tensor("target_modules").help(help));
                }
            }
        }
        self.problems.extend(problems.into_iter().map(|p| p.file(&config.file)));
        self.warnings.extend(warnings.into_iter().map(|w| w.file(&config.file)));
        resolved
    }

    /// Both factors of a module, or one report per orphan.
    fn pair(&mut self, path: &str, module: &Module<'_>) -> Option<(Factor, Factor)> {
        let orphan = |key: &Key<'_>, missing: &str| {
            let message = format!("module {path:?} has {:?} but no {missing}", key.name);
            let help = "the file is incomplete; save the adapter again";
            Diagnostic::new(rules::FACTORS_PAIRED, message).tensor(key.name).help(help)
        };
        match (module.a, module.b, module.bias_delta.or(module.magnitude).or(module.diagonal)) {
            (Some(a), Some(b), _) => return self.factor(a).zip(self.factor(b)),
            (Some(a), None, _) => self.problem(orphan(a, "factor B")),
            (None, Some(b), _) => self.problem(orphan(b, "factor A")),
            (None, None, Some(bias)) => self.problem(orphan(bias, "factors")),
            (None, None, None) => {}
        }
        None
    }

    fn factor(&self, key: &Key<'_>) -> Option<Factor> {
        Factor::new(self.source, key.name)
    }

    /// The scaling with the rank of the tensors, which the config must agree with. Factors that do not agree with each other are
    /// left to [`Adapter::new`], which shows their shapes.
    fn check_rank(&mut self, path: &str, a: &Factor, b: &Factor, stated: &scaling::Resolved) -> Scaling {
        let (Some((a_rank, inner)), Some((out, b_rank))) = (a.info().shape.matrix(), b.info().shape.matrix()) else {
            return stated.scaling;
        };
        let wanted = stated.scaling.rank;
        if a_rank == b_rank && a_rank != wanted && a_rank > 0 {
            let message = format!(
                "module {path:?} has rank {a_rank}, but {} states {wanted}; PEFT itself could not load this",
                stated.rank_from
            );
            let help = if inner == wanted && out == wanted {
                "the factors look transposed: A is (rank, in) and B is (out, rank)"
            } else {
                "this is the config of another adapter, or rank_pattern was lost or reordered; correct it"
            };
            self.problem(Diagnostic::new(rules::RANK_RESOLVED, message).tensor(a.name()).help(help));
        }
        Scaling { rank: a_rank, ..stated.scaling }
    }

    /// The factors of a variant of LoRA that stores them in another form, in the usual one.
    fn written_out(
        &mut self,
        path: &str,
        (a, b): (Factor, Factor),
        diagonal: Option<&Key<'_>>,
        config: Option<&PeftConfig>,
    ) -> Option<(Factor, Factor)> {
        if diagonal.is_some() != config.is_some_and(|config| config.kasa) {
            let message = format!("module {path:?}: lora_diag and kasa_config go together, and one of them is missing");
            let help = "this is the config of another adapter, or the file is incomplete";
            self.problem(Diagnostic::new(rules::FACTORS_PAIRED, message).tensor(a.name()).help(help));
            return None;
        }
        let Some(config) = config else { return Some((a, b)) };
        let (name, shapes) = (a.name().to_owned(), format!("A {} and B {}", a.info().shape, b.info().shape));
        let whole = match &config.block_diagonal {
            Some(blocks) => blocks.whole(self.source, path, a, b),
            None => Some((a, b)),
        };
        let whole = whole.and_then(|(a, b)| match config.group {
            Some(group) => Some((variant::ungrouped(self.source, &a, group)?, b)),
            None => Some((a, b)),
        });
        let whole = whole.and_then(|(a, b)| match diagonal {
            Some(key) => Some((a, variant::with_diagonal(self.source, &b, key.name)?)),
            None => Some((a, b)),
        });
        if whole.is_none() {
            let message = format!("module {path:?}: {shapes} are not what kasa_config, use_bdlora or qalora_group_size says");
            let help = "this is the config of another adapter";
            self.problem(Diagnostic::new(rules::FACTOR_SHAPES, message).tensor(name).help(help));
        }
        whole
    }

    /// The factors of a stack of experts, if that is what they are: `r` is the rank of one of them.
    fn unpacked(&self, place: &Place, a: &Factor, b: &Factor, stated: Option<&scaling::Resolved>) -> Option<(Factor, Factor)> {
        let rank = stated.filter(|_| place.parameter)?.scaling.rank;
        let (a_info, b_info) = experts::unpacked(a.info(), b.info(), rank)?;
        if a_info.shape.dims().first() == Some(&1) {
            return None;
        }
        let mut derived = Derived::new(self.source);
        let (a_name, b_name, to) = (a.name().to_owned(), b.name().to_owned(), b_info.clone());
        derived.insert(a.name(), a_info, move |source| read_all(source, &a_name));
        derived.insert(b.name(), b_info, move |source| experts::unpack(source, &b_name, &to));
        let derived: Arc<dyn TensorSource> = Arc::new(derived);
        Factor::new(&derived, a.name()).zip(Factor::new(&derived, b.name()))
    }

    /// PEFT 0.19.0 took stacks the wrong way round, depending on the model, so that its squares can be told by nobody.
    fn check_square_experts(
        &mut self,
        place: &Place,
        (a, b): (&Factor, &Factor),
        config: Option<&PeftConfig>,
        options: &PeftOptions,
    ) {
        // Of anything else the shape tells.
        if a.info().shape.dims().get(2) != b.info().shape.dims().get(1) {
            return;
        }
        let is_it = config.and_then(|config| config.peft_version.as_deref()).is_some_and(|version| version.starts_with("0.19.0"));
        if is_it && options.expert_axes.is_none() {
            let message = format!(
                "{:?} was written by PEFT 0.19.0, which laid out some stacks of experts the wrong way round",
                place.tensor
            );
            let help = "state how the factors lie: --expert-axes out-in if A has the inputs of the weight (E, out, in), in-out if (E, in, out)";
            self.problem(Diagnostic::new(rules::ORIENTATION, message).tensor(a.name()).help(help));
        }
    }

    /// Magnitudes are there if and only if `use_dora` is set.
    fn check_magnitude(&mut self, path: &str, module: &Module<'_>, config: Option<&PeftConfig>) {
        match (module.magnitude, config.map(|c| c.dora)) {
            (Some(key), Some(false)) => {
                let message = format!("{:?} is a magnitude of DoRA, but use_dora is not set", key.name);
                let help = "PEFT would ignore the tensor in silence; set use_dora, or remove the tensor";
                self.problem(Diagnostic::new(rules::KEY_GRAMMAR, message).tensor(key.name).help(help));
            }
            (None, Some(true)) => {
                let message = format!("use_dora is set, but module {path:?} has no lora_magnitude_vector");
                let help = "the file is incomplete; save the adapter again";
                self.problem(Diagnostic::new(rules::FACTORS_PAIRED, message).tensor(path).help(help));
            }
            _ => {}
        }
    }

    /// `lora_B.bias` is there if and only if `lora_bias` is set.
    fn check_lora_bias(&mut self, path: &str, module: &Module<'_>, embedding: bool, config: Option<&PeftConfig>) {
        match (module.bias_delta, config.map(|c| c.lora_bias)) {
            (Some(key), Some(false)) => {
                let message = format!("{:?} is a bias update, but lora_bias is not set", key.name);
                let help = "PEFT would ignore the tensor in silence; set lora_bias, or remove the tensor";
                self.problem(Diagnostic::new(rules::KEY_GRAMMAR, message).tensor(key.name).help(help));
            }
            (None, Some(true)) if !embedding => {
                let message = format!("lora_bias is set, but module {path:?} has no lora_B.bias");
                let help = "the file is incomplete; save the adapter again";
                self.problem(Diagnostic::new(rules::FACTORS_PAIRED, message).tensor(path).help(help));
            }
            _ => {}
        }
    }

    /// With `ensure_weight_tying` PEFT trains one update for both names of a tied embedding and applies it transposed to the head, which
    /// is not what the tensors say by themselves.
    fn check_tying(&mut self, targets: &[Target], replacements: &[Replacement], config: Option<&PeftConfig>) {
        let Some(config) = config.filter(|config| config.ensure_weight_tying) else { return };
        let names = targets.iter().map(|t| &t.tensor).chain(replacements.iter().map(|r| &r.tensor));
        if let Some(name) = names.into_iter().find(|name| full::is_embedding(name)) {
            let message = format!("ensure_weight_tying is set, and {name:?} is updated together with what it is tied to");
            let help = "merge it with PEFT (merge_and_unload) and use the merged model";
            let problem = Diagnostic::new(rules::CONFIG_METHOD, message).tensor("ensure_weight_tying").help(help);
            self.problem(problem.file(&config.file));
        }
    }

    /// Rows of embeddings, which the config alone numbers.
    fn rows(&mut self, keys: &[Key<'_>], config: Option<&PeftConfig>) -> Vec<RowReplacement> {
        let stated = config.map_or(&[][..], |config| &config.tokens);
        let (mut rows, mut used) = (Vec::new(), vec![false; stated.len()]);
        for key in keys.iter().filter(|key| key.role == Role::Rows) {
            let path = key.path.as_str();
            let at = stated.iter().position(|(module, _)| module.is_empty() || ends(path).any(|end| end == module));
            let Some((at, (_, ids))) = at.and_then(|at| Some((at, stated.get(at)?))) else {
                let message = format!("{:?} holds rows of an embedding, and no config says which", key.name);
                let help = "trainable_token_indices of adapter_config.json has to name them";
                self.problem(Diagnostic::new(rules::FULL_TENSOR_NAMED, message).tensor(key.name).help(help));
                continue;
            };
            if let Some(used) = used.get_mut(at) {
                *used = true;
            }
            let tensor = format!("{path}.weight");
            rows.extend(self.factor(key).map(|with| RowReplacement { tensor, rows: ids.clone(), with }));
        }
        if let Some((module, ids)) = stated.iter().zip(used).find(|(_, used)| !used).map(|(stated, _)| stated) {
            let message = format!("trainable_token_indices names {} rows of {module:?}, which are not in the file", ids.len());
            let help = "the file is incomplete; save the adapter again";
            self.problem(Diagnostic::new(rules::FACTORS_PAIRED, message).tensor("trainable_token_indices").help(help));
        }
        rows
    }

    fn replacements(&mut self, keys: &[Key<'_>], modules: &ByModule<'_>, config: Option<&PeftConfig>) -> Vec<Replacement> {
        let targets: BTreeSet<&str> = modules.keys().map(|(path, _)| *path).collect();
        let mut replacements = Vec::new();
        for key in keys {
            let parameter = match key.role {
                Role::Full => key.path.clone(),
                Role::BaseBias => format!("{}.bias", key.path.trim_end_matches(".base_layer")),
                Role::BaseWeight if targets.contains(key.path.as_str()) => {
                    let tensor = format!("{}.weight", key.path);
                    replacements.extend(self.factor(key).map(|with| Replacement { tensor, with, shared: true }));
                    continue;
                }
                Role::BaseWeight => format!("{}.weight", key.path),
                _ => continue,
            };
            match full::unannounced(key.name, &parameter, config, &targets) {
                Some(problem) => self.problem(problem),
                None => {
                    let shared = config.is_none_or(|config| !full::saved(&config.modules_to_save, &parameter));
                    replacements.extend(self.factor(key).map(|with| Replacement { tensor: parameter, with, shared }));
                }
            }
        }
        replacements
    }
}

/// How PEFT laid out the factors of a stack of experts: before 0.19 every stack was taken for `(E, in, out)`, since 0.19.1 that depends on
/// the model (PR 3165).
fn expert_axes(config: &PeftConfig) -> Option<Orientation> {
    let version = config.peft_version.as_deref().unwrap_or("0.17");
    let mut parts = version.split('.').map(|part| part.parse::<u64>().unwrap_or(0));
    let (major, minor) = (parts.next()?, parts.next()?);
    ((major, minor) < (0, 19)).then_some(Orientation::InOut)
}
