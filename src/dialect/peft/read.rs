//! From tensor names and config to an [`Adapter`]. Every tensor ends in exactly one place: a factor, a bias update, a replacement,
//! or a problem; and all problems are reported together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::config::PeftConfig;
use super::full;
use super::keys::{self, Key, PREFIX, Role};
use super::patterns::Modules;
use super::scaling;
use crate::adapter::{
    Adapter, AdapterParts, BaseIdentity, BiasDelta, Factor, Kind, Orientation, Replacement, Scaling, ScalingRule, Target,
};
use crate::dialect::foreign;
use crate::error::{Diagnostic, Error, Result};
use crate::limits::Limits;
use crate::rules;
use crate::tensor::TensorSource;

/// What the caller states in place of the config.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct PeftOptions {
    /// Alpha of every module, for adapters without a config.
    pub(crate) alpha: Option<f64>,
    /// Scaling rule of every module, for adapters without a config. Default [`ScalingRule::Standard`].
    pub(crate) rule: Option<ScalingRule>,
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
    let keys: Vec<Key<'_>> = names.iter().map(|name| keys::parse(name, &|n| source.info(n).is_some())).collect();
    reader.check_prefix(&keys);
    reader.check_adapter_names(&keys);
    let modules = reader.group(&keys);
    let targets = reader.targets(&modules, config, options, limits);
    let replacements = reader.replacements(&keys, &modules, config);
    reader.check_tying(&targets, &replacements, config);
    let Reader { problems, warnings, .. } = reader;
    let parts = AdapterParts {
        label: label.display().to_string(),
        dialect: "peft",
        targets,
        replacements,
        base: BaseIdentity { name: config.and_then(|c| c.base_name.clone()), ..BaseIdentity::default() },
        origin_config: config.map(|c| c.text.clone()),
        warnings: config.map(|c| c.warnings.clone()).into_iter().flatten().chain(warnings).collect(),
        ..AdapterParts::default()
    };
    let mut problems = problems;
    let refused_all = parts.targets.is_empty() && parts.replacements.is_empty() && !problems.is_empty();
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
        for key in keys {
            let embedding = matches!(key.role, Role::EmbeddingA | Role::EmbeddingB);
            let module = || (key.path.as_str(), embedding);
            let slot = match key.role {
                Role::A | Role::EmbeddingA => &mut modules.entry(module()).or_default().a,
                Role::B | Role::EmbeddingB => &mut modules.entry(module()).or_default().b,
                Role::BiasDelta => &mut modules.entry(module()).or_default().bias_delta,
                Role::BaseBias | Role::BaseWeight | Role::Full => continue,
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

    fn targets(
        &mut self,
        modules: &ByModule<'_>,
        config: Option<&PeftConfig>,
        options: &PeftOptions,
        limits: &Limits,
    ) -> Vec<Target> {
        let paths: Vec<&str> = modules.keys().map(|(path, _)| *path).collect();
        let resolved = config.map(|config| self.resolve(config, &paths, limits));
        if resolved.is_none() && options.alpha.is_none() && !modules.is_empty() {
            let message = "there is no adapter_config.json, so the scale of the update is not known";
            let help = "put adapter_config.json beside the weights, or state alpha: --alpha NUMBER";
            self.problem(Diagnostic::new(rules::CONFIG_PRESENT, message).help(help));
        }
        let orientation = options.orientation.or(config.map(|c| c.orientation)).unwrap_or(Orientation::Undeclared);
        let mut targets = Vec::with_capacity(modules.len());
        for (i, (&(path, embedding), module)) in modules.iter().enumerate() {
            let Some((a, b)) = self.pair(path, module) else { continue };
            let stated = resolved.as_ref().and_then(|resolved| resolved.get(i));
            let scaling = match stated {
                Some(stated) => stated.scaling,
                None => Scaling {
                    rank: a.info().shape.matrix().map_or(1, |(rank, _)| rank),
                    alpha: options.alpha.unwrap_or(1.0),
                    rule: options.rule.unwrap_or(ScalingRule::Standard),
                },
            };
            let scaling = stated.map_or(scaling, |stated| self.check_rank(path, &a, &b, stated));
            let bias = module.bias_delta.and_then(|key| self.factor(key));
            self.check_lora_bias(path, module, embedding, config);
            targets.push(Target {
                tensor: format!("{path}.weight"),
                kind: if embedding { Kind::Embedding } else { Kind::Linear(orientation) },
                a,
                b,
                scaling,
                bias: bias.map(|delta| BiasDelta { tensor: format!("{path}.bias"), delta }),
            });
        }
        targets
    }

    fn resolve(&mut self, config: &PeftConfig, paths: &[&str], limits: &Limits) -> Vec<scaling::Resolved> {
        let index = Modules::new(paths);
        let mut problems = Vec::new();
        let mut warnings = Vec::new();
        let resolved = scaling::resolve(config, &index, paths, limits, &mut problems, &mut warnings);
        match index.uncovered(&config.target_modules, limits) {
            Err(problem) => problems.push(problem),
            Ok(uncovered) => {
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
        match (module.a, module.b, module.bias_delta) {
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

    /// `lora_B.bias` is there if and only if `lora_bias` is set.
    fn check_lora_bias(&mut self, path: &str, module: &Module<'_>, embedding: bool, config: Option<&PeftConfig>) {
        match (module.bias_delta, config.map(|c| c.lora_bias)) {
            (Some(key), Some(false)) => {
                let message = format!("{:?} is a bias update, but lora_bias is not set", key.name);
                let help = "PEFT would ignore the tensor in silence; set lora_bias, or remove the tensor";
                self.problem(Diagnostic::new(rules::KEY_GRAMMAR, message).tensor(key.name).help(help));
            }
            (None, Some(true)) if !embedding => {
                let message = format!("lora_bias is set, but module {path:?} has no lora_B.bias; its bias is left as it is");
                self.warnings.push(Diagnostic::new(rules::KEY_GRAMMAR, message).tensor("lora_bias"));
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

    fn replacements(&mut self, keys: &[Key<'_>], modules: &ByModule<'_>, config: Option<&PeftConfig>) -> Vec<Replacement> {
        let targets: BTreeSet<&str> = modules.keys().map(|(path, _)| *path).collect();
        let mut replacements = Vec::new();
        for key in keys {
            let parameter = match key.role {
                Role::Full => key.path.clone(),
                Role::BaseBias => format!("{}.bias", key.path),
                Role::BaseWeight if targets.contains(key.path.as_str()) => {
                    let tensor = format!("{}.weight", key.path);
                    replacements.extend(self.factor(key).map(|with| Replacement { tensor, with }));
                    continue;
                }
                Role::BaseWeight => format!("{}.weight", key.path),
                _ => continue,
            };
            match full::unannounced(key.name, &parameter, config, &targets) {
                Some(problem) => self.problem(problem),
                None => replacements.extend(self.factor(key).map(|with| Replacement { tensor: parameter, with })),
            }
        }
        replacements
    }
}
