//! What the figures of a tensor say about how it was made. Pure: figures in, a verdict in words out. The gain g is how many times the
//! wanted update D is found in M − W; each way of merging wrongly has its own g, and what g does not explain tells the rest.

use crate::adapter::Scaling;
use crate::exec::Figures;
use crate::report::Verdict;
use crate::report::text::{count, plural};

/// No g is told from another one that is nearer than this.
const TOLERANCE: f64 = 0.02;
/// Nor from one that is nearer than so many standard errors.
const ERRORS: f64 = 5.0;
/// Units in the last place, of the largest operand, within which sums in another order or in single precision lie: one rounding of
/// the update and one of the sum, for each adapter, because others round after each.
const NEAR: f64 = 2.0;
/// How far a value may be from the right one, relative to the root mean square of the update, for an update that was computed in a
/// 16-bit format: some 2⁻⁹ of products that may be ten times their sum.
const COARSE: f64 = 0.05;
/// What g may leave unexplained, relative to the update that it claims, beyond what rounding leaves.
const UNEXPLAINED: f64 = 0.1;
/// Below this share of the update the verdict says that rounding has lost part of it.
const KEPT: f64 = 0.9;

/// How the single contribution of a tensor is scaled.
#[derive(Debug, Clone, Copy)]
pub(super) struct Applied {
    pub(super) scaling: Scaling,
    /// The weight that the adapter was given.
    pub(super) weight: f64,
}

/// A verdict with its sentence.
pub(super) type Said = (Verdict, String);

/// What the figures allow to say.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Judgement {
    /// All there is to say.
    Settled(Said),
    /// The update was added so many times; there is a name for it, or several that give the same factor. Whether a factor of two comes
    /// from two merges is told by the bits.
    Scaled(f64, Vec<Said>),
    /// The update is not what was added, or not alone: others are to be tried, and if none fits it is this.
    Search(Said),
}

/// g with its standard error, what g leaves unexplained, and the same for the correctly rounded result.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Gains {
    pub(super) gain: f64,
    pub(super) error: f64,
    pub(super) expected: f64,
    /// ‖M − W − gD‖².
    pub(super) left: f64,
    /// ‖M − W − gD‖ / ‖D‖.
    pub(super) residual: f64,
    /// The same of the correctly rounded result: what rounding alone leaves.
    pub(super) rounding: f64,
}

impl Gains {
    /// `None` if there is no update.
    pub(super) fn of(figures: &Figures) -> Option<Gains> {
        let (gain, left) = figures.found.gain(figures.delta)?;
        let (expected, rounding) = figures.correct.gain(figures.delta)?;
        let of_update = |square: f64| (square / figures.delta).sqrt();
        let error = of_update(left) / (figures.values.max(1) as f64).sqrt();
        Some(Gains { gain, error, expected, left, residual: of_update(left), rounding: of_update(rounding) })
    }

    fn tolerance(&self) -> f64 {
        TOLERANCE.max(ERRORS * self.error)
    }
}

