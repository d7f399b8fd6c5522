//! The command line as people and programs meet it: help, verbs, exit codes, and output that is valid whatever happens.
#![cfg(feature = "cli")]

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::fixture;
use serde_json::Value;

fn loratool() -> Command {
    Command::new(env!("CARGO_BIN_EXE_loratool"))
}

fn run(args: &[&str]) -> Output {
    loratool().args(args).output().unwrap()
}

fn path(name: &str) -> String {
    fixture(name).display().to_string()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn adapter() -> String {
    path("adapters/llama-qv-r8")
}

fn base() -> String {
    path("models/llama-tiny")
}

/// Runs with `--json` and gives the exit code and the one object on standard output.
fn json(args: &[&str]) -> (i32, Value) {
    let out = run(&[args, &["--json"]].concat());
    let text = text(&out.stdout);
    assert_eq!(text.lines().count(), 1, "{text}");
    let object: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(object["loratool"]["schema"], 1);
    assert!(out.stderr.is_empty(), "{}", self::text(&out.stderr));
    (out.status.code().unwrap(), object)
}

#[test]
fn help_is_there_for_every_verb_and_fits_80_columns() {
    for args in [
        &["--help"][..],
        &["inspect", "--help"],
        &["validate", "--help"],
        &["merge", "--help"],
        &["verify", "--help"],
        &["convert", "--help"],
        &["bake", "--help"],
        &["unmerge", "--help"],
        &["recover", "--help"],
        &["extract", "--help"],
        &["resize", "--help"],
    ] {
        let out = run(args);
        let help = text(&out.stdout);
        assert_eq!(out.status.code(), Some(0));
        assert!(help.contains("Examples:") && out.stderr.is_empty(), "{args:?}");
        assert!(help.lines().all(|line| line.chars().count() <= 80), "{help}");
    }
    assert!(text(&run(&["--version"]).stdout).starts_with("loratool 0."));
}

#[test]
fn without_arguments_the_help_is_an_error() {
    let out = run(&[]);
    assert_eq!((out.status.code(), out.stdout.len()), (Some(2), 0));
    assert!(text(&out.stderr).contains("Usage: loratool"));
}

#[test]
fn inspect_says_what_an_adapter_and_a_checkpoint_are() {
    let out = run(&["inspect", &adapter(), "--base", &base(), "--norms"]);
    let shown = text(&out.stdout);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(shown.contains("an adapter (peft)") && shown.contains("self_attn.q_proj  0-1") && shown.contains("fits "), "{shown}");
    let shown = text(&run(&["inspect", &base()]).stdout);
    assert!(shown.contains("a checkpoint") && shown.contains("21 tensors in 4 files"), "{shown}");
}

#[test]
fn inspect_shows_what_an_adapter_is_even_if_it_does_not_fit() {
    let other = path("models/bert-tiny");
    let (code, object) = json(&["inspect", &adapter(), "--base", &other]);
    assert_eq!((code, &object["error"]["exit_code"]), (4, &4.into()));
    assert_eq!(object["report"]["kind"], "adapter");
}

#[test]
fn validate_lists_its_checks() {
    let shown = text(&run(&["validate", &adapter(), "--base", &base()]).stdout);
    assert!(shown.contains("valid: 3 checks passed"), "{shown}");
    let shown = text(&run(&["validate", &base(), "--values"]).stdout);
    assert!(shown.contains("valid: 2 checks passed"), "{shown}");
}

#[test]
fn merge_reports_a_balance_and_leaves_nothing_else_behind() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("merged");
    let output = output.to_str().unwrap();
    let out = run(&["merge", &base(), "--adapter", &adapter(), "-o", output, "--dry-run"]);
    assert!(text(&out.stdout).starts_with("would merge 1 adapter; nothing was written"));
    assert!(!Path::new(output).exists());
    let out = run(&["merge", &base(), "--adapter", &adapter(), "-o", output]);
    let shown = text(&out.stdout);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(
        shown.contains("adapter tensors: 8 = 8 applied + 0 ignored\nbase tensors: 21 = 17 copied + 4 modified; added: 0\n"),
        "{shown}"
    );
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    let again = run(&["merge", &base(), "--adapter", &adapter(), "-o", output]);
    assert_eq!(again.status.code(), Some(2));
    assert!(text(&again.stderr).contains("--overwrite"));
    let quiet = run(&["merge", &base(), "--adapter", &adapter(), "-o", output, "--overwrite", "--quiet"]);
    assert_eq!((quiet.status.code(), quiet.stdout.len(), quiet.stderr.len()), (Some(0), 0, 0));
}

