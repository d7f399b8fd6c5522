//! `convert`: the same adapter in another dialect, bit for bit. A PEFT folder that is written here holds a container as its
//! `adapter_model.safetensors`, so nothing is lost on the way and back.

use std::fs;
use std::path::Path;

use super::digests::content;
use crate::adapter::{Adapter, BaseIdentity, Kind, Lineage, LineageInput, Orientation};
use crate::checkpoint::Checkpoint;
use crate::dialect::{container, peft};
use crate::error::{Error, Result};
use crate::exec;
use crate::io::{OutputKind, Overwrite, Staging, check_output, write_error};
use crate::limits::Limits;
use crate::plan::{BindOptions, Binding, Weighted};
use crate::report::{ConvertReport, Note};
use crate::rules;
use crate::tensor::TensorSource;

/// What to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConvertTo {
    /// One container file.
    Container,
    /// A PEFT folder: `adapter_model.safetensors` and `adapter_config.json`.
    Peft,
}

/// How to convert.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ConvertOptions<'a> {
    /// What to write. Default: a container.
    pub to: ConvertTo,
    /// The base, if it is at hand: the adapter is bound to it, and its identity is recorded. Default none.
    pub base: Option<&'a Checkpoint>,
    /// What may be relaxed in binding to the base.
    pub bind: BindOptions,
    /// What to do if the output exists. Default: refuse.
    pub overwrite: Overwrite,
    /// Bounds on input.
    pub limits: Limits,
}

impl Default for ConvertOptions<'_> {
    fn default() -> Self {
        ConvertOptions {
            to: ConvertTo::Container,
            base: None,
            bind: BindOptions::default(),
            overwrite: Overwrite::Refuse,
            limits: Limits::default(),
        }
    }
}

/// Writes `adapter` in another dialect. Factors keep their bytes.
///
/// # Errors
/// `A-008` if a value is not finite, `C-037` if a stated digest does not match, `A-024` if an orientation is undeclared and no base
/// settles it, what [`Binding::new`] finds if there is a base, `U-002`, `U-003`, `E-002` for the output.
pub fn convert(adapter: &Adapter, output: &Path, options: &ConvertOptions<'_>) -> Result<ConvertReport> {
    let (kind, to) = match options.to {
        ConvertTo::Container => (OutputKind::File, "container"),
        ConvertTo::Peft => (OutputKind::Folder, "peft"),
    };
    check_output(output, kind, &[Path::new(adapter.label())], options.overwrite)?;
    for factor in adapter.factors() {
        exec::check_finite(factor)?;
    }
    let root = content(adapter)?;
    super::digests::verify_stated(adapter)?;
    let (adapter, identity) = match options.base {
        Some(base) => settle(adapter, base, options)?,
        None => (adapter.clone(), adapter.base().clone()),
    };
    let step = Lineage {
        op: "convert".to_owned(),
        tool: format!("loratool {}", env!("CARGO_PKG_VERSION")),
        inputs: vec![LineageInput { role: "adapter".to_owned(), dialect: adapter.dialect().to_owned(), content: root.finish() }],
        parameters: "{}".to_owned(),
    };
    let staging = Staging::new(output, kind)?;
    let name = "adapter_model.safetensors";
    let path = staging.path_of(name);
    let written = container::write(&adapter, Some(&identity), Some(step), &staging.create(name)?, &path)?;
    let mut losses = Vec::new();
    if options.to == ConvertTo::Peft {
        let (config, lost) = peft::config_json(&adapter)?;
        losses.extend(lost.iter().map(Note::from));
        let path = staging.path_of("adapter_config.json");
        fs::write(&path, config).map_err(|e| write_error(&path, e))?;
    }
    staging.publish()?;
    Ok(ConvertReport {
        input: adapter.label().to_owned(),
        from: adapter.dialect(),
        to,
        output: output.display().to_string(),
        targets: adapter.targets().len() as u64,
        replacements: adapter.replacements().len() as u64,
        bytes: written.bytes,
        content: written.content,
        losses,
        warnings: adapter.warnings().iter().map(Note::from).collect(),
    })
}

/// Binds the adapter to the base: orientations become known, and the base's identity is recorded.
fn settle(adapter: &Adapter, base: &Checkpoint, options: &ConvertOptions<'_>) -> Result<(Adapter, BaseIdentity)> {
    let bind = BindOptions { add_new_tensors: true, untie: true, ..options.bind.clone() };
    let binding = Binding::new(base, Weighted::full(adapter), 0, &bind, &options.limits)?;
    let mut parts = adapter.parts().clone();
    for target in &mut parts.targets {
        if matches!(target.kind, Kind::Linear(_)) {
            let transposed = binding.is_transposed(&target.tensor).ok_or_else(|| {
                Error::new(rules::EVERY_TARGET, format!("{:?} is not in the base", target.tensor))
                    .file(adapter.label())
                    .tensor(&target.tensor)
            })?;
            target.kind = Kind::Linear(if transposed { Orientation::InOut } else { Orientation::OutIn });
        }
    }
    let names: Vec<&str> = binding.tensors().filter(|name| base.info(name).is_some()).collect();
    let identity = BaseIdentity {
        name: adapter.base().name.clone(),
        structure: Some(base.structure_root()),
        targets: Some(base.content_root(&names)?),
    };
    Ok((Adapter::new(parts, &options.limits)?, identity))
}
