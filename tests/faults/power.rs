//! The power goes after every change of the disk. Of what was not forced to it, nothing, everything or any part is there.

use super::disk::{Disk, Keep};
use super::scene::{ALL, Known, Scene, State, write};

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

/// The loop is one that can fail: a disk that ignores what it is told to keep shows in every scene.
#[test]
fn without_fsync_a_power_cut_shows() {
    for scene in ALL {
        assert!(!wrong_images(scene, "sync ").is_empty(), "{}: no file needs to be synced", scene.name);
        assert!(!wrong_images(scene, "syncdir ").is_empty(), "{}: no folder needs to be synced", scene.name);
    }
}
