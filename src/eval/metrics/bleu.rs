//! Corpus BLEU (Papineni et al. 2002) as sacrebleu computes it with its defaults (Post 2018): tokeniser 13a, case kept, order
//! 4, exponential smoothing, no effective order. It is for corpora; the score of a single short sentence is mostly 0.
//!
//! Crates that were looked at: `bleuscore` 0.2.0 smooths by adding one (as TensorFlow's NMT and Hugging Face's `bleu` do) or
//! not at all, so that no setting of it agrees with sacrebleu where an order has no match; it also panics without input.

use super::words::{is_space, literal, words};
use regex::Regex;
use std::collections::HashMap;
use std::sync::LazyLock;

const ORDER: usize = 4;

/// The sums of a corpus, from which BLEU follows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Bleu {
    segments: u64,
    hypothesis_length: u64,
    reference_length: u64,
    /// For each order, the n-grams that a reference has too, and all of them.
    orders: [(u64, u64); ORDER],
}

impl Bleu {
    /// Adds a segment. An n-gram counts as often as the reference that has most of it allows; the length is that of the
    /// reference nearest in length, the shorter of two. Without references it counts as one with an empty reference.
    pub(crate) fn add(&mut self, hypothesis: &str, references: &[impl AsRef<str>]) {
        let hypothesis = tokenise(hypothesis);
        let hypothesis = words(&hypothesis).collect::<Vec<_>>();
        let references: Vec<String> = references.iter().map(|text| tokenise(text.as_ref())).collect();
        let references: Vec<Vec<&str>> = references.iter().map(|text| words(text).collect()).collect();

        let nearest = references.iter().map(Vec::len).min_by_key(|length| (length.abs_diff(hypothesis.len()), *length));
        self.segments += 1;
        self.hypothesis_length += hypothesis.len() as u64;
        self.reference_length += nearest.unwrap_or(0) as u64;
        for (n, (correct, total)) in (1..).zip(&mut self.orders) {
            let mut allowed: HashMap<&[&str], u64> = HashMap::new();
            for reference in &references {
                for (gram, count) in grams(reference, n) {
                    let most = allowed.entry(gram).or_default();
                    *most = count.max(*most);
                }
            }
            for (gram, count) in grams(&hypothesis, n) {
                *total += count;
                *correct += count.min(allowed.get(gram).copied().unwrap_or(0));
            }
        }
    }

    /// The score, from 0 to 100, with cₙ of tₙ n-grams correct and lengths h and r:
    ///
    /// ```text
    /// BLEU = min(1, exp(1 - r/h)) · exp(Σₙ ln(pₙ) / 4),  pₙ = 100 cₙ/tₙ
    /// ```
    ///
    /// The k-th order without a correct n-gram gets 100 / (2ᵏ tₙ) instead (Chen and Cherry 2014, method 3). 0 if nothing is
    /// correct or an order has no n-grams at all; `None` without segments.
    pub(crate) fn score(&self) -> Option<f64> {
        if self.segments == 0 {
            return None;
        }
        if self.orders.iter().all(|(correct, _)| *correct == 0) || self.orders.iter().any(|(_, total)| *total == 0) {
            return Some(0.0);
        }
        let (mut smoothing, mut logarithms) = (1.0, 0.0);
        for (correct, total) in self.orders {
            logarithms += if correct == 0 {
                smoothing *= 2.0;
                (100.0 / (smoothing * total as f64)).ln()
            } else {
                (100.0 * correct as f64 / total as f64).ln()
            };
        }
        let brevity = (1.0 - self.reference_length as f64 / self.hypothesis_length as f64).exp().min(1.0);
        Some(brevity * (logarithms / ORDER as f64).exp())
    }
}

fn grams<'a, 'b>(words: &'a [&'b str], n: usize) -> HashMap<&'a [&'b str], u64> {
    let mut counts = HashMap::new();
    for gram in words.windows(n) {
        *counts.entry(gram).or_default() += 1;
    }
    counts
}

/// The patterns of `tokenizer_re.py` of sacrebleu, in their order: symbols stand alone; full stops and commas do unless a digit
/// is before them, and after them; a dash does if a digit is before it.
static RULES: LazyLock<[(Regex, &str); 4]> = LazyLock::new(|| {
    [
        (literal(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), " ${1} "),
        (literal(r"([^0-9])([\.,])"), "${1} ${2} "),
        (literal(r"([\.,])([^0-9])"), " ${1} ${2}"),
        (literal(r"([0-9])(-)"), "${1} ${2} "),
    ]
});

