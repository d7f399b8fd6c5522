//! Table R: memory, descriptors, threads, stack and space, all of them short. What is needed does not follow the size of files; what cannot
//! be had is an error with the name of the flag or limit, told before anything is written, and never an abort.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use crate::bytes::{file, raw};
use crate::runs::{IN_PLACE, MERGE, done, holes, loratool, refused, run, shards, shell, skip, small_disk, zeros};
use crate::scene::{MODEL, Scene, WEIGHT};

/// More than any memory here: 20 GiB.
const HUGE: (&str, &str, [u64; 2]) = ("pad", "BF16", [1 << 17, 81920]);

/// A base of holes with [`HUGE`] in it. `None` where there are no such files.
fn huge(rows: u64, cols: u64) -> Option<Scene> {
    let probe = tempfile::tempfile().unwrap();
    match probe.set_len(21 << 30) {
        Ok(()) => Some(holes(rows, cols, &[HUGE])),
        Err(_) => skip("the file system has no files of 20 GiB"),
    }
}

/// The most anonymous memory that a successful run was seen with, in bytes.
fn anonymous(mut command: Command) -> u64 {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().unwrap();
    let mut most = 0;
    let status = loop {
        let text = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let kib = text.lines().find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        most = most.max(kib.unwrap_or(0) << 10);
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
    };
    assert!(status.success(), "{status}");
    most
}

