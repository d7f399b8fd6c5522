//! Activation statistics: how large the inputs of a layer are, channel by channel. With them the error that is made small is that of the
//! layer's outputs, ‖(D - B·A)·S‖ with S the root mean squares on the diagonal, and not that of the weights (the diagonal form of SVD-LLM, Wang
//! et al. 2024, section 3.1; ASVD, Yuan et al. 2023).

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::exec::float_of;
use crate::plan::Layer;
use crate::rules;
use crate::tensor::{TensorSource, read_all};

/// The mean square of a channel is raised by this share of the mean over all channels, so that a channel that never spoke keeps a weight.
const RIDGE: f64 = 1e-6;

/// Root mean squares of the inputs of layers: for a weight `M.weight` a tensor of that name, or of the name `M`, with a value for each input.
#[derive(Clone)]
pub struct ActStats {
    source: Arc<dyn TensorSource>,
}

impl ActStats {
    /// The tensors of a file, or of memory.
    pub fn new(source: Arc<dyn TensorSource>) -> Self {
        ActStats { source }
    }

    /// The weights of the inputs of a layer; `None` if there are none for it.
    ///
    /// # Errors
    /// `A-023` if there are not as many as inputs, `A-025` if they are no plain floats, `A-030` if one is negative or not finite; `E-001`.
    pub(super) fn of(&self, layer: &Layer, inputs: u64) -> Result<Option<Vec<f32>>> {
        let names = [layer.tensor.as_str(), layer.tensor.strip_suffix(".weight").unwrap_or(&layer.tensor)];
        let Some((name, info)) = names.iter().find_map(|name| Some((*name, self.source.info(name)?))) else { return Ok(None) };
        let refuse = |rule, message: String| Err(Error::new(rule, message).file(self.source.label()).tensor(name));
        if info.shape.elements() != inputs || info.shape.dims().len() != 1 {
            let message =
                format!("{name:?} is {} and {:?} has {inputs} inputs, each with a root mean square", info.shape, layer.tensor);
            return refuse(rules::SHAPE_FITS, message);
        }
        let Some(float) = float_of(info.dtype) else {
            return refuse(rules::BASE_DTYPE, format!("{name:?} is {}, and statistics are plain floats", info.dtype));
        };
        let raw = read_all(&*self.source, name)?;
        let mut values = vec![0.0f64; inputs as usize];
        float.widen(&raw, &mut values);
        let mean = values.iter().map(|x| x * x).sum::<f64>() / inputs.max(1) as f64;
        if values.iter().any(|x| !x.is_finite() || *x < 0.0) || mean == 0.0 {
            return refuse(rules::BASE_FINITE, format!("{name:?} holds a value that is no root mean square, or only zeros"));
        }
        // Of a mean square of 1, so that the norms stay those of weights.
        Ok(Some(values.iter().map(|x| (x * x / mean + RIDGE).sqrt() as f32).collect()))
    }
}

impl fmt::Debug for ActStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ActStats({})", self.source.label().display())
    }
}
