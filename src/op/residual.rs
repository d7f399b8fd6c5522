//! What an initialisation took out of the base, computed again from the published base: PiSSA's largest singular components, OLoRA's first
//! columns of a QR decomposition, KaSA's smallest singular components. It joins the factors of the adapter, which is then a plain one for
//! the published base: W − R + s·B·A (PEFT `tuners/lora/layer.py`, `pissa_init`, `olora_init`; `variants.py`, `KasaLinearVariant`).

use std::sync::Arc;

use nalgebra::DMatrix;

use super::digests::content;
use crate::adapter::{Adapter, Factor, Kind, Removed, Scaling, ScalingRule, Target};
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Error, Result};
use crate::exec;
use crate::limits::Limits;
use crate::plan::{BindOptions, Binding, Panel, Weighted};
use crate::rules;
use crate::tensor::{Dtype, MemorySource, Shape, TensorInfo, TensorSource};

/// The smaller side of the largest weight that is decomposed: a dense decomposition takes its cube in time.
const LARGEST: u64 = 2048;
/// Values of the largest weight that is decomposed, which is held in f64.
const MOST: u64 = 1 << 25;
/// More rounds of the singular value decomposition than any matrix needs.
const ROUNDS: usize = 10_000;

/// `adapter` for the published base, if its initialisation took something out of it that can be computed again; as it is, if it took out
/// nothing. One weight at a time is held in memory, in f64, and the new factors of all of them.
///
/// # Errors
/// `P-007` if what was taken out cannot be computed again, or not in this version; what [`Binding::new`] finds; `A-030` for a weight that is
/// not finite; `E-001`, `E-004` while reading.
pub fn recompute_residual(adapter: Adapter, base: &Checkpoint, bind: &BindOptions, limits: &Limits) -> Result<Adapter> {
    let Some((why, removed)) = adapter.parts().residual.clone() else { return Ok(adapter) };
    if removed == Removed::Unknown {
        let help =
            "what was taken out of the base cannot be computed from it; give the base that was trained on, with --residual-base";
        return Err(why.help(help).into());
    }
    let options = BindOptions { residual_base: true, ..bind.clone() };
    let weighted = Weighted::full(&adapter);
    let binding = Binding::new(base, weighted, 0, &options, limits)?;
    let mut memory = MemorySource::new();
    let mut wholes = Vec::new();
    for (index, target) in adapter.targets().iter().enumerate() {
        let Kind::Linear(_) = target.kind else {
            let message =
                format!("{:?} is no linear layer, and what was taken out of it is not computed by this version", target.tensor);
            return Err(Error::new(rules::INIT_CHANGES_BASE, message).file(adapter.label()).tensor(target.a.name()));
        };
        wholes.push(whole(target, removed, base, &binding)?);
        let Some((b, a)) = wholes.last() else { continue };
        let mut put = |name: String, matrix: &DMatrix<f64>| {
            let dims = vec![matrix.nrows() as u64, matrix.ncols() as u64];
            let shape = Shape::new(dims).ok_or_else(|| Error::new(rules::SHAPE_FITS, "a factor is too large"))?;
            // nalgebra stores by columns.
            let bytes = matrix.transpose().iter().flat_map(|value| value.to_le_bytes()).collect();
            memory.insert(name, TensorInfo { dtype: Dtype::F64, shape }, bytes)
        };
        put(format!("{index}.B"), b)?;
        put(format!("{index}.A"), a)?;
    }
    let source: Arc<dyn TensorSource> = Arc::new(memory);
    let mut parts = adapter.parts().clone();
    for (index, target) in parts.targets.iter_mut().enumerate() {
        let factor = |part: &str| {
            let missing = || Error::new(rules::READ, "a computed factor is missing").tensor(&target.tensor);
            Factor::new(&source, &format!("{index}.{part}")).ok_or_else(missing)
        };
        let (a, b) = (factor("A")?, factor("B")?);
        let rank = a.info().shape.dims().first().copied().unwrap_or(1);
        let scaling = Scaling { rank, alpha: rank as f64, rule: ScalingRule::Standard };
        *target = Target { a, b, scaling, singular_values: None, ..target.clone() };
    }
    parts.residual = None;
    parts.made_of = Some(content(&adapter, || Ok(()))?.finish());
    parts.origin_config = None;
    parts.digests.clear();
    parts.content = None;
    let message = "what the initialisation took out of the base was computed again from this base, and is taken out of it";
    parts.warnings.push(Diagnostic::new(rules::INIT_CHANGES_BASE, message));
    Adapter::new(parts, limits)
}

