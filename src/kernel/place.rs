//! Rounds values that were computed elsewhere to the format of the weight, and takes the sums that the report needs. For changes that
//! are not a sum of base and update, of which there are few, so it is plain code for all instruction sets.

use super::float::{BF16, F16, F32, F64, Float, Format};
use super::tile::{BLOCK, Lanes, Sums};

/// Rounds `wanted` into `out`, which is of the format `to`; `base` is what the values were before.
pub(crate) fn place(to: Float, base: &[f64], wanted: &[f64], keep_nonfinite: bool, out: &mut [u8]) -> Sums {
    match to {
        Float::F64 => run::<F64>(base, wanted, keep_nonfinite, out),
        Float::F32 => run::<F32>(base, wanted, keep_nonfinite, out),
        Float::F16 => run::<F16>(base, wanted, keep_nonfinite, out),
        Float::BF16 => run::<BF16>(base, wanted, keep_nonfinite, out),
    }
}

fn run<G: Format>(base: &[f64], wanted: &[f64], keep_nonfinite: bool, out: &mut [u8]) -> Sums {
    let mut sums = Lanes::default();
    let blocks = base.chunks(BLOCK).zip(wanted.chunks(BLOCK)).zip(out.chunks_mut(BLOCK * G::SIZE));
    for ((base, wanted), out) in blocks {
        // What is missing of a short block is zero, and changes no sum.
        let (mut w, mut m, mut delta) = ([0.0; BLOCK], [0.0; BLOCK], [0.0; BLOCK]);
        for (i, (raw, (before, after))) in out.chunks_exact_mut(G::SIZE).zip(base.iter().zip(wanted)).enumerate() {
            let keep = keep_nonfinite && !before.is_finite();
            let bits = G::narrow(if keep { *before } else { *after });
            G::store(bits, raw);
            (w[i], m[i], delta[i]) = (*before, G::widen(bits), after - before);
        }
        sums.take::<G>(&w, &m, &delta, keep_nonfinite);
    }
    sums.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_rounded_once_and_counted() {
        let base: Vec<f64> = (0..40).map(f64::from).collect();
        // A tie of bf16, from just above it: rounding through f32 would go down.
        let mut wanted = base.clone();
        wanted[33] = 1.00390625 + 1e-12;
        wanted[35] = f64::NAN;
        let mut out = vec![0; 80];
        let sums = place(Float::BF16, &base, &wanted, false, &mut out);
        assert_eq!((sums.changed, sums.nonfinite), (1, 1));
        let mut read = vec![0.0f64; 40];
        Float::BF16.widen(&out, &mut read);
        assert_eq!((read[33], read[34]), (1.0078125, 34.0));
    }
}
