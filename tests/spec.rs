//! The specification, the code and the vectors are held equal: the same rule ids in all three, and every vector read as its manifest
//! says. `spec/reader/read.py`, written from the text alone, is held against the same vectors.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use loratool::{Error, Limits, ReadMode, SafetensorsFile, Strictness, Values, rules};
use serde_json::Value;

fn spec(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("spec").join(path)
}

fn manifest() -> Value {
    serde_json::from_str(&std::fs::read_to_string(spec("vectors/manifest.json")).unwrap()).unwrap()
}

/// Rules of the specification; `E` and `U` rules are of the tool alone.
fn rules_in_code() -> BTreeSet<(String, String)> {
    let of_spec = rules::ALL.iter().filter(|rule| !rule.id.starts_with(['E', 'U']));
    of_spec.map(|rule| (rule.id.to_owned(), rule.title.to_owned())).collect()
}

#[test]
fn every_rule_of_the_code_is_a_heading_of_the_text_and_the_other_way_round() {
    let mut in_text = BTreeSet::new();
    for file in ["container.md", "adapter-model.md", "checkpoint.md", "mapping/peft.md"] {
        for line in std::fs::read_to_string(spec(file)).unwrap().lines() {
            let Some((id, title)) = line.strip_prefix("### ").and_then(|heading| heading.split_once(' ')) else { continue };
            if id.len() == 5 && id.as_bytes()[1] == b'-' {
                assert!(in_text.insert((id.to_owned(), title.to_owned())), "{id} stands twice in the text");
            }
        }
    }
    assert_eq!(rules_in_code(), in_text);
}

#[test]
fn every_rule_has_a_vector_or_a_reason_why_not() {
    let manifest = manifest();
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    let vectors = manifest["vectors"].as_array().unwrap();
    let broken = vectors.iter().filter(|v| v["expect"] != "accept");
    let covered: BTreeSet<String> = broken.flat_map(|v| v["rules"].as_array().unwrap()).map(text).collect();
    let excused: BTreeSet<String> = manifest["without_vectors"].as_object().unwrap().keys().cloned().collect();
    assert!(covered.is_disjoint(&excused), "{:?}", covered.intersection(&excused).collect::<Vec<_>>());
    let all: BTreeSet<String> = covered.union(&excused).cloned().collect();
    assert_eq!(all, rules_in_code().into_iter().map(|(id, _)| id).collect());
}

#[test]
fn the_folder_holds_the_vectors_of_the_manifest_and_no_others() {
    let listed: BTreeSet<String> =
        manifest()["vectors"].as_array().unwrap().iter().map(|v| v["path"].as_str().unwrap().to_owned()).collect();
    let entries = std::fs::read_dir(spec("vectors")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let found: BTreeSet<String> =
        entries.filter(|name| name.starts_with("y_") || name.starts_with("n_") || name.starts_with("i_")).collect();
    assert_eq!(listed, found);
}

/// Reads a vector whole: what `validate` does.
fn read(kind: &str, path: &Path) -> Result<(), Error> {
    let limits = Limits::default();
    match kind {
        "safetensors" => SafetensorsFile::open(path, ReadMode::Read, Strictness::Strict, &limits).map(drop),
        "checkpoint" => loratool::validate_checkpoint(&loratool::open_checkpoint(path)?, Values::Read).map(drop),
        "container" | "peft" => loratool::validate_adapter(&loratool::open_adapter(path)?, None, &limits).map(drop),
        other => panic!("unknown kind {other}"),
    }
}

#[test]
fn every_vector_is_read_as_the_manifest_says() {
    let mut wrong = Vec::new();
    for vector in manifest()["vectors"].as_array().unwrap() {
        let (path, expect) = (vector["path"].as_str().unwrap(), vector["expect"].as_str().unwrap());
        let rule = vector["rules"][0].as_str().unwrap();
        let found = match read(vector["kind"].as_str().unwrap(), &spec("vectors").join(path)) {
            Ok(()) => ("accept".to_owned(), String::new()),
            Err(error) => (error.class().name().to_owned(), error.diagnostics()[0].rule().id.to_owned()),
        };
        let rule_agrees = expect == "accept" || found.1 == rule;
        if found.0 != expect || !rule_agrees {
            wrong.push(format!("{path}: expected {expect} {rule}, found {} {}", found.0, found.1));
        }
    }
    assert!(wrong.is_empty(), "{} vectors are read otherwise:\n{}", wrong.len(), wrong.join("\n"));
}

/// Content roots are recomputed from the bytes, not read from the manifest inside the file.
#[test]
fn the_vectors_have_the_content_roots_and_warnings_that_the_manifest_states() {
    let scratch = tempfile::tempdir().unwrap();
    let (mut roots, mut warnings) = (0, 0);
    for (i, vector) in manifest()["vectors"].as_array().unwrap().iter().enumerate() {
        let path = spec("vectors").join(vector["path"].as_str().unwrap());
        if let Some(content) = vector.get("content") {
            let adapter = loratool::open_adapter(&path).unwrap();
            let copy = scratch.path().join(format!("{i}.safetensors"));
            let report = loratool::convert(&adapter, &copy, &Default::default(), &()).unwrap();
            assert_eq!(&report.content, content.as_str().unwrap(), "{}", path.display());
            roots += 1;
        }
        for rule in vector.get("warns").and_then(Value::as_array).into_iter().flatten() {
            let found = match vector["kind"].as_str().unwrap() {
                "checkpoint" => loratool::open_checkpoint(&path).unwrap().warnings().to_vec(),
                "safetensors" => continue,
                _ => loratool::open_adapter(&path).unwrap().warnings().to_vec(),
            };
            assert!(found.iter().any(|w| w.rule().id == rule.as_str().unwrap()), "{}: {found:?}", path.display());
            warnings += 1;
        }
    }
    assert!(roots > 10 && warnings > 5, "{roots} {warnings}");
}

#[test]
fn the_updates_of_the_vectors_have_the_values_that_the_manifest_states() {
    let mut checked = 0;
    for vector in manifest()["vectors"].as_array().unwrap().iter().filter(|v| v.get("delta").is_some()) {
        let adapter = loratool::open_adapter(spec("vectors").join(vector["path"].as_str().unwrap())).unwrap();
        for delta in vector["delta"].as_array().unwrap() {
            let (tensor, row, col) = (delta[0].as_str().unwrap(), delta[1][0].as_u64().unwrap(), delta[1][1].as_u64().unwrap());
            let target = adapter.targets().iter().find(|t| t.tensor == tensor).unwrap();
            // The manifest counts in the base tensor's rows and columns; `delta_rows` in the layer's outputs and inputs.
            let transposed = !matches!(target.kind, loratool::Kind::Linear(loratool::Orientation::OutIn));
            let (out, inner) = if transposed { (col, row) } else { (row, col) };
            let found = loratool::delta_rows(target, out..out + 1).unwrap()[inner as usize];
            let (wanted, tolerance) = (delta[2].as_f64().unwrap(), delta[3].as_f64().unwrap());
            assert!((found - wanted).abs() <= tolerance, "{tensor}[{row}, {col}] is {found}, not {wanted}");
            checked += 1;
        }
    }
    assert!(checked > 3);
}
