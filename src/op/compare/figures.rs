//! What is measured of two updates of one matrix, and how it adds up over matrices.

use super::control::{conflict, random};
use super::diverged;
use crate::error::Result;
use crate::kernel::fusion::{Relation, Term, relation};
use crate::op::combine::{Pair, Sum};
use crate::report::Overlap;

/// Directions whose similarity is kept for a picture.
const DIRECTIONS: usize = 32;

/// Sums over matrices.
#[derive(Default)]
pub(super) struct Figures {
    squares: [f64; 2],
    inner: f64,
    /// Σ ‖Δ₁‖²‖Δ₂‖²/(m·n): the variance of ⟨Δ₁, Δ₂⟩ by chance.
    by_chance: f64,
    /// Values whose signs differ, as a sample has them, and all.
    conflicts: [f64; 2],
    /// Σ ‖U₁ᵀU₂‖² and Σ ‖V₁ᵀV₂‖², and Σ min(rank₁, rank₂).
    overlaps: [f64; 2],
    ranks_sum: f64,
    within: [f64; 2],
    /// The highest.
    pub(super) ranks: [u64; 2],
    /// The smallest, in degrees.
    pub(super) angles: [f64; 2],
    /// Singular values of the sum, of each matrix.
    sums: Vec<Vec<f64>>,
    /// Σ over matrices of the squares (U₁ᵀU₂)² and (V₁ᵀV₂)².
    grids: [Vec<Vec<f64>>; 2],
    /// The ranks of both in each matrix.
    both_ranks: Vec<[usize; 2]>,
    count: f64,
}

/// One matrix, and the same with a random adapter in the place of the second.
pub(super) struct One {
    pub(super) real: Measured,
    pub(super) random: Measured,
}

/// What was measured of two updates of one matrix.
pub(super) struct Measured {
    relation: Relation,
    conflicts: [f64; 2],
    values: f64,
}

impl One {
    /// Measures both updates of a sum.
    ///
    /// # Errors
    /// `A-008`, `E-012`, `E-001`, `E-004`.
    pub(super) fn of(sum: &Sum, expert: u64) -> Result<One> {
        let mut pairs = Vec::with_capacity(2);
        for part in &sum.parts {
            pairs.push(Pair::of(&part.target, expert)?);
        }
        let [one, two] = &pairs[..] else { return Err(diverged(&sum.tensor)) };
        let random = random(&sum.tensor, expert, two);
        Ok(One { real: Measured::of(&sum.tensor, one, two)?, random: Measured::of(&sum.tensor, one, &random)? })
    }
}

impl Measured {
    fn of(tensor: &str, one: &Pair, two: &Pair) -> Result<Measured> {
        let term = |pair: &'_ Pair| -> (usize, usize) { (pair.b.len() / pair.rank, pair.a.len() / pair.rank) };
        let (out, inner) = term(one);
        let of = |pair| relation_term(pair);
        let relation = relation(of(one), of(two)).ok_or_else(|| diverged(tensor))?;
        Ok(Measured { relation, conflicts: conflict(tensor, one, two, (out, inner)), values: (out * inner) as f64 })
    }
}

fn relation_term(pair: &Pair) -> Term<'_> {
    Term { b: &pair.b, a: &pair.a, rank: pair.rank }
}

