//! Configs that people published, and the fixtures that PEFT wrote. A folder that is not there is skipped, and said so.

use std::path::PathBuf;

use super::*;

/// The JSON files of a folder beside or in the package.
fn configs(folder: &str, deep: bool) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let Ok(entries) = std::fs::read_dir(&root) else {
        eprintln!("skipped: {} is not there", root.display());
        return Vec::new();
    };
    let entries = entries.map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = if deep { entries.map(|e| e.join("adapter_config.json")).collect() } else { entries.collect() };
    files.retain(|file| file.extension().is_some_and(|e| e == "json") && file.exists());
    files.sort();
    files
}

fn outcome(file: &Path) -> Result<PeftConfig> {
    PeftConfig::parse(&std::fs::read(file).unwrap(), file, &Limits::default())
}

#[test]
fn published_configs_are_read_or_refused_for_a_stated_reason() {
    for file in configs("../shared/configs", false) {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let expected: &[&str] = match name.as_str() {
            n if n.contains("prefixtuning") => &["P-003"],
            n if n.contains("MLX") => &["P-018"],
            _ => &[],
        };
        let outcome = outcome(&file);
        assert_eq!(rules(&outcome), expected, "{name}: {outcome:?}");
        let Ok(config) = outcome else { continue };
        assert_eq!(ids(&config.warnings), [""; 0], "{name}");
    }
}

#[test]
fn fixtures_are_read_and_refused_ones_refused() {
    for file in configs("fixtures/adapters", true) {
        assert_eq!(rules(&outcome(&file)), [""; 0], "{}", file.display());
    }
    for file in configs("fixtures/adapters/refused", true) {
        let outcome = outcome(&file);
        assert!(matches!(rules(&outcome)[..], ["P-003"] | ["P-006"]), "{}: {outcome:?}", file.display());
    }
}
