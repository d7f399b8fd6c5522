//! Table C: two runs at once, on one output and in one place; readers of what is replaced; threads that share and that panic.

use std::fs::{self, File};
use std::io::Read;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

use loratool::{
    Adapter, Checkpoint, MergeOptions, OpenOptions, Overwrite, Progress, ReadMode, TensorSource, Weighted, merge, open_adapter,
    open_checkpoint_with,
};
use rustix::fs::{FlockOperation, flock};

use crate::runs::{
    IN_PLACE, MERGE, holes, in_place_watched, loratool, meanwhile, merge_watched, merged, output, refused, run, skip,
};
use crate::scene::{MODEL, Scene, WEIGHT};

/// While one run writes, another one finishes: the first is told so, and what stands is whole and the second's.
#[test]
fn c01_of_two_runs_to_one_output_one_wins_and_the_other_is_told() {
    let scene = Scene::sound();
    let expected = merged(&scene);
    let error = merge_watched(&scene, |_| {}, &meanwhile(|| run(loratool(&scene, MERGE)).says(0, &[]))).unwrap_err();
    assert_eq!(error.class().exit_code(), 8, "{error}");
    assert!(error.to_string().contains("by another program"), "{error}");
    assert!(output(&scene, "out") == expected);
    // What was to be replaced is something else by now.
    let other = [MERGE, &["--overwrite", "--scale", "2"]].concat();
    let replace = |options: &mut MergeOptions| options.overwrite = Overwrite::Replace;
    let error = merge_watched(&scene, replace, &meanwhile(|| run(loratool(&scene, &other)).says(0, &[]))).unwrap_err();
    assert_eq!(error.class().exit_code(), 8, "{error}");
    assert!(output(&scene, "out") != expected, "the second run was replaced by the first");
    assert_eq!(fs::read_dir(scene.path()).unwrap().count(), 3, "a staging is left");
}

/// At the same time, whoever is first.
#[test]
fn c01_two_programs_at_once_leave_one_whole_output() {
    let scene = holes(512, 512, &[]);
    let expected = merged(&scene);
    for _ in 0..5 {
        let mut both = [(); 2]
            .map(|()| loratool(&scene, &[MERGE, &["--quiet"]].concat()).stderr(std::process::Stdio::null()).spawn().unwrap());
        let mut codes = both.each_mut().map(|child| child.wait().unwrap().code());
        codes.sort_unstable();
        // 2 if it began when the other had ended.
        assert!(matches!(codes, [Some(0), Some(2 | 8)]), "{codes:?}");
        assert!(output(&scene, "out") == expected);
        fs::remove_dir_all(scene.at("out")).unwrap();
        assert_eq!(fs::read_dir(scene.path()).unwrap().count(), 2, "a staging is left");
    }
}

/// Calls something once before the first byte is written, and once after.
struct Between<F>(F, std::sync::Once, std::sync::Once);

impl<F: Fn() + Sync> Progress for Between<F> {
    fn advance(&self, _: u64) {
        self.1.call_once(&self.0);
    }

    fn cancelled(&self) -> bool {
        self.2.call_once(&self.0);
        false
    }
}

#[test]
fn c02_of_two_runs_in_one_place_the_second_is_refused() {
    let scene = Scene::sound();
    let expected = output(&scene, "base").len() + 1;
    let second = || run(loratool(&scene, IN_PLACE)).says(8, &["E-011", "help: "]);
    let watch = Between(second, std::sync::Once::new(), std::sync::Once::new());
    in_place_watched(&scene, &watch).unwrap();
    assert!(watch.1.is_completed() && watch.2.is_completed());
    assert!(output(&scene, "base").len() == expected, "something else than the record is new");
    let undisturbed = Scene::sound();
    run(loratool(&undisturbed, IN_PLACE)).says(0, &[]);
    assert!(fs::read(scene.at(MODEL)).unwrap() == fs::read(undisturbed.at(MODEL)).unwrap());
}

