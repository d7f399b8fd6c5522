//! Patterns against answers of Python 3.11 (`re.match(rf"(.*\.)?({key})$", name)`, `re.fullmatch(pattern, name)`).

use super::super::config::Selection;
use super::super::patterns::{Found, Modules};
use super::*;

const NAMES: &[&str] = &[
    "q_proj",
    "kq_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.0.self_attn.kq_proj",
    "model.layers.0.self_attn.v_proj",
    "x.model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.experts.3.up_proj",
    "model.layersX0.self_attn.q_proj",
    "encoder.layer.1.output.dense",
    "lm_head",
    "a-b.c",
    "h.0.attn.c_attn",
];

#[rustfmt::skip]
const MATCH: &[(&str, &str)] = &[
    (r#"q_proj"#, "x.xxx..x.x...."),
    (r#"kq_proj"#, ".x...x........"),
    (r#"^q_proj"#, "x............."),
    (r#"^model.layers.0.self_attn.q_proj"#, "..x......x...."),
    (r#"^model\.layers\.0\.self_attn\.q_proj"#, "..x..........."),
    (r#"model.layers.0.self_attn.q_proj"#, "..x....x.x...."),
    (r#"model\.layers\.0\.self_attn\.q_proj"#, "..x....x......"),
    (r#"layers.0.self_attn.q_proj"#, "..x....x.x...."),
    (r#"self_attn.q_proj"#, "..xxx..x.x...."),
    (r#".q_proj"#, ".x...x........"),
    (r#"q.proj"#, "x.xxx..x.x...."),
    (r#"\bq_proj\b"#, "x.xxx..x.x...."),
    (r#"layers\.\d{1,}\.self_attn\.q_proj"#, "..xxx..x......"),
    (r#"layers\.\d{2}\.self_attn\.q_proj"#, "....x........."),
    (r#"layers\.\d{,1}\.self_attn\.q_proj"#, "..xx...x......"),
    (r#"q_proj)|(lm_head"#, "x.xxx..x.x.x.."),
    (r#"a-b.c"#, "............x."),
    (r#"a\-b\.c"#, "............x."),
    (r#"h.*c_attn"#, ".............x"),
    (r#""#, ".............."),
    (r#"q_pro[a-z]"#, "x.xxx..x.x...."),
    (r#"[^k]q_proj"#, ".............."),
    (r#"model\.(.*)\.q_proj"#, "..xxx..x.x...."),
    (r#"layers.0.*"#, "..x..xxxxx...."),
    (r#"[\w.]+dense"#, "..........x..."),
    (r#"(?i:Q_PROJ)"#, "x.xxx..x.x...."),
    (r#"\Aq_proj"#, "x............."),
    (r#"q_proj\Z"#, "x.xxx..x.x...."),
    (r#"layer.1.output.dense"#, "..........x..."),
    (r#"model.layers..self_attn.q_proj"#, ".............."),
    (r#"]q"#, ".............."),
    (r#"x*?q_proj"#, "x.xxx..x.x...."),
    (r#"[]q]_proj"#, "x.xxx..x.x...."),
    (r#"model\.layers\.(?P<n>0)\.self_attn\.q_proj"#, "..x....x......"),
    (r#"(?:.*?(?:language|text|self_attn|model).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)"#, "..xxxx.xxx...."),
];

#[rustfmt::skip]
const FULLMATCH: &[(&str, &str)] = &[
    (r#"q_proj"#, "x............."),
    (r#".*q_proj"#, "xxxxxx.x.x...."),
    (r#".*\.(q|v)_proj$"#, "..xxx.xx.x...."),
    (r#"q_proj|lm_head"#, "x..........x.."),
    (r#"q|q_proj"#, "x............."),
    (r#"(a+)+$"#, ".............."),
    (r#".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$"#, ".............."),
    (r#"^(?!.*kq).*_proj$"#, "x.xxx.xxxx...."),
    (r#"(?i).*Q_PROJ"#, "xxxxxx.x.x...."),
    (r#""#, ".............."),
    (r#"model\.layers\.\d+\..*"#, "..xxxxx.x....."),
    (r#"(.*)\.(\w)_proj"#, "..xxx.xx.x...."),
    (r#"(?:.*?(?:language|text|self_attn|model).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))"#, "..xxxxxxxx...."),
];

fn resolve(pattern: &[(&str, u64)], names: &[&str]) -> (Found, Vec<Diagnostic>) {
    let owned: Vec<(String, u64)> = pattern.iter().map(|(key, value)| ((*key).to_owned(), *value)).collect();
    let mut problems = Vec::new();
    let found = Modules::new(names).resolve("rank_pattern", &owned, &Limits::default(), &mut problems);
    (found, problems)
}

fn marks(matched: impl Iterator<Item = bool>) -> String {
    matched.map(|m| if m { 'x' } else { '.' }).collect()
}

#[test]
fn keys_match_what_python_matches() {
    for (key, expected) in MATCH {
        let (found, problems) = resolve(&[(key, 1)], NAMES);
        assert!(problems.is_empty(), "{key}: {problems:?}");
        assert_eq!(marks(found.winner.iter().map(Option::is_some)), *expected, "{key}");
        // The same through the engines alone: a name that is not ASCII turns the short cuts off.
        let with_accent: Vec<&str> = NAMES.iter().copied().chain(["é"]).collect();
        let (found, _) = resolve(&[(key, 1)], &with_accent);
        assert_eq!(marks(found.winner.iter().take(NAMES.len()).map(Option::is_some)), *expected, "{key}");
    }
}

#[test]
fn target_modules_match_what_python_matches() {
    for (pattern, expected) in FULLMATCH {
        let uncovered = Modules::new(NAMES).uncovered(&Selection::Pattern((*pattern).to_owned()), &Limits::default()).unwrap();
        assert_eq!(marks((0..NAMES.len()).map(|i| !uncovered.contains(&i))), *expected, "{pattern}");
    }
}

#[test]
fn a_list_of_targets_matches_whole_names_and_ends_at_dots() {
    let list = |names: &[&str]| Selection::Names(names.iter().map(|&n| n.to_owned()).collect());
    let uncovered = |names: &[&str]| Modules::new(NAMES).uncovered(&list(names), &Limits::default()).unwrap().len();
    assert_eq!(uncovered(&["q_proj"]), NAMES.len() - 6);
    assert_eq!(uncovered(&["0.self_attn.q_proj", "lm_head", "proj", "model.layers.0"]), NAMES.len() - 3);
    assert_eq!(uncovered(&[]), NAMES.len());
    assert_eq!(Modules::new(NAMES).uncovered(&Selection::Automatic, &Limits::default()).unwrap().len(), 0);
}

#[test]
fn the_first_key_of_the_file_wins_both_ways() {
    let names = ["model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.q_proj"];
    let (found, _) = resolve(&[("q_proj", 4), ("layers.1.self_attn.q_proj", 16)], &names);
    assert_eq!((found.winner, found.rival, found.used), (vec![Some(0), Some(0)], vec![Some(1), None], vec![true, true]));
    let (found, _) = resolve(&[("layers.1.self_attn.q_proj", 16), ("q_proj", 4)], &names);
    assert_eq!((found.winner, found.rival), (vec![Some(0), Some(1)], vec![Some(1), None]));
    // Equal values: the order says nothing.
    let (found, _) = resolve(&[("layers.1.self_attn.q_proj", 4), ("q_proj", 4)], &names);
    assert_eq!(found.rival, [None, None]);
}

#[test]
fn a_name_that_is_no_pattern_of_itself_is_looked_up() {
    let (found, _) = resolve(&[("a+b", 4), ("^a+b$", 2)], &["a+b", "aab"]);
    assert_eq!((found.winner, found.used), (vec![Some(0), Some(0)], vec![true, true]));
    let (found, _) = resolve(&[(r"x\dy", 4)], &[r"x\dy"]);
    assert_eq!((found.winner, found.used), (vec![Some(0)], vec![true]));
}

#[test]
fn a_pattern_that_the_engines_may_read_differently_is_refused() {
    for key in [
        "q_proj)",
        "(q_proj",
        "*",
        "a**",
        "a*+b",
        "a{2}{3}",
        "[a&&b]",
        "[a[b]]",
        "[a--b]",
        r"\<q",
        r"\pL",
        r"\h",
        r"\x41",
        r"\b{start}q",
        "(?<n>q)",
        "(?P=n)",
        "(?x) q",
        "(?#c)q",
        "(?i)q",
        "(?>q)",
        "(?(1)a|b)",
        "a{",
        "a{x}",
        "[",
        r"\",
        r"(\w{1000}){1000}",
    ] {
        let (found, problems) = resolve(&[(key, 1)], NAMES);
        assert_eq!(ids(&problems), ["P-008"], "{key}");
        assert!(problems.first().unwrap().help_text().unwrap().contains("explicitly"));
        assert!(found.winner.iter().all(Option::is_none));
    }
}

#[test]
fn a_pattern_that_never_ends_is_stopped() {
    let long = format!("{}b", "a".repeat(64));
    let names = [long.as_str()];
    // Linear engine: an answer at once.
    assert_eq!(resolve(&[(r"(a+)+$", 1)], &names).1.len(), 0);
    // Look-around needs the other engine, which gives up.
    assert_eq!(ids(&resolve(&[(r"(?=(a+)+$)(a|a)+\1", 1), (r"(a*)*\2c(?!x)", 1)], &names).1).first(), Some(&"P-008"));
    let error = Modules::new(&names).uncovered(&Selection::Pattern(r"(?!x)((a|aa)+)\1$".to_owned()), &Limits::default());
    assert_eq!(error.unwrap_err().rule().id, "P-008");
}

#[test]
fn many_keys_for_many_modules_take_linear_time() {
    let names: Vec<String> = (0..20_000).map(|i| format!("model.layers.{i}.mlp.up_proj")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let keys: Vec<(String, u64)> = names.iter().map(|name| (format!("^{}", regex::escape(name)), 1)).collect();
    let mut problems = Vec::new();
    let found = Modules::new(&names).resolve("rank_pattern", &keys, &Limits::default(), &mut problems);
    assert!(problems.is_empty() && found.used.iter().all(|used| *used));
    let regexes: Vec<(String, u64)> = (0..20_000).map(|i| (format!("(up|down)_proj{i}"), 1)).collect();
    Modules::new(&names).resolve("rank_pattern", &regexes, &Limits::default(), &mut problems);
    assert_eq!(ids(&problems), ["P-005"]);
}
