//! What the figures of two adapters mean, in plain words.

use super::figures::Figures;
use crate::report::Overlap;

/// A cosine above: nearly the same, and the sum is one of them twice.
const REDUNDANT: f64 = 0.7;
/// A cosine above: they have something in common. Two adapters of one model that were trained for different tasks are mostly below.
const ALIGNED: f64 = 0.2;
/// A cosine and a ratio of norms so near to 1 are the same update but for rounding.
const SAME: f64 = 1e-4;

/// The word for the cosine.
pub(super) fn relation(all: &Figures, overlap: &Overlap) -> &'static str {
    let ratio = overlap.norms[0] / overlap.norms[1];
    match overlap.cosine {
        _ if all.is_empty() => "disjoint",
        _ if overlap.norms.contains(&0.0) => "zero",
        cosine if cosine > 1.0 - SAME && (ratio - 1.0).abs() < SAME => "same",
        cosine if cosine > REDUNDANT => "redundant",
        cosine if cosine > ALIGNED => "aligned",
        cosine if cosine < -REDUNDANT => "opposite",
        cosine if cosine < -ALIGNED => "conflicting",
        _ => "unrelated",
    }
}

/// The sentence for the word.
pub(super) fn sentence(relation: &str, overlap: &Overlap, chance: f64, all: &Figures) -> String {
    let as_random = overlap.cosine.abs() <= 3.0 * chance;
    let mut text = match relation {
        "disjoint" => return "they update different tensors: their sum is both of them, and costs no rank".to_owned(),
        "zero" => return "one of the updates is zero: the sum is the other one".to_owned(),
        "same" => "they are the same update: their sum is one of them twice".to_owned(),
        "redundant" => {
            "they are nearly the same update: their sum is about one of them twice, so let the weights add up to 1".to_owned()
        }
        "aligned" => "they point the same way in part: what they have in common adds up".to_owned(),
        "opposite" => "they are nearly opposite: their sum undoes both".to_owned(),
        "conflicting" => "they work against each other: their sum undoes a part of both".to_owned(),
        _ if as_random => {
            "they are unrelated, no nearer to each other than to a random adapter: a sum keeps both, and a mean halves both"
                .to_owned()
        }
        _ => "they are all but unrelated: a sum keeps both, and a mean halves both".to_owned(),
    };
    let shares_spaces = overlap.output_overlap.max(overlap.input_overlap) > 0.5;
    if relation == "unrelated" && shares_spaces {
        text.push_str("; but they use the same directions, so that a low rank may hold the sum");
    }
    let (tenth, hundredth) = (all.rank_for(0.1), all.rank_for(0.01));
    text.push_str(&format!(". Rank {tenth} holds the sum to 10 %, rank {hundredth} to 1 %"));
    text
}
