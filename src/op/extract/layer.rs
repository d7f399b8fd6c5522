//! One weight, which may be a stack of matrices: its factors go to the spool, its figures to the report.

use faer::MatRef;

use super::decompose::{Decomposed, Task, Way};
use super::metric::decompose_in;
use super::options::ExtractOptions;
use crate::adapter::{Kind, Orientation};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::exec::{Difference, Metric, Progress, Weight, float_of};
use crate::kernel::{Float, Isa};
use crate::op::rank::RankRule;
use crate::op::spool::{Place, Spool};
use crate::plan::Layer;
use crate::report::{ExtractedTarget, OmittedTarget};
use crate::rules;
use crate::tensor::{Shape, TensorInfo, TensorSource};

/// What all layers have in common.
pub(super) struct Site<'s> {
    pub(super) base: Option<&'s Checkpoint>,
    pub(super) tuned: &'s Checkpoint,
    pub(super) options: &'s ExtractOptions,
    pub(super) progress: &'s dyn Progress,
}

/// What became of a weight.
pub(super) struct Outcome {
    /// ‖D‖².
    pub(super) norm_squared: f64,
    /// ‖D - B·A‖²; ‖D‖² without factors.
    pub(super) error_squared: f64,
    pub(super) fate: Fate,
}

pub(super) enum Fate {
    Unchanged,
    Omitted(OmittedTarget),
    Extracted(ExtractedTarget),
}

/// The stored matrix is `(in, out)`.
fn is_transposed(kind: Kind) -> bool {
    kind == Kind::Embedding || kind.orientation() == Some(Orientation::InOut)
}

/// Where the two factors of a layer lie in the spool.
#[derive(Clone, Copy)]
struct Places {
    a: Place,
    b: Place,
    rank: usize,
}

/// The names of a layer's factors in the spool.
pub(super) fn names(layer: &Layer) -> [String; 2] {
    [format!("{}:A", layer.tensor), format!("{}:B", layer.tensor)]
}

/// What the parts of a stack add up to.
#[derive(Default)]
struct Sums {
    norm_squared: f64,
    base_squared: f64,
    error_squared: f64,
    excess: f64,
    spectral: f64,
    blocks: usize,
    is_exact: bool,
    edge: f64,
    gain: f64,
    weighted: Option<f64>,
}

impl Sums {
    fn add(&mut self, found: &Decomposed) {
        self.base_squared += found.base_squared;
        if found.norm_squared == 0.0 {
            return;
        }
        self.gain = if self.norm_squared == 0.0 { found.gain } else { self.gain.min(found.gain) };
        self.norm_squared += found.norm_squared;
        self.error_squared += found.error_squared;
        self.excess = self.excess.max(found.excess);
        self.spectral = self.spectral.max(found.spectral);
        self.blocks = self.blocks.max(found.blocks);
        self.is_exact |= found.method == Way::Exact;
        self.edge = self.edge.max(found.edge);
        self.weighted = [self.weighted, found.weighted].into_iter().flatten().reduce(f64::max);
    }
}

