//! How far two updates are from each other, in their factors: ‖B·A − D·C‖ = ‖[B D]·[A; −C]‖ by the Gram matrices of both sides, in f64.

use crate::adapter::Target;
use crate::error::Result;
use crate::exec::read_factors;
use crate::kernel::product_norm;

/// Two thin matrices `(rows, rank)` and `(rank, cols)`, row-major, whose product is an update with its scale.
pub(in super::super) struct Pair {
    pub(in super::super) b: Vec<f64>,
    pub(in super::super) a: Vec<f64>,
    pub(in super::super) rank: usize,
}

impl Pair {
    /// The factors of one matrix of a target; A has the scale.
    ///
    /// # Errors
    /// `A-008`, `E-001`, `E-004`.
    pub(in super::super) fn of(target: &Target, expert: u64) -> Result<Pair> {
        let (out, _) = target.out_in();
        let (b, mut a) = read_factors(target, expert, 0..out)?;
        let scale = target.scaling.effective();
        a.iter_mut().for_each(|value| *value *= scale);
        Ok(Pair { b, a, rank: target.scaling.rank as usize })
    }

    /// ‖B·A‖².
    pub(in super::super) fn norm_squared(&self) -> f64 {
        product_norm(&self.b, &self.a, self.rank).powi(2)
    }

    /// ‖B·A − D·C‖².
    pub(super) fn distance_squared(&self, other: &Pair) -> f64 {
        // If the factors are nearly the same, what they differ in says it: B·A − D·C = (B − D)·A + D·(A − C).
        if self.rank == other.rank {
            let minus = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x - y).collect::<Vec<f64>>();
            let (b, a) = (minus(&self.b, &other.b), minus(&self.a, &other.a));
            return beside(&b, &other.b, &self.a, &a, self.rank, self.rank);
        }
        let minus: Vec<f64> = other.a.iter().map(|value| -value).collect();
        beside(&self.b, &other.b, &self.a, &minus, self.rank, other.rank)
    }
}

/// ‖[B D]·[A; C]‖².
fn beside(b: &[f64], d: &[f64], a: &[f64], c: &[f64], rank: usize, other: usize) -> f64 {
    let left: Vec<f64> = b.chunks_exact(rank).zip(d.chunks_exact(other)).flat_map(|(b, d)| b.iter().chain(d)).copied().collect();
    let right: Vec<f64> = a.iter().chain(c).copied().collect();
    product_norm(&left, &right, rank + other).powi(2)
}

/// ‖ΔW‖² of all matrices of a target.
///
/// # Errors
/// `A-008`, `E-001`, `E-004`.
pub(in super::super) fn norm_squared(target: &Target) -> Result<f64> {
    let each = (0..target.experts().unwrap_or(1)).map(|expert| Ok(Pair::of(target, expert)?.norm_squared()));
    each.sum()
}

/// ‖ΔW − ΔV‖² of two targets of one tensor.
///
/// # Errors
/// `A-008`, `E-001`, `E-004`.
pub(super) fn distance_squared(one: &Target, other: &Target) -> Result<f64> {
    let each =
        (0..one.experts().unwrap_or(1)).map(|expert| Ok(Pair::of(one, expert)?.distance_squared(&Pair::of(other, expert)?)));
    each.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(rank: usize, seed: f64) -> Pair {
        let wave = |i: usize| (seed + 1.7 * i as f64).sin();
        Pair { b: (0..5 * rank).map(wave).collect(), a: (0..rank * 4).map(|i| wave(i + 31)).collect(), rank }
    }

    fn dense(pair: &Pair) -> Vec<f64> {
        let at = |n: usize| (0..pair.rank).map(|k| pair.b[n / 4 * pair.rank + k] * pair.a[k * 4 + n % 4]).sum();
        (0..20).map(at).collect()
    }

    #[test]
    fn distances_are_those_of_the_products() {
        for (one, other) in [(pair(2, 0.3), pair(3, 1.0)), (pair(2, 0.3), pair(2, 1.0)), (pair(3, 0.1), pair(1, 2.0))] {
            let wanted: f64 = dense(&one).iter().zip(dense(&other)).map(|(x, y)| (x - y).powi(2)).sum();
            assert!((one.distance_squared(&other) - wanted).abs() < 1e-12 * wanted.max(1.0));
        }
        let (one, mut near) = (pair(3, 0.3), pair(3, 0.3));
        near.a[2] += 1e-12;
        let found = one.distance_squared(&near).sqrt();
        assert!(found > 0.0 && found < 1e-11, "{found:e}");
    }
}