#[test]
fn c03_a_checkpoint_with_a_pending_journal_is_closed_to_every_verb() {
    // As after a power cut: a journal, and a length field that no reader takes.
    let scene = Scene::sound()
        .with("base/loratool.journal", "pending")
        .with("merged/model.safetensors", fs::read(Scene::sound().at(MODEL)).unwrap());
    for args in [
        &["inspect", "base"][..],
        &["inspect", "adapter", "--base", "base"],
        &["inspect", MODEL],
        &["validate", "base", "--values"],
        &["validate", "adapter", "--base", "base"],
        MERGE,
        IN_PLACE,
        &["merge", "base", "-a", "adapter", "-o", "out", "--dry-run"],
        &["merge", MODEL, "-a", "adapter", "-o", "out"],
        &["verify", "base", "--base", "merged", "-a", "adapter"],
        &["verify", "merged", "--base", "base", "-a", "adapter"],
        &["unmerge", "base", "-a", "adapter", "-o", "out"],
        &["unmerge", "base", "-a", "adapter", "--in-place"],
        &["convert", "adapter", "--to", "container", "--base", "base", "-o", "out"],
    ] {
        refused(&scene, loratool(&scene, args), 8, &["E-011", "loratool.journal", "loratool recover base"]);
        let ended = run(loratool(&scene, &[args, &["--json"]].concat()));
        assert!(ended.code == Some(8) && ended.out.contains(r#""E-011""#), "{ended:?}");
    }
    // Where only the field is left, the journal was lost.
    let mut bytes = fs::read(scene.at(MODEL)).unwrap();
    bytes[..8].fill(0xff);
    let scene = scene.without("base/loratool.journal").with(MODEL, bytes);
    refused(&scene, loratool(&scene, MERGE), 8, &["C-003", "interrupted in-place merge", "loratool recover"]);
    refused(&scene, loratool(&scene, &["recover", "base"]), 8, &["its journal is gone", "get the checkpoint again"]);
}

#[test]
fn c04_a_reader_of_what_is_replaced_keeps_what_it_opened() {
    let scene = Scene::sound();
    run(loratool(&scene, MERGE)).says(0, &[]);
    let weights = scene.at("out/model.safetensors");
    let old = fs::read(&weights).unwrap();
    let mut open = OpenOptions::default();
    open.mode = ReadMode::Map;
    let (mut file, mapped) = (File::open(&weights).unwrap(), open_checkpoint_with(scene.at("out"), &open).unwrap());
    let mut before = vec![0; 48];
    mapped.read(WEIGHT, 0, &mut before).unwrap();
    run(loratool(&scene, &[MERGE, &["--overwrite", "--scale", "3"]].concat())).says(0, &[]);
    assert!(fs::read(&weights).unwrap() != old);
    assert_ne!(fs::metadata(&weights).unwrap().ino(), file.metadata().unwrap().ino());
    let (mut now, mut after) = (Vec::new(), vec![0; 48]);
    file.read_to_end(&mut now).unwrap();
    mapped.read(WEIGHT, 0, &mut after).unwrap();
    assert!(now == old && after == before);
}

/// The lock is the system's, and goes with the process that holds it: there is no file that could be stale.
#[test]
fn c05_a_lock_is_gone_with_its_holder() {
    let scene = Scene::sound();
    let held = File::options().write(true).open(scene.at(MODEL)).unwrap();
    flock(&held, FlockOperation::LockExclusive).unwrap();
    refused(&scene, loratool(&scene, IN_PLACE), 8, &["another program is merging into this file", "wait for it to finish"]);
    flock(&held, FlockOperation::Unlock).unwrap();
    // A holder that is killed.
    let mut holder = Command::new("flock");
    let Ok(mut holder) = holder.args(["--no-fork", scene.at(MODEL).to_str().unwrap(), "sleep", "1000"]).spawn() else {
        return skip("there is no flock to hold a lock with").unwrap_or_default();
    };
    let probe = File::open(scene.at(MODEL)).unwrap();
    while flock(&probe, FlockOperation::NonBlockingLockShared).is_ok() {
        flock(&probe, FlockOperation::Unlock).unwrap();
        assert!(holder.try_wait().unwrap().is_none(), "it ended");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let ended = run(loratool(&scene, IN_PLACE));
    holder.kill().unwrap();
    holder.wait().unwrap();
    ended.says(8, &["another program is merging into this file"]);
    run(loratool(&scene, IN_PLACE)).says(0, &[]);
    assert_eq!(fs::read_dir(scene.at("base")).unwrap().count(), 2);
}

#[test]
fn c06_threads_share_what_is_open_and_write_the_same_bytes() {
    fn shared<T: Send + Sync>() {}
    shared::<Checkpoint>();
    shared::<Adapter>();
    let scene = holes(256, 256, &[]);
    let expected = merged(&scene);
    for mode in [ReadMode::Read, ReadMode::Map] {
        let mut open = OpenOptions::default();
        open.mode = mode;
        let (base, adapter) =
            (open_checkpoint_with(scene.at("base"), &open).unwrap(), open_adapter(scene.at("adapter")).unwrap());
        let outputs = ["one", "two", "three"];
        std::thread::scope(|scope| {
            for out in outputs {
                let (base, adapter, out) = (&base, &adapter, scene.at(out));
                scope.spawn(move || merge(base, &[Weighted::full(adapter)], &out, &MergeOptions::default(), &()).unwrap());
            }
        });
        for out in outputs {
            assert!(output(&scene, out) == expected, "{out}");
            fs::remove_dir_all(scene.at(out)).unwrap();
        }
    }
}

/// Panics in a thread that computes, late enough that others are at work.
struct Panics;

impl Progress for Panics {
    fn advance(&self, _: u64) {
        panic!("planted");
    }
}

#[test]
fn c07_a_panic_in_a_worker_leaves_nothing() {
    let scene = holes(1024, 1024, &[]);
    let before = scene.snapshot();
    for threads in [1, 4] {
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            merge_watched(&scene, |options| options.exec.threads = NonZeroUsize::new(threads), &Panics)
        }));
        assert!(panicked.is_err(), "the panic was swallowed");
        assert!(scene.snapshot() == before, "something is left");
    }
}

/// A program that the host starts while it merges inherits no file of ours.
#[test]
fn c07_a_child_of_the_host_inherits_no_descriptor() {
    let scene = Scene::sound();
    let look = || {
        let seen = Command::new("ls").args(["-l", "/proc/self/fd"]).output().unwrap();
        let seen = String::from_utf8_lossy(&seen.stdout).into_owned();
        assert!(seen.contains("/proc") && !seen.contains(scene.path().to_str().unwrap()), "{seen}");
    };
    merge_watched(&scene, |_| {}, &meanwhile(look)).unwrap();
    let scene = Scene::sound();
    let look = || {
        let seen = Command::new("ls").args(["-l", "/proc/self/fd"]).output().unwrap();
        assert!(!String::from_utf8_lossy(&seen.stdout).contains(scene.path().to_str().unwrap()));
    };
    in_place_watched(&scene, &meanwhile(look)).unwrap();
}
