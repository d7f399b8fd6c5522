//! The documents of the command line say what it does: the examples in `docs/json.md` are run again, every member that they show is
//! described, and the tables in `docs/errors.md` are those of the code.
#![cfg(feature = "cli")]

use std::path::Path;
use std::process::Command;

use loratool::rules;
use serde_json::Value;

fn document(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(name)).unwrap()
}

/// Commands and what they are said to print.
fn examples(text: &str) -> Vec<(Vec<String>, Value)> {
    let blocks = text.split("```console\n$ ").skip(1).map(|block| block.split("```").next().unwrap());
    let example = |block: &str| {
        let (command, printed) = block.split_once('\n').unwrap();
        let words: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        (words, serde_json::from_str(printed).unwrap())
    };
    blocks.map(example).collect()
}

/// Equal, but for the last digits of sums that the instruction set may round otherwise.
fn same(x: &Value, y: &Value) -> bool {
    match (x, y) {
        // The last digits of factors that were decomposed depend on the instruction set, and with them their digest and the length of the text.
        (Value::Object(x), Value::Object(y)) => {
            let computed = x.contains_key("omitted") || x.contains_key("parameters_before");
            // What a model computes in f32 depends on the processor in the sixth digit.
            let by_model = x.contains_key("logit");
            let near = |x: &Value, y: &Value| {
                let pair = x.as_f64().zip(y.as_f64());
                by_model && pair.is_some_and(|(x, y)| (x - y).abs() <= 1e-4)
            };
            let equal = |(x, y): ((&String, &Value), (&String, &Value))| {
                x.0 == y.0 && (computed && (x.0 == "content" || x.0 == "bytes") || near(x.1, y.1) || same(x.1, y.1))
            };
            x.len() == y.len() && x.iter().zip(y).all(equal)
        }
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(x, y)| same(x, y)),
        (Value::Number(x), Value::Number(y)) => {
            let (x, y) = (x.as_f64().unwrap(), y.as_f64().unwrap());
            (x - y).abs() <= 1e-9 * x.abs()
        }
        _ => x == y,
    }
}

fn members<'v>(value: &'v Value, found: &mut Vec<&'v str>) {
    match value {
        Value::Object(object) => object.iter().for_each(|(name, value)| {
            found.push(name);
            members(value, found);
        }),
        Value::Array(list) => list.iter().for_each(|value| members(value, found)),
        _ => {}
    }
}

#[test]
fn the_examples_print_what_is_shown() {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures"), folder.path().join("fixtures")).unwrap();
    let text = document("json.md");
    let examples = examples(&text);
    let verbs: Vec<&str> = examples.iter().map(|(words, _)| words[1].as_str()).collect();
    assert_eq!(
        verbs,
        [
            "merge", "inspect", "inspect", "validate", "validate", "merge", "verify", "recover", "unmerge", "convert", "bake",
            "extract", "resize", "combine", "compare", "eval", "predict"
        ]
    );
    for (words, shown) in &examples {
        let out = Command::new(env!("CARGO_BIN_EXE_loratool")).args(&words[1..]).current_dir(folder.path()).output().unwrap();
        let printed: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert!(same(shown, &printed), "{}\nshown:   {shown}\nprinted: {printed}", words.join(" "));
        let mut names = Vec::new();
        members(shown, &mut names);
        for name in names {
            assert!(text.contains(&format!("`{name}`")), "the member {name:?} is not described");
        }
    }
}

#[test]
fn every_rule_of_the_tool_is_listed() {
    let text = document("errors.md");
    for rule in rules::ALL.iter().filter(|rule| rule.id.starts_with(['E', 'U'])) {
        let row = format!("| {} | {} | {} |", rule.id, rule.class.exit_code(), rule.title);
        assert!(text.contains(&row), "no row {row:?}");
    }
    for rule in rules::ALL {
        let row = format!("| {} | `{}` |", rule.class.exit_code(), rule.class.name());
        let interrupted = rule.class == loratool::Class::Interrupted;
        assert!(interrupted || text.contains(&row), "no row {row:?}");
    }
}
