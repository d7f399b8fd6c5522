//! An adapter as files: a container, or a PEFT folder with a container as its weights. Published whole or not at all.

use std::path::Path;

use super::convert::ConvertTo;
use super::plain;
use crate::adapter::{Adapter, BaseIdentity, Lineage};
use crate::dialect::{container, peft};
use crate::error::{Diagnostic, Result};
use crate::exec::{self, Progress};
use crate::io::{Durability, OutputKind, Overwrite, Staging};

/// What was written.
pub(super) struct Written {
    pub(super) bytes: u64,
    /// Content root of the tensors.
    pub(super) content: String,
    /// What the dialect cannot express.
    pub(super) losses: Vec<Diagnostic>,
}

/// What is at `output` in a dialect.
pub(super) fn kind(to: ConvertTo) -> (OutputKind, &'static str) {
    match to {
        ConvertTo::Container => (OutputKind::File, "container"),
        ConvertTo::Peft => (OutputKind::Folder, "peft"),
    }
}

/// Writes the adapter, with one step more in its history. `unchanged` is asked for the inputs before the output gets its name. `progress`
/// counts the bytes of the tensors.
///
/// # Errors
/// As [`container::write`] and [`peft::config_json`]; `E-002`; the first of
/// `unchanged`; `E-006` if `progress` cancels.
pub(super) fn write(
    adapter: &Adapter,
    identity: &BaseIdentity,
    step: Lineage,
    (output, to, overwrite): (&Path, ConvertTo, Overwrite),
    unchanged: impl FnOnce() -> Result<()>,
    progress: &dyn Progress,
) -> Result<Written> {
    let go_on = || if progress.cancelled() { Err(exec::interrupted()) } else { Ok(()) };
    let staging = Staging::new(output, kind(to).0, overwrite)?;
    let name = "adapter_model.safetensors";
    let (file, target) = (staging.create(name)?, staging.target_of(name));
    let advance = |bytes| {
        progress.advance(bytes);
        go_on()
    };
    // What PEFT packs otherwise than a container does cannot be both.
    let (bytes, content) = if to == ConvertTo::Peft && peft::is_packed(adapter) {
        let factors = peft::packed(adapter, container::named(adapter)?)?;
        let written = plain::write(&factors, &file, &target, advance)?;
        (written.bytes, written.content)
    } else {
        let written = container::write(adapter, Some(identity), Some(step), &file, &target, advance)?;
        (written.bytes, written.content)
    };
    let mut losses = Vec::new();
    if to == ConvertTo::Peft {
        let (config, lost) = peft::config_json(adapter)?;
        losses = lost;
        staging.write("adapter_config.json", config.as_bytes())?;
    }
    staging.sync()?;
    unchanged()?;
    go_on()?;
    staging.publish(Durability::Synced)?;
    Ok(Written { bytes, content, losses })
}
