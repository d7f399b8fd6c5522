//! The figures of a comparison, over slices. W is what the tensor started from, D the wanted update, C = round(W + D) what a correct
//! merge holds, M what is there. Sums are taken around M − W − D, which is small where the merge is right, so that they stay exact
//! where it matters.

use crate::kernel::{Float, float8};

/// Sums and counts over values of one tensor; those of two blocks add up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Figures {
    /// Values compared.
    pub(crate) values: u64,
    /// Bytes of M that they take.
    pub(crate) bytes: u64,
    /// ‖W‖².
    pub(crate) base: f64,
    /// ‖D‖².
    pub(crate) delta: f64,
    /// ‖M − W − D‖² and ⟨M − W − D, D⟩.
    pub(crate) found: Miss,
    /// The same of C in place of M.
    pub(crate) correct: Miss,
    /// Values by their distance from C in units of the last place: 0, 1, 2, 3 to 4, 5 to 16, more.
    pub(crate) ulps: [u64; 6],
    /// Values of M that are not finite.
    pub(crate) nonfinite: u64,
    /// Values of M that are those of W.
    pub(crate) as_origin: u64,
    /// Values of M that are those of the base's tensor of this name.
    pub(crate) as_base: u64,
    /// The greatest |M − C|, in units of the last place of the largest of W, C and all of D nearby: what no order of the same sums
    /// exceeds by much. D is a sum of terms that may be larger than itself, and its neighbours tell how large.
    pub(crate) worst: f64,
    /// The greatest |M − C|.
    pub(crate) farthest: f64,
    /// Values of M that are W + D rounded to BF16, and to F16. Only counted in blocks where few values are those of C.
    pub(crate) narrowed: [u64; 2],
}

/// What is left of M − W when D is taken away.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Miss {
    pub(crate) square: f64,
    pub(crate) along: f64,
}

impl Miss {
    fn add(&mut self, miss: f64, d: f64) {
        self.square += miss * miss;
        self.along += miss * d;
    }

    /// g with ⟨M − W, D⟩ = g ⟨D, D⟩, and ‖M − W − gD‖², if D is not zero.
    pub(crate) fn gain(&self, delta: f64) -> Option<(f64, f64)> {
        let over = (delta > 0.0).then(|| self.along / delta)?;
        Some((1.0 + over, (self.square - over * self.along).max(0.0)))
    }
}

impl Figures {
    /// Compares a block: W and D widened, M as stored.
    pub(super) fn of(stored: Float, base: &[f64], delta: &[f64], merged: &[u8]) -> Figures {
        let size = stored.size();
        let mut sums = Figures { values: base.len() as u64, bytes: merged.len() as u64, ..Default::default() };
        let peak = delta.iter().fold(0.0, |peak: f64, d| peak.max(d.abs()));
        let (mut wide, mut wanted, mut raw, mut correct) = ([0.0; LANE], [0.0; LANE], [0; 8 * LANE], [0.0; LANE]);
        for ((w, d), m) in base.chunks(LANE).zip(delta.chunks(LANE)).zip(merged.chunks(LANE * size)) {
            let n = w.len();
            wanted.iter_mut().zip(w.iter().zip(d)).for_each(|(c, (w, d))| *c = w + d);
            stored.narrow(&wanted[..n], &mut raw[..n * size]);
            stored.widen(&raw[..n * size], &mut correct[..n]);
            if *m == raw[..n * size] && sums.add_correct(w, d, &correct[..n]) {
                continue;
            }
            stored.widen(m, &mut wide[..n]);
            for i in 0..n {
                let bits = (&m[i * size..(i + 1) * size], &raw[i * size..(i + 1) * size]);
                sums.value(stored, w[i], (d[i], peak), correct[i], wide[i], bits);
            }
        }
        if sums.ulps[0] < sums.values / 2 {
            sums.narrowed = [Float::BF16, Float::F16].map(|narrow| narrowed(narrow, stored, base, delta, merged));
        }
        sums
    }

