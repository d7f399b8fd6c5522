//! What is added to which tensor, as a text and tensors beside it: the part of a journal, and of an undo log, from which a merge can be
//! computed again without the adapter. `spec/journal.md` defines it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::block::rows_cols;
use super::budget::{THREAD, can_be_had, threads};
use super::pool::each;
use super::run::ExecOptions;
use crate::adapter::Factor;
use crate::codec::safetensors::SafetensorsFile;
use crate::error::Result;
use crate::io::tensor_digest;
use crate::plan::{Change, Contribution, Keeps, Norms, Origin, Panel};
use crate::tensor::{Dtype, Shape, TensorInfo, TensorSource, is_plain_float, pieces};

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ChangeRecord {
    pub(super) file: usize,
    pub(super) tensor: String,
    pub(super) dtype: Dtype,
    shape: Vec<u64>,
    pub(super) begin: u64,
    /// The tensor beside the text that takes its place, if one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    with: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    parts: Vec<PartRecord>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PartRecord {
    rank: u64,
    scale: f64,
    /// Dimensions that count rows: 2 for a stack of experts.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    lead: usize,
    left: PanelRecord,
    right: PanelRecord,
}

fn one() -> usize {
    1
}

fn is_one(lead: &usize) -> bool {
    *lead == 1
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum PanelRecord {
    One,
    Direct(String),
    Transposed(String),
}

/// Bytes of factors that are hashed on several threads.
const WORTH_THREADS: u64 = 8 << 20;

/// The tensors of a file by name, as factors.
pub(super) type Factors = HashMap<String, Factor>;

/// Writes down `changes`, each with the index of its file; `factors` takes what they need, in the order of its names.
pub(super) fn record<'c>(changes: &[(usize, &'c Change<'_>)], factors: &mut Vec<&'c Factor>) -> Vec<ChangeRecord> {
    let mut name = |factor: &'c Factor| {
        factors.push(factor);
        factor_name(factors.len() - 1)
    };
    let mut records = Vec::new();
    for (file, change) in changes {
        let with = match change.origin {
            Origin::Adapter(factor) => Some(name(factor)),
            Origin::Base { .. } => None,
        };
        let mut panel = |panel: &'c Panel| match panel {
            Panel::One => PanelRecord::One,
            Panel::Direct(factor) => PanelRecord::Direct(name(factor)),
            Panel::Transposed(factor) => PanelRecord::Transposed(name(factor)),
        };
        let part = |c: &'c Contribution| PartRecord {
            rank: c.rank,
            scale: c.scale,
            lead: c.lead,
            left: panel(&c.left),
            right: panel(&c.right),
        };
        records.push(ChangeRecord {
            file: *file,
            tensor: change.name.clone(),
            dtype: change.info.dtype,
            shape: change.info.shape.dims().to_vec(),
            begin: change.begin,
            with,
            parts: change.contributions.iter().map(part).collect(),
        });
    }
    records
}

/// The name of a factor in the file.
pub(super) fn factor_name(index: usize) -> String {
    format!("loratool.factor.{index}")
}

/// All tensors of a file; those that it states digests of are held against them.
///
/// # Errors
/// `E-001`, `E-004`; in the inner result what is wrong with the file.
pub(super) fn factors(file: SafetensorsFile, digests: &BTreeMap<String, String>) -> Result<std::result::Result<Factors, String>> {
    let source: Arc<dyn TensorSource> = Arc::new(file);
    let factors: Factors = source.names().filter_map(|name| Some((name.to_owned(), Factor::new(&source, name)?))).collect();
    for (name, stated) in digests {
        let Some(factor) = factors.get(name) else { return Ok(Err(format!("there is no {name:?}"))) };
        if *stated != digest(factor)? {
            return Ok(Err(format!("{name:?} is not what its digest names")));
        }
    }
    Ok(Ok(factors))
}

/// Digests of the factors, under the names that they have in the file.
pub(super) fn named_digests(factors: &[&Factor]) -> Result<BTreeMap<String, String>> {
    Ok(digests(factors, || Ok(()))?.into_iter().enumerate().map(|(index, digest)| (factor_name(index), digest)).collect())
}

/// The digest of a table of marks.
pub(super) fn digest_of_marks(marks: &[u64]) -> String {
    let mut hash = tensor_digest(&table(marks.len() as u64));
    marks.iter().for_each(|mark| hash.update(&mark.to_le_bytes()));
    hash.finish()
}

/// What a table of marks is in a file.
pub(super) fn table(count: u64) -> TensorInfo {
    let shape = Shape::new(vec![count]).unwrap_or_else(|| unreachable!("one dimension does not overflow"));
    TensorInfo { dtype: Dtype::U64, shape }
}