/// B `(out, 2·rank)` and A `(2·rank, in)` of a target, with what was taken out of its weight.
fn whole(target: &Target, removed: Removed, base: &Checkpoint, binding: &Binding<'_>) -> Result<(DMatrix<f64>, DMatrix<f64>)> {
    let missing = || Error::new(rules::EVERY_TARGET, format!("{:?} is not in the base", target.tensor)).tensor(&target.tensor);
    let (name, contribution) = binding.settled(&target.tensor).ok_or_else(missing)?;
    let w = weight(base, name)?;
    let w = if matches!(contribution.left, Panel::Transposed(_)) { w.transpose() } else { w };
    let (out, inner) = (w.nrows(), w.ncols());
    let (rank, scale) = (target.scaling.rank as usize, target.scaling.effective());
    if rank > out.min(inner) {
        let message = format!("rank {rank} of {name:?} is more than its {out} by {inner} weight has");
        return Err(Error::new(rules::RANK_LIMIT, message).tensor(target.a.name()));
    }
    let (b, a) = exec::read_factors(target, 0, 0..out as u64)?;
    let (b, a) = (DMatrix::from_row_slice(out, rank, &b) * scale, DMatrix::from_row_slice(rank, inner, &a));
    let (left, right) = match removed {
        Removed::LeadingColumns => {
            let qr = w.qr();
            (qr.q().columns(0, rank) * scale, qr.r().rows(0, rank).into_owned())
        }
        Removed::LeadingComponents | Removed::TrailingComponents | Removed::Unknown => {
            let count = out.min(inner);
            let first = if removed == Removed::TrailingComponents { count - rank } else { 0 };
            let svd = w.try_svd(true, true, f64::EPSILON, ROUNDS);
            let decomposed = svd.and_then(|svd| Some((svd.u?, svd.singular_values, svd.v_t?)));
            let Some((u, values, v)) = decomposed else {
                let message = format!("the singular values of {name:?} were not found in {ROUNDS} rounds");
                return Err(Error::new(rules::INIT_CHANGES_BASE, message).tensor(target.a.name()));
            };
            let scaled = DMatrix::from_diagonal(&values.rows(first, rank).into_owned());
            (u.columns(first, rank) * scaled, v.rows(first, rank).into_owned())
        }
    };
    let mut whole_b = DMatrix::zeros(out, 2 * rank);
    whole_b.columns_mut(0, rank).copy_from(&b);
    whole_b.columns_mut(rank, rank).copy_from(&-left);
    let mut whole_a = DMatrix::zeros(2 * rank, inner);
    whole_a.rows_mut(0, rank).copy_from(&a);
    whole_a.rows_mut(rank, rank).copy_from(&right);
    Ok((whole_b, whole_a))
}

/// A matrix of the base.
fn weight(base: &Checkpoint, name: &str) -> Result<DMatrix<f64>> {
    let refuse = |rule, message: String| Error::new(rule, message).file(base.path()).tensor(name);
    let info = base.info(name).ok_or_else(|| refuse(rules::EVERY_TARGET, format!("{name:?} is not stored in the base")))?;
    let (Some((rows, cols)), Some(float)) = (info.shape.matrix(), exec::float_of(info.dtype)) else {
        return Err(refuse(rules::INIT_CHANGES_BASE, format!("{name:?} is no matrix of plain floats")));
    };
    if rows.min(cols) > LARGEST || info.shape.elements() > MOST {
        let message = format!("{name:?} is {}: decomposing it would take too long in this version", info.shape);
        let help = "save the adapter again in PEFT with path_initial_model_for_weight_conversion, or give the base that was trained on, \
                    with --residual-base";
        return Err(refuse(rules::INIT_CHANGES_BASE, message).help(help));
    }
    let mut bytes = vec![0; usize::try_from(info.bytes()).unwrap_or(0)];
    base.read(name, 0, &mut bytes)?;
    let mut values = vec![0.0f64; (rows * cols) as usize];
    float.widen(&bytes, &mut values);
    if values.iter().any(|value| !value.is_finite()) {
        return Err(refuse(rules::BASE_FINITE, format!("{name:?} holds values that are not finite, so it has no decomposition")));
    }
    Ok(DMatrix::from_row_slice(rows as usize, cols as usize, &values))
}
