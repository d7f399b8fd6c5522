//! Table F: disks that are full or forbidden, outputs that are not what they seem, names that are odd, files that change meanwhile. Each
//! ends with a message and the way out, or in the bytes of an undisturbed merge, and never leaves anything else. The rows in which a call
//! has to fail (F02, F04 to F06, F09, F16 to F18, F22, F23) are in `tests/faults`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use loratool::Error;

use crate::bytes::{floats, safetensors};
use crate::runs::{
    IN_PLACE, MERGE, as_anyone, done, holes, in_place_watched, loratool, meanwhile, merge_watched, merged, mounted, output,
    refused, run, shell, skip, small_disk,
};
use crate::scene::{A, B, FACTORS, MODEL, NORM, Scene, WEIGHT, factors, norm, weight};

/// Like [`MERGE`] into another place.
fn merge_to(out: &str) -> Vec<&str> {
    [&MERGE[..5], &[out]].concat()
}

/// Over what is there.
fn over(out: &str) -> Vec<&str> {
    [&merge_to(out)[..], &["--overwrite"]].concat()
}

fn mode(path: impl AsRef<Path>) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn set_mode(path: impl AsRef<Path>, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A base that is a file; the output is then one too.
fn of_file() -> Scene {
    Scene::sound().without("base").with("base", safetensors(&[weight(), norm()]))
}

fn count(folder: impl AsRef<Path>) -> usize {
    fs::read_dir(folder).unwrap().count()
}

/// A disk with room for so many names and no more: wherever in a merge it is full, nothing is left on it.
#[test]
fn f01_a_disk_that_is_full_at_any_file_leaves_nothing() {
    let scene = Scene::sharded().with("base/config.json", "{}").with("base/tokenizer.json", "{}");
    let mut refusals = 0;
    for names in 1.. {
        let Some(_disk) = small_disk(&scene, "disk", &format!("size=1m,nr_inodes={names}")) else { return };
        let ended = run(loratool(&scene, &merge_to("disk/out")));
        if ended.code == Some(0) {
            break;
        }
        ended.says(6, &["disk/out", "no space left", "help: free some space", "E-002"]);
        assert_eq!(count(scene.at("disk")), 0, "with {names} names: {}", ended.err);
        refusals += 1;
    }
    assert!(refusals > 5, "the disk was full {refusals} times only");
}

#[test]
fn f03_a_file_longer_than_allowed_is_an_error_and_not_a_signal() {
    let scene = holes(64, 64, &[]);
    refused(&scene, shell(&scene, "ulimit -f 4;", MERGE, ""), 6, &["out/model.safetensors", "larger than allowed", "ulimit -f"]);
}

#[test]
fn f03_a_folder_that_may_not_be_written_to_is_named() {
    let scene = Scene::sound();
    fs::create_dir(scene.at("closed")).unwrap();
    set_mode(scene.at("closed"), 0o555);
    let Some(command) = as_anyone(&scene, &merge_to("closed/out")) else { return };
    refused(&scene, command, 6, &["closed/out", "permission denied", "check the permissions of the folder"]);
}

#[test]
fn f03_a_file_that_may_not_be_read_is_named() {
    for path in [MODEL, FACTORS] {
        let scene = Scene::sound();
        let before = scene.snapshot();
        set_mode(scene.at(path), 0);
        let Some(command) = as_anyone(&scene, MERGE) else { return };
        run(command).says(6, &[path, "permission denied", "check the permissions of the file"]);
        set_mode(scene.at(path), 0o644);
        assert!(scene.snapshot() == before);
    }
}

#[test]
fn f03_a_disk_that_is_read_only_is_named() {
    let scene = Scene::sound();
    let Some(_disk) = small_disk(&scene, "disk", "size=1m,ro") else { return };
    refused(&scene, loratool(&scene, &merge_to("disk/out")), 6, &["disk/out", "read-only", "write elsewhere"]);
}

#[test]
fn f03_an_immutable_folder_is_named() {
    let scene = Scene::sound();
    fs::create_dir(scene.at("fixed")).unwrap();
    let chattr = |flag| {
        let status = Command::new("chattr").arg(flag).arg(scene.at("fixed")).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    };
    if !chattr("+i") {
        return skip("making a folder immutable needs root and a file system that can").unwrap_or_default();
    }
    let caught = std::panic::catch_unwind(|| {
        refused(&scene, loratool(&scene, &merge_to("fixed/out")), 6, &["fixed/out", "permission denied"]);
    });
    assert!(chattr("-i"));
    caught.unwrap();
}

#[test]
fn f07_an_output_that_is_no_file_is_refused_and_not_written_to() {
    for scene in [Scene::sound().fifo("fifo"), of_file().fifo("fifo")] {
        for out in ["/dev/full", "/dev/null", "fifo"] {
            for args in [merge_to(out), over(out)] {
                refused(&scene, loratool(&scene, &args), 2, &[out, "a device or pipe", "U-002"]);
            }
        }
    }
    let scene = of_file().with("folder/kept", "");
    refused(&scene, loratool(&scene, &over("folder")), 2, &["the output is a folder but a file is to be written"]);
    let scene = Scene::sound().with("file", "kept");
    refused(&scene, loratool(&scene, &over("file")), 2, &["the output is a file but a folder is to be written"]);
    let scene = Scene::sound().with("folder/precious", "kept");
    refused(&scene, loratool(&scene, &over("folder")), 2, &["a folder without weights"]);
}

#[test]
fn f08_a_full_or_closed_stdout_is_an_error_or_quiet() {
    let full = ">/dev/full";
    for args in [&["inspect", "base"][..], &["inspect", "adapter", "--json"], &["validate", "base"], &["merge", "--help"]] {
        let scene = Scene::sound();
        refused(&scene, shell(&scene, "", args, full), 6, &["standard output", "No space left"]);
        refused(&scene, shell(&scene, "", args, ">&-"), 0, &[]);
    }
    // What was published stays: the error is about the report.
    let scene = Scene::sound();
    run(shell(&scene, "", MERGE, full)).says(6, &["standard output"]);
    assert!(output(&scene, "out") == merged(&scene));
    // No output gets the number of a closed stream, and with it what is printed there.
    let closed = Scene::sound();
    done(&closed, shell(&closed, "", MERGE, "<&- >&- 2>&-"));
    // A reader that goes away.
    let scene = Scene::sound();
    let mut child = loratool(&scene, MERGE).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    assert!(ended.status.success() && ended.stderr.is_empty(), "{ended:?}");
}

/// The name cannot be given to the new folder, because a disk is mounted on it.
#[test]
fn f09_a_name_that_cannot_be_given_leaves_nothing() {
    let scene = Scene::sound();
    let Some(_disk) = small_disk(&scene, "out", "size=1m") else { return };
    fs::write(scene.at("out/old.safetensors"), "kept").unwrap();
    refused(&scene, loratool(&scene, &over("out")), 6, &["out", "E-002", "help: "]);
}

#[test]
fn f10_an_output_that_exists_is_refused_or_replaced_in_one_step() {
    for scene in [Scene::sound(), of_file()] {
        done(&scene, loratool(&scene, MERGE));
        refused(&scene, loratool(&scene, MERGE), 2, &["out", "the output exists", "--overwrite"]);
        let old = fs::metadata(scene.at("out")).unwrap().ino();
        let expected = merged(&scene);
        run(loratool(&scene, &over("out"))).says(0, &[]);
        assert!(output(&scene, "out") == expected);
        assert_ne!(fs::metadata(scene.at("out")).unwrap().ino(), old, "what was there was written to");
        assert_eq!(count(scene.path()), 3);
    }
}

#[test]
fn f11_an_output_that_is_a_link_is_never_written_through() {
    let blob = "blobs/0a0a";
    for scene in
        [of_file().with(blob, "blob").link("out", blob), Scene::sound().with("blobs/x.safetensors", "blob").link("out", "blobs")]
    {
        for args in [merge_to("out"), over("out")] {
            refused(&scene, loratool(&scene, &args), 2, &["out", "is a link", "U-003"]);
        }
    }
    let scene = of_file().link("out", "nowhere");
    refused(&scene, loratool(&scene, &over("out")), 2, &["is a link"]);
}

#[test]
fn f12_an_output_that_is_an_input_is_refused_by_whatever_name() {
    for scene in [Scene::sound(), of_file()] {
        let absolute = scene.at("base").display().to_string();
        for out in ["base", "./base", "adapter/../base", &absolute] {
            refused(&scene, loratool(&scene, &over(out)), 2, &["is the input", "U-003"]);
        }
    }
    let scene = of_file();
    fs::hard_link(scene.at("base"), scene.at("other")).unwrap();
    refused(&scene, loratool(&scene, &over("other")), 2, &["is the input", "U-003"]);
    let scene = Scene::sound();
    for (out, said) in [("base/out", "within each other"), ("adapter", "within each other"), (".", "needs a name")] {
        refused(&scene, loratool(&scene, &over(out)), 2, &[said]);
    }
    fs::create_dir(scene.at("other")).unwrap();
    let Some(_bound) = mounted(&["--bind", &scene.at("base").display().to_string()], &scene.at("other")) else { return };
    refused(&scene, loratool(&scene, &over("other")), 2, &["is the input", "U-003"]);
}

#[test]
fn f13_the_mode_follows_the_umask_or_what_is_replaced() {
    for (umask, file, folder) in [("022", 0o644, 0o755), ("077", 0o600, 0o700)] {
        let scene = Scene::sound().with("base/config.json", "{}");
        set_mode(scene.at("base/config.json"), 0o664);
        let masked = |args: &[&str]| run(shell(&scene, &format!("umask {umask};"), args, "")).says(0, &[]);
        masked(MERGE);
        assert_eq!(mode(scene.at("out")), folder);
        for name in ["model.safetensors", "config.json", "loratool.merge.json"] {
            assert_eq!(mode(scene.at("out").join(name)), file, "{name} with umask {umask}");
        }
        masked(&["convert", "adapter", "--to", "container", "-o", "container"]);
        assert_eq!(mode(scene.at("container")), file);
        // What is replaced keeps its mode.
        set_mode(scene.at("out"), 0o750);
        set_mode(scene.at("container"), 0o640);
        masked(&over("out"));
        masked(&["convert", "adapter", "--to", "container", "-o", "container", "--overwrite"]);
        assert_eq!((mode(scene.at("out")), mode(scene.at("container"))), (0o750, 0o640), "with umask {umask}");
    }
    let scene = of_file().with("out", "old");
    set_mode(scene.at("out"), 0o640);
    run(loratool(&scene, &over("out"))).says(0, &[]);
    assert_eq!(mode(scene.at("out")), 0o640);
}

#[test]
fn f14_odd_names_are_written_or_refused_in_words() {
    for out in ["no/such/out", "base/config.json/out"] {
        let scene = Scene::sound().with("base/config.json", "{}");
        refused(&scene, loratool(&scene, &merge_to(out)), 6, &["the output's folder", "E-002"]);
    }
    let scene = Scene::sound();
    let too_long = "x".repeat(256);
    refused(&scene, loratool(&scene, &merge_to(&too_long)), 6, &["E-002"]);
    refused(&scene, loratool(&scene, &merge_to("a\n\u{1b}[31m/out")), 6, &["a\\n\\u{1b}[31m"]);
    refused(&scene, loratool(&scene, &merge_to("")), 2, &[]);
    let longest = "x".repeat(255);
    for scene in [Scene::sound(), of_file()] {
        let expected = merged(&scene);
        for out in [longest.as_bytes(), b"caf\xe9", b"new\nline"] {
            let (out, before) = (OsStr::from_bytes(out), count(scene.path()));
            let mut command = loratool(&scene, &MERGE[..5]);
            command.arg(out);
            let ended = run(command);
            ended.says(0, &[]);
            assert!(!ended.out.contains("new\nline"), "the name is not escaped: {}", ended.out);
            assert!(output(&scene, out) == expected, "{out:?}");
            assert_eq!(count(scene.path()), before + 1, "{out:?}");
        }
    }
}

#[test]
fn f14_a_slash_at_the_end_is_the_name_of_a_folder() {
    let scene = Scene::sound();
    run(loratool(&scene, &merge_to("out/"))).says(0, &[]);
    assert!(output(&scene, "out") == merged(&scene));
    let scene = of_file();
    for out in ["out/", "base/"] {
        refused(&scene, loratool(&scene, &over(out)), 6, &[out, "the name of a folder", "leave out the slash"]);
    }
}

#[test]
fn f14_a_working_folder_that_is_gone_is_an_error() {
    let scene = Scene::sound();
    let command = format!(
        "mkdir gone && cd gone && rmdir ../gone && exec \"$0\" merge {0}/base -a {0}/adapter -o out",
        scene.path().display()
    );
    let mut shell = Command::new("sh");
    shell.current_dir(scene.path()).args(["-c", &command]).arg(env!("CARGO_BIN_EXE_loratool"));
    refused(&scene, shell, 6, &["out", "E-002"]);
}

/// The name of the staging is known before; whatever lies under it is passed by, and neither followed nor used.
#[test]
fn f15_a_link_planted_at_the_name_of_the_staging_is_passed_by() {
    for scene in [Scene::sound(), of_file()] {
        let scene = scene.with("victim/file", "kept");
        let expected = merged(&scene);
        for target in ["victim", "victim/file", "nowhere"] {
            run(shell(&scene, &format!("ln -s {target} .loratool-$$-0.tmp; echo x > .loratool-$$-1.tmp;"), &over("out"), ""))
                .says(0, &[]);
            assert!(output(&scene, "out") == expected);
            assert_eq!(fs::read(scene.at("victim/file")).unwrap(), b"kept");
            assert!(!scene.at("nowhere").exists() && count(scene.at("victim")) == 1);
            let planted = fs::read_dir(scene.path()).unwrap().map(|entry| entry.unwrap().path());
            let planted: Vec<_> = planted.filter(|path| path.to_str().unwrap().contains(".loratool-")).collect();
            assert_eq!(planted.len(), 2, "what was planted is gone, or the staging is left");
            planted.iter().for_each(|path| fs::remove_file(path).unwrap());
        }
    }
}

#[test]
fn f25_a_staging_that_an_older_run_left_is_never_adopted() {
    let scene = Scene::sound();
    let left = "mkdir .loratool-$$-0.tmp; echo old > .loratool-$$-0.tmp/model.safetensors; echo old > .loratool-$$-0.tmp/stray;";
    run(shell(&scene, left, MERGE, "")).says(0, &[]);
    assert!(output(&scene, "out") == merged(&scene));
    assert_eq!(count(scene.path()), 4, "the older staging is gone, or there is another");
}

/// A merge in place that was interrupted: `base/` with its journal.
fn interrupted() -> Scene {
    interrupted_by(&After::default())
}

fn interrupted_by(watch: &dyn loratool::Progress) -> Scene {
    let second = floats("layers.1.q_proj.weight", "F32", &[4, 3], &[0.5; 12]);
    let factor =
        |name: &str, shape: &[u64]| floats(&name.replace(".0.", ".1."), "F32", shape, &vec![2.0; (shape[0] * shape[1]) as usize]);
    let factors = [&factors()[..], &[factor(A, &[2, 3]), factor(B, &[4, 2])]].concat();
    let scene = Scene::sound().base(&[weight(), norm(), second]).adapter(2, &factors);
    run(loratool(&scene, &merge_to("expected"))).says(0, &[]);
    let error = in_place_watched(&scene, watch).unwrap_err();
    assert_eq!(error.class().exit_code(), 130, "{error}");
    assert!(scene.at(JOURNAL).exists());
    scene
}

const JOURNAL: &str = "base/loratool.journal";

/// Cancels once something is written.
#[derive(Default)]
struct After(std::sync::atomic::AtomicBool);

impl loratool::Progress for After {
    fn advance(&self, _: u64) {
        self.0.store(true, std::sync::atomic::Ordering::SeqCst);
    }

    fn cancelled(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::SeqCst)
    }
}

