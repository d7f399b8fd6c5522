//! `adapter_config.json`: encoding, syntax, types, methods (catalogue rows J01 to J14).

use std::path::Path;

use super::super::config::{Bias, Selection};
use super::*;
use crate::adapter::{Orientation, Removed, ScalingRule};
use crate::error::Class;

#[test]
fn encodings_other_than_utf8_are_named() {
    let text = lora("");
    let utf16: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let marked: Vec<u8> = [vec![0xff, 0xfe], utf16.clone()].concat();
    let cases: &[(Vec<u8>, &str)] = &[
        (Vec::new(), "empty"),
        ([&[0xef, 0xbb, 0xbf], text.as_bytes()].concat(), "byte order mark"),
        (utf16, "UTF-16"),
        (marked, "UTF-16"),
        (lora(r#""x": "caf#""#).into_bytes().iter().map(|&b| if b == b'#' { 0xe9 } else { b }).collect(), "Latin-1"),
        (b"[1]".to_vec(), "expected a JSON object"),
        (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), "not JSON"),
        (b"{".to_vec(), "line 1 column 1"),
        ("[".repeat(100_000).into_bytes(), "recursion limit"),
        (b"{} {}".to_vec(), "trailing"),
    ];
    for (bytes, expected) in cases {
        let error = PeftConfig::parse(bytes, Path::new("c.json"), &Limits::default()).unwrap_err();
        let diagnostic = error.diagnostics().first().unwrap();
        assert_eq!(diagnostic.rule().id, "P-001", "{error}");
        assert!(diagnostic.message().contains(expected), "{error}");
        assert!(diagnostic.place().offset.is_some(), "{error}");
    }
    assert_eq!(rules(&parse(&text.replace(", ", ",\r\n"))), [""; 0]);
}

#[test]
fn a_syntax_error_names_the_byte() {
    let error = parse("{\n  \"r\": 8,\n  \"lora_alpha\": NaN\n}").unwrap_err();
    assert_eq!(error.place().offset, Some(28), "{error}");
    assert!(error.diagnostics()[0].help_text().unwrap().contains("NaN"), "{error:?}");
    for token in ["Infinity", "-Infinity", "1e400", "01", "'8'"] {
        assert_eq!(rules(&parse(&format!(r#"{{"peft_type": "LORA", "r": 8, "lora_alpha": {token}}}"#))), ["P-001"], "{token}");
    }
}

#[test]
fn a_key_that_occurs_twice_is_refused_at_any_level() {
    for body in [r#""bias": "none", "bias": "none""#, r#""alpha_pattern": {"q": 1, "q": 2}"#, r#""a": [{"b": 1, "\u0062": 1}]"#] {
        let error = parse(&lora(body)).unwrap_err();
        assert_eq!(ids(error.diagnostics()), ["P-002"], "{error}");
        assert_eq!(error.class(), Class::Format);
    }
    assert_eq!(rules(&parse(r#"{"peft_type": "LORA", "r": 8, "r": 8}"#)), ["P-002"]);
}

#[test]
fn r_is_a_whole_number_of_at_least_one() {
    for (r, rule) in [
        ("0", "P-004"),
        ("-1", "P-004"),
        ("\"8\"", "P-004"),
        ("8.0", "P-004"),
        ("true", "P-004"),
        ("null", "P-004"),
        ("1e9", "P-004"),
        ("1000000000", "P-005"),
        ("4097", "P-005"),
    ] {
        let error = parse(&format!(r#"{{"peft_type": "LORA", "r": {r}}}"#)).unwrap_err();
        assert_eq!(ids(error.diagnostics()), [rule], "{r}");
        assert_eq!(error.place().tensor.as_deref(), Some("r"));
    }
    assert_eq!(rules(&parse(r#"{"peft_type": "LORA"}"#)), ["P-004"]);
    assert_eq!(parse(r#"{"peft_type": "LORA", "r": 4096}"#).unwrap().rank, 4096);
}

#[test]
fn alpha_is_a_number_and_eight_by_default() {
    let alpha = |text: &str| parse(&format!(r#"{{"peft_type": "LORA", "r": 8, "lora_alpha": {text}}}"#));
    assert_eq!(alpha("16").unwrap().alpha, 16.0);
    assert_eq!(alpha("16.5").unwrap().alpha, 16.5);
    assert_eq!(alpha("null").unwrap().alpha, 8.0);
    for wrong in ["\"16\"", "true", "[16]"] {
        assert_eq!(rules(&alpha(wrong)), ["P-004"], "{wrong}");
    }
}

#[test]
fn every_problem_of_the_fields_is_reported_at_once() {
    let text = r#"{"peft_type": "LORA", "r": 0, "lora_alpha": "x", "use_rslora": "true", "fan_in_fan_out": 1, "bias": "some",
        "target_modules": 5, "modules_to_save": "classifier", "rank_pattern": {"q": 0, "v": 9999}, "alpha_pattern": [],
        "alora_invocation_tokens": [3], "base_model_name_or_path": 7}"#;
    let error = parse(text).unwrap_err();
    assert_eq!(error.class(), Class::Format);
    let wanted = ["P-004"; 5].into_iter().chain(["P-005"]).chain(["P-004"; 5]).chain(["P-006"]);
    let mut found = ids(error.diagnostics());
    found.sort_unstable();
    let mut wanted: Vec<&str> = wanted.collect();
    wanted.sort_unstable();
    assert_eq!(found, wanted, "{error}");
    assert!(error.diagnostics().iter().all(|d| d.place().file.is_some() && d.place().tensor.is_some()), "{error:?}");
}

#[test]
fn limits_are_kept_on_both_sides() {
    let text = lora("");
    let limits = Limits { config_bytes: text.len() as u64, ..Limits::default() };
    assert!(PeftConfig::parse(text.as_bytes(), Path::new("c"), &limits).is_ok());
    let limits = Limits { config_bytes: text.len() as u64 - 1, ..Limits::default() };
    assert_eq!(rules(&PeftConfig::parse(text.as_bytes(), Path::new("c"), &limits)), ["P-005"]);
    let names = |n: usize| parse(&lora(&format!(r#""target_modules": [{}]"#, vec!["\"q\""; n].join(","))));
    assert!(names(100_000).is_ok());
    assert_eq!(rules(&names(100_001)), ["P-005"]);
}

#[test]
fn fields_are_read_as_peft_reads_them() {
    let config = config(
        r#""use_rslora": true, "fan_in_fan_out": true, "bias": "lora_only", "lora_bias": true, "target_modules": "all-Linear",
        "rank_pattern": {"z": 4, "a": 2}, "alpha_pattern": {"z": 1.5}, "task_type": "SEQ_CLS", "modules_to_save": ["pooler"],
        "base_model_name_or_path": "../x\u001b[31m""#,
    );
    assert_eq!(config.rule, ScalingRule::RankStabilized);
    assert_eq!(config.orientation, Orientation::InOut);
    assert_eq!(config.bias, Bias::LoraOnly);
    assert_eq!(config.target_modules, Selection::Automatic);
    assert_eq!(config.rank_pattern, [("z".to_owned(), 4), ("a".to_owned(), 2)]);
    assert_eq!(config.alpha_pattern, [("z".to_owned(), 1.5)]);
    assert_eq!(config.modules_to_save, ["pooler", "classifier", "score"]);
    assert_eq!(config.base_name.as_deref(), Some("../x\u{1b}[31m"));
    let plain = super::config("");
    assert_eq!((plain.rule, plain.orientation, plain.bias), (ScalingRule::Standard, Orientation::Undeclared, Bias::None));
    let list = super::config(r#""target_modules": []"#);
    assert_eq!(list.target_modules, Selection::Names(Vec::new()));
    assert_eq!(rules(&parse(&lora(r#""target_modules": ["q", 1]"#))), ["P-004"]);
}

#[test]
fn methods_other_than_lora_are_refused_by_name() {
    for method in
        ["BOFT", "HRA", "PREFIX_TUNING", "PROMPT_TUNING", "POLY", "FOURIERFT", "OFT", "XLORA", "VBLORA", "NEWEST", "lora"]
    {
        let error = parse(&format!(r#"{{"peft_type": "{method}"}}"#)).unwrap_err();
        assert_eq!(ids(error.diagnostics()), ["P-003"]);
        assert_eq!(error.class(), Class::Mismatch);
        let diagnostic = error.diagnostics().first().unwrap();
        assert!(diagnostic.message().contains(method) && diagnostic.help_text().is_some(), "{error}");
    }
    assert_eq!(rules(&parse(r#"{"r": 8}"#)), ["P-003"]);
    assert_eq!(rules(&parse(r#"{"peft_type": 1}"#)), ["P-003"]);
    assert_eq!(rules(&parse(r#"{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}"#)), ["P-018"]);
}

#[test]
fn variants_are_refused_when_they_are_set() {
    for field in [
        r#""alora_invocation_tokens": [1]"#,
        r#""arrow_config": {}"#,
        r#""megatron_config": {"x": 1}"#,
        r#""enable_lora": [true, false, true]"#,
    ] {
        assert_eq!(rules(&parse(&lora(field))), ["P-006"], "{field}");
    }
    for field in [r#""use_qalora": 1"#, r#""use_dora": "yes""#, r#""use_bdlora": {}"#, r#""trainable_token_indices": [-1]"#] {
        assert!(rules(&parse(&lora(field))).contains(&"P-004"), "{field}");
    }
    let off = r#""use_dora": false, "use_qalora": false, "use_bdlora": null, "alora_invocation_tokens": null, "arrow_config": null,
        "kasa_config": null, "layer_replication": null, "target_parameters": [], "trainable_token_indices": null,
        "lora_ga_config": null, "loftq_config": {}, "layers_to_transform": [1], "exclude_modules": ["x"]"#;
    assert_eq!(ids(&config(off).warnings), [""; 0]);
}

#[test]
fn initialisations_that_change_the_base_say_what_they_took_out_of_it() {
    let (leading, columns, unknown) = (Removed::LeadingComponents, Removed::LeadingColumns, Removed::Unknown);
    for (init, wanted) in [
        ("pissa", leading),
        ("PISSA", leading),
        ("pissa_niter_16", unknown),
        ("olora", columns),
        ("OLoRA", columns),
        ("corda", unknown),
        ("lora_ga", unknown),
        ("loftq", unknown),
        ("paca", unknown),
    ] {
        let (why, removed) = config(&format!(r#""init_lora_weights": "{init}""#)).residual.unwrap();
        assert_eq!((why.rule().id, removed), ("P-007", wanted), "{init}");
        assert!(why.help_text().is_some());
    }
    assert_eq!(config(r#""kasa_config": {}"#).residual.unwrap().1, Removed::TrailingComponents);
    assert!(config("").residual.is_none());
    for init in ["true", "false", "null", "\"gaussian\"", "\"eva\"", "\"orthogonal\"", "\"mica\"", "\"Gaussian\""] {
        assert!(parse(&lora(&format!(r#""init_lora_weights": {init}"#))).is_ok(), "{init}");
    }
    assert_eq!(rules(&parse(&lora(r#""init_lora_weights": 1"#))), ["P-004"]);
}

#[test]
fn unknown_fields_are_one_warning() {
    let config = config(r#""brand_new": true, "other": null, "revision": "main""#);
    assert_eq!(ids(&config.warnings), ["P-015"]);
    let message = config.warnings.first().unwrap().message();
    assert!(message.contains("\"brand_new\" (true)") && message.contains("\"other\" (null)"), "{message}");
    assert!(!message.contains("revision"), "{message}");
}
