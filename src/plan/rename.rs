//! Names of an adapter and names of a checkpoint are two name spaces: the same layer is `encoder.layer.0` in one file and
//! `bert.encoder.layer.0` in another, depending on the class that the model was loaded with. Exact names come first; then this
//! table; and one renaming must fit every target, or none is used. Nothing is ever matched by suffix.

use serde::Serialize;

use super::families::{self, FAMILIES};

/// A change of prefix, or of names by the rules of a family, applied to every name that the base does not have as it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Renaming {
    /// What the adapter's names start with.
    pub from: String,
    /// What the base's names start with instead.
    pub to: String,
    /// The family whose rules are applied instead of a change of prefix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<&'static str>,
    /// The user asked for it: it holds for every name that starts so, and not only for those that the base does not have.
    #[serde(skip)]
    pub(super) asked: bool,
}

impl Renaming {
    /// The renaming that changes nothing.
    pub fn identity() -> Self {
        Renaming { from: String::new(), to: String::new(), family: None, asked: false }
    }

    /// True if nothing is renamed.
    pub fn is_identity(&self) -> bool {
        self.from == self.to && self.family.is_none()
    }

    /// The name in the base's name space.
    pub(super) fn apply(&self, name: &str, exists: &dyn Fn(&str) -> bool) -> String {
        if self.is_identity() || !self.asked && exists(name) {
            return name.to_owned();
        }
        if let Some(family) = FAMILIES.iter().find(|family| Some(family.name) == self.family) {
            return families::apply(family.rules, name);
        }
        match name.strip_prefix(&self.from) {
            Some(rest) => format!("{}{rest}", self.to),
            None => name.to_owned(),
        }
    }
}

/// Prefixes that model classes put before the names of their body (`base_model_prefix` in transformers 5.23). A checkpoint saved
/// from the body alone lacks it, and one saved from a model with a head has it.
const BODIES: &[&str] = &[
    "model.",
    "bert.",
    "roberta.",
    "distilbert.",
    "albert.",
    "electra.",
    "deberta.",
    "transformer.",
    "gpt_neox.",
    "vit.",
    "wav2vec2.",
    "esm.",
    "mpnet.",
    "xlm_roberta.",
    "new.",
];

/// Renamings of multimodal wrappers and of training wrappers, from the adapter's prefix to the base's.
const WRAPPERS: &[(&str, &str)] = &[
    ("model.", "model.language_model."), // text-trained adapter, transformers 5 multimodal base
    ("model.language_model.", "model."), // the reverse
    ("model.", "language_model.model."), // text-trained adapter, transformers 4 multimodal base
    ("language_model.model.", "model."), // the reverse
    ("model.language_model.", "language_model.model."), // transformers 5 adapter, transformers 4 base
    ("language_model.model.", "model.language_model."), // the reverse
    ("module.", ""),                     // torch DistributedDataParallel
    ("_orig_mod.", ""),                  // torch.compile
    ("model.model.", "model."),          // a wrapper class around the model that was adapted
];

/// All renamings that are tried after exact names.
pub(super) fn known() -> Vec<Renaming> {
    let make = |from: &str, to: &str| Renaming { from: from.to_owned(), to: to.to_owned(), family: None, asked: false };
    let of_family = |family: &families::Family| Renaming { family: Some(family.name), ..Renaming::identity() };
    let strip = BODIES.iter().map(|body| make(body, ""));
    let add = BODIES.iter().map(|body| make("", body));
    let wrappers = WRAPPERS.iter().map(|(from, to)| make(from, to));
    strip.chain(add).chain(wrappers).chain(FAMILIES.iter().map(of_family)).collect()
}

/// Length in bytes of what two names share at their ends, whole segments only.
pub(super) fn common_suffix(x: &str, y: &str) -> usize {
    let shared = x.rsplit('.').zip(y.rsplit('.')).take_while(|(a, b)| a == b);
    shared.map(|(segment, _)| segment.len() + 1).sum()
}

/// Whether a suffix that two names share says that they may be the same layer: it holds the layer's number, or two names of modules
/// beside `weight` or `bias`. Names of any two models end on `q_proj.weight`.
pub(super) fn tells_a_layer(suffix: &str) -> bool {
    let segments: Vec<&str> = suffix.split('.').filter(|s| !matches!(*s, "" | "weight" | "bias")).collect();
    segments.len() >= 2 || segments.iter().any(|s| s.bytes().all(|b| b.is_ascii_digit()))
}

/// The name that is most like `name`: by what they share at the end, then at the start.
pub(super) fn nearest<'n>(name: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let prefix = |other: &str| name.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
    names.max_by_key(|other| (common_suffix(name, other), prefix(other)))
}

/// Does `name` match a pattern in which `*` stands for any run of characters?
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    let mut pieces = pattern.split('*');
    let Some(mut rest) = pieces.next().and_then(|first| name.strip_prefix(first)) else { return false };
    let mut open = false;
    let mut last = "";
    for piece in pieces {
        open = true;
        last = piece;
        match rest.find(piece) {
            Some(at) => rest = rest.get(at + piece.len()..).unwrap_or(""),
            None => return false,
        }
    }
    if open { name.ends_with(last) } else { rest.is_empty() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_the_one_of_the_specification() {
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/spec/adapter-model.md")).unwrap();
        let side = |prefix: &str| if prefix.is_empty() { "*(nothing)*".to_owned() } else { format!("`{prefix}`") };
        for (from, to) in WRAPPERS {
            assert!(text.contains(&format!("| {} | {} |", side(from), side(to))), "{from} to {to} is not in the text");
        }
        let section = text.split("### A-022").nth(1).unwrap().split("### A-023").next().unwrap();
        let rows = section.lines().filter(|line| line.starts_with("| `")).count();
        let bodies = section.split("*body* is each of").nth(1).unwrap().split("\n\n").next().unwrap().matches('`').count() / 2;
        assert_eq!((rows, bodies), (WRAPPERS.len(), BODIES.len()));
        assert!(BODIES.iter().all(|body| section.contains(&side(body))));
    }

    #[test]
    fn patterns_match_whole_names() {
        assert!(matches("model.layers.*.q_proj.weight", "model.layers.31.self_attn.q_proj.weight"));
        assert!(matches("*", "anything") && matches("a*", "a") && matches("a", "a"));
        assert!(!matches("a", "ab") && !matches("*.bias", "x.weight") && !matches("q*", "kq"));
    }

    #[test]
    fn the_nearest_name_shares_the_end() {
        let base = ["bert.encoder.layer.0.query.weight", "bert.encoder.layer.1.query.weight", "pooler.weight"];
        assert_eq!(nearest("encoder.layer.1.query.weight", base.into_iter()), Some(base[1]));
    }

    #[test]
    fn a_shared_suffix_tells_a_layer_by_number_or_by_two_modules() {
        for suffix in ["layers.0.q_proj.weight", "0.weight", "self_attn.q_proj.weight", "layer.attention.bias"] {
            assert!(tells_a_layer(suffix), "{suffix}");
        }
        for suffix in ["", "weight", "bias", "q_proj.weight", "q_proj"] {
            assert!(!tells_a_layer(suffix), "{suffix}");
        }
    }

    #[test]
    fn names_that_the_base_has_are_not_renamed() {
        let renaming = Renaming { from: String::new(), to: "bert.".into(), family: None, asked: false };
        let exists = |name: &str| name == "classifier.weight";
        assert_eq!(renaming.apply("classifier.weight", &exists), "classifier.weight");
        assert_eq!(renaming.apply("pooler.weight", &exists), "bert.pooler.weight");
    }
}
