//! Exact match and token F1 of SQuAD v1.1 (Rajpurkar et al. 2016), for answers that are short texts. They follow the official
//! `evaluate-v1.1.py`, in which an answer without tokens has F1 0 even against another one (v2.0 gives 1 there).

use super::words::{literal, words};
use regex::{Captures, Regex};
use std::collections::HashMap;
use std::sync::LazyLock;

/// A run of what Python's `\w` matches: letters, numbers and the underscore. The `\w` of this engine has combining marks as
/// well and lacks some numbers, so `\b` would find other ends. `\b(a|an|the)\b` is a run that is an article as a whole.
static RUN: LazyLock<Regex> = LazyLock::new(|| literal(r"[\p{L}\p{N}_]+"));

/// Whether the prediction is one of the gold answers, all of them normalised.
pub(crate) fn exact_match(prediction: &str, golds: &[impl AsRef<str>]) -> bool {
    let prediction = normalise(prediction);
    golds.iter().any(|gold| normalise(gold.as_ref()) == prediction)
}

/// The best F1 of the tokens over the gold answers: 2PR / (P + R), with P and R the shares of the prediction's and the gold
/// answer's tokens that the two have in common, repetitions counted. 0 without gold answers.
pub(crate) fn f1(prediction: &str, golds: &[impl AsRef<str>]) -> f64 {
    let prediction = normalise(prediction);
    golds.iter().map(|gold| token_f1(&prediction, &normalise(gold.as_ref()))).fold(0.0, f64::max)
}

fn token_f1(prediction: &str, gold: &str) -> f64 {
    let mut left: HashMap<&str, u64> = HashMap::new();
    let (mut predicted, mut wanted, mut same) = (0u64, 0u64, 0u64);
    for word in words(gold) {
        *left.entry(word).or_default() += 1;
        wanted += 1;
    }
    for word in words(prediction) {
        predicted += 1;
        if let Some(count) = left.get_mut(word).filter(|count| **count > 0) {
            *count -= 1;
            same += 1;
        }
    }
    if same == 0 {
        return 0.0;
    }
    let (precision, recall) = (same as f64 / predicted as f64, same as f64 / wanted as f64);
    2.0 * precision * recall / (precision + recall)
}

/// `normalize_answer`: lower case, without ASCII punctuation, without articles, single spaces, in this order.
fn normalise(text: &str) -> String {
    let plain: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let bare = RUN.replace_all(&plain, |run: &Captures<'_>| match run.get(0).map_or("", |all| all.as_str()) {
        "a" | "an" | "the" => " ".to_owned(),
        other => other.to_owned(),
    });
    words(&bare).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The functions of `evaluate-v1.1.py` run with Python 3.11.
    #[test]
    fn answers_are_normalised_as_the_original_does() {
        let cases = [
            ("The  Quick, brown fox!", "quick brown fox"),
            ("a an the", ""),
            ("A-the an", "athe"),
            ("don't", "dont"),
            ("a.the b", "athe b"),
            ("İstanbul ΟΔΟΣ", "i\u{307}stanbul οδος"),
            ("a\u{301} the", "\u{301}"),
            ("the² a_ an", "the²"),
            ("ⓐthe हिa", "ⓐ हि"),
            ("“The” end…", "“ ” end…"),
            ("a\u{a0}b\u{1680}the\u{2003}x\u{1c}y", "b x y"),
            ("", ""),
            ("…", "…"),
            ("Straße THE", "straße"),
            ("theatre an'd", "theatre and"),
            ("कि the की a", "कि की"),
        ];
        for (text, wanted) in cases {
            assert_eq!(normalise(text), wanted, "{text:?}");
        }
    }

    /// As above: `metric_max_over_ground_truths` of `exact_match_score` and of `f1_score`.
    #[test]
    fn scores_are_those_of_the_original() {
        let cases: [(&str, &[&str], bool, f64); 10] = [
            ("the cat", &["Cat!"], true, 1.0),
            ("", &["", "x"], true, 0.0),
            ("the", &["an"], true, 0.0),
            ("cat cat cat", &["cat cat dog"], false, 0.6666666666666666),
            ("in the year 1066", &["1066", "year 1066 AD"], false, 0.6666666666666666),
            ("Zürich", &["zurich", "ZÜRICH"], true, 1.0),
            ("a b c d e", &["e d c b"], false, 1.0),
            ("x", &["y", "z"], false, 0.0),
            ("to be or not to be", &["to be", "not to be or to", "be be be to"], false, 0.9090909090909091),
            ("东京 塔", &["东京塔", "塔"], false, 0.6666666666666666),
        ];
        for (prediction, golds, exact, wanted) in cases {
            assert_eq!(exact_match(prediction, golds), exact, "{prediction:?}");
            assert!((f1(prediction, golds) - wanted).abs() < 1e-15, "{prediction:?}: {}", f1(prediction, golds));
        }
    }

    #[test]
    fn without_gold_answers_nothing_is_right() {
        let none: [&str; 0] = [];
        assert!(!exact_match("", &none));
        assert_eq!(f1("x", &none), 0.0);
    }
}