fn two_threads(args: &[&'static str]) -> Vec<&'static str> {
    [args, &["--threads", "2"]].concat()
}

/// On two threads there is 1 MiB of tiles for each, and what belongs to them: the bound is far above that, and far below the files.
#[test]
fn r01_memory_does_not_follow_the_size_of_the_base() {
    let bound = 32 << 20;
    let Some(scene) = huge(2048, 2048) else { return };
    let most = anonymous(loratool(&scene, &two_threads(IN_PLACE)));
    assert!(most < bound, "{most} bytes for 20 GiB in place");
    let scene = holes(4096, 4096, &[]);
    let most = anonymous(loratool(&scene, &two_threads(MERGE)));
    assert!(most < bound, "{most} bytes for 64 MiB");
}

/// A header of nothing but small tensors, the kind that costs most for its length.
fn of_small_tensors(count: usize) -> Scene {
    let entry = |i| format!(r#""{i:07}":{{"dtype":"I8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1);
    let header = format!("{{{}}}", (0..count).map(entry).collect::<Vec<_>>().join(","));
    Scene::sound().with("small.safetensors", file(header, &vec![0; count]))
}

/// A run under limits on memory either works or says so, and is never killed. How many worked.
fn works_or_says_so(scene: &Scene, limit: &str, kibibytes: &[u64], args: &[&str], words: &[&str]) -> usize {
    let under = |kib: &u64| {
        let ended = run(shell(scene, &format!("ulimit {limit} {kib};"), args, ""));
        if ended.code != Some(0) {
            ended.says(7, &[&["E-008", "ulimit -d"], words].concat());
            assert!(!scene.at("out").exists() && fs::read_dir(scene.path()).unwrap().count() <= 3, "something is left");
        }
        let _ = fs::remove_dir_all(scene.at("out"));
        ended.code == Some(0)
    };
    kibibytes.iter().filter(|kib| under(kib)).count()
}

#[test]
fn r02_the_worst_header_takes_memory_by_its_length() {
    let scene = of_small_tensors(50_000);
    let header = fs::metadata(scene.at("small.safetensors")).unwrap().len();
    let most = anonymous(loratool(&scene, &["validate", "small.safetensors"]));
    assert!(most < (64 << 20) + 20 * header, "{most} bytes for a header of {header}");
}

#[test]
fn r03_less_memory_than_buffers_take_is_refused_before_writing() {
    let scene = holes(1024, 1024, &[]);
    let worked =
        works_or_says_so(&scene, "-d", &[2000, 2250, 2500, 3000, 4000, 6000, 8000, 16000, 64000], MERGE, &["the buffers take"]);
    assert!((3..9).contains(&worked), "{worked} of 9 worked");
    refused(&scene, shell(&scene, "ulimit -d 8000;", IN_PLACE, ""), 7, &["E-008", "the buffers take", "ulimit -d"]);
    refused(&scene, loratool(&scene, &[MERGE, &["--memory", "1KiB"]].concat()), 7, &["E-008", "allow more with --memory"]);
}

#[test]
fn r04_less_memory_than_a_header_takes_is_refused() {
    let scene = of_small_tensors(50_000);
    let worked = works_or_says_so(
        &scene,
        "-d",
        &[4000, 8000, 16000, 32000, 48000, 64000, 256_000],
        &["validate", "small.safetensors"],
        &["header of"],
    );
    assert!((1..7).contains(&worked), "{worked} of 7 worked");
}

#[test]
fn r05_eight_descriptors_are_enough_for_200_shards() {
    let scene = shards(200);
    let few = "ulimit -n 8;";
    done(&scene, shell(&scene, few, MERGE, ""));
    for args in [
        &["verify", "out", "--base", "base", "-a", "adapter"][..],
        &["validate", "base", "--values"],
        &["validate", "adapter", "--base", "base"],
        &["convert", "adapter", "--to", "container", "--base", "base", "-o", "container"],
        &["unmerge", "out", "-a", "adapter", "-o", "back"],
    ] {
        run(shell(&scene, few, args, "")).says(0, &[]);
    }
    assert!(
        fs::read(scene.at("back/model-00150-of-00200.safetensors")).unwrap()
            == fs::read(scene.at("base/model-00150-of-00200.safetensors")).unwrap()
    );
}

/// A lock lives as long as its descriptor: in place, there is one for each file that changes, or nothing is changed.
#[test]
fn r05_in_place_every_file_that_changes_needs_a_descriptor() {
    let scene = shards(20);
    refused(&scene, shell(&scene, "ulimit -n 8;", IN_PLACE, ""), 6, &["Too many open files", "ulimit -n"]);
    run(shell(&scene, "ulimit -n 64;", IN_PLACE, "")).says(0, &[]);
}

#[test]
fn r06_address_space_is_not_needed_for_what_is_not_read() {
    let Some(scene) = huge(512, 512) else { return };
    let limit = format!("ulimit -v {};", 2 << 20);
    for args in [&["inspect", "base"][..], &[IN_PLACE, &["--mmap", "--dry-run"]].concat(), &two_threads(IN_PLACE)] {
        run(shell(&scene, &limit, args, "")).says(0, &[]);
    }
    // A map that cannot be had is a file that is read.
    let scene = huge(512, 512).unwrap();
    run(shell(&scene, &limit, &[&two_threads(IN_PLACE)[..], &["--mmap"]].concat(), "")).says(0, &[]);
}

/// With stacks of 64 TiB no thread can be started: the first one does all.
const NO_THREADS: &str = "export RUST_MIN_STACK=70368744177664;";

#[test]
fn r07_any_number_of_threads_writes_the_same_bytes() {
    let scene = holes(1024, 1024, &[]);
    for threads in ["1", "2", "64", "100000"] {
        done(&scene, loratool(&scene, &[MERGE, &["--threads", threads, "--tile", "64KiB"]].concat()));
        fs::remove_dir_all(scene.at("out")).unwrap();
    }
    done(&scene, shell(&scene, NO_THREADS, &[MERGE, &["--threads", "64"]].concat(), ""));
}

#[test]
fn r07_every_verb_does_without_threads() {
    let scene = Scene::sound();
    run(loratool(&scene, MERGE)).says(0, &[]);
    for args in [
        &["verify", "out", "--base", "base", "-a", "adapter"][..],
        &["unmerge", "out", "-a", "adapter", "-o", "back"],
        &["convert", "adapter", "--to", "container", "--base", "base", "-o", "container"],
        &["validate", "base", "--values"],
        &["inspect", "adapter", "--norms"],
        IN_PLACE,
    ] {
        run(shell(&scene, NO_THREADS, args, "")).says(0, &[]);
    }
}

#[test]
fn r08_a_small_stack_is_enough() {
    for small in ["ulimit -s 8192;", "ulimit -s 512; export RUST_MIN_STACK=524288;"] {
        let scene = holes(256, 256, &[]);
        done(&scene, shell(&scene, small, MERGE, ""));
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        let scene = Scene::sound().with("base/config.json", format!(r#"{{"deep": {deep}}}"#));
        run(shell(&scene, small, &["inspect", "base"], "")).says(0, &[]);
        let scene = Scene::sound().with(MODEL, file(format!(r#"{{"deep": {deep}}}"#), &[]));
        refused(&scene, shell(&scene, small, MERGE, ""), 3, &["model.safetensors"]);
    }
}

#[test]
fn r09_less_space_than_the_weights_take_is_refused_before_writing() {
    // More than there is on any disk, with nothing in it.
    let scene = holes(4, 3, &[]);
    let tebi = [1 << 20, 1 << 22];
    if tempfile::tempfile().unwrap().set_len(9 << 40).is_err() {
        return skip("the file system has no files of 8 TiB").unwrap_or_default();
    }
    zeros(&scene.at(MODEL), &[("pad", "BF16", tebi), (WEIGHT, "F32", [4, 3])]);
    let before = fs::read_dir(scene.path()).unwrap().count();
    let ended = run(loratool(&scene, MERGE));
    ended.says(6, &["E-003", "the output needs 8,796,093,0", "are free", "free some space", "out"]);
    assert_eq!(fs::read_dir(scene.path()).unwrap().count(), before);
}

#[test]
fn r09_what_lies_beside_the_weights_takes_space_too() {
    let scene = Scene::sound().with("base/tokenizer.json", vec![b' '; 2 << 20]);
    let Some(_disk) = small_disk(&scene, "disk", "size=1m") else { return };
    refused(&scene, loratool(&scene, &["merge", "base", "-a", "adapter", "-o", "disk/out"]), 6, &["E-003", "2,097,", "are free"]);
}

/// One row, one column, and nothing else to split. That 2³¹ values are split alike is a test of `exec/tasks.rs`.
#[test]
fn r11_a_long_row_and_a_long_column_are_split() {
    for [rows, cols] in [[1, 300_000], [300_000, 1]] {
        let scene = holes(rows, cols, &[]);
        for tile in ["4KiB", "64KiB"] {
            done(&scene, loratool(&scene, &[MERGE, &["--tile", tile]].concat()));
            let out = fs::read(scene.at("out/model.safetensors")).unwrap();
            assert!(crate::bytes::stored(&out, WEIGHT) == raw("F32", &vec![1.0; 300_000]));
            fs::remove_dir_all(scene.at("out")).unwrap();
        }
    }
}

#[test]
fn r12_offsets_beyond_32_bits_are_right() {
    let Some(scene) = huge(64, 64) else { return };
    let len = fs::metadata(scene.at(MODEL)).unwrap().len();
    run(loratool(&scene, IN_PLACE)).says(0, &[]);
    let weights = File::open(scene.at(MODEL)).unwrap();
    let mut bytes = vec![0; 4 + 64 * 64 * 4];
    weights.read_exact_at(&mut bytes, len - 4 - 64 * 64 * 4).unwrap();
    assert!(bytes[4..] == raw("F32", &[1.0; 64 * 64]) && bytes[..4] == [0; 4]);
    assert_eq!(weights.metadata().unwrap().len(), len);
    let shown = run(loratool(&scene, &["inspect", "base", "--tensors"]));
    assert!(shown.out.contains(WEIGHT), "{}", shown.out);
}