/// Judges a tensor that so many adapters change by its figures.
pub(super) fn judge(figures: &Figures, adapters: usize, applied: Option<Applied>) -> Judgement {
    let near = figures.worst <= NEAR * adapters.max(1) as f64;
    use Judgement::{Scaled, Search, Settled};
    let settled = |verdict, says: String| Settled((verdict, says));
    let gains = Gains::of(figures);
    if figures.ulps[0] == figures.values {
        return match gains.filter(|gains| gains.expected < KEPT) {
            Some(gains) => settled(Verdict::RoundingLost, lost(gains.expected)),
            None if gains.is_none() && figures.base > 0.0 => {
                settled(Verdict::Merged, "every value is as it should be".to_owned())
            }
            None => settled(Verdict::Merged, "every value is correctly rounded".to_owned()),
        };
    }
    if figures.as_base == figures.values {
        return settled(Verdict::NotMerged, "the tensor is the base's: nothing was merged into it".to_owned());
    }
    for (name, count) in ["BF16", "F16"].into_iter().zip(figures.narrowed) {
        if count == figures.values {
            return settled(Verdict::MergedLowerPrecision, format!("merged: every value is correctly rounded to {name}"));
        }
    }
    if figures.worst.is_infinite() {
        let message = format!("{} that are not finite, and should be", plural(figures.nonfinite, "value"));
        return settled(Verdict::Different, message);
    }
    let Some(gains) = gains else {
        let away = figures.values - figures.ulps[0];
        let verdict = if near { Verdict::MergedOtherRounding } else { Verdict::Different };
        return settled(verdict, format!("{} of {} are not what they should be", count(away), plural(figures.values, "value")));
    };
    let (gain, tolerance) = (gains.gain, gains.tolerance());
    // Rounding by chance keeps the whole update, which rounding to the nearest may not.
    if (gain - gains.expected).abs() <= tolerance || near && (gain - 1.0).abs() <= tolerance {
        let rms = (figures.delta / figures.values.max(1) as f64).sqrt();
        return match () {
            () if near => settled(Verdict::MergedOtherRounding, rounded_otherwise(figures)),
            () if figures.farthest <= COARSE * rms => settled(Verdict::MergedLowerPrecision, coarse(figures, &gains)),
            () => Search((Verdict::Different, strays(figures, &gains))),
        };
    }
    if gain.abs() > tolerance && gains.residual <= UNEXPLAINED * gain.abs().max(1.0) + 3.0 * gains.rounding {
        let mut names = names(gain, tolerance * gain.abs().max(1.0), applied);
        if names.is_empty() {
            names.push((Verdict::OtherScale, format!("the update was added {gain:.3} times")));
        }
        return Scaled(gain, names);
    }
    Search((Verdict::Different, unexplained(&gains)))
}

/// Every name of a factor. Several may give the same number, such as a scale of 1/2 that was ignored and an update added twice.
fn names(gain: f64, tolerance: f64, applied: Option<Applied>) -> Vec<Said> {
    let mut known = vec![
        (2.0, Verdict::MergedTwice, "the update was added twice".to_owned()),
        (-1.0, Verdict::Subtracted, "the update was subtracted".to_owned()),
    ];
    if let Some(Applied { scaling, weight }) = applied {
        use crate::adapter::ScalingRule::{RankStabilized, Standard};
        let (rank, scale) = (scaling.rank as f64, scaling.effective());
        let root = rank.sqrt();
        match scaling.rule {
            RankStabilized => {
                let says = "the rsLoRA scale is missing: alpha/rank instead of alpha/sqrt(rank)";
                known.push((1.0 / root, Verdict::RsloraMissing, says.to_owned()));
                known.push((
                    root,
                    Verdict::AlphaNotDivided,
                    "alpha was taken for the scale: not divided by sqrt(rank)".to_owned(),
                ));
            }
            Standard => {
                let says = "the rsLoRA scale was applied: alpha/sqrt(rank) instead of alpha/rank";
                known.push((root, Verdict::RsloraApplied, says.to_owned()));
                known.push((rank, Verdict::AlphaNotDivided, "alpha was taken for the scale: not divided by the rank".to_owned()));
            }
        }
        let ignored = format!("the scale {} ({}) was ignored", short(scale), scaling.rule.name());
        known.push((1.0 / scale, Verdict::ScaleIgnored, ignored));
        known.push((1.0 / weight, Verdict::WeightIgnored, format!("the weight {} was ignored", short(weight))));
        known.push((scale, Verdict::OtherScale, format!("the scale {} was applied twice", short(scale))));
    }
    known.retain(|(factor, ..)| (factor - gain).abs() <= tolerance && (factor - 1.0).abs() > tolerance);
    known.into_iter().map(|(_, verdict, says)| (verdict, says)).collect()
}

