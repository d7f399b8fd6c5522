//! From a file with a manifest to an [`Adapter`]. What the manifest says is held against the headers of the tensors; their bytes are
//! not read, and the digests go along as stated, for whoever reads the bytes to check (`C-037`).

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::KEY;
use super::manifest::{Axes, EntryKind, Manifest, RescalingEntry, TargetEntry};
use super::parse::check_json;
use crate::adapter::{
    Adapter, AdapterParts, BaseIdentity, BiasDelta, Factor, Lineage, LineageInput, Orientation, Removed, Replacement, Rescaling,
    RowReplacement, Scaling, Target,
};
use crate::codec::safetensors::SafetensorsFile;
use crate::error::{Diagnostic, Error, Result};
use crate::io::ContentRoot;
use crate::limits::Limits;
use crate::rules;
use crate::tensor::TensorSource;

/// How far the stated scale may be from the formula, relatively: rounding of a writer in another language, no more.
const SCALE_TOLERANCE: f64 = 1e-12;

/// Whether the file carries a manifest.
pub(crate) fn is_container(file: &SafetensorsFile) -> bool {
    value(file, KEY).is_some()
}

/// Reads a container whose header was read strictly.
///
/// # Errors
/// `C-030` to `C-042` and what [`Adapter::new`] finds; each step reports all that it finds, and the first step that does ends it.
pub(crate) fn read(file: Arc<SafetensorsFile>, limits: &Limits) -> Result<Adapter> {
    let manifest = checked_manifest(&file).map_err(|e| e.file(file.path()))?;
    let label = file.path().display().to_string();
    let warnings = file.warnings().to_vec();
    let source: Arc<dyn TensorSource> = file;
    let factor = |name: &str| Factor::new(&source, name).ok_or_else(|| absent(name));
    let mut targets = Vec::with_capacity(manifest.targets.len());
    for entry in manifest.targets {
        targets.push(Target {
            kind: entry.kind(),
            a: factor(&entry.a)?,
            b: factor(&entry.b)?,
            scaling: scaling(&entry),
            bias: match entry.bias {
                Some(bias) => Some(BiasDelta { delta: factor(&bias.delta)?, tensor: bias.tensor }),
                None => None,
            },
            magnitude: match entry.magnitude {
                Some(name) => Some(factor(&name)?),
                None => None,
            },
            singular_values: entry.singular_values,
            tensor: entry.tensor,
        });
    }
    let mut rows = Vec::with_capacity(manifest.rows.len());
    for entry in manifest.rows {
        rows.push(RowReplacement { with: factor(&entry.with)?, tensor: entry.tensor, rows: entry.rows });
    }
    let mut rescalings = Vec::with_capacity(manifest.rescalings.len());
    for entry in manifest.rescalings {
        let RescalingEntry { tensor, axis, transposed, if_there, by } = entry;
        let orientation = if transposed { Orientation::InOut } else { Orientation::OutIn };
        rescalings.push(Rescaling { by: factor(&by)?, tensor, axis, orientation, if_there });
    }
    let mut replacements = Vec::with_capacity(manifest.replacements.len());
    for entry in manifest.replacements {
        replacements.push(Replacement { with: factor(&entry.with)?, tensor: entry.tensor, shared: entry.shared });
    }
    let lineage = manifest.lineage.into_iter().map(|record| Lineage {
        op: record.op,
        tool: record.tool,
        inputs: record
            .inputs
            .into_iter()
            .map(|i| LineageInput { role: i.role, dialect: i.dialect, content: i.content })
            .collect(),
        parameters: record.parameters.get().to_owned(),
    });
    let parts = AdapterParts {
        made_of: None,
        label,
        dialect: "container",
        targets,
        replacements,
        rows,
        rescalings,
        replication: manifest.replication.iter().map(|[start, end]| (*start, *end)).collect(),
        residual: manifest.residual.map(|residual| {
            let help = match residual.removed {
                Removed::Unknown => "give the base that was trained on, with --residual-base",
                _ => "take it out here, with --recompute-residual, or give the base that was trained on, with --residual-base",
            };
            (Diagnostic::new(rules::INIT_CHANGES_BASE, residual.why).help(help), residual.removed)
        }),
        base: BaseIdentity { name: manifest.base.name, structure: manifest.base.structure, targets: manifest.base.targets },
        lineage: lineage.collect(),
        digests: manifest.digests,
        content: Some(manifest.content),
        origin_config: manifest.origin.map(|origin| origin.config.get().to_owned()),
        warnings,
    };
    Adapter::new(parts, limits)
}

fn value<'a>(file: &'a SafetensorsFile, key: &str) -> Option<&'a str> {
    file.metadata().iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
}

fn absent(name: &str) -> Error {
    Error::new(rules::MANIFEST_BALANCE, format!("the manifest names the tensor {name:?}, which the file does not hold"))
        .tensor(name)
}

