//! Activation statistics: what the inputs x of a layer are like. With them the error that is made small is that of the layer's outputs and
//! not that of the weights: ‖(D - B·A)·F‖ with E[x·xᵀ] = F·Fᵀ (SVD-LLM, Wang et al. 2024, section 3.1), or with the root mean squares of the
//! channels on the diagonal of F (as in ASVD, Yuan et al. 2023).

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Diagnostic, Error, Result};
use crate::exec::{Metric, float_of};
use crate::plan::Layer;
use crate::report::text::plural;
use crate::rules;
use crate::tensor::{TensorSource, read_all};

/// Statistics of the inputs of layers: for a weight `M.weight` a tensor of that name, or of the name `M`. One of shape `(inputs)` holds the
/// root mean square of each input; one of shape `(inputs, n)` a factor F of their covariance, E\[x·xᵀ\] = F·Fᵀ, such as its Cholesky
/// factor, or n samples divided by √n. Only ratios matter.
#[derive(Clone)]
pub struct ActStats {
    source: Arc<dyn TensorSource>,
}

impl ActStats {
    /// The tensors of a file, or of memory.
    pub fn new(source: Arc<dyn TensorSource>) -> Self {
        ActStats { source }
    }

    /// Where they are from.
    pub(super) fn label(&self) -> &Path {
        self.source.label()
    }

    /// # Errors
    /// `E-004` if the file has changed since it was opened.
    pub(super) fn unchanged(&self) -> Result<()> {
        self.source.unchanged()
    }

    /// The name of the statistic of a layer.
    fn name<'l>(&self, layer: &'l Layer) -> Option<&'l str> {
        let names = [layer.tensor.as_str(), layer.tensor.strip_suffix(".weight").unwrap_or(&layer.tensor)];
        names.into_iter().find(|name| self.source.info(name).is_some())
    }

    /// Warnings about layers without statistics, and statistics without a layer.
    ///
    /// # Errors
    /// `A-020` if no layer has one.
    pub(super) fn check(&self, layers: &[Layer]) -> Result<Vec<Diagnostic>> {
        let used: BTreeSet<&str> = layers.iter().filter_map(|layer| self.name(layer)).collect();
        let unknown: Vec<&str> = self.source.names().filter(|name| !used.contains(name)).collect();
        if used.is_empty() {
            let message =
                format!("no layer has statistics: {:?} here is {:?} there", unknown.first(), layers.first().map(|l| &l.tensor));
            let help = "name each statistic after the weight of its layer, as the base does";
            return Err(Error::new(rules::SOME_TARGET, message).file(self.source.label()).help(help));
        }
        let mut warnings = Vec::new();
        let mut warn = |count: usize, what: &str, first: &str| {
            let message = format!("{} {what}, the first {first:?}", plural(count as u64, "layer"));
            warnings.push(Diagnostic::new(rules::EVERY_TARGET, message).file(self.source.label()));
        };
        let without: Vec<&Layer> = layers.iter().filter(|layer| self.name(layer).is_none()).collect();
        if let Some(first) = without.first() {
            warn(without.len(), "without statistics, extracted without them", &first.tensor);
        }
        if let Some(first) = unknown.first() {
            warn(unknown.len(), "with statistics that are none of the targets", first);
        }
        Ok(warnings)
    }

    /// What is known of the inputs of a layer; `None` if it is nothing.
    ///
    /// # Errors
    /// `A-023` if there are not as many as inputs, `A-025` if they are no plain floats, `A-030` if one is not finite, or all are 0, or a root mean
    /// square is negative; `E-001`.
    pub(super) fn of(&self, layer: &Layer, inputs: u64) -> Result<Option<Metric>> {
        let Some((name, info)) = self.name(layer).and_then(|name| Some((name, self.source.info(name)?))) else { return Ok(None) };
        let refuse = |rule, message: String| Err(Error::new(rule, message).file(self.source.label()).tensor(name));
        let columns = match *info.shape.dims() {
            [rows] if rows == inputs => None,
            [rows, columns] if rows == inputs && columns > 0 => Some(columns as usize),
            _ => {
                let message = format!(
                    "{name:?} is {} and {:?} has {inputs} inputs: give ({inputs}) root mean squares, or a factor ({inputs}, n) of the covariance",
                    info.shape, layer.tensor
                );
                return refuse(rules::SHAPE_FITS, message);
            }
        };
        let Some(float) = float_of(info.dtype) else {
            return refuse(rules::BASE_DTYPE, format!("{name:?} is {}, and statistics are plain floats", info.dtype));
        };
        let raw = read_all(&*self.source, name)?;
        let mut values = vec![0.0f64; raw.len() / float.size()];
        float.widen(&raw, &mut values);
        let mean = values.iter().map(|x| x * x).sum::<f64>() / inputs.max(1) as f64;
        if !mean.is_finite() || mean == 0.0 || (columns.is_none() && values.iter().any(|x| *x < 0.0)) {
            return refuse(rules::BASE_FINITE, format!("{name:?} holds a value that is no statistic of inputs, or only zeros"));
        }
        // Of a mean square of 1, so that the norms stay those of weights.
        let values = values.iter().map(|x| (x / mean.sqrt()) as f32).collect();
        Ok(Some(match columns {
            None => Metric::Diagonal(values),
            Some(columns) => Metric::Factor { values, columns },
        }))
    }
}

impl fmt::Debug for ActStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ActStats({})", self.source.label().display())
    }
}
