//! `inspect`: what a file is, from its header alone unless figures are asked for that need the values.

use std::collections::HashMap;

use super::{family, method};
use crate::adapter::{Adapter, Axis, Target};
use crate::checkpoint::{Checkpoint, Shard};
use crate::error::Result;
use crate::exec;
use crate::kernel::product_norm;
use crate::report::{
    AdapterReport, CheckpointReport, DtypeReport, FactorDtypes, FileReport, ListedTensor, Note, ReplacementReport,
    RescalingReport, RowsReport, TargetReport, TiedReport,
};
use crate::tensor::{TensorInfo, TensorSource};

/// What to look at beyond the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct InspectOptions {
    /// Read the factors and state ‖scale · B·A‖ of each target. Default false.
    pub norms: bool,
    /// List every tensor of a checkpoint. Default false.
    pub listing: bool,
}

/// What an adapter is.
///
/// # Errors
/// `A-008`, `E-001` with `norms`; none otherwise.
pub fn inspect_adapter(adapter: &Adapter, options: &InspectOptions) -> Result<AdapterReport> {
    let targets: Result<Vec<TargetReport>> = adapter.targets().iter().map(|target| target_report(target, options)).collect();
    Ok(AdapterReport {
        path: adapter.label().to_owned(),
        dialect: adapter.dialect(),
        method: method::method(adapter),
        family: family::family(adapter),
        needs: method::needs(adapter),
        base_name: adapter.base().name.clone(),
        base_structure: adapter.base().structure.clone(),
        parameters: adapter.parameters(),
        bytes: adapter.factors().map(|f| f.info().bytes()).sum(),
        targets: targets?,
        replacements: adapter
            .replacements()
            .iter()
            .map(|r| ReplacementReport {
                tensor: r.tensor.clone(),
                dtype: r.with.info().dtype.to_string(),
                shape: r.with.info().shape.dims().to_vec(),
            })
            .collect(),
        rows: adapter
            .rows()
            .iter()
            .map(|r| RowsReport { tensor: r.tensor.clone(), rows: r.rows.clone(), dtype: r.with.info().dtype.to_string() })
            .collect(),
        rescalings: adapter
            .rescalings()
            .iter()
            .map(|r| RescalingReport {
                tensor: r.tensor.clone(),
                axis: match r.axis {
                    Axis::Output => "output",
                    Axis::Input => "input",
                },
                factors: r.by.info().shape.elements(),
                dtype: r.by.info().dtype.to_string(),
            })
            .collect(),
        lineage: adapter.lineage().iter().map(|step| format!("{} by {}", step.op, step.tool)).collect(),
        warnings: adapter.warnings().iter().map(Note::from).collect(),
    })
}

fn target_report(target: &Target, options: &InspectOptions) -> Result<TargetReport> {
    let (out, inner) = target.out_in();
    let scale = target.scaling.effective();
    let norm = match options.norms {
        false => None,
        true => {
            let mut square = 0.0;
            for expert in 0..target.experts().unwrap_or(1) {
                let (b, a) = exec::read_factors(target, expert, 0..out)?;
                square += product_norm(&b, &a, target.scaling.rank as usize).powi(2);
            }
            Some(scale.abs() * square.sqrt())
        }
    };
    Ok(TargetReport {
        tensor: target.tensor.clone(),
        kind: target.kind.name(),
        out,
        inner,
        rank: target.scaling.rank,
        alpha: target.scaling.alpha,
        rule: target.scaling.rule.name(),
        scale,
        dtype: FactorDtypes { a: target.a.info().dtype.to_string(), b: target.b.info().dtype.to_string() },
        bias: target.bias.is_some(),
        magnitudes: target.magnitude.is_some(),
        experts: target.experts(),
        norm,
    })
}

/// What a checkpoint is.
pub fn inspect_checkpoint(base: &Checkpoint, options: &InspectOptions) -> CheckpointReport {
    let mut dtypes: HashMap<String, (u64, u64)> = HashMap::new();
    let infos = || base.names().filter_map(|name| Some((name, base.info(name)?)));
    for (_, info) in infos() {
        let entry = dtypes.entry(info.dtype.to_string()).or_default();
        entry.0 += 1;
        entry.1 = entry.1.saturating_add(info.shape.elements());
    }
    let mut dtypes: Vec<_> =
        dtypes.into_iter().map(|(dtype, (tensors, parameters))| DtypeReport { dtype, tensors, parameters }).collect();
    dtypes.sort_by(|x, y| y.parameters.cmp(&x.parameters).then_with(|| x.dtype.cmp(&y.dtype)));
    let file =
        |s: &Shard| FileReport { file: s.file_name.clone(), bytes: s.file.file_len(), tensors: s.file.names().count() as u64 };
    let files: Vec<_> = base.shards().iter().map(file).collect();
    let listed = |(name, info): (&str, &TensorInfo)| ListedTensor {
        tensor: name.to_owned(),
        dtype: info.dtype.to_string(),
        shape: info.shape.dims().to_vec(),
    };
    CheckpointReport {
        path: base.path().display().to_string(),
        model_type: base.config().model_type.clone(),
        tensors: files.iter().map(|f| f.tensors).sum(),
        parameters: dtypes.iter().map(|d| d.parameters).fold(0, u64::saturating_add),
        bytes: files.iter().map(|f| f.bytes).sum(),
        files,
        dtypes,
        tied: tied(base),
        quantization: base.config().quantization.clone(),
        quantization_block: base.config().weight_block.map(|(rows, cols)| [rows, cols]),
        structure: base.structure_root(),
        listing: options.listing.then(|| infos().map(listed).collect()),
        warnings: base.warnings().iter().map(Note::from).collect(),
    }
}

/// The stored name of a tied embedding and the names that share it.
fn tied(base: &Checkpoint) -> Option<TiedReport> {
    let ties = base.names().filter_map(|name| Some((name, base.tied(name)?)));
    let (name, tie) = ties.into_iter().find(|(name, tie)| !tie.heads.is_empty() && !tie.heads.contains(name))?;
    Some(TiedReport { stored: name.to_owned(), shared_by: tie.heads.iter().map(|head| (*head).to_owned()).collect() })
}
