//! From tensor names and config to an [`Adapter`]. Every tensor ends in exactly one place: a factor, a bias update, a replacement,
//! or a problem; and all problems are reported together.

mod targets;
mod whole;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::config::PeftConfig;
use super::full;
use super::keys::{self, Key, PREFIX, Role};
use super::methods::{self, Method};
use crate::adapter::{Adapter, AdapterParts, BaseIdentity, Factor, Orientation, Replacement, ScalingRule, Target};
use crate::dialect::foreign;
use crate::error::{Diagnostic, Error, Result};
use crate::limits::Limits;
use crate::rules;
use crate::tensor::TensorSource;

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
    let in_file = |said: Diagnostic| if said.place().file.is_some() { said } else { said.file(&label) };
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
        warnings: config.map(|c| c.warnings.clone()).into_iter().flatten().chain(warnings.into_iter().map(in_file)).collect(),
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
    let placed = problems.into_iter().map(in_file);
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

    fn factor(&self, key: &Key<'_>) -> Option<Factor> {
        Factor::new(self.source, key.name)
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
}