/// `tokenizer_13a.py` of sacrebleu, the same as `mteval-v13a.pl`, after the `rstrip` that `BLEU` puts before it. The tokens are
/// the words of the text it gives.
fn tokenise(line: &str) -> String {
    let line = line.trim_end_matches(is_space).replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    let line = line.replace("&quot;", "\"").replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">");
    RULES.iter().fold(format!(" {line} "), |line, (rule, to)| rule.replace_all(&line, *to).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hypotheses, each with its references, and their score.
    type Case<'a> = (&'a [(&'a str, &'a [&'a str])], f64);

    /// `sacrebleu.tokenizers.tokenizer_13a.Tokenizer13a()(line.rstrip())`, sacrebleu 2.6.0.
    #[test]
    fn tokens_are_those_of_sacrebleu() {
        let cases = [
            ("Hello, World!", "Hello , World !"),
            ("It's 3.14, or 1,000.50-2; e.g. A.B.C.", "It's 3.14 , or 1,000.50 - 2 ; e . g . A . B . C ."),
            ("&quot;Tom &amp; Jerry&quot; &lt;b&gt; a<skipped>b", "\" Tom & Jerry \" < b > ab"),
            ("pre-\nfix and\nlines \n", "prefix and lines"),
            ("5-6 a-b -7 7-", "5 - 6 a-b -7 7 -"),
            ("x,,y..z .5 5. ,5", "x , , y . . z . 5 5 . , 5"),
            ("“Zürich” – 東京、大阪。 naïve…", "“Zürich” – 東京、大阪。 naïve…"),
            ("\u{a0}a\u{2003}b\u{1c}c\u{3000}", "a b c"),
            ("a[b]c{d}~e`f^g_h|i\\j/k@l$m#n%o*p+q=r", "a [ b ] c { d } ~ e ` f ^ g _ h | i \\ j / k @ l $ m # n % o * p + q = r"),
            ("", ""),
            ("&amp;lt; AT&T", "< AT & T"),
            ("٣.٤ a٣,b", "٣ . ٤ a٣ , b"),
            ("tab\there\r\nend  ", "tab here end"),
        ];
        for (line, wanted) in cases {
            assert_eq!(words(&tokenise(line)).collect::<Vec<_>>().join(" "), wanted, "{line:?}");
        }
    }

    /// `sacrebleu.metrics.BLEU().corpus_score(hypotheses, references).score`, sacrebleu 2.6.0.
    #[test]
    fn scores_are_those_of_sacrebleu() {
        let cases: [Case<'_>; 12] = [
            (
                &[("The quick brown fox jumps over the lazy dog.", &["The quick brown fox jumped over the lazy dog."])],
                65.80370064762461,
            ),
            (
                &[
                    ("It costs $1,234.50, doesn't it?", &["It costs $1,234.50 -- doesn't it?"]),
                    ("No; 5-6 people came.", &["No, 5 or 6 people came."]),
                ],
                44.350755136452946,
            ),
            (
                &[
                    (
                        "Der Zug fährt um 8.30 Uhr nach Zürich – pünktlich!",
                        &["Der Zug fährt um 8.30 Uhr nach Zürich, pünktlich!"],
                    ),
                    ("東京 は 大きい 都市 です 。", &["東京 は 大きな 都市 です 。"]),
                ],
                63.08395927018784,
            ),
            (
                &[
                    ("", &["Something was expected here."]),
                    ("There is a cat on the mat today.", &["There is a cat on the mat now."]),
                ],
                43.067300377637174,
            ),
            (
                &[("the the the cat sat", &["a cat sat down quietly then"]), ("dog runs far away", &["dog ran away far"])],
                14.350172107563083,
            ),
            (&[("Hello there", &["Hello there"])], 0.0),
            (&[("Yes.", &["Yes."]), ("No way out now", &["No way out here now"])], 55.701630028386894),
            (&[("entirely different words here", &["nothing shared at all whatsoever"])], 0.0),
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
                54.31835989571493,
            ),
            (&[("a b c d e", &["a b c d e f", "a b c d"])], 100.00000000000004),
            (
                &[("short one here ok", &["this reference is a good deal longer than the hypothesis, short one here ok"])],
                6.39278612067076,
            ),
            (&[("", &[""])], 0.0),
        ];
        for (segments, wanted) in cases {
            let mut bleu = Bleu::default();
            segments.iter().for_each(|(hypothesis, references)| bleu.add(hypothesis, references));
            let found = bleu.score().unwrap();
            assert!((found - wanted).abs() < 1e-9, "{segments:?}: {found} {wanted}");
        }
    }

    #[test]
    fn without_segments_there_is_no_score_and_without_references_nothing_is_correct() {
        let mut bleu = Bleu::default();
        assert_eq!(bleu.score(), None);
        let none: [&str; 0] = [];
        bleu.add("one two three four", &none);
        assert_eq!(bleu.score(), Some(0.0));
    }
}
