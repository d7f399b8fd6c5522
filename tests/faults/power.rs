//! The power goes after every change of the disk. Of what was not forced to it, nothing, everything or any part is there.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::Value;

use super::disk::{Disk, Keep};
use super::scene::{ALL, Known, RESUMED, Scene, State, is_staging, write};

const KEPT: [Keep; 6] = [
    Keep::Nothing,
    Keep::Everything,
    Keep::Some { piece: 512, seed: 1 },
    Keep::Some { piece: 512, seed: 2 },
    Keep::Some { piece: 4096, seed: 3 },
    Keep::Some { piece: 4096, seed: 4 },
];

/// What is wrong with the images of a run on a disk that ignores the lines that start with `without`; the first few.
fn wrong_images(scene: Scene, without: &str) -> Vec<String> {
    let known = scene.known();
    // The inodes that the trace names are those of this folder, which is then changed: the disk is loaded before.
    let folder = known.set_up();
    let mut disk = Disk::new(folder.path());
    let trace = tempfile::NamedTempFile::new().unwrap();
    let env = [("LORATOOL_FAULT_TRACE", trace.path().display().to_string())];
    assert!(known.run(folder.path(), &env).status.success());
    let text = std::fs::read_to_string(trace.path()).unwrap();
    let (mut wrong, mut after) = (Vec::new(), "the start");
    for line in text.lines().filter(|line| !line.starts_with("call ") && !line.starts_with(without)).chain([""]) {
        // The empty line stands for the end of the run, whose result must then be there.
        if !line.is_empty() {
            disk.apply(line);
            after = &line[..line.len().min(80)];
        }
        for (keep, names_too) in KEPT.into_iter().flat_map(|keep| [(keep, false), (keep, true)]) {
            if let Some(fault) = fault_of(&known, &disk.image(keep, names_too), line.is_empty()) {
                wrong.push(format!("{}: after {after}, {keep:?}, names {names_too}: {fault}", scene.name));
            }
            if wrong.len() > 4 {
                return wrong;
            }
        }
    }
    wrong
}

fn fault_of(known: &Known, image: &super::scene::Files, finished: bool) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), image);
    let mut state = known.state(folder.path());
    if state == State::Pending {
        let done = known.recover(folder.path(), &[]);
        if !done.status.success() {
            return Some(String::from_utf8_lossy(&done.stderr).into_owned());
        }
        state = known.state(folder.path());
        if state != State::New {
            return Some(format!("recovered to {state:?}"));
        }
    }
    match state {
        State::New => None,
        State::Old if !finished => None,
        other => Some(format!("{other:?}")),
    }
}

fn survives(scene: Scene) {
    let wrong = wrong_images(scene, "none");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_power_cut_at_any_time_out_of_place() {
    ALL.into_iter().filter(|scene| !scene.in_place()).for_each(survives);
}

#[test]
fn a_power_cut_at_any_time_in_place() {
    ALL.into_iter().filter(Scene::in_place).for_each(survives);
}

/// Whatever a power cut leaves of an interrupted merge, its resumption ends in the bytes of an undisturbed one: what the ledger calls
/// complete is on disk.
#[test]
fn a_power_cut_at_any_time_before_a_merge_is_resumed() {
    let known = RESUMED.known();
    let folder = known.set_up();
    settle_times(folder.path());
    let mut disk = Disk::new(folder.path());
    let trace = tempfile::NamedTempFile::new().unwrap();
    assert!(known.run(folder.path(), &[("LORATOOL_FAULT_TRACE", trace.path().display().to_string())]).status.success());
    let text = std::fs::read_to_string(trace.path()).unwrap();
    let mut taken_over = 0;
    for line in text.lines().filter(|line| !line.starts_with("call ")) {
        disk.apply(line);
        for (keep, names_too) in KEPT.into_iter().flat_map(|keep| [(keep, false), (keep, true)]) {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), &disk.image(keep, names_too));
            settle_times(folder.path());
            let what = format!("after {}, {keep:?}, names {names_too}", &line[..line.len().min(80)]);
            if known.state(folder.path()) == State::Old {
                let done = known.run(folder.path(), &[]);
                assert!(done.status.success(), "{what}: {}", String::from_utf8_lossy(&done.stderr));
                taken_over += usize::from(String::from_utf8_lossy(&done.stdout).contains("resumed"));
            }
            assert_eq!(known.state(folder.path()), State::New, "{what}");
        }
    }
    assert!(taken_over > 10, "{taken_over}");
}

/// Gives the base's files one time of change, and staged files the one that their ledger names: an image is written anew.
fn settle_times(folder: &Path) {
    let set = |path: &Path, time: SystemTime| {
        if let Ok(file) = OpenOptions::new().write(true).open(path) {
            file.set_modified(time).unwrap();
        }
    };
    let list = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path());
    list(&folder.join("model")).for_each(|path| set(&path, SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000)));
    let is_ledger = |path: &PathBuf| {
        path.extension().is_some_and(|x| x == "resume") && is_staging(path.file_name().unwrap().to_str().unwrap())
    };
    for ledger in list(folder).filter(is_ledger) {
        let text = std::fs::read(&ledger).unwrap();
        for line in text.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice::<Value>(line).ok()) {
            if let (Some(name), Some(seconds), Some(nanos)) =
                (line["file"].as_str(), line["state"][0].as_u64(), line["state"][1].as_u64())
            {
                set(&ledger.with_extension("tmp").join(name), SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos as u32));
            }
        }
    }
}

/// The loop is one that can fail: a disk that ignores what it is told to keep shows in every scene.
#[test]
fn without_fsync_a_power_cut_shows() {
    for scene in ALL {
        assert!(!wrong_images(scene, "sync ").is_empty(), "{}: no file needs to be synced", scene.name);
        assert!(!wrong_images(scene, "syncdir ").is_empty(), "{}: no folder needs to be synced", scene.name);
    }
}
