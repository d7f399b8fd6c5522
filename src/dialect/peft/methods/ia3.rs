//! IA3 (Liu et al. 2022): the outputs of a layer, weight and bias, or the inputs of a feed-forward layer, are multiplied (PEFT
//! `tuners/ia3/layer.py`, `merge`).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::config::PeftConfig;
use super::{Made, Parts, factor};
use crate::adapter::{Axis, Rescaling};
use crate::tensor::TensorSource;

pub(super) fn make(config: &PeftConfig, modules: &BTreeMap<String, Parts<'_>>, source: &Arc<dyn TensorSource>, made: &mut Made) {
    for (module, parts) in modules {
        let Some(&name) = parts.get("ia3_l") else { continue };
        // As PEFT compares (`IA3Model._check_target_module_feedforward`), the end need not begin at a dot.
        let is_feedforward = config.feedforward_modules.iter().any(|listed| module.ends_with(listed.as_str()));
        let axis = if is_feedforward { Axis::Input } else { Axis::Output };
        let by = factor(source, name);
        let orientation = config.orientation;
        let of = |parameter: &str, if_there| Rescaling {
            tensor: format!("{module}.{parameter}"),
            axis,
            orientation,
            if_there,
            by: by.clone(),
        };
        made.rescalings.push(of("weight", false));
        if !is_feedforward {
            // Not every layer has a bias, and the file does not say.
            made.rescalings.push(of("bias", true));
        }
    }
}