/// Reads a table of marks.
///
/// # Errors
/// `E-001`, `E-004`.
pub(super) fn marks(factor: &Factor) -> Result<Vec<u64>> {
    let mut marks = Vec::new();
    pieces(factor.info().bytes(), |offset, bytes| {
        factor.read(offset, bytes)?;
        marks.extend(bytes.as_chunks::<8>().0.iter().map(|mark| u64::from_le_bytes(*mark)));
        Ok(())
    })?;
    Ok(marks)
}

/// SHA-256 in hexadecimal digits.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl ChangeRecord {
    /// What is recorded, with the index of its file; `None` if it names a factor that is not there.
    pub(super) fn change<'f>(&self, factors: &'f Factors) -> Option<(usize, Change<'f>)> {
        let record = self;
        let info = TensorInfo { dtype: record.dtype, shape: Shape::new(record.shape.clone())? };
        let origin = match &record.with {
            Some(name) => Origin::Adapter(factors.get(name)?),
            None => Origin::Base { shard: record.file, begin: record.begin, info: info.clone() },
        };
        let panel = |record: &PanelRecord| {
            Some(match record {
                PanelRecord::One => Panel::One,
                PanelRecord::Direct(name) => Panel::Direct(factors.get(name)?.clone()),
                PanelRecord::Transposed(name) => Panel::Transposed(factors.get(name)?.clone()),
            })
        };
        let part = |part: &PartRecord| {
            let (left, right) = (panel(&part.left)?, panel(&part.right)?);
            let PartRecord { rank, scale, lead, .. } = *part;
            (lead == 1 || lead == 2).then_some(())?;
            let (adapter, tensors, gain, rounded_apart) = (0, Vec::new(), None, false);
            Some(Contribution { adapter, tensors, left, right, rank, scale, lead, gain, rounded_apart })
        };
        let contributions: Option<Vec<_>> = record.parts.iter().map(part).collect();
        let (name, begin, contributions) = (record.tensor.clone(), record.begin, contributions?);
        let (patches, norms, mixing, keeps) = (Vec::new(), Norms::default(), None, Keeps::default());
        let (added, quantised) = (false, None);
        let change = Change { name, info, begin, origin, contributions, added, patches, norms, mixing, keeps, quantised };
        Some((record.file, change))
    }

    /// `None` if the change does not fit its factors.
    pub(super) fn fits(&self, change: &Change<'_>) -> Option<()> {
        let (rows, cols) = rows_cols(change);
        let (high, slices) = (change.slice_rows(), rows.checked_div(change.slice_rows())?);
        // Kernels of convolutions are columns, and the slices of a stack lie behind each other.
        let is = |factor: &Factor, [first, second]: [u64; 2]| {
            let shape = &factor.info().shape;
            let lead =
                if slices > 1 || shape.dims().len() == 3 && change.contributions.iter().any(|c| c.lead == 2) { 2 } else { 1 };
            let leads = slices.checked_mul(first);
            let fits = shape.dims().len() > lead && leads == Some(shape.split(lead).0) && shape.split(lead).1 == second;
            fits && is_plain_float(factor.info().dtype)
        };
        if let Origin::Adapter(with) = change.origin {
            (with.info().shape == change.info.shape && is_plain_float(with.info().dtype)).then_some(())?;
        } else if self.parts.is_empty() {
            return None;
        }
        for part in &change.contributions {
            let rank = part.rank;
            (rank > 0 && part.scale.is_finite()).then_some(())?;
            let left = match &part.left {
                Panel::One => rows == 1 && rank == 1,
                Panel::Direct(factor) => is(factor, [high, rank]),
                Panel::Transposed(factor) => is(factor, [rank, high]),
            };
            let right = match &part.right {
                Panel::One => false,
                Panel::Direct(factor) => is(factor, [rank, cols]) || rank == 1 && factor.info().shape.dims() == [cols],
                Panel::Transposed(factor) => is(factor, [cols, rank]),
            };
            (left && right).then_some(())?;
        }
        Some(())
    }
}

/// The tensor digests of factors, on all cores. `go_on` is asked before each of them, and may end it.
///
/// # Errors
/// `E-001`, `E-004`; what `go_on` says.
pub(crate) fn digests(factors: &[&Factor], go_on: impl Fn() -> Result<()> + Sync) -> Result<Vec<String>> {
    // Small ones are not worth a thread, and threads take memory.
    let bytes: u64 = factors.iter().map(|factor| factor.info().bytes()).sum();
    let threads = if bytes < WORTH_THREADS { 1 } else { threads(&ExecOptions::default(), factors.len()) };
    let threads = if can_be_had(2 * threads as u64 * THREAD) { threads } else { 1 };
    each(threads, factors.len(), |index, _| {
        go_on()?;
        digest(factors[index])
    })
}

/// The tensor digest of a factor.
fn digest(factor: &Factor) -> Result<String> {
    let mut hash = tensor_digest(factor.info());
    pieces(factor.info().bytes(), |offset, bytes| {
        factor.read(offset, bytes)?;
        hash.update(bytes);
        Ok(())
    })?;
    Ok(hash.finish())
}
