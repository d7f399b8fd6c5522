//! Multipliers of a base tensor: all of them or, at weight 0, none.

use super::{Binder, elsewhere};
use crate::adapter::{Axis, Orientation, Rescaling};
use crate::error::Diagnostic;
use crate::plan::bind::Ignored;
use crate::plan::options::Weighted;
use crate::plan::shape::{self, Along, Contribution, Gain, Over, Panel};
use crate::plan::{quantised, tied};
use crate::rules;
use crate::tensor::Shape;

impl<'a> Binder<'a, '_> {
    /// Multipliers: all of them or, at weight 0, none; anything between is no multiple of what was trained.
    pub(super) fn bind_rescalings(&mut self, weighted: Weighted<'a>) {
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
