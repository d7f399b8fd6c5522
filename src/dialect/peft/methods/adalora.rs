//! AdaLoRA (Zhang et al. 2023): ΔW = s·B·diag(E)·A with s = lora_alpha / (init_r + 1e-5), also after ranks were pruned (PEFT
//! `tuners/adalora/layer.py`, `SVDLinear.get_delta_weight`).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::config::PeftConfig;
use super::thin::{Matrix, computed};
use super::{Made, Parts, factor};
use crate::adapter::{Kind, Scaling, ScalingRule, Target};
use crate::error::Diagnostic;
use crate::rules;
use crate::tensor::TensorSource;

pub(super) fn make(config: &PeftConfig, modules: &BTreeMap<String, Parts<'_>>, source: &Arc<dyn TensorSource>, made: &mut Made) {
    for (module, parts) in modules {
        let (Some(&a), Some(&b), Some(&e), 3) = (parts.get("lora_A"), parts.get("lora_B"), parts.get("lora_E"), parts.len())
        else {
            made.incomplete(module, parts, "lora_A, lora_B and lora_E");
            continue;
        };
        let (a, b_info, e_info) = (factor(source, a), factor(source, b), factor(source, e));
        let (Some((rank, _)), Some((out, b_rank))) = (a.info().shape.matrix(), b_info.info().shape.matrix()) else {
            made.incomplete(module, parts, "matrices");
            continue;
        };
        if rank == 0 && b_rank == 0 {
            let message = format!("all ranks of {module:?} were pruned in training, so it has no update");
            made.warnings.push(Diagnostic::new(rules::RANK_AGREES, message).tensor(a.name()));
            continue;
        }
        if e_info.info().shape.elements() != rank || b_rank != rank {
            made.incomplete(module, parts, "factors of one rank");
            continue;
        }
        let (b_name, e_name) = (b.to_owned(), e.to_owned());
        let b = computed(source, b, (out, rank), move |source| {
            let (b, e) = (Matrix::read(source, &b_name)?, Matrix::read(source, &e_name)?);
            Ok(Matrix::of(b.rows, b.cols, |row, k| b.at(row, k) * e.at(k, 0)))
        });
        // Written so that alpha / rank is the scale.
        let alpha = config.alpha * rank as f64 / (config.init_rank as f64 + 1e-5);
        let Some(b) = b else {
            made.too_large(module);
            continue;
        };
        made.targets.push(Target {
            tensor: format!("{module}.weight"),
            kind: Kind::Linear(config.orientation),
            a,
            b,
            scaling: Scaling { rank, alpha, rule: ScalingRule::Standard },
            bias: None,
            magnitude: None,
            singular_values: None,
        });
    }
}
