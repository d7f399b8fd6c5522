//! E4M3, the 8-bit format of quantised weights (OCP 8-bit floating point specification, section 5.1; `float8_e4m3fn` in torch): four bits of
//! exponent with a bias of 7, three of mantissa, no infinity, and NaN where all seven are set. A code means something together with the
//! scale of its block, so it is no format of weights as those of [`float`](super::float) are, and no kernel takes it.

/// The largest finite value.
pub(crate) const LARGEST: f64 = 448.0;
/// What is greater than this is nearer to 480, which the format does not have. At the tie the even code is that of 448.
pub(crate) const LAST_TIE: f64 = 464.0;
/// The distance of subnormal values.
const STEP: f64 = 1.0 / 512.0;
/// Below this, values are subnormal.
const NORMAL: f64 = 1.0 / 64.0;
const NAN: u8 = 0x7f;
/// Bits of the mantissa of f64 that are rounded away.
const DROPPED: u32 = 49;
/// The difference of the exponents' offsets, above three bits of mantissa.
const OFFSET: u64 = (1023 - 7) << 3;

/// Exact.
pub(crate) fn widen(code: u8) -> f64 {
    let magnitude = code & NAN;
    let value = match magnitude {
        NAN => f64::NAN,
        0..8 => f64::from(magnitude) * STEP,
        _ => f64::from_bits((u64::from(magnitude) + OFFSET) << DROPPED),
    };
    if code > NAN { -value } else { value }
}

/// Rounded once, to nearest even. NaN for what is above [`LAST_TIE`]: who divides by the scale that a block needs has nothing there.
pub(crate) fn narrow(value: f64) -> u8 {
    let (bits, sign) = (value.abs().to_bits(), if value.is_sign_negative() { 0x80 } else { 0 });
    let magnitude = if value.abs() < NORMAL {
        (value.abs() / STEP).round_ties_even() as u8
    } else if value.abs() <= LAST_TIE {
        let half = (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1);
        (((bits + half) >> DROPPED) - OFFSET) as u8
    } else {
        NAN
    };
    sign | magnitude
}

/// The distance from a positive number to the next larger one of the format, in the binade of `x`.
pub(crate) fn unit(x: f64) -> f64 {
    let exponent = ((x.to_bits() >> 52) & 0x7ff) as i64 - 1023;
    f64::from_bits(((exponent.clamp(-6, 8) - 3 + 1023) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What torch 2.15 makes of `torch.uint8` viewed as `float8_e4m3fn`.
    const BY_TORCH: &[(u8, f64)] = &[
        (0x00, 0.0),
        (0x01, 0.001953125),
        (0x07, 0.013671875),
        (0x08, 0.015625),
        (0x09, 0.017578125),
        (0x38, 1.0),
        (0x39, 1.125),
        (0x5a, 20.0),
        (0x77, 240.0),
        (0x78, 256.0),
        (0x7e, 448.0),
        (0x80, -0.0),
        (0x81, -0.001953125),
        (0xb8, -1.0),
        (0xfe, -448.0),
    ];

    #[test]
    fn codes_mean_what_torch_says() {
        for (code, value) in BY_TORCH {
            assert_eq!(widen(*code).to_bits(), value.to_bits(), "{code:#04x}");
        }
        assert!(widen(0x7f).is_nan() && widen(0xff).is_nan());
        assert!((0..0x7e).all(|code| widen(code) < widen(code + 1)));
        assert!((0..0x7f).all(|code| widen(code) == -widen(code | 0x80)));
    }

    #[test]
    fn every_code_narrows_back() {
        for code in (0..=0xff).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(narrow(widen(code)), code);
        }
    }

    #[test]
    fn ties_go_to_the_even_code_and_their_neighbours_to_the_nearer() {
        for code in 0..0x7e {
            let tie = (widen(code) + widen(code + 1)) / 2.0;
            let even = code + (code & 1);
            for (sign, negative) in [(1.0, 0), (-1.0, 0x80)] {
                assert_eq!(narrow(sign * tie), even | negative, "{tie}");
                assert_eq!(narrow(sign * f64::from_bits(tie.to_bits() - 1)), code | negative);
                assert_eq!(narrow(sign * f64::from_bits(tie.to_bits() + 1)), (code + 1) | negative);
            }
        }
        assert_eq!(
            (narrow(LAST_TIE), narrow(f64::from_bits(LAST_TIE.to_bits() + 1)), narrow(f64::NAN) & 0x7f),
            (0x7e, 0x7f, 0x7f)
        );
    }

    proptest! {
        #[test]
        fn any_value_goes_to_a_nearest_code(value in -LAST_TIE..LAST_TIE, small in 0i32..12) {
            let value = value * 2f64.powi(-small);
            let error = (widen(narrow(value)) - value).abs();
            let least = (0..=0xfe).map(|code| (widen(code) - value).abs()).filter(|x| !x.is_nan()).fold(f64::MAX, f64::min);
            prop_assert_eq!(error, least);
        }
    }

    #[test]
    fn steps_are_those_of_the_codes() {
        for code in 0..0x7e {
            assert_eq!(unit(widen(code)), widen(code + 1) - widen(code), "{code:#04x}");
        }
    }
}