    /// Compares a block of a quantised weight: W, D, C and M as values, and the scale of the codes of C. A unit in the last place is the distance
    /// of codes there, times the scale.
    pub(super) fn of_codes(base: &[f64], delta: &[f64], correct: &[f64], merged: &[f64], scales: &[f64]) -> Figures {
        let mut sums = Figures { values: base.len() as u64, bytes: merged.len() as u64, ..Default::default() };
        let peak = delta.iter().fold(0.0, |peak: f64, d| peak.max(d.abs()));
        for i in 0..base.len() {
            let (w, d, c, m, scale) = (base[i], delta[i], correct[i], merged[i], scales[i]);
            sums.as_origin += u64::from(m == w || (m.is_nan() && w.is_nan()));
            let unit = |x: f64| if scale > 0.0 { float8::unit(x / scale) * scale } else { f64::MIN_POSITIVE };
            let steps = match (m.is_finite(), c.is_finite()) {
                _ if m == c || (m.is_nan() && c.is_nan()) => 0,
                // A whole one for each that was begun: the codes of another scale lie between those of this one.
                (true, true) => ((m - c).abs() / unit(c.abs())).ceil() as u64,
                _ => u64::MAX,
            };
            sums.ulps[bucket(steps)] += 1;
            sums.nonfinite += u64::from(!m.is_finite());
            if m.is_finite() && c.is_finite() && w.is_finite() {
                sums.finite(w, d, c, m);
                if steps > 0 {
                    let apart = (m - c).abs();
                    sums.farthest = sums.farthest.max(apart);
                    sums.worst = sums.worst.max(apart / unit(w.abs().max(peak).max(c.abs())));
                }
            } else if steps > 0 {
                (sums.worst, sums.farthest) = (f64::INFINITY, f64::INFINITY);
            }
        }
        sums.as_base = sums.as_origin;
        sums
    }

    fn finite(&mut self, w: f64, d: f64, c: f64, m: f64) {
        self.base += w * w;
        self.delta += d * d;
        self.found.add((m - w) - d, d);
        self.correct.add((c - w) - d, d);
    }

    /// Takes in values that are all the correct ones, as they mostly are. False, with nothing done, if some are not finite.
    fn add_correct(&mut self, w: &[f64], d: &[f64], c: &[f64]) -> bool {
        // Sums in lanes, which the compiler turns into vectors. Anything that is not finite shows in one of them.
        let (mut base, mut delta, mut square, mut along, mut same) = ([0.0; 8], [0.0; 8], [0.0; 8], [0.0; 8], [0u64; 8]);
        for ((w, d), c) in w.chunks(8).zip(d.chunks(8)).zip(c.chunks(8)) {
            for (i, ((w, d), c)) in w.iter().zip(d).zip(c).enumerate() {
                let miss = (c - w) - d;
                base[i] += w * w;
                delta[i] += d * d;
                square[i] += miss * miss;
                along[i] += miss * d;
                same[i] += u64::from(c == w);
            }
        }
        let [base, delta, square, along] = [base, delta, square, along].map(|lanes| lanes.iter().sum::<f64>());
        if !(base + delta + square + along).is_finite() {
            return false;
        }
        self.ulps[0] += w.len() as u64;
        self.as_origin += same.iter().sum::<u64>();
        self.base += base;
        self.delta += delta;
        for miss in [&mut self.found, &mut self.correct] {
            miss.square += square;
            miss.along += along;
        }
        true
    }

    fn value(&mut self, stored: Float, w: f64, (d, peak): (f64, f64), c: f64, m: f64, (found, wanted): (&[u8], &[u8])) {
        self.as_origin += u64::from(m == w || (m.is_nan() && w.is_nan()));
        let steps = match (m.is_finite(), c.is_finite()) {
            (true, true) => position(found).abs_diff(position(wanted)),
            _ if m == c || (m.is_nan() && c.is_nan()) => 0,
            _ => u64::MAX,
        };
        self.ulps[bucket(steps)] += 1;
        self.nonfinite += u64::from(!m.is_finite());
        if !m.is_finite() || !c.is_finite() || !w.is_finite() {
            if steps > 0 {
                (self.worst, self.farthest) = (f64::INFINITY, f64::INFINITY);
            }
            return;
        }
        self.finite(w, d, c, m);
        if steps > 0 {
            let apart = (m - c).abs();
            self.farthest = self.farthest.max(apart);
            self.worst = self.worst.max(apart / unit(stored, w.abs().max(peak).max(c.abs())));
        }
    }

