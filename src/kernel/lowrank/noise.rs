//! What rounding to a file's format did to a difference of weights: the noise that it added, by the size of the last place of each
//! weight, and the share of the difference that it kept.
//!
//! A weight that was rounded to nearest is off by up to half a unit in its last place u, with the variance u²/12. So the noise of a
//! checkpoint of 16 bits is known from the file, and no singular value below the largest one of such a noise says anything.

use super::super::float::Float;

/// Exponents of f32.
const BINS: usize = 256;

/// The noise of one matrix, gathered row by row.
#[derive(Debug, Clone)]
pub(crate) struct Noise {
    /// Sums of the variances of each column.
    columns: Vec<f64>,
    /// The largest such sum of a row.
    row: f64,
    /// How many weights have this exponent, and how many of them did not change.
    counts: Vec<(u64, u64)>,
    /// Unit in the last place of a weight of 1.
    unit: f32,
    /// The smallest unit of the format: of its subnormals.
    least: f32,
}

impl Noise {
    /// None yet, of a matrix of so many columns.
    pub(crate) fn new(format: Float, cols: usize) -> Self {
        let (unit, least) = match format {
            Float::BF16 => (2f32.powi(-7), 0.0),
            Float::F16 => (2f32.powi(-10), 2f32.powi(-24)),
            Float::F32 => (f32::EPSILON, 0.0),
            Float::F64 => (f64::EPSILON as f32, 0.0),
        };
        Noise { columns: vec![0.0; cols], row: 0.0, counts: vec![(0, 0); BINS], unit, least }
    }

    /// Takes in a row of weights and of their differences.
    pub(crate) fn add(&mut self, weights: &[f32], difference: &[f32]) {
        let mut sum = 0.0;
        // A row in which nothing changed was not tuned, and says nothing of rounding: a token that was not seen, a padded one.
        let is_tuned = difference.iter().any(|d| *d != 0.0);
        for ((weight, d), column) in weights.iter().zip(difference).zip(&mut self.columns) {
            let bits = weight.to_bits() & 0x7f80_0000;
            let unit = f64::from((f32::from_bits(bits) * self.unit).max(self.least));
            let variance = unit * unit / 12.0;
            *column += variance;
            sum += variance;
            let (all, same) = &mut self.counts[(bits >> 23) as usize];
            // Nor does a weight that was pruned.
            if is_tuned && (*weight != 0.0 || *d != 0.0) {
                *all += 1;
                *same += u64::from(*d == 0.0);
            }
        }
        self.row = self.row.max(sum);
    }

    /// Both together.
    pub(crate) fn plus(mut self, other: &Noise) -> Self {
        self.columns.iter_mut().zip(&other.columns).for_each(|(x, y)| *x += y);
        self.row = self.row.max(other.row);
        self.counts.iter_mut().zip(&other.counts).for_each(|(x, y)| *x = (x.0 + y.0, x.1 + y.1));
        self
    }

    /// The largest singular value that such a noise has: the largest norm of the deviations of a row plus that of a column (Bandeira and
    /// van Handel 2016, theorem 1.1, leading terms). For one variance s² everywhere it is s·(√rows + √cols).
    pub(crate) fn edge(&self) -> f64 {
        self.row.sqrt() + self.columns.iter().fold(0.0, |most: f64, c| most.max(*c)).sqrt()
    }

    /// The share of the difference that survived rounding, ⟨rounded, true⟩ / ‖true‖², if its values are normal: their deviation τ follows
    /// from how many weights did not change, which is a value within half a unit.
    pub(crate) fn gain(&self) -> f64 {
        let units: Vec<(f64, f64)> = self.units();
        let all: f64 = units.iter().map(|(_, n)| n).sum();
        let same: f64 = self.counts.iter().map(|(_, same)| *same as f64).sum();
        if same == 0.0 || all == 0.0 {
            return 1.0;
        }
        if same == all {
            return 0.0;
        }
        let expected = |tau: f64| units.iter().map(|(u, n)| n * within(0.5 * u / tau)).sum::<f64>();
        let largest = units.iter().fold(0.0, |most: f64, (u, _)| most.max(*u));
        let (mut low, mut high) = (largest * 1e-9, largest * 1e9);
        for _ in 0..200 {
            let middle = (low * high).sqrt();
            if expected(middle) > same { low = middle } else { high = middle }
        }
        let tau = (low * high).sqrt();
        units.iter().map(|(u, n)| n * kept(u / tau)).sum::<f64>() / all
    }

