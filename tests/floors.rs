//! The floors of the house: a module may import only from lower floors, so that data flows one way and a reader of the folder names
//! can see it. The table is in DESIGN.md.

use std::path::{Path, PathBuf};

/// Module and floor. `lib.rs` and `main.rs` stand above all.
const FLOORS: &[(&str, u32)] = &[
    ("kernel", 0),
    ("error", 1),
    ("limits", 1),
    ("rules", 1),
    ("io", 2),
    ("tensor", 2),
    ("codec", 3),
    ("adapter", 3),
    ("checkpoint", 4),
    ("dialect", 4),
    ("loader", 4),
    ("plan", 5),
    ("report", 5),
    ("exec", 6),
    ("op", 7),
    ("open", 8),
    ("eval", 8),
    ("cli", 9),
];

/// Imports between modules of one floor that are as they should be: an error cites a rule, a rule has a class, and bytes are hashed
/// with their dtype and shape. A report shows a renaming as the plan made it.
const SAME_FLOOR: &[(&str, &str)] = &[("error", "rules"), ("rules", "error"), ("io", "tensor"), ("report", "plan")];

/// What must not be seen even from a higher floor.
const FORBIDDEN: &[(&str, &str)] = &[("checkpoint", "adapter"), ("adapter", "codec"), ("adapter", "io"), ("exec", "dialect")];

fn floor(module: &str) -> Option<u32> {
    FLOORS.iter().find(|(name, _)| *name == module).map(|(_, floor)| *floor)
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, found),
            false if path.extension().is_some_and(|e| e == "rs") => found.push(path),
            false => {}
        }
    }
}

#[test]
fn modules_import_from_lower_floors_only() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut wrong = Vec::new();
    let mut seen = 0;
    for file in files {
        let relative = file.strip_prefix(&src).unwrap();
        let first = relative.components().next().unwrap().as_os_str().to_str().unwrap();
        let module = first.trim_end_matches(".rs");
        if matches!(module, "lib" | "main") || relative.iter().any(|part| part.to_str().unwrap().starts_with("tests")) {
            continue;
        }
        let own = floor(module).unwrap_or_else(|| panic!("{module} has no floor"));
        let text = std::fs::read_to_string(&file).unwrap();
        // A list after `crate::` would hide its modules from this test; the command line, at the top, may import anything public.
        assert!(module == "cli" || !text.contains("use crate::{"), "{} imports a list from the root", relative.display());
        for import in
            text.split("crate::").skip(1).map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap())
        {
            let Some(other) = floor(import).filter(|_| import != module) else { continue };
            seen += 1;
            let lower = other < own || SAME_FLOOR.contains(&(module, import));
            if !lower || FORBIDDEN.contains(&(module, import)) {
                wrong.push(format!("{} imports {import}", relative.display()));
            }
        }
    }
    assert!(seen > 100, "only {seen} imports were found: the test is blind");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_stays_behind_its_gates() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let with_unsafe = files.iter().filter(|f| std::fs::read_to_string(f).unwrap().contains("unsafe {"));
    let mut names: Vec<_> = with_unsafe.map(|f| f.strip_prefix(&src).unwrap().display().to_string()).collect();
    names.sort();
    assert_eq!(names, ["io/map.rs", "kernel/dispatch.rs", "kernel/lowrank/dispatch.rs", "kernel/vector.rs"]);
}