/// Cancels when it is told what will be written.
#[derive(Default)]
struct Before(std::sync::atomic::AtomicBool);

impl loratool::Progress for Before {
    fn expect(&self, _: u64) {
        self.0.store(true, std::sync::atomic::Ordering::SeqCst);
    }

    fn cancelled(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::SeqCst)
    }
}

const RECOVER: &[&str] = &["recover", "base"];

/// Recovers, and sees to it that the result is that of a merge elsewhere.
fn recovers(scene: &Scene) {
    run(loratool(scene, RECOVER)).says(0, &[]);
    assert!(output(scene, "base") == output(scene, "expected"), "the bytes are not those of a merge elsewhere");
}

#[test]
fn f19_a_damaged_or_foreign_journal_is_never_applied() {
    let scene = interrupted();
    let sound = fs::read(scene.at(JOURNAL)).unwrap();
    let with = |bytes: &[u8]| fs::write(scene.at(JOURNAL), bytes).unwrap();
    for at in (0..sound.len()).step_by(sound.len() / 40) {
        let mut flipped = sound.clone();
        flipped[at] ^= 1;
        with(&flipped);
        refused(&scene, loratool(&scene, RECOVER), 9, &["E-010", "loratool.journal"]);
        with(&sound[..at]);
        refused(&scene, loratool(&scene, RECOVER), 9, &["E-010", "loratool.journal"]);
    }
    // That of another model, whose file has the same name and length.
    with(&sound);
    let good = fs::read(scene.at(MODEL)).unwrap();
    let mut foreign = good.clone();
    let at = foreign.windows(NORM.len()).position(|name| name == NORM.as_bytes()).unwrap();
    foreign[at] = b'm';
    fs::write(scene.at(MODEL), &foreign).unwrap();
    refused(&scene, loratool(&scene, RECOVER), 9, &["E-010", "model.safetensors", "nothing was written to it"]);
    fs::write(scene.at(MODEL), &good).unwrap();
    recovers(&scene);
}