#[test]
fn merge_says_what_survived_and_what_16_bits_would_keep() {
    let folder = tempfile::tempdir().unwrap();
    let output = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let wide = text(&run(&["merge", &path("models/llama-tiny-f32"), "--adapter", &adapter(), "-o", &output("f32")]).stdout);
    assert!(wide.contains(" % of the update survived rounding\nstored in BF16 later, "), "{wide}");
    assert!(wide.contains(" % of them would differ from the base; in F16, "), "{wide}");
    let narrow = text(&run(&["merge", &base(), "--adapter", &adapter(), "-o", &output("bf16")]).stdout);
    assert!(narrow.ends_with(" touched weights changed\n100 % of the update survived rounding\n"), "{narrow}");
}

#[test]
fn convert_says_that_nothing_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let container = folder.path().join("adapter.safetensors");
    let container = container.to_str().unwrap();
    let out = run(&["convert", &adapter(), "-o", container, "--to", "container"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(text(&out.stdout).contains("nothing is lost"));
    let (code, object) = json(&["inspect", container]);
    assert_eq!((code, &object["report"]["dialect"]), (0, &"container".into()));
}

#[test]
fn json_is_one_object_for_success_and_for_every_error() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let output = output.to_str().unwrap();
    let (code, object) = json(&["merge", &base(), "--adapter", &adapter(), "-o", output]);
    assert_eq!((code, &object["verb"]), (0, &"merge".into()));
    assert_eq!(object["report"]["balance"]["applied"], 8);
    let oft = path("adapters/refused/oft");
    let bad = folder.path().join("bad.safetensors");
    fs::write(&bad, "no").unwrap();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["inspect", "no/such"], 6, "io"),
        (&["inspect", bad.to_str().unwrap()], 3, "format"),
        (&["inspect", &oft], 4, "mismatch"),
        (&["merge", &base(), "--adapter", "x:nan", "-o", "y"], 2, "usage"),
        (&["merge", "--no-such-flag"], 2, "usage"),
        (&["nonsense"], 2, "usage"),
    ];
    for (args, code, class) in cases {
        let (found, object) = json(args);
        assert_eq!((found, object["error"]["class"].as_str()), (*code, Some(*class)), "{args:?}");
        assert_eq!(object["error"]["exit_code"], *code);
        assert!(!object["error"]["problems"].as_array().unwrap().is_empty());
        assert!(object.get("report").is_none());
    }
}

#[test]
fn usage_errors_exit_2_and_say_what_to_do() {
    let (base, adapter) = (base(), adapter());
    let comma = format!("{adapter}:0,5");
    for (args, said) in [
        (vec!["--adapter", &comma], "decimal comma"),
        (vec!["--adapter", &adapter, "--scale", "inf"], "not a finite number"),
        (vec!["--adapter", &adapter, "--scale="], "the scale is empty"),
        (vec!["--adapter", &adapter, "--adapter", &adapter], "--allow-repeat"),
        (vec!["--adapter", &adapter, "--prefix", "model."], "FROM=TO"),
        (vec!["--adapter", &adapter, "--threads", "0"], "--threads"),
        (vec!["--adapter", &adapter, "--tile", "big"], "64KiB"),
        (vec![], "--adapter"),
    ] {
        let out = run(&[&["merge", &base, "-o", "no/where/to/go"], &args[..]].concat());
        assert_eq!((out.status.code(), out.stdout.len()), (Some(2), 0), "{args:?}");
        assert!(text(&out.stderr).contains(said), "{args:?}: {}", text(&out.stderr));
    }
}

#[test]
fn no_escape_sequence_reaches_the_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let hostile = "q\u{9b}31m\u{202e}\u{200b}";
    let header = format!(r#"{{"{hostile}.weight":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
    let file = folder.path().join(format!("{hostile}\x1b[31m.safetensors"));
    fs::write(&file, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat()).unwrap();
    for args in [&["inspect", "--tensors"][..], &["validate"], &["inspect", "--json"]] {
        let out = loratool().args(args).arg(&file).output().unwrap();
        for c in format!("{}{}", text(&out.stdout), text(&out.stderr)).chars() {
            assert!(c == '\n' || !(c.is_control() || ('\u{200b}'..='\u{202e}').contains(&c)), "{args:?} lets {c:?} through");
        }
    }
}

