//! The writer. It emits the one canonical form (`C-040`), and a manifest that the reader would refuse is refused here before a byte is
//! written. Digests have a fixed length, so the header's length is known before they are: the data is read once, hashed as it is
//! copied, and the header is written last. A file that was cut short has a length field of 0 and is no container.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::canonical::canonical;
use super::manifest::{
    Base, BiasEntry, EntryKind, Input, Manifest, Origin, Record, ReplacementEntry, RescalingEntry, ResidualEntry, RowsEntry,
    TargetEntry, VERSION,
};
use super::parse::check_json;
use super::{KEY, names};
use crate::adapter::{Adapter, BaseIdentity, Factor, Kind, Lineage, Orientation, Target};
use crate::codec::safetensors::Layout;
use crate::error::{Error, Result};
use crate::io::{ContentRoot, disk, tensor_digest, write_error};
use crate::limits::Limits;
use crate::rules;
use crate::tensor::{TensorInfo, pieces};

/// What was written.
#[derive(Debug)]
pub(crate) struct Written {
    /// Length of the file.
    pub(crate) bytes: u64,
    /// The content root.
    pub(crate) content: String,
}

/// Writes `adapter` as a container into the empty file `out`, of which `out_path` is the name in messages. `base` replaces what the
/// adapter knows of its base; `step` is added to its lineage. `advance` is called with the number of bytes of each piece that was
/// written, and may end it. The same adapter gives the same bytes.
///
/// # Errors
/// `A-024` if an orientation is not declared, `P-011` if a target is no module's weight, `C-003`, `C-019`, `C-021` or `C-022` if the header
/// would be over a limit, a `C-03x` rule if an identity or lineage record is malformed; `E-001`, `E-004` while reading, `E-002` while writing; the
/// first of `advance`.
pub(crate) fn write(
    adapter: &Adapter,
    base: Option<&BaseIdentity>,
    step: Option<Lineage>,
    out: &File,
    out_path: &Path,
    mut advance: impl FnMut(u64) -> Result<()>,
) -> Result<Written> {
    let (mut manifest, factors) = draft(adapter, base.unwrap_or(adapter.base()), step).map_err(|e| e.file(adapter.label()))?;
    let mut tensors: Vec<(&str, &TensorInfo)> = factors.iter().map(|(name, factor)| (name.as_str(), factor.info())).collect();
    Layout::canonical_order(&mut tensors);
    let layout = lay_out(&manifest, &tensors, out_path)?;

    let mut root = ContentRoot::default();
    for ((name, _), offset) in tensors.iter().zip(&layout.offsets) {
        if let Some(factor) = factors.get(*name) {
            root.insert(name, copy(factor, out, *offset, out_path, &mut advance)?);
        }
    }
    manifest.digests = root.digests().clone();
    manifest.content = root.finish();
    let head = lay_out(&manifest, &tensors, out_path)?.head;
    if head.len() != layout.head.len() {
        return Err(Error::new(rules::CANONICAL, "the header changed its length while it was written").file(out_path));
    }
    disk::write_at(out, &head, 0).map_err(|e| write_error(out_path, e))?;
    Ok(Written { bytes: layout.file_len, content: manifest.content })
}

/// Every tensor of a container of the adapter by its name there, which is PEFT's where PEFT has one.
///
/// # Errors
/// As [`write()`], for what can be known without writing.
pub(crate) fn named(adapter: &Adapter) -> Result<BTreeMap<String, Factor>> {
    let (_, factors) = draft(adapter, adapter.base(), None).map_err(|e| e.file(adapter.label()))?;
    Ok(factors.into_iter().map(|(name, factor)| (name, factor.clone())).collect())
}

