//! The binary on every bad input of the tables: the exit code is that of the class, the output cannot drive a terminal, and
//! nothing is left behind.

use std::path::Path;
use std::process::{Command, Output};

use crate::bad::{Ask, Bad, Row};
use crate::bytes::floats;
use crate::scene::{Scene, norm, weight, within};
use crate::{adapter, binding, config, folder, header, values};

/// Runs the binary in the scene's folder.
fn run(scene: &Scene, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loratool"));
    command.current_dir(scene.path()).args(args);
    within(move || command.output().unwrap())
}

fn args(ask: Ask) -> &'static [&'static str] {
    match ask {
        Ask::Merge => &["merge", "base", "--adapter", "adapter", "-o", "out"],
        Ask::MergeMapped => &["merge", "base", "--adapter", "adapter", "-o", "out", "--mmap"],
        Ask::ValidateBase => &["validate", "base", "--values"],
        Ask::ValidateAdapter => &["validate", "adapter"],
    }
}

/// Control characters other than line breaks, and characters that change the direction of a line or take no room.
fn drives_a_terminal(text: &str) -> bool {
    let hidden = |c| matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}');
    text.chars().any(|c| c.is_control() && c != '\n' || hidden(c))
}

/// The exit code, after checks that hold for every run.
fn code(what: &str, output: &Output, problems: &mut Vec<String>) -> Option<i32> {
    for (stream, bytes) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
        match std::str::from_utf8(bytes) {
            Ok(text) if !drives_a_terminal(text) => {}
            _ => problems.push(format!("{what}: {stream} is not escaped: {:?}", String::from_utf8_lossy(bytes))),
        }
    }
    let code = output.status.code();
    if code.is_none_or(|code| code == 70 || code > 100) {
        problems.push(format!("{what}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    code
}

/// Runs what is asked, as text and as JSON.
fn check_refusal(what: &str, scene: &Scene, bad: &Bad, problems: &mut Vec<String>) {
    let text = run(scene, args(bad.ask));
    let found = code(what, &text, problems);
    if found != Some(i32::from(bad.exit)) {
        problems.push(format!("{what}: exit {found:?}, expected {}: {}", bad.exit, String::from_utf8_lossy(&text.stderr)));
    }
    if !text.stdout.is_empty() || !String::from_utf8_lossy(&text.stderr).contains(bad.rule) {
        problems.push(format!("{what}: the error is not told on stderr: {text:?}"));
    }
    let json = run(scene, &[args(bad.ask), &["--json"]].concat());
    if code(what, &json, problems) != Some(i32::from(bad.exit)) {
        problems.push(format!("{what}: another exit code with --json: {:?}", json.status));
    }
    let told = serde_json::from_slice::<serde_json::Value>(&json.stdout).unwrap_or_default();
    let error = &told["error"];
    if (error["exit_code"].as_u64(), error["problems"][0]["rule"].as_str()) != (Some(u64::from(bad.exit)), Some(bad.rule)) {
        problems.push(format!("{what}: the JSON does not tell it: {}", String::from_utf8_lossy(&json.stdout)));
    }
}

/// Looks at both inputs on their own. A file that cannot be opened is refused in the same way whoever opens it.
fn check_looks(what: &str, scene: &Scene, exit: u8, problems: &mut Vec<String>) {
    for verb in ["inspect", "validate"] {
        let both = ["base", "adapter"].map(|path| code(what, &run(scene, &[verb, path]), problems));
        let exit = Some(i32::from(exit));
        if !both.contains(&exit) || !both.iter().all(|found| [Some(0), exit].contains(found)) {
            problems.push(format!("{what}: {verb} exits {both:?}, expected {exit:?} for one of them"));
        }
    }
}

/// Runs a table; `opens` says that its files are refused when they are opened, by any verb.
fn check_table(rows: &[Row], opens: bool) {
    let mut problems = Vec::new();
    for (name, row) in rows {
        for (i, bad) in row().iter().enumerate() {
            for (role, scene) in bad.scenes.iter().enumerate() {
                let what = format!("{name}, case {i}.{role}");
                let before = scene.snapshot();
                check_refusal(&what, scene, bad, &mut problems);
                // One case of a row stands for the others here: this is about the verbs.
                if opens && i == 0 && bad.ask == Ask::Merge && !bad.rule.starts_with('A') {
                    check_looks(&what, scene, bad.exit, &mut problems);
                }
                if scene.snapshot() != before {
                    problems.push(format!("{what}: something was left behind, or an input changed"));
                }
            }
        }
    }
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
}

#[test]
fn the_binary_refuses_bad_headers() {
    check_table(header::ROWS, true);
}

#[test]
fn the_binary_refuses_bad_values() {
    check_table(values::ROWS, false);
}

#[test]
fn the_binary_refuses_bad_folders() {
    check_table(folder::ROWS, true);
}

#[test]
fn the_binary_refuses_bad_adapters_pairs_and_configs() {
    check_table(adapter::ROWS, false);
    check_table(binding::ROWS, false);
    check_table(config::ROWS, false);
}

/// Names from files are shown, never obeyed.
#[test]
fn the_binary_escapes_the_names_of_tensors() {
    let names = ["abc\u{202e}fed", "zero\u{200b}width", "\u{feff}mark", "iso\u{2066}late"];
    let odd = names.map(|name| floats(name, "F32", &[1], &[f64::NAN]));
    let scene = Scene::sound().base(&[vec![weight(), norm()], odd.to_vec()].concat());
    let mut problems = Vec::new();
    for args in [
        &["inspect", "base", "--tensors"][..],
        &["inspect", "base", "--tensors", "--json"],
        &["validate", "base", "--values"],
        args(Ask::Merge),
    ] {
        let output = run(&scene, args);
        assert_eq!(code(&format!("{args:?}"), &output, &mut problems), Some(0), "{output:?}");
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    let listing = String::from_utf8(run(&scene, &["inspect", "base", "--tensors"]).stdout).unwrap();
    assert!(listing.contains("\\u{202e}"), "{listing}");
}

/// A device is named on the command line like any other path, and not read.
#[test]
fn the_binary_refuses_devices() {
    let scene = Scene::sound();
    for device in ["/dev/zero", "/dev/null"] {
        assert!(Path::new(device).exists());
        for args in [["validate", device], ["inspect", device]] {
            assert_eq!(run(&scene, &args).status.code(), Some(6), "{args:?}");
        }
    }
}