/// The manifest of a file, held against the file's header.
fn checked_manifest(file: &SafetensorsFile) -> Result<Manifest> {
    let text = value(file, KEY).ok_or_else(|| Error::new(rules::MANIFEST_JSON, format!("the metadata has no {KEY}")))?;
    check_json(text)?;
    match value(file, "format") {
        Some("pt") => {}
        Some(other) => return Err(Error::new(rules::FORMAT_PT, format!("the metadata has format {other:?}; expected \"pt\""))),
        None => return Err(Error::new(rules::FORMAT_PT, "the metadata has no format; expected \"pt\"")),
    }
    let manifest = Manifest::parse(text)?;
    let report = |problems: Vec<Diagnostic>| Error::check(problems.into_iter().map(|p| p.file(file.path())).collect());
    report(balance(&manifest, file))?;
    report(manifest.targets.iter().filter_map(|entry| shape_problem(entry, file)).collect())?;
    report(manifest.targets.iter().filter_map(scale_problem).collect())?;
    check_root(&manifest.digests, &manifest.content)?;
    Ok(manifest)
}

/// `C-034`: the manifest's names, the file's names and the digests' names are one set, and the manifest has each once.
fn balance(manifest: &Manifest, file: &SafetensorsFile) -> Vec<Diagnostic> {
    let mut uses: HashMap<&str, usize> = HashMap::new();
    for name in manifest.named_tensors() {
        *uses.entry(name).or_default() += 1;
    }
    let problem = |name: &str, message: String| Diagnostic::new(rules::MANIFEST_BALANCE, message).tensor(name);
    let mut problems = Vec::new();
    for name in file.names() {
        match uses.get(name) {
            None => problems.push(problem(name, format!("no target or replacement names the tensor {name:?}"))),
            Some(1) => {}
            Some(count) => problems.push(problem(name, format!("the manifest names the tensor {name:?} {count} times"))),
        }
        if !manifest.digests.contains_key(name) {
            problems.push(problem(name, format!("the manifest has no digest of the tensor {name:?}")));
        }
    }
    let missing = manifest.named_tensors().filter(|name| file.info(name).is_none());
    problems.extend(missing.flat_map(|name| absent(name).into_diagnostics()));
    let extra = manifest.digests.keys().filter(|name| file.info(name).is_none());
    problems
        .extend(extra.map(|name| problem(name, format!("the manifest has a digest of {name:?}, which the file does not hold"))));
    problems
}

/// `C-035`: the factors have the dimensions of their kind and one rank, and with the kind they give the shape.
fn shape_problem(entry: &TargetEntry, file: &SafetensorsFile) -> Option<Diagnostic> {
    let (a, b) = (&file.info(&entry.a)?.shape, &file.info(&entry.b)?.shape);
    let problem = |message: String| {
        let message = format!("target {:?}: A {a} and B {b} {message}", entry.tensor);
        Some(Diagnostic::new(rules::MANIFEST_SHAPES, message).tensor(&entry.a))
    };
    let (ranks, shape) = match (entry.kind, a.dims(), b.dims()) {
        (EntryKind::Linear | EntryKind::Flat, &[a, inner], &[out, b]) => ([a, b], vec![out, inner]),
        (EntryKind::LinearTransposed | EntryKind::Embedding, &[a, inner], &[out, b]) => ([a, b], vec![inner, out]),
        (EntryKind::Conv(sizes), &[a, ref kernel @ ..], &[out, b, ref ones @ ..])
            if kernel.len() == sizes + 1 && ones.len() == sizes && ones.iter().all(|&one| one == 1) =>
        {
            ([a, b], std::iter::once(out).chain(kernel.iter().copied()).collect())
        }
        (EntryKind::Experts, &[experts, a, inner], &[others, out, b]) if experts == others => match entry.axes {
            Some(Axes::InOut) => ([a, b], vec![experts, inner, out]),
            _ => ([a, b], vec![experts, out, inner]),
        },
        (EntryKind::Linear | EntryKind::LinearTransposed | EntryKind::Embedding | EntryKind::Flat, ..) => {
            return problem("are not both matrices".into());
        }
        (kind, ..) => return problem(format!("do not have the dimensions of {}", kind.name())),
    };
    if ranks != [entry.rank; 2] {
        return problem(format!("do not have the rank {} that the manifest states", entry.rank));
    }
    if entry.shape != shape {
        let kind = entry.kind.name();
        return problem(format!("give the shape {shape:?} for {kind}, but the manifest states {:?}", entry.shape));
    }
    None
}

/// `C-036`.
fn scale_problem(entry: &TargetEntry) -> Option<Diagnostic> {
    let expected = scaling(entry).effective();
    // A rank of 0 gives no number to compare with and passes here; A-002 refuses it by name.
    let differs = (entry.scale - expected).abs() > SCALE_TOLERANCE * expected.abs();
    let rule = entry.scaling.name();
    let message = || format!("target {:?}: scale is {} but {rule} is {expected}", entry.tensor, entry.scale);
    differs.then(|| Diagnostic::new(rules::MANIFEST_SCALE, message()).tensor(&entry.tensor))
}

fn scaling(entry: &TargetEntry) -> Scaling {
    Scaling { rank: entry.rank, alpha: entry.alpha, rule: entry.scaling }
}

/// `C-038`.
fn check_root(digests: &BTreeMap<String, String>, content: &str) -> Result<()> {
    let mut root = ContentRoot::default();
    for (name, digest) in digests {
        root.insert(name, digest.clone());
    }
    let found = root.finish();
    if found == content {
        return Ok(());
    }
    let message = format!("content is {content} but the tensor digests give {found}");
    Err(Error::new(rules::CONTENT_ROOT, message).help("the manifest was damaged or edited; get the file again"))
}
