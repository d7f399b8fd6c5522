//! Updates by factors: each target on its weight, on parts of a stack of experts or on a stack of its parts, and on its bias.

use std::borrow::Cow;

use super::{Binder, elsewhere};
use crate::adapter::{Kind, Orientation, Target};
use crate::error::{Diagnostic, Result};
use crate::plan::fused::{self, Gathered, Stacked};
use crate::plan::options::Weighted;
use crate::plan::quantised::{self, packed_dtype};
use crate::plan::shape::{Contribution, Fit, Gain, Over, Panel, contradicted_by_model, contradicts, experts_of, fit};
use crate::plan::tied;
use crate::rules;
use crate::tensor::{Shape, TensorSource, is_plain_float};

impl<'a> Binder<'a, '_> {
    pub(super) fn bind_targets(&mut self, weighted: Weighted<'a>) {
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
}

/// The names of the tensors that change the weight of a target.
fn tensors_of(target: &Target) -> Vec<String> {
    [Some(&target.a), Some(&target.b), target.magnitude.as_ref()].into_iter().flatten().map(|f| f.name().to_owned()).collect()
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
