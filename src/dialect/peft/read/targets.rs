//! Targets: pairs of factors with their scale, bias and magnitude, each held against the config.

use std::sync::Arc;

use super::{ByModule, Module, PeftOptions, Reader};
use crate::adapter::{BiasDelta, Factor, Kind, Orientation, Scaling, ScalingRule, Target};
use crate::dialect::peft::config::PeftConfig;
use crate::dialect::peft::experts;
use crate::dialect::peft::keys::Key;
use crate::dialect::peft::methods::{Method, variant};
use crate::dialect::peft::patterns::Modules;
use crate::dialect::peft::place::{self, Place};
use crate::dialect::peft::scaling;
use crate::error::Diagnostic;
use crate::limits::Limits;
use crate::rules;
use crate::tensor::{Derived, TensorSource, read_all};

impl Reader<'_> {
    pub(super) fn targets(
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
                singular_values: None,
            });
        }
        targets
    }

    pub(super) fn resolve(
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

    /// The scaling with the rank of the tensors, which the config must agree with. Factors that do not agree with each other are
    /// left to [`Adapter::new`](crate::adapter::Adapter::new), which shows their shapes.
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
}

/// How PEFT laid out the factors of a stack of experts: before 0.19 every stack was taken for `(E, in, out)`, since 0.19.1 that depends on
/// the model (PR 3165).
fn expert_axes(config: &PeftConfig) -> Option<Orientation> {
    let version = config.peft_version.as_deref().unwrap_or("0.17");
    let mut parts = version.split('.').map(|part| part.parse::<u64>().unwrap_or(0));
    let (major, minor) = (parts.next()?, parts.next()?);
    ((major, minor) < (0, 19)).then_some(Orientation::InOut)
}
