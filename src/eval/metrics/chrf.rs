//! Corpus chrF2 (Popović 2015) as sacrebleu computes it with its defaults: characters up to order 6, no words, β = 2, white
//! space left out, no ε-smoothing. It suits languages that BLEU's tokeniser does not know.
//!
//! Crates that were looked at: `chrf` 1.1.0 is chrF of a single sentence, averages F over orders (ours averages precision and
//! recall, then takes F), smooths with ε, and removes spaces but no other white space.

use super::words::words;
use std::collections::HashMap;

const ORDER: usize = 6;

/// β², how much more recall weighs than precision.
const FACTOR: f64 = 4.0;

/// The n-grams of one order: those of the hypothesis, those of the reference, and those that they share.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    hypothesis: u64,
    reference: u64,
    shared: u64,
}

/// The sums of a corpus, from which chrF2 follows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Chrf {
    segments: u64,
    orders: [Counts; ORDER],
}

impl Chrf {
    /// Adds a segment, compared with the reference that it is nearest to by its own score, the first of several. Without
    /// references it counts as one with an empty reference, which leaves the score as it is.
    pub(crate) fn add(&mut self, hypothesis: &str, references: &[impl AsRef<str>]) {
        let hypothesis = characters(hypothesis);
        let mut best: Option<(f64, [Counts; ORDER])> = None;
        for reference in references {
            let counts = compare(&hypothesis, &characters(reference.as_ref()));
            let score = f_score(&counts);
            if best.is_none_or(|(before, _)| score > before) {
                best = Some((score, counts));
            }
        }
        self.segments += 1;
        for (sum, counts) in self.orders.iter_mut().zip(best.map_or_else(Default::default, |(_, counts)| counts)) {
            sum.hypothesis += counts.hypothesis;
            sum.reference += counts.reference;
            sum.shared += counts.shared;
        }
    }

    /// The score, from 0 to 100, with P and R the means of precision and recall over the orders that both sides have n-grams
    /// of:
    ///
    /// ```text
    /// chrF2 = 100 · (1 + β²) P R / (β² P + R)
    /// ```
    ///
    /// 0 if nothing is shared; `None` without segments.
    pub(crate) fn score(&self) -> Option<f64> {
        (self.segments > 0).then(|| f_score(&self.orders))
    }
}

fn characters(text: &str) -> Vec<char> {
    words(text).flat_map(str::chars).collect()
}

fn compare(hypothesis: &[char], reference: &[char]) -> [Counts; ORDER] {
    let mut counts = [Counts::default(); ORDER];
    for (n, counts) in (1..).zip(&mut counts) {
        // What a reference is too short for is not held against the hypothesis.
        if reference.len() < n {
            continue;
        }
        let mut left: HashMap<&[char], u64> = HashMap::new();
        for gram in reference.windows(n) {
            *left.entry(gram).or_default() += 1;
            counts.reference += 1;
        }
        for gram in hypothesis.windows(n) {
            counts.hypothesis += 1;
            if let Some(count) = left.get_mut(gram).filter(|count| **count > 0) {
                *count -= 1;
                counts.shared += 1;
            }
        }
    }
    counts
}

fn f_score(orders: &[Counts; ORDER]) -> f64 {
    let (mut precision, mut recall, mut effective) = (0.0, 0.0, 0.0);
    for counts in orders.iter().filter(|counts| counts.hypothesis > 0 && counts.reference > 0) {
        precision += counts.shared as f64 / counts.hypothesis as f64;
        recall += counts.shared as f64 / counts.reference as f64;
        effective += 1.0;
    }
    if precision + recall == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (precision / effective, recall / effective);
    100.0 * (1.0 + FACTOR) * precision * recall / (FACTOR * precision + recall)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hypotheses, each with its references, and their score.
    type Case<'a> = (&'a [(&'a str, &'a [&'a str])], f64);

    /// `sacrebleu.metrics.CHRF().corpus_score(hypotheses, references).score`, sacrebleu 2.6.0.
    #[test]
    fn scores_are_those_of_sacrebleu() {
        let cases: [Case<'_>; 16] = [
            (
                &[("The quick brown fox jumps over the lazy dog.", &["The quick brown fox jumped over the lazy dog."])],
                87.18339128560473,
            ),
            (
                &[
                    ("It costs $1,234.50, doesn't it?", &["It costs $1,234.50 -- doesn't it?"]),
                    ("No; 5-6 people came.", &["No, 5 or 6 people came."]),
                ],
                76.06557968369519,
            ),
            (
                &[
                    (
                        "Der Zug fährt um 8.30 Uhr nach Zürich – pünktlich!",
                        &["Der Zug fährt um 8.30 Uhr nach Zürich, pünktlich!"],
                    ),
                    ("東京 は 大きい 都市 です 。", &["東京 は 大きな 都市 です 。"]),
                ],
                84.49397341788647,
            ),
            (
                &[
                    ("", &["Something was expected here."]),
                    ("There is a cat on the mat today.", &["There is a cat on the mat now."]),
                ],
                43.101606409724134,
            ),
            (
                &[("the the the cat sat", &["a cat sat down quietly then"]), ("dog runs far away", &["dog ran away far"])],
                30.835516347123203,
            ),
            (&[("Hello there", &["Hello there"])], 100.0),
            (&[("Yes.", &["Yes."]), ("No way out now", &["No way out here now"])], 56.87203951307962),
            (&[("entirely different words here", &["nothing shared at all whatsoever"])], 11.541536954929946),
            (
                &[
                    (
                        "The cat sat on the mat.",
                        &["A cat was sitting on the mat.", "The cat sat on a mat.", "There was a cat on the mat, sitting."],
                    ),
                    (
                        "Rain is expected tomorrow in the north",
                        &["Tomorrow it will rain in the north", "Rain expected tomorrow, in the north"],
                    ),
                ],
                76.04864523529218,
            ),
            (&[("a b c d e", &["a b c d e f", "a b c d"])], 91.3677130044843),
            (
                &[("short one here ok", &["this reference is a good deal longer than the hypothesis, short one here ok"])],
                22.970375955416237,
            ),
            (&[("", &[""])], 0.0),
            (&[("abc", &["abcdefgh"]), ("abcdefgh", &["abc"])], 42.52044252044252),
            (&[("aaaa aaaa", &["aa aa aa", "aaaaaaaa b"])], 87.97602256699577),
            (&[("नमस\u{94d}ते दुनिया", &["नमस\u{94d}कार दुनिया"])], 46.3083088096897),
            (&[("x\u{a0}y\u{2003}z w\tv", &["xyzwv"])], 100.0),
        ];
        for (segments, wanted) in cases {
            let mut chrf = Chrf::default();
            segments.iter().for_each(|(hypothesis, references)| chrf.add(hypothesis, references));
            let found = chrf.score().unwrap();
            assert!((found - wanted).abs() < 1e-9, "{segments:?}: {found} {wanted}");
        }
    }

    #[test]
    fn without_segments_there_is_no_score_and_without_references_nothing_changes() {
        let mut chrf = Chrf::default();
        assert_eq!(chrf.score(), None);
        chrf.add("the cat", &["the cart"]);
        let before = chrf.score();
        let none: [&str; 0] = [];
        chrf.add("the cat", &none);
        assert_eq!(chrf.score(), before);
    }
}
