//! VeRA (Kopiczko et al. 2024, equation 2): ΔW = diag(b)·B·diag(d)·A with A and B shared by all modules and cut to the size of each
//! (PEFT `tuners/vera/layer.py`). They are random; a file that was saved without them can be read by PEFT alone, with torch's generator.

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
    let shared = |part: &str| modules.get("").and_then(|parts| parts.get(part)).copied();
    let (Some(shared_a), Some(shared_b)) = (shared("vera_A"), shared("vera_B")) else {
        let message = "the shared matrices vera_A and vera_B are not in the file: it was saved with save_projection=False";
        let help = "load it in PEFT, which draws them again from projection_prng_key, and save it with save_projection=True";
        made.problems.push(Diagnostic::new(rules::METHOD_SUPPORTED, message).help(help));
        return;
    };
    if let Some(parts) = modules.get("").filter(|parts| parts.len() > 2) {
        made.incomplete("", parts, "vera_A and vera_B alone");
    }
    let (a, big_b) = (factor(source, shared_a), factor(source, shared_b));
    let (Some((rank, _)), Some((height, b_rank))) = (a.info().shape.matrix(), big_b.info().shape.matrix()) else {
        made.incomplete("", &modules.get("").cloned().unwrap_or_default(), "matrices");
        return;
    };
    for (module, parts) in modules.iter().filter(|(module, _)| !module.is_empty()) {
        let (Some(&lambda_b), Some(&lambda_d), 2) = (parts.get("vera_lambda_b"), parts.get("vera_lambda_d"), parts.len()) else {
            made.incomplete(module, parts, "vera_lambda_b and vera_lambda_d");
            continue;
        };
        let out = factor(source, lambda_b).info().shape.elements();
        if factor(source, lambda_d).info().shape.elements() != rank || b_rank != rank || out > height {
            made.incomplete(module, parts, "vectors that fit the shared matrices");
            continue;
        }
        let names = [lambda_b.to_owned(), lambda_d.to_owned(), shared_b.to_owned()];
        let b = computed(source, lambda_b, (out, rank), move |source| {
            let [by_row, by_rank, b] = &names;
            let (by_row, by_rank) = (Matrix::read(source, by_row)?, Matrix::read(source, by_rank)?);
            let b = Matrix::read(source, b)?;
            Ok(Matrix::of(by_row.rows, b.cols, |row, k| by_row.at(row, 0) * b.at(row, k) * by_rank.at(k, 0)))
        });
        let Some(b) = b else {
            made.too_large(module);
            continue;
        };
        made.targets.push(Target {
            tensor: format!("{module}.weight"),
            kind: Kind::Shared(config.orientation),
            a: a.clone(),
            b,
            scaling: Scaling { rank, alpha: rank as f64, rule: ScalingRule::Standard },
            bias: None,
            magnitude: None,
            singular_values: None,
        });
    }
}