/// The journal of the middle of a merge beside the end of it: nothing says of the rest that it is new, so it is not touched.
#[test]
fn f19_an_old_copy_of_a_journal_is_never_applied() {
    let scene = interrupted();
    let old = fs::read(scene.at(JOURNAL)).unwrap();
    recovers(&scene);
    let scene = scene.with(JOURNAL, old);
    let weights = fs::read(scene.at(MODEL)).unwrap();
    run(loratool(&scene, &["inspect", "base"])).says(8, &["loratool recover base"]);
    run(loratool(&scene, RECOVER)).says(9, &["E-010"]);
    assert!(fs::read(scene.at(MODEL)).unwrap()[8..] == weights[8..]);
    assert!(scene.at(JOURNAL).exists());
}

#[test]
fn f20_a_base_that_was_edited_before_the_recovery_is_not_merged_over() {
    edited_before_the_recovery(&interrupted());
    edited_before_the_recovery(&interrupted_by(&Before::default()));
}

/// Neither the edited tensor nor the other one is written to.
fn edited_before_the_recovery(scene: &Scene) {
    let bytes = fs::read(scene.at("expected/model.safetensors")).unwrap();
    let file = File::options().write(true).read(true).open(scene.at(MODEL)).unwrap();
    for name in [WEIGHT, "layers.1.q_proj.weight"] {
        let found = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let at = found.tensor(name).unwrap().data().as_ptr() as u64 - bytes.as_ptr() as u64 + 6;
        let mut good = [0; 1];
        file.read_exact_at(&mut good, at).unwrap();
        file.write_all_at(&[good[0] ^ 4], at).unwrap();
        refused(scene, loratool(scene, RECOVER), 9, &["E-010", "another program wrote to the file", "get the checkpoint again"]);
        file.write_all_at(&good, at).unwrap();
    }
    recovers(scene);
}

