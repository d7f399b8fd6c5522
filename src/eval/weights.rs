//! Where a model's tensors come from: the base's files, and a plan that says what adapters make of them. One cache of the base's tensors
//! serves any number of views, so that adapters share the base's memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;

use super::computed;
use super::config::Config;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::exec::{float_of, values};
use crate::limits::Limits;
use crate::op::{Unmerged, merge_tensor};
use crate::plan::{BindOptions, Origin, OutputOptions, Plan, Weighted};
use crate::rules;
use crate::tensor::{Dtype, TensorSource, read_all};

/// A base whose tensors are in memory once, in f32, as far as models have asked for them.
pub struct Base {
    checkpoint: Checkpoint,
    cache: Mutex<HashMap<String, Tensor>>,
}

impl Base {
    /// Nothing is read yet.
    pub fn new(checkpoint: Checkpoint) -> Self {
        Base { checkpoint, cache: Mutex::default() }
    }

    /// The files.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Bytes that its tensors take by now.
    pub fn bytes(&self) -> usize {
        let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.values().map(|tensor| tensor.elem_count() * size_of::<f32>()).sum()
    }

    fn tensor(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(info) = self.checkpoint.info(name) else { return Ok(None) };
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tensor) = cache.get(name) {
            return Ok(Some(tensor.clone()));
        }
        let bytes = read_all(&self.checkpoint, name)?;
        let tensor = from_bytes(name, info.dtype, info.shape.dims(), &bytes)?;
        cache.insert(name.to_owned(), tensor.clone());
        Ok(Some(tensor))
    }
}

/// How the adapters of [`Weights`] are applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum View {
    /// Beside the base's weights, layer by layer, and unrounded where a layer cannot: what PEFT does before it merges.
    OnTheFly,
    /// As the weights that a merge would write, with its rounding to the base's dtype.
    Merged,
}

/// The tensors of a model.
pub struct Weights<'a> {
    base: &'a Base,
    plan: Option<Plan<'a>>,
    view: View,
}

impl<'a> Weights<'a> {
    /// The base as it is.
    pub fn base(base: &'a Base) -> Self {
        Weights { base, plan: None, view: View::Merged }
    }

    /// The base with adapters. New tensors, such as the head of a classifier, are taken from them.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn adapted(
        base: &'a Base,
        adapters: &[Weighted<'a>],
        view: View,
        options: &BindOptions,
        limits: &Limits,
    ) -> Result<Self> {
        let options = BindOptions { add_new_tensors: true, ..options.clone() };
        let dtype = (view == View::OnTheFly).then_some(Dtype::F32);
        let output = OutputOptions { dtype, ..Default::default() };
        let plan = Plan::with_output(&base.checkpoint, adapters, &options, &output, limits)?;
        Ok(Weights { base, plan: Some(plan), view })
    }

    /// The files of the base.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        &self.base.checkpoint
    }

    /// What the adapters do.
    pub fn plan(&self) -> Option<&Plan<'a>> {
        self.plan.as_ref()
    }

    pub(super) fn config(&self) -> Result<Config<'a>> {
        Config::new(&self.base.checkpoint)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        let added = || self.plan.as_ref().is_some_and(|plan| plan.changes().any(|change| change.name == name));
        self.base.checkpoint.info(name).is_some() || added()
    }

    /// A whole tensor, as the view has it, in f32.
    ///
    /// # Errors
    /// `U-010` if there is none, or it is packed; `E-001` and what computing it can tell.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let changed = |plan: &&Plan<'_>| plan.changes().any(|change| change.name == name && is_change(change));
        let Some(plan) = self.plan.as_ref().filter(changed) else {
            let missing = || Error::new(rules::RUNNABLE, format!("the model has no tensor {name:?}"));
            return self.base.tensor(name)?.ok_or_else(|| missing().file(self.base.checkpoint.path()).tensor(name));
        };
        let change = plan.changes().find(|change| change.name == name);
        let info = change.map(|change| change.info.clone());
        let bytes = merge_tensor(plan, name)?;
        match info {
            Some(info) => from_bytes(name, info.dtype, info.shape.dims(), &bytes),
            None => Err(Error::new(rules::RUNNABLE, format!("the model has no tensor {name:?}"))),
        }
    }

    /// The weight of a layer, and what is done to its output; a weight that has no unmerged form comes whole.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    pub(super) fn layer(&self, name: &str) -> Result<(Tensor, Option<Arc<Unmerged>>)> {
        let plan = self.plan.as_ref().filter(|_| self.view == View::OnTheFly);
        let Some((plan, operator)) = plan.and_then(|plan| Some((plan, Unmerged::new(plan, name).ok()?))) else {
            return Ok((self.tensor(name)?, None));
        };
        let origin = plan.changes().find(|change| change.name == name).map(|change| &change.origin);
        let weight = match origin {
            Some(Origin::Adapter(factor)) => {
                let narrow: Vec<f32> = values(factor)?.iter().map(|value| *value as f32).collect();
                let dims: Vec<usize> = factor.info().shape.dims().iter().map(|dim| *dim as usize).collect();
                Tensor::from_vec(narrow, dims, &Device::Cpu).map_err(computed)?
            }
            _ => {
                let missing = || Error::new(rules::RUNNABLE, format!("the model has no tensor {name:?}"));
                self.base.tensor(name)?.ok_or_else(missing)?
            }
        };
        Ok((weight, Some(Arc::new(operator))))
    }
}

/// More than the base's own values in another dtype?
fn is_change(change: &crate::plan::Change<'_>) -> bool {
    let from_base = matches!(change.origin, Origin::Base { .. });
    !from_base || !change.contributions.is_empty() || !change.patches.is_empty() || change.quantised.is_some()
}

fn from_bytes(name: &str, dtype: Dtype, dims: &[u64], bytes: &[u8]) -> Result<Tensor> {
    let float = float_of(dtype).ok_or_else(|| {
        let message = format!("{name:?} is {dtype}, and only F64, F32, F16 and BF16 are run");
        Error::new(rules::RUNNABLE, message).tensor(name).help("dequantise the model first")
    })?;
    let mut narrow = vec![0.0_f32; bytes.len() / float.size()];
    float.widen(bytes, &mut narrow);
    let dims: Vec<usize> = dims.iter().map(|dim| *dim as usize).collect();
    Tensor::from_vec(narrow, dims, &Device::Cpu).map_err(computed)
}

/// The views as a source of candle's own models: `VarBuilder::from_backend(Box::new(weights), …)`. These take whole weights only, so an adapter on
/// the fly is its unrounded sum with the base's weight.
impl SimpleBackend for Weights<'_> {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if tensor.shape() != &shape {
            candle_core::bail!("{name:?} is {:?}, and the model wants {shape:?}", tensor.shape());
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let tensor = self.tensor(name).map_err(candle_core::Error::wrap)?;
        tensor.to_dtype(dtype)?.to_device(device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.has(name)
    }
}