/// The manifest with digests of zeros, and every tensor by its name in the file.
fn draft<'a>(
    adapter: &'a Adapter,
    base: &BaseIdentity,
    step: Option<Lineage>,
) -> Result<(Manifest, BTreeMap<String, &'a Factor>)> {
    let mut factors = BTreeMap::new();
    let mut add = |name: String, factor: &'a Factor| {
        if name.len() > Limits::default().name_bytes {
            return Err(Error::new(rules::NAME_SANE, format!("a tensor name would have {} bytes", name.len())).tensor(name));
        }
        match factors.insert(name.clone(), factor) {
            None => Ok(name),
            Some(_) => Err(Error::new(rules::UNIQUE_NAMES, format!("two tensors would be named {name:?}")).tensor(name)),
        }
    };
    let mut targets = Vec::with_capacity(adapter.targets().len());
    for target in adapter.targets() {
        targets.push(entry(adapter, target, &mut add)?);
    }
    let modules = names::modules(adapter);
    let mut replacements = Vec::with_capacity(adapter.replacements().len());
    for replacement in adapter.replacements() {
        let with = add(names::of_replacement(adapter, replacement, &modules), &replacement.with)?;
        replacements.push(ReplacementEntry { tensor: replacement.tensor.clone(), with, shared: replacement.shared });
    }
    let mut rows = Vec::with_capacity(adapter.rows().len());
    for entry in adapter.rows() {
        let with = add(names::of_rows(&entry.tensor), &entry.with)?;
        rows.push(RowsEntry { tensor: entry.tensor.clone(), rows: entry.rows.clone(), with });
    }
    let mut rescalings = Vec::with_capacity(adapter.rescalings().len());
    let mut named: BTreeMap<String, &Factor> = BTreeMap::new();
    for entry in adapter.rescalings() {
        let by = names::of_rescaling(&entry.tensor);
        // Weight and bias of a module have their multipliers in common; others of that name are an error.
        let is_same = |factor: &Factor| factor.name() == entry.by.name() && Arc::ptr_eq(factor.source(), entry.by.source());
        let by = if named.get(&by).is_some_and(|factor| is_same(factor)) { by } else { add(by, &entry.by)? };
        named.insert(by.clone(), &entry.by);
        let transposed = match entry.orientation {
            Orientation::OutIn => false,
            Orientation::InOut => true,
            Orientation::Undeclared => {
                let message = format!("the orientation of {:?} is not declared, and a container states it", entry.tensor);
                return Err(Error::new(rules::ORIENTATION, message).tensor(&entry.tensor).help("pass --fan-in-fan-out"));
            }
        };
        let (tensor, axis, if_there) = (entry.tensor.clone(), entry.axis, entry.if_there);
        rescalings.push(RescalingEntry { tensor, axis, transposed, if_there, by });
    }
    let lineage = adapter.lineage().iter().cloned().chain(step).map(record).collect::<Result<_>>()?;
    let zeros = "0".repeat(64);
    let mut manifest = Manifest {
        container: VERSION.to_owned(),
        required: Default::default(),
        optional: Default::default(),
        base: Base { name: base.name.clone(), structure: base.structure.clone(), targets: base.targets.clone() },
        targets,
        replacements,
        rows,
        rescalings,
        replication: adapter.replication().iter().map(|(start, end)| [*start, *end]).collect(),
        residual: adapter
            .parts()
            .residual
            .as_ref()
            .map(|(why, removed)| ResidualEntry { why: why.message().to_owned(), removed: *removed }),
        digests: factors.keys().map(|name| (name.clone(), zeros.clone())).collect(),
        content: zeros,
        lineage,
        origin: adapter.origin_config().map(origin).transpose()?,
    };
    manifest.required = manifest.used_features();
    Ok((manifest, factors))
}