impl Site<'_> {
    /// The singular values of a weight up to a rank, largest first; of a stack those of all parts together.
    ///
    /// # Errors
    /// As [`decompose_in()`].
    pub(super) fn values(&self, layer: &Layer, cap: u64) -> Result<Vec<f64>> {
        let (mut squares, metric) = (Vec::<f64>::new(), self.metric(layer)?);
        for slice in 0..layer.slices {
            let found = self.decompose(layer, slice, RankRule::Fixed(cap), cap, metric.as_ref())?;
            squares.resize(squares.len().max(found.rank), 0.0);
            squares.iter_mut().zip(&found.values[..found.rank]).for_each(|(sum, value)| *sum += value * value);
        }
        Ok(squares.into_iter().map(f64::sqrt).collect())
    }

    /// Factorises the change of a weight by a rule.
    ///
    /// # Errors
    /// As [`decompose_in()`]; `E-002` for the spool.
    pub(super) fn extract(&self, layer: &Layer, rule: RankRule, spool: &Spool) -> Result<Outcome> {
        let metric = self.metric(layer)?;
        let (rule, of_all) = self.common(layer, rule, metric.as_ref())?;
        let cap = if let RankRule::Fixed(rank) = rule { rank } else { self.options.max_rank };
        let (mut sums, mut places, mut values) = (Sums::default(), None, Vec::new());
        for slice in 0..layer.slices {
            let found = self.decompose(layer, slice, rule, cap, metric.as_ref())?;
            sums.add(&found);
            let rank = of_all.unwrap_or(found.rank);
            if rank > 0 {
                let places = *places.get_or_insert_with(|| self.reserve(layer, rank, spool));
                self.put(layer, slice, &found, places, spool)?;
            }
            if layer.slices == 1 && found.weighted.is_none() {
                values = found.values.iter().copied().take(found.rank).collect();
            }
        }
        let fate = self.fate(layer, &sums, places.map(|places| places.rank), values);
        if let Fate::Extracted(target) = &fate {
            self.progress.tell(&format!("{} rank {} off by {:.2} %", layer.tensor, target.rank, 100.0 * target.error));
        }
        Ok(Outcome { norm_squared: sums.norm_squared, error_squared: sums.error_squared, fate })
    }

    /// A weight for which a budget has no room.
    ///
    /// # Errors
    /// `A-030`, `E-001`, `E-004`, `E-006`.
    pub(super) fn without(&self, layer: &Layer) -> Result<Outcome> {
        let mut norm_squared = 0.0;
        for slice in 0..layer.slices {
            norm_squared += self.difference(layer, slice)?.norm_squared()?;
        }
        let omission = OmittedTarget { tensor: layer.tensor.clone(), why: "budget", norm: norm_squared.sqrt(), survived: None };
        let fate = if norm_squared == 0.0 { Fate::Unchanged } else { Fate::Omitted(omission) };
        Ok(Outcome { norm_squared, error_squared: norm_squared, fate })
    }

    /// The rule for each matrix of a layer and, of a stack, the rank that all its parts have: it is known when all were seen. A rank by noise
    /// stays that of each part, and the rest of a part is zero.
    fn common(&self, layer: &Layer, rule: RankRule, metric: Option<&Metric>) -> Result<(RankRule, Option<usize>)> {
        let smaller = layer.rows.min(layer.cols);
        match rule {
            _ if layer.slices == 1 => return Ok((rule, None)),
            RankRule::Fixed(rank) => return Ok((rule, Some(rank.min(smaller) as usize))),
            _ => {}
        }
        let mut most = 0;
        for slice in 0..layer.slices {
            most = most.max(self.decompose(layer, slice, rule, self.options.max_rank, metric)?.rank);
        }
        let each = if rule == RankRule::Auto || most == 0 { rule } else { RankRule::Fixed(most as u64) };
        Ok((each, Some(most)))
    }

    fn fate(&self, layer: &Layer, sums: &Sums, rank: Option<usize>, values: Vec<f64>) -> Fate {
        let by_noise = self.options.rank == RankRule::Auto;
        if sums.norm_squared == 0.0 {
            return Fate::Unchanged;
        }
        let norm = sums.norm_squared.sqrt();
        let Some(rank) = rank else {
            let unrecoverable = by_noise && sums.gain < super::decompose::SURVIVES;
            let why = match (unrecoverable, self.options.act_stats.is_some()) {
                (true, _) => "unrecoverable",
                (false, false) => "noise",
                (false, true) => super::NO_INPUT,
            };
            let survived = by_noise.then_some(sums.gain);
            return Fate::Omitted(OmittedTarget { tensor: layer.tensor.clone(), why, norm, survived });
        };
        Fate::Extracted(ExtractedTarget {
            tensor: layer.tensor.clone(),
            shape: layer.shape.clone(),
            rank: rank as u64,
            norm,
            relative: (sums.base_squared > 0.0).then(|| (sums.norm_squared / sums.base_squared).sqrt()),
            error: (sums.error_squared / sums.norm_squared).sqrt(),
            weighted_error: sums.weighted,
            excess: sums.excess,
            spectral: sums.spectral,
            method: if sums.is_exact { "exact" } else { "krylov" },
            blocks: sums.blocks as u64,
            noise: by_noise.then_some(sums.edge),
            singular_values: values,
        })
    }

    /// What is known of the inputs of a layer.
    fn metric(&self, layer: &Layer) -> Result<Option<Metric>> {
        let inputs = if is_transposed(layer.kind) { layer.rows } else { layer.cols };
        self.options.act_stats.as_ref().map_or(Ok(None), |stats| stats.of(layer, inputs))
    }

    fn decompose(&self, layer: &Layer, slice: u64, rule: RankRule, cap: u64, metric: Option<&Metric>) -> Result<Decomposed> {
        let task = Task {
            options: self.options,
            rule,
            cap: usize::try_from(cap).unwrap_or(usize::MAX),
            key: key(self.options.seed, &layer.tensor, slice),
            is_transposed: is_transposed(layer.kind),
        };
        decompose_in(metric, &self.difference(layer, slice)?, &task)
    }

    fn difference<'l>(&'l self, layer: &'l Layer, slice: u64) -> Result<Difference<'l>> {
        let first = slice * layer.rows * layer.cols;
        let weight = |source: &'l Checkpoint, name: &'l str| -> Result<Weight<'l>> {
            let missing = || Error::new(rules::READ, "no such tensor").file(source.path()).tensor(name);
            let float = source.info(name).and_then(|info| float_of(info.dtype)).ok_or_else(missing)?;
            Ok(Weight { source, name, float, first })
        };
        let base = self.base.map(|base| weight(base, &layer.tensor)).transpose()?;
        let tuned = weight(self.tuned, &layer.tuned)?;
        let isa = if self.options.exec.portable { Isa::Portable } else { Isa::best() };
        Ok(Difference::new(tuned, base, (layer.rows as usize, layer.cols as usize), isa, self.progress))
    }

    fn reserve(&self, layer: &Layer, rank: usize, spool: &Spool) -> Places {
        let [a, b] = names(layer);
        let (out, inner) = if is_transposed(layer.kind) { (layer.cols, layer.rows) } else { (layer.rows, layer.cols) };
        let rank_dim = rank as u64;
        let (dims_a, dims_b) = match layer.kind {
            Kind::Experts(_) => (vec![layer.slices, rank_dim, inner], vec![layer.slices, out, rank_dim]),
            Kind::Conv => {
                let kernel = layer.shape.get(2..).unwrap_or_default();
                let a = [rank_dim].iter().chain(layer.shape.get(1..).unwrap_or_default()).copied().collect();
                (a, [out, rank_dim].into_iter().chain(kernel.iter().map(|_| 1)).collect())
            }
            _ => (vec![rank_dim, inner], vec![out, rank_dim]),
        };
        let info = |dims| TensorInfo { dtype: self.options.dtype, shape: Shape::new(dims).unwrap_or_default() };
        Places { a: spool.reserve(&a, info(dims_a)), b: spool.reserve(&b, info(dims_b)), rank }
    }

    /// Puts the factors of one matrix into the spool, with zeros up to the rank of the stack.
    fn put(&self, layer: &Layer, slice: u64, found: &Decomposed, places: Places, spool: &Spool) -> Result<()> {
        let float = float_of(self.options.dtype).unwrap_or(Float::F32);
        let (rows, cols, rank) = (layer.rows as usize, layer.cols as usize, places.rank);
        let (out, inner) = if is_transposed(layer.kind) { (cols, rows) } else { (rows, cols) };
        let pair = found.factors.as_ref().map(|(left, right)| (left.as_ref(), right.as_ref()));
        let pair = pair
            .map(|(left, right)| if is_transposed(layer.kind) { (right.transpose(), left.transpose()) } else { (left, right) });
        let (b, a) = (pair.map(|pair| pair.0), pair.map(|pair| pair.1));
        for (place, matrix, (rows, cols)) in [(places.b, b, (out, rank)), (places.a, a, (rank, inner))] {
            let bytes = bytes(matrix, (rows, cols), float);
            spool.put(place, slice * (rows * cols * float.size()) as u64, &bytes)?;
        }
        Ok(())
    }
}

/// A matrix as it is stored, row-major, with zeros where it has fewer rows or columns.
pub(in super::super) fn bytes(matrix: Option<MatRef<'_, f64>>, (rows, cols): (usize, usize), float: Float) -> Vec<u8> {
    let mut values = vec![0.0; rows * cols];
    if let Some(matrix) = matrix {
        for j in 0..matrix.ncols().min(cols) {
            let column = matrix.col(j);
            values.iter_mut().skip(j).step_by(cols).zip(column.iter()).for_each(|(value, x)| *value = *x);
        }
    }
    let mut bytes = vec![0; values.len() * float.size()];
    float.narrow(&values, &mut bytes);
    bytes
}

/// The key of the random start of a matrix: another for each, and the same in every run (FNV-1a, 64 bits).
fn key(seed: u64, tensor: &str, slice: u64) -> u64 {
    let bytes = seed.to_le_bytes().into_iter().chain(slice.to_le_bytes()).chain(tensor.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