    /// Both together.
    pub(crate) fn plus(&self, other: &Figures) -> Figures {
        let miss = |x: Miss, y: Miss| Miss { square: x.square + y.square, along: x.along + y.along };
        let mut ulps = self.ulps;
        ulps.iter_mut().zip(other.ulps).for_each(|(x, y)| *x += y);
        Figures {
            values: self.values + other.values,
            bytes: self.bytes + other.bytes,
            base: self.base + other.base,
            delta: self.delta + other.delta,
            found: miss(self.found, other.found),
            correct: miss(self.correct, other.correct),
            ulps,
            nonfinite: self.nonfinite + other.nonfinite,
            as_origin: self.as_origin + other.as_origin,
            as_base: self.as_base + other.as_base,
            worst: self.worst.max(other.worst),
            farthest: self.farthest.max(other.farthest),
            narrowed: [self.narrowed[0] + other.narrowed[0], self.narrowed[1] + other.narrowed[1]],
        }
    }
}

/// Values of M that are W + D rounded to a narrower format.
fn narrowed(narrow: Float, stored: Float, base: &[f64], delta: &[f64], merged: &[u8]) -> u64 {
    let size = stored.size();
    if size <= narrow.size() {
        return 0;
    }
    let (mut raw, mut narrow_value, mut wide) = ([0; 2], [0.0], [0.0]);
    let mut count = 0;
    for ((w, d), m) in base.iter().zip(delta).zip(merged.chunks_exact(size)) {
        narrow.narrow(&[w + d], &mut raw);
        narrow.widen(&raw, &mut narrow_value);
        stored.widen(m, &mut wide);
        count += u64::from(wide == narrow_value);
    }
    count
}

/// Values that are rounded together.
const LANE: usize = 64;

fn bucket(steps: u64) -> usize {
    match steps {
        0..=2 => steps as usize,
        3..=4 => 3,
        5..=16 => 4,
        _ => 5,
    }
}

/// The place of a stored value among all of its format, in ascending order; both zeros have one place.
fn position(raw: &[u8]) -> i64 {
    let mut bytes = [0; 8];
    bytes[..raw.len()].copy_from_slice(raw);
    let sign = 1u64 << (8 * raw.len() - 1);
    let bits = u64::from_le_bytes(bytes);
    let magnitude = (bits & (sign - 1)) as i64;
    if bits & sign == 0 { magnitude } else { -magnitude }
}

/// The distance from a positive number to the next larger one of the format.
pub(super) fn unit(stored: Float, x: f64) -> f64 {
    let (digits, least) = match stored {
        Float::F64 => (52, -1022 + 52),
        Float::F32 => (23, -126),
        Float::F16 => (10, -14),
        Float::BF16 => (7, -126),
    };
    let exponent = ((x.to_bits() >> 52) & 0x7ff) as i64 - 1023;
    f64::from_bits(((exponent.max(least) - digits + 1023) as u64) << 52)
}

/// How another update explains what was added.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Probe {
    /// Values looked at.
    pub(crate) values: u64,
    /// ‖M − W‖².
    pub(crate) moved: f64,
    /// ‖D'‖², of the other update.
    pub(crate) delta: f64,
    /// ⟨M − W, D'⟩.
    pub(crate) along: f64,
    /// Values that are round(W + factor · D').
    pub(crate) at_once: u64,
    /// Values that are round(round(W + D') + D').
    pub(crate) in_two: u64,
}

impl Probe {
    /// Adds a block.
    pub(super) fn add(&mut self, stored: Float, base: &[f64], delta: &[f64], merged: &[u8], factor: f64) {
        let size = stored.size();
        let (mut raw, mut one) = ([0; 8], [0.0]);
        let mut round = |x: f64| {
            stored.narrow(&[x], &mut raw[..size]);
            stored.widen(&raw[..size], &mut one);
            one[0]
        };
        let mut wide = [0.0f64];
        for ((w, d), m) in base.iter().zip(delta).zip(merged.chunks_exact(size)) {
            stored.widen(m, &mut wide);
            let m = wide[0];
            if !(m.is_finite() && w.is_finite()) {
                continue;
            }
            self.values += 1;
            self.moved += (m - w) * (m - w);
            self.delta += d * d;
            self.along += (m - w) * d;
            self.at_once += u64::from(round(w + factor * d) == m);
            let once = round(w + d);
            self.in_two += u64::from(round(once + d) == m);
        }
    }