fn entry<'a>(
    adapter: &Adapter,
    target: &'a Target,
    add: &mut impl FnMut(String, &'a Factor) -> Result<String>,
) -> Result<TargetEntry> {
    let undeclared = || {
        let message = format!("the orientation of {:?} is not declared, and a container states it", target.tensor);
        let help = match target.kind {
            Kind::Experts(_) => "pass --expert-axes, or settle it by the base: loratool convert --base BASE",
            _ => "pass --fan-in-fan-out, or settle it by the base: loratool convert --base BASE",
        };
        Error::new(rules::ORIENTATION, message).tensor(&target.tensor).help(help)
    };
    let (kind, axes) = EntryKind::of(target).ok_or_else(undeclared)?;
    // What is flat has the base's own shape, which the adapter does not know.
    let shape = match target.base_shape() {
        Some(shape) => shape,
        None if kind == EntryKind::Flat => <[u64; 2]>::from(target.out_in()).to_vec(),
        None => return Err(undeclared()),
    };
    let names = names::of_target(adapter, target)?;
    Ok(TargetEntry {
        tensor: target.tensor.clone(),
        kind,
        axes,
        shape,
        a: add(names.a, &target.a)?,
        b: add(names.b, &target.b)?,
        rank: target.scaling.rank,
        alpha: target.scaling.alpha,
        scaling: target.scaling.rule,
        scale: target.scaling.effective(),
        bias: match &target.bias {
            Some(bias) => Some(BiasEntry { tensor: bias.tensor.clone(), delta: add(names.bias, &bias.delta)? }),
            None => None,
        },
        magnitude: match &target.magnitude {
            Some(magnitude) => Some(add(names.magnitude, magnitude)?),
            None => None,
        },
        singular_values: target.singular_values.clone(),
    })
}

fn record(step: Lineage) -> Result<Record> {
    let inputs = step.inputs.into_iter().map(|i| Input { role: i.role, dialect: i.dialect, content: i.content });
    let parameters = canonical(&step.parameters)
        .ok_or_else(|| Error::new(rules::LINEAGE_FORM, format!("the parameters of the step {:?} are not JSON", step.op)))?;
    Ok(Record { op: step.op, tool: step.tool, inputs: inputs.collect(), parameters })
}

/// Only PEFT's config is carried so far; the specification names no other.
fn origin(config: &str) -> Result<Origin> {
    let config = canonical(config).ok_or_else(|| Error::new(rules::MANIFEST_JSON, "the original config is not JSON"))?;
    Ok(Origin { dialect: "peft".to_owned(), config })
}

/// Header and offsets, once the reader has accepted the manifest.
fn lay_out(manifest: &Manifest, tensors: &[(&str, &TensorInfo)], out_path: &Path) -> Result<Layout> {
    let fail = |rule, message: String| Error::new(rule, message).file(out_path);
    let text =
        serde_json::to_string(manifest).map_err(|e| fail(rules::MANIFEST_JSON, format!("the manifest is not JSON: {e}")))?;
    check_json(&text).and_then(|()| Manifest::parse(&text)).map_err(|e| e.file(out_path))?;
    let limits = Limits::default();
    if text.len() > limits.metadata_bytes {
        let message = format!("the manifest would have {} bytes, over the limit of {}", text.len(), limits.metadata_bytes);
        return Err(fail(rules::METADATA_LIMIT, message));
    }
    if tensors.len() > limits.tensors {
        return Err(fail(rules::TENSOR_LIMIT, format!("{} tensors, over the limit of {}", tensors.len(), limits.tensors)));
    }
    let layout = Layout::new(&[("format".to_owned(), "pt".to_owned()), (KEY.to_owned(), text)], tensors);
    if layout.head.len() as u64 - 8 > limits.header_bytes {
        let message = format!("the header would have {} bytes, over the limit of {}", layout.head.len() - 8, limits.header_bytes);
        return Err(fail(rules::HEADER_LIMIT, message));
    }
    Ok(layout)
}

/// Copies a tensor to `position` of the file and returns its digest.
fn copy(
    factor: &Factor,
    out: &File,
    position: u64,
    out_path: &Path,
    advance: &mut impl FnMut(u64) -> Result<()>,
) -> Result<String> {
    let mut hash = tensor_digest(factor.info());
    pieces(factor.info().bytes(), |offset, piece| {
        factor.read(offset, piece)?;
        hash.update(piece);
        disk::write_at(out, piece, position + offset).map_err(|e| write_error(out_path, e))?;
        advance(piece.len() as u64)
    })?;
    Ok(hash.finish())
}