/// The verdict on an update that was added `gain` times. A factor of two is two merges where the bits of more values say so than say
/// that twice the update was added at once.
pub(super) fn scaled(gain: f64, names: Vec<Said>, in_two: u64, at_once: u64) -> Said {
    let at_once_only = |said: &Said| said.0 == Verdict::MergedTwice && in_two <= at_once;
    let twice = names.iter().any(|said| said.0 == Verdict::MergedTwice && in_two > at_once);
    let mut kept: Vec<Said> =
        names.into_iter().filter(|said| !at_once_only(said) && (!twice || said.0 == Verdict::MergedTwice)).collect();
    if kept.is_empty() {
        kept.push((Verdict::OtherScale, "the update was added at once with twice its scale".to_owned()));
    }
    let verdict = kept[0].0;
    let says: Vec<String> = kept.into_iter().map(|said| said.1).collect();
    (verdict, format!("{} (scale × {})", says.join(", or "), short(gain)))
}

/// Does another update explain what was added? If so, how many times it was added.
pub(super) fn explains(gain: f64, residual: f64, rounding: f64) -> bool {
    gain > 0.1 && residual <= 0.3 * gain + 3.0 * rounding
}

/// ` × 2`, or nothing for once.
pub(super) fn times(gain: f64) -> String {
    if (gain - 1.0).abs() <= 0.05 { String::new() } else { format!(" × {}", short(gain)) }
}

fn lost(kept: f64) -> String {
    format!("correctly rounded, but rounding leaves {:.1} % of the update", 100.0 * kept)
}

fn rounded_otherwise(figures: &Figures) -> String {
    format!("merged; {} of {} rounded otherwise", count(figures.values - figures.ulps[0]), plural(figures.values, "value"))
}

fn coarse(figures: &Figures, gains: &Gains) -> String {
    let away = count(figures.values - figures.ulps[0]);
    format!("merged in a lower precision: {away} values differ, by {:.1e} of the update", gains.residual)
}

fn strays(figures: &Figures, gains: &Gains) -> String {
    let far: u64 = figures.ulps[3..].iter().sum();
    format!("merged once (g {}), but {} are more than 2 ulp off", short(gains.gain), plural(far, "value"))
}

fn unexplained(gains: &Gains) -> String {
    format!(
        "not this update: g = {} ± {:.1e}, and {} of its size is something else",
        short(gains.gain),
        gains.error,
        short(gains.residual)
    )
}

