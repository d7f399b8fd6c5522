//! How far two updates are from each other, in their factors: ‖B·A − D·C‖ = ‖[B D]·[A; −C]‖ by the Gram matrices of both sides, in f64.

use crate::adapter::Target;
use crate::error::{Error, Result};
use crate::exec::read_factors;
use crate::kernel::product_norm;
use crate::rules;

/// Sizes of a value of an update whose square, and that of any sum of them, is a normal number of f64.
const MEASURED: std::ops::Range<f64> = 1e-140..1e140;

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
    /// `A-008`, `E-001`, `E-004`; `A-031` if the update is so large or so small that f64 cannot hold its squares.
    pub(in super::super) fn of(target: &Target, expert: u64) -> Result<Pair> {
        let (out, _) = target.out_in();
        let (b, mut a) = read_factors(target, expert, 0..out)?;
        let scale = target.scaling.effective();
        let largest = |values: &[f64]| values.iter().fold(0.0, |most: f64, value| most.max(value.abs()));
        let (of_b, of_a) = (largest(&b), largest(&a));
        a.iter_mut().for_each(|value| *value *= scale);
        let size = of_b * of_a * scale.abs();
        if of_b > 0.0 && of_a > 0.0 && !MEASURED.contains(&size) {
            let message = format!("the update of {:?} is about {size:e}, and f64 cannot hold its square", target.tensor);
            let help = "the factors of an adapter, or its weight, are too large or too small";
            return Err(Error::new(rules::RESULT_FINITE, message).tensor(&target.tensor).help(help));
        }
        Ok(Pair { b, a, rank: target.scaling.rank as usize })
    }

    /// ‖B·A‖²; 0 where columns cancel so far that only the rounding of f64 is left of it.
    pub(in super::super) fn norm_squared(&self) -> f64 {
        let square = product_norm(&self.b, &self.a, self.rank).powi(2);
        let squares = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
        // The Gram matrices are products of as many values as there are rows, with random errors; their trace has rank² terms.
        let noise = 8.0 * f64::EPSILON * self.rank as f64 * squares(&self.b) * squares(&self.a);
        if square > noise { square } else { 0.0 }
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

/// ‖ΔW‖² of all matrices of a target, and ‖ΔW − ΔV‖² with V another target of the tensor, or nothing.
///
/// # Errors
/// `A-008`, `A-031`, `E-001`, `E-004`.
pub(super) fn norm_and_distance(one: &Target, other: Option<&Target>) -> Result<(f64, f64)> {
    let (mut norm, mut distance) = (0.0, 0.0);
    for expert in 0..one.experts().unwrap_or(1) {
        let pair = Pair::of(one, expert)?;
        let square = pair.norm_squared();
        norm += square;
        distance += match other {
            Some(other) => pair.distance_squared(&Pair::of(other, expert)?),
            None => square,
        };
    }
    Ok((norm, distance))
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
