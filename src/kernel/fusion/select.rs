//! The value that is the k-th largest of a stream which is read several times and never held: its bits are found 16 at a time, by counting,
//! until so few values have the bits that are known that they can be held.

use super::ties::Cut;

/// Candidates that are held at most.
const HELD: u64 = 1 << 20;
/// Bytes that they take.
pub(crate) const CANDIDATES: u64 = HELD * 16;
/// Bits of |x| as f64, without the sign.
const BITS: u32 = 63;

/// One reading of all values: gives each with its index, by ascending index.
pub(crate) trait Reading {
    /// Why a reading failed.
    type Error;
    /// Reads all values, a few at a time: the index of the first of them, and they.
    fn each(&self, step: &mut dyn FnMut(u64, &[f64])) -> Result<(), Self::Error>;
}

/// The cut after which `count` of the values are kept. `count` is at least 1 and at most the number of values.
pub(super) fn cut<R: Reading>(values: &R, count: u64) -> Result<Cut, R::Error> {
    let (mut known, mut prefix, mut left) = (0, 0, count);
    let size = |value: f64| value.abs().to_bits();
    let is_candidate = |bits: u64, known: u32, prefix: u64| known == 0 || bits >> (BITS - known) == prefix;
    loop {
        let digits = 16.min(BITS - known);
        let shift = BITS - known - digits;
        let mut counts = vec![0u64; 1 << digits];
        values.each(&mut |_, part| {
            for value in part {
                let bits = size(*value);
                if is_candidate(bits, known, prefix) {
                    counts[(bits >> shift) as usize & ((1 << digits) - 1)] += 1;
                }
            }
        })?;
        // From the largest on.
        let mut digit = counts.len() - 1;
        while counts[digit] < left && digit > 0 {
            left -= counts[digit];
            digit -= 1;
        }
        prefix = prefix << digits | digit as u64;
        known += digits;
        if counts[digit] <= HELD || known == BITS {
            break;
        }
    }
    if known == BITS {
        return last_of_equal(values, f64::from_bits(prefix), left);
    }
    let mut held: Vec<(u64, u64)> = Vec::new();
    values.each(&mut |first, part| {
        for (value, index) in part.iter().zip(first..) {
            if is_candidate(size(*value), known, prefix) {
                held.push((size(*value), index));
            }
        }
    })?;
    let before = |x: &(u64, u64), y: &(u64, u64)| y.0.cmp(&x.0).then(x.1.cmp(&y.1));
    let place = (left.max(1) - 1) as usize;
    if place >= held.len() {
        return Ok(Cut::ALL);
    }
    let (_, (bits, index), _) = held.select_nth_unstable_by(place, before);
    Ok(Cut { size: f64::from_bits(*bits), index: *index })
}

/// The cut after so many of the values that all have one size.
fn last_of_equal<R: Reading>(values: &R, size: f64, count: u64) -> Result<Cut, R::Error> {
    let (mut left, mut last) = (count, 0);
    values.each(&mut |first, part| {
        for (value, index) in part.iter().zip(first..) {
            if left > 0 && value.abs() == size {
                (left, last) = (left - 1, index);
            }
        }
    })?;
    Ok(Cut { size, index: last })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Held(Vec<f64>);

    impl Reading for Held {
        type Error = std::convert::Infallible;
        fn each(&self, step: &mut dyn FnMut(u64, &[f64])) -> Result<(), Self::Error> {
            self.0.chunks(7).enumerate().for_each(|(i, part)| step(7 * i as u64, part));
            Ok(())
        }
    }

    fn same(values: Vec<f64>, count: usize) {
        let wanted = Cut::of(&values, count).unwrap();
        let found = cut(&Held(values.clone()), count as u64).unwrap();
        let kept = |cut: Cut| values.iter().zip(0..).filter(|(value, i)| cut.keeps(**value, *i)).count();
        assert_eq!((kept(found), kept(wanted)), (count, count));
        assert!(wanted == Cut::ALL || found == wanted, "{found:?} for {wanted:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]
        #[test]
        fn the_cut_is_that_of_sorting(values in proptest::collection::vec(prop_oneof![any::<i8>().prop_map(f64::from), -1e300f64..1e300, Just(0.0)], 1..80), part in 0.0f64..1.0) {
            let count = 1 + (part * (values.len() - 1) as f64) as usize;
            same(values, count);
        }
    }

    #[test]
    fn many_equal_values_are_not_held() {
        let many = vec![0.25; HELD as usize + 10];
        for count in [1, 5, many.len() - 1] {
            let found = cut(&Held(many.clone()), count as u64).unwrap();
            assert_eq!(found, Cut { size: 0.25, index: count as u64 - 1 });
        }
    }
}