#[test]
fn an_argument_need_not_be_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let out = loratool().arg("inspect").arg(std::ffi::OsStr::from_bytes(b"no-such-caf\xe9")).output().unwrap();
    assert_eq!(out.status.code(), Some(6));
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let mut child =
        loratool().args(["inspect", &base(), "--tensors"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert_eq!((out.status.code(), text(&out.stderr)), (Some(0), String::new()));
}

#[test]
#[cfg(target_os = "linux")]
fn output_that_cannot_be_written_exits_6() {
    for args in [&["inspect", &base()][..], &["inspect", "--json", &base()], &["--help"]] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let out = loratool().args(args).stdout(full).output().unwrap();
        assert_eq!(out.status.code(), Some(6), "{args:?}");
        assert!(text(&out.stderr).contains("cannot write to standard output"));
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_file_size_limit_is_an_error_and_not_a_signal() {
    let folder = tempfile::tempdir().unwrap();
    let command = format!(
        "ulimit -f 8; exec {} merge {} -a {} -o {}/m",
        env!("CARGO_BIN_EXE_loratool"),
        base(),
        adapter(),
        folder.path().display()
    );
    let out = Command::new("sh").args(["-c", &command]).output().unwrap();
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(6), "{said}");
    assert!(said.contains("/m/model-0000") && !said.contains(".loratool-"), "the staging is named: {said}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// A safetensors file of zeros; what is not header is a hole.
fn zeros(path: &Path, tensors: &[(&str, [u64; 2])]) {
    let mut at = 0;
    let entries = tensors.iter().map(|(name, [rows, cols])| {
        let begin = at;
        at += rows * cols * 4;
        format!(r#""{name}":{{"dtype":"F32","shape":[{rows},{cols}],"data_offsets":[{begin},{at}]}}"#)
    });
    let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    fs::write(path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    File::options().write(true).open(path).unwrap().set_len(8 + header.len() as u64 + at).unwrap();
}

#[test]
fn memory_is_kept_to_or_refused_by_the_name_of_its_flag() {
    let folder = tempfile::tempdir().unwrap();
    let merge = |memory: &str, out: &str| {
        let mut command = loratool();
        command.arg("merge").arg(base()).arg("--adapter").arg(adapter()).arg("-o").arg(folder.path().join(out));
        command.args(["--memory", memory]).output().unwrap()
    };
    let refused = merge("100", "refused");
    assert_eq!(refused.status.code(), Some(7));
    assert!(text(&refused.stderr).contains("--memory"), "{}", text(&refused.stderr));
    assert!(!folder.path().join("refused").exists());
    let done = merge("128KiB", "done");
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(folder.path().join("done").join("config.json").exists());
}

#[test]
fn a_signal_ends_a_merge_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let (base, adapter, out) = (folder.path().join("base.safetensors"), folder.path().join("adapter"), folder.path().join("out"));
    fs::create_dir_all(&adapter).unwrap();
    fs::create_dir_all(&out).unwrap();
    zeros(&base, &[("model.q_proj.weight", [8000, 8192])]);
    let factor = |letter: &str| format!("base_model.model.model.q_proj.lora_{letter}.weight");
    zeros(&adapter.join("adapter_model.safetensors"), &[(&factor("A"), [64, 8192]), (&factor("B"), [8000, 64])]);
    fs::write(adapter.join("adapter_config.json"), r#"{"peft_type":"LORA","r":64,"lora_alpha":64,"target_modules":["q_proj"]}"#)
        .unwrap();
    for (signal, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        // Signals that whoever runs the tests ignores (a job in the background) would stay ignored, as they should.
        let mut command = Command::new("env");
        command.arg("--default-signal=INT,TERM,HUP").arg(env!("CARGO_BIN_EXE_loratool"));
        command.arg("merge").arg(&base).arg("--adapter").arg(&adapter).arg("-o").arg(out.join("merged"));
        // The slowest way there is, so that there is time to interrupt it.
        command.args(["--threads", "1", "--portable"]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        while fs::read_dir(&out).unwrap().count() == 0 && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let killed = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status().unwrap();
        let ended = child.wait_with_output().unwrap();
        assert!(killed.success(), "the merge had ended: {}", text(&ended.stderr));
        assert_eq!(ended.status.code(), Some(code), "SIG{signal}: {}", text(&ended.stderr));
        assert!(text(&ended.stderr).contains("interrupted"), "{}", text(&ended.stderr));
        assert_eq!(fs::read_dir(&out).unwrap().count(), 0, "SIG{signal}");
    }
}

/// A prefix that was asked for is the one that is used, whatever else would fit.
#[test]
fn a_prefix_is_not_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let merge = |prefix: &str, out: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_loratool"));
        command.arg("merge").arg(root.join("models/llama-tiny")).arg("-a").arg(root.join("adapters/llama-qv-r8"));
        command.args(["--json", "--prefix", prefix, "-o"]).arg(folder.path().join(out)).output().unwrap()
    };
    assert_eq!(merge("model.=zzz.", "none").status.code(), Some(4));
    // Both layers of the adapter would land on one.
    assert_eq!(merge("model.layers.0=model.layers.1", "one").status.code(), Some(4));
    assert!(merge("model.=model.", "same").status.success());
}