/// Three significant digits at most.
fn short(x: f64) -> String {
    let decimals = (2 - x.abs().max(1e-4).log10().floor() as i32).clamp(0, 6) as usize;
    let text = format!("{x:.decimals$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::ScalingRule;
    use crate::exec::Miss;

    /// 10,000 values of an update of norm 1 on weights of norm 10, added `gain` times, with noise.
    fn figures(gain: f64, noise: f64) -> Figures {
        let over = gain - 1.0;
        Figures {
            values: 10_000,
            base: 100.0,
            delta: 1.0,
            found: Miss { along: over, square: over * over + noise * noise },
            correct: Miss { along: 0.0, square: 1e-6 },
            ulps: [100, 200, 300, 400, 500, 8500],
            worst: 1e4,
            farthest: 1.0,
            ..Default::default()
        }
    }

    fn applied(rule: ScalingRule, alpha: f64, rank: u64, weight: f64) -> Option<Applied> {
        Some(Applied { scaling: Scaling { rank, alpha, rule }, weight })
    }

    fn first(judgement: Judgement) -> Verdict {
        match judgement {
            Judgement::Settled(said) | Judgement::Search(said) => said.0,
            Judgement::Scaled(_, names) => names[0].0,
        }
    }

    #[test]
    fn every_factor_has_its_name() {
        use ScalingRule::{RankStabilized, Standard};
        for (gain, applied, verdict) in [
            (2.0, None, Verdict::MergedTwice),
            (-1.0, None, Verdict::Subtracted),
            (1.7, None, Verdict::OtherScale),
            (3.0, applied(Standard, 27.0, 9, 1.0), Verdict::RsloraApplied),
            (1.0 / 3.0, applied(RankStabilized, 27.0, 9, 1.0), Verdict::RsloraMissing),
            (9.0, applied(Standard, 27.0, 9, 1.0), Verdict::AlphaNotDivided),
            (0.2, applied(Standard, 80.0, 16, 1.0), Verdict::ScaleIgnored),
            (4.0, applied(Standard, 80.0, 25, 0.25), Verdict::WeightIgnored),
        ] {
            assert_eq!(first(judge(&figures(gain, 1e-3), 1, applied)), verdict, "{gain}");
        }
    }

    #[test]
    fn noise_widens_what_a_factor_may_be() {
        let exact = judge(&figures(1.9, 1e-3), 1, None);
        assert_eq!(first(exact), Verdict::OtherScale);
        // With noise 30 times the update the standard error is 0.3.
        let mut noisy = figures(1.9, 30.0);
        noisy.correct.square = 900.0;
        assert!((Gains::of(&noisy).unwrap().error - 0.3).abs() < 1e-9);
        assert_eq!(first(judge(&noisy, 1, None)), Verdict::Different);
    }

    #[test]
    fn a_merge_is_told_from_what_looks_like_one() {
        let right = Figures { ulps: [10_000, 0, 0, 0, 0, 0], worst: 0.0, ..figures(1.0, 1e-3) };
        assert_eq!(first(judge(&right, 1, None)), Verdict::Merged);
        let lost = Figures { correct: Miss { along: -0.5, square: 0.25 }, found: Miss { along: -0.5, square: 0.25 }, ..right };
        assert_eq!(first(judge(&lost, 1, None)), Verdict::RoundingLost);
        let near = Figures { worst: 1.0, ..figures(1.0, 1e-3) };
        assert_eq!(first(judge(&near, 1, None)), Verdict::MergedOtherRounding);
        let base = Figures { as_base: 10_000, worst: 1.0, ..figures(0.0, 0.0) };
        assert_eq!(first(judge(&base, 1, None)), Verdict::NotMerged);
        // All but one value of the base: near in ulp where the update is small, but the update is not there.
        let almost = Figures { as_base: 9_999, worst: 1.0, ..figures(0.0, 0.0) };
        assert_eq!(first(judge(&almost, 1, None)), Verdict::Different);
        let one_off = Figures { ulps: [9_999, 0, 0, 0, 0, 1], ..figures(1.0, 1e-3) };
        assert_eq!(first(judge(&one_off, 1, None)), Verdict::Different);
        let infinite = Figures { worst: f64::INFINITY, nonfinite: 1, ..one_off };
        assert_eq!(first(judge(&infinite, 1, None)), Verdict::Different);
    }

    #[test]
    fn two_merges_are_told_from_twice_the_scale_by_the_bits() {
        let names = |gain| match judge(&figures(gain, 1e-3), 1, None) {
            Judgement::Scaled(_, names) => names,
            other => panic!("{other:?}"),
        };
        assert_eq!(scaled(2.0, names(2.0), 100, 90).0, Verdict::MergedTwice);
        assert_eq!(scaled(2.0, names(2.0), 90, 100).0, Verdict::OtherScale);
        // A scale of 1/2 that was ignored gives the same factor, added at once.
        let both = match judge(&figures(2.0, 1e-3), 1, applied(ScalingRule::Standard, 8.0, 16, 1.0)) {
            Judgement::Scaled(_, names) => names,
            other => panic!("{other:?}"),
        };
        assert_eq!(scaled(2.0, both, 90, 100).0, Verdict::ScaleIgnored);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, -1e-9, 2.0, 0.353553, -1.0, 1234.5].map(short), ["0", "0", "2", "0.354", "-1", "1234"]);
    }
}