    /// The gain, and what is left relative to the update; `None` if the update is zero.
    pub(crate) fn gain(&self) -> Option<(f64, f64)> {
        let gain = (self.delta > 0.0).then(|| self.along / self.delta)?;
        Some((gain, ((self.moved - gain * self.along).max(0.0) / self.delta).sqrt()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn distances_are_counted_in_steps_of_the_format() {
        let one = 1.0f32.to_bits();
        let merged: Vec<f32> = [0, 1, 2, 3, 16, 17].map(|n| f32::from_bits(one + n)).to_vec();
        let figures = Figures::of(Float::F32, &[0.5; 6], &[0.5; 6], &bytes(&merged));
        assert_eq!(figures.ulps, [1, 1, 1, 1, 1, 1]);
        assert_eq!((figures.worst, figures.values, figures.bytes), (17.0, 6, 24));
        // Either side of zero, the steps go on counting.
        let around = Figures::of(Float::F32, &[0.0], &[f64::from(f32::from_bits(1))], &bytes(&[-f32::from_bits(1)]));
        assert_eq!(around.ulps, [0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn the_gain_is_exact_where_the_merge_is() {
        let (w, d) = ([1.0, 2.0, -3.0], [0.25, -0.5, 0.125]);
        for (times, gain) in [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0), (-1.0, -1.0)] {
            let merged: Vec<f32> = w.iter().zip(&d).map(|(w, d)| (w + times * d) as f32).collect();
            let figures = Figures::of(Float::F32, &w, &d, &bytes(&merged));
            assert_eq!(figures.found.gain(figures.delta), Some((gain, 0.0)));
        }
        assert_eq!(Miss::default().gain(0.0), None);
    }

    /// One value that is off takes its whole chunk the long way: the figures are the same.
    #[test]
    fn correct_values_are_summed_as_all_others() {
        let w: Vec<f64> = (0..100).map(|i| f64::from(i as f32 * 0.37 - 11.0)).collect();
        let d: Vec<f64> = (0..100).map(|i| f64::from(i % 7) * 0.001).collect();
        let right: Vec<f32> = w.iter().zip(&d).map(|(w, d)| (w + d) as f32).collect();
        let fast = Figures::of(Float::F32, &w, &d, &bytes(&right));
        let mut slow = Figures { values: 100, bytes: 400, ..Default::default() };
        let peak = 0.006;
        for i in 0..100 {
            let (m, raw) = (f64::from(right[i]), right[i].to_le_bytes());
            slow.value(Float::F32, w[i], (d[i], peak), m, m, (&raw, &raw));
        }
        assert_eq!((fast.ulps, fast.as_origin, fast.values), (slow.ulps, slow.as_origin, slow.values));
        for (x, y) in [
            (fast.base, slow.base),
            (fast.delta, slow.delta),
            (fast.found.square, slow.found.square),
            (fast.found.along, slow.found.along),
        ] {
            assert!((x - y).abs() <= 1e-12 * y.abs(), "{x} {y}");
        }
        assert_eq!(fast.found, fast.correct);
    }

    #[test]
    fn a_value_that_is_not_finite_is_never_near() {
        let figures = Figures::of(Float::F32, &[1.0, f64::NAN], &[0.0, 0.0], &bytes(&[f32::NAN, f32::NAN]));
        assert_eq!((figures.ulps[5], figures.ulps[0], figures.nonfinite, figures.worst), (1, 1, 2, f64::INFINITY));
    }

    #[test]
    fn units_are_those_of_the_format() {
        assert_eq!(unit(Float::BF16, 1.0), 0.0078125);
        assert_eq!(unit(Float::F32, 1.5), f64::from(f32::EPSILON));
        assert_eq!(unit(Float::F16, 0.0), 2f64.powi(-24));
        assert_eq!(unit(Float::F64, 1.0), f64::EPSILON);
    }
}