/// The base changes when the first bytes of the output are written.
fn changed(act: impl Fn(&Path) + Sync) -> Error {
    let scene = holes(512, 512, &[("pad", "F32", [512, 512])]);
    let base = scene.at(MODEL);
    File::options().write(true).open(&base).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let entries = count(scene.path());
    let error = merge_watched(&scene, |_| {}, &meanwhile(|| act(&base))).unwrap_err();
    assert_eq!(count(scene.path()), entries, "something is left: {error}");
    error
}

type Act<'a> = &'a (dyn Fn(&Path) + Sync);

#[test]
fn f21_a_base_that_changes_meanwhile_is_an_error() {
    let open = |path: &Path| File::options().append(true).open(path).unwrap();
    let cases: [(&str, Act<'_>); 5] = [
        ("truncated", &|path| open(path).set_len(1 << 10).unwrap()),
        ("appended to", &|path| open(path).write_all(b"more").unwrap()),
        ("edited", &|path| File::options().write(true).open(path).unwrap().write_all_at(b"x", 1 << 19).unwrap()),
        ("replaced", &|path| {
            fs::write(path.with_extension("new"), fs::read(path).unwrap()).unwrap();
            fs::rename(path.with_extension("new"), path).unwrap();
        }),
        ("removed", &|path| fs::remove_file(path).unwrap()),
    ];
    for (what, act) in cases {
        let error = changed(act);
        assert_eq!((error.class().exit_code(), error.diagnostics()[0].rule().id), (6, "E-004"), "{what}: {error}");
        assert!(error.to_string().contains("model.safetensors"), "{what}: {error}");
    }
}

#[test]
fn f21_an_adapter_that_changes_meanwhile_is_an_error() {
    let scene = Scene::sound();
    let adapter = scene.at(FACTORS);
    File::options().write(true).open(&adapter).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let edit = || {
        let mut bytes = Vec::new();
        File::open(&adapter).unwrap().read_to_end(&mut bytes).unwrap();
        File::options().write(true).open(&adapter).unwrap().write_all_at(&bytes[..8], 0).unwrap();
    };
    let error = merge_watched(&scene, |_| {}, &meanwhile(edit)).unwrap_err();
    assert_eq!((error.class().exit_code(), error.diagnostics()[0].rule().id), (6, "E-004"), "{error}");
    assert_eq!(count(scene.path()), 2);
}

/// A link to the base, or another name of it, would change with it.
#[test]
fn f17_in_place_is_refused_where_other_names_would_change() {
    let scene = Scene::sound();
    fs::hard_link(scene.at(MODEL), scene.at("other")).unwrap();
    refused(&scene, loratool(&scene, IN_PLACE), 2, &["hard links", "U-005"]);
    let scene = Scene::sound();
    fs::rename(scene.at(MODEL), scene.at("base/blob")).unwrap();
    symlink("blob", scene.at(MODEL)).unwrap();
    refused(&scene, loratool(&scene, IN_PLACE), 2, &["is a link", "U-005"]);
}