    /// Units in the last place, and how many weights have them.
    fn units(&self) -> Vec<(f64, f64)> {
        let used = self.counts.iter().enumerate().filter(|(_, (all, _))| *all > 0);
        let unit =
            |bin: usize| f64::from((f32::from_bits((bin as u32) << 23) * self.unit).max(self.least)).max(f64::MIN_POSITIVE);
        used.map(|(bin, (all, _))| (unit(bin), *all as f64)).collect()
    }
}

/// The probability that a standard normal value is within ±x: erf(x/√2) (Abramowitz and Stegun 1964, 7.1.26, to 1.5e-7).
fn within(x: f64) -> f64 {
    let z = x / std::f64::consts::SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let poly = [1.061_405_429, -1.453_152_027, 1.421_413_741, -0.284_496_736, 0.254_829_592];
    1.0 - poly.iter().fold(0.0, |sum, c| (sum + c) * t) * (-z * z).exp()
}

/// E[x·round(x)] for x standard normal and rounding to multiples of `unit`: a step of `unit` at each odd half of it, and
/// E[|x|; |x| > a] = 2φ(a).
fn kept(unit: f64) -> f64 {
    let mut sum = 0.0;
    let mut at = 0.5 * unit;
    if unit < 0.05 {
        return 1.0;
    }
    while at < 40.0 {
        sum += 2.0 * unit * (-0.5 * at * at).exp() / (2.0 * std::f64::consts::PI).sqrt();
        at += unit;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Twelve uniform values make a nearly normal one.
    fn normal(state: &mut u64) -> f64 {
        let mut next = || {
            *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (*state >> 11) as f64 / (1u64 << 53) as f64
        };
        (0..12).map(|_| next()).sum::<f64>() - 6.0
    }

    fn rounded(x: f64) -> f64 {
        let mut raw = [0; 2];
        Float::BF16.narrow(&[x], &mut raw);
        let mut out = [0.0f64];
        Float::BF16.widen(&raw, &mut out);
        out[0]
    }

    /// Against rounding itself, at the differences of table 1.6 of the measurements that this rests on.
    #[test]
    fn edge_and_gain_are_those_of_rounded_weights() {
        let (rows, cols) = (200, 300);
        for rho in [3e-4, 1e-3, 3e-3, 1e-2] {
            let mut state = 7;
            let mut noise = Noise::new(Float::BF16, cols);
            let (mut kept, mut norm, mut error) = (0.0, 0.0, 0.0);
            for _ in 0..rows {
                let base: Vec<f64> = (0..cols).map(|_| rounded(0.02 * normal(&mut state))).collect();
                let true_d: Vec<f64> = (0..cols).map(|_| 0.02 * rho * normal(&mut state)).collect();
                let tuned: Vec<f64> = base.iter().zip(&true_d).map(|(w, d)| rounded(w + d)).collect();
                let d: Vec<f32> = tuned.iter().zip(&base).map(|(t, w)| (t - w) as f32).collect();
                noise.add(&tuned.iter().map(|t| *t as f32).collect::<Vec<_>>(), &d);
                for (d, t) in d.iter().zip(&true_d) {
                    kept += f64::from(*d) * t;
                    norm += t * t;
                    error += (f64::from(*d) - t).powi(2);
                }
            }
            let (gain, wanted) = (noise.gain(), kept / norm);
            assert!((gain - wanted).abs() < 0.02 + 0.05 * (1.0 - wanted), "rho {rho}: {gain} for {wanted}");
            if rho == 1e-2 {
                let deviation = (error / (rows * cols) as f64).sqrt();
                let white = deviation * ((rows as f64).sqrt() + (cols as f64).sqrt());
                assert!((0.95..1.4).contains(&(noise.edge() / white)), "{} for {white}", noise.edge());
            }
        }
    }
}