fn quotient(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

impl Figures {
    pub(super) fn add(&mut self, one: &Measured) {
        let Measured { relation, conflicts, values } = one;
        let shares = conflicts.map(|count| quotient(count, conflicts[1]) * values);
        let add = |sums: &mut [f64; 2], values: &[f64; 2]| sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        add(&mut self.squares, &relation.squares);
        add(&mut self.conflicts, &shares);
        add(&mut self.within, &relation.within);
        self.ranks.iter_mut().zip(relation.ranks).for_each(|(most, rank)| *most = (*most).max(rank as u64));
        self.inner += relation.inner;
        self.by_chance += relation.squares[0] * relation.squares[1] / values;
        self.both_ranks.push(relation.ranks);
        self.ranks_sum += relation.ranks[0].min(relation.ranks[1]) as f64;
        let sides = [(&relation.outputs, &relation.output_cosines), (&relation.inputs, &relation.input_cosines)];
        for (side, (grid, cosines)) in sides.into_iter().enumerate() {
            self.overlaps[side] += (0..grid.ncols()).flat_map(|j| (0..grid.nrows()).map(move |i| grid[(i, j)])).sum::<f64>();
            let angle = cosines.first().map_or(90.0, |cosine| cosine.acos().to_degrees());
            self.angles[side] = if self.count == 0.0 { angle } else { self.angles[side].min(angle) };
            let sums = &mut self.grids[side];
            sums.resize(sums.len().max(grid.nrows().min(DIRECTIONS)), Vec::new());
            for (i, row) in sums.iter_mut().enumerate().take(grid.nrows()) {
                row.resize(row.len().max(grid.ncols().min(DIRECTIONS)), 0.0);
                row.iter_mut().enumerate().take(grid.ncols()).for_each(|(j, sum)| *sum += grid[(i, j)]);
            }
        }
        self.sums.push(relation.sum.clone());
        self.count += 1.0;
    }

    pub(super) fn overlap(&self) -> Overlap {
        let cosine = quotient(self.inner, (self.squares[0] * self.squares[1]).sqrt()).clamp(-1.0, 1.0);
        Overlap {
            norms: self.squares.map(f64::sqrt),
            cosine,
            sign_conflict: quotient(self.conflicts[0], self.conflicts[1]),
            sign_conflict_normal: cosine.acos() / std::f64::consts::PI,
            output_overlap: quotient(self.overlaps[0], self.ranks_sum),
            input_overlap: quotient(self.overlaps[1], self.ranks_sum),
            redundancy: [quotient(self.within[0], self.squares[1]).sqrt(), quotient(self.within[1], self.squares[0]).sqrt()],
        }
    }

    /// √E cos² of a random adapter.
    pub(super) fn chance(&self) -> f64 {
        quotient(self.by_chance.sqrt(), (self.squares[0] * self.squares[1]).sqrt())
    }

    /// Do they share nothing?
    pub(super) fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }

    fn missing(&self, rank: usize) -> f64 {
        let whole: f64 = self.sums.iter().flatten().map(|value| value * value).sum();
        let left: f64 = self.sums.iter().flat_map(|values| values.iter().skip(rank)).map(|value| value * value).sum();
        // A sum of nothing is -0.
        quotient(left + 0.0, whole).sqrt()
    }

    /// The smallest rank of all that leaves at most this share.
    pub(super) fn rank_for(&self, error: f64) -> u64 {
        let longest = self.sums.iter().map(Vec::len).max().unwrap_or(0);
        (0..=longest).find(|rank| self.missing(*rank) <= error).unwrap_or(longest) as u64
    }

    /// The error at some ranks.
    pub(super) fn truncation(&self) -> impl Iterator<Item = (u64, f64)> {
        let longest = self.sums.iter().map(Vec::len).max().unwrap_or(0);
        let powers = std::iter::successors(Some(1), |rank| Some(2 * rank)).take_while(move |rank| *rank < longest);
        powers.chain((longest > 0).then_some(longest)).map(|rank| (rank as u64, self.missing(rank)))
    }

    /// φ(i, j) = Σ over the first i and the first j directions / Σ min(i, j) of what a matrix has of both, over all matrices.
    pub(super) fn similarity(&self, side: usize) -> Vec<Vec<f64>> {
        let grid = &self.grids[side];
        let sum = |i: usize, j: usize| grid.iter().take(i).flat_map(|row| row.iter().take(j)).sum::<f64>();
        let width = grid.iter().map(Vec::len).max().unwrap_or(0);
        let most =
            |i: usize, j: usize| self.both_ranks.iter().map(|[one, two]| (i.min(*one)).min(j.min(*two)) as f64).sum::<f64>();
        let at = |i: usize, j: usize| quotient(sum(i, j), most(i, j));
        (1..=grid.len()).map(|i| (1..=width).map(|j| at(i, j)).collect()).collect()
    }
}
