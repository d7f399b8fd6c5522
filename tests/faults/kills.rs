//! The process is killed at every call, before it and in the middle of it, and so is the recovery.

use std::os::unix::process::ExitStatusExt;

use super::scene::{ALL, Known, RESUMED, Scene, State, calls, is_staging, read, write};

fn killed(status: std::process::ExitStatus) -> bool {
    status.signal().is_some()
}

/// Whatever a killed run left, the same command or `recover` ends in the same bytes as an undisturbed run.
fn go_on(known: &Known, folder: &std::path::Path, what: &str) {
    if known.state(folder) == State::Pending {
        let done = known.recover(folder, &[]);
        assert!(done.status.success(), "{what}\n{}", String::from_utf8_lossy(&done.stderr));
    } else if known.state(folder) == State::Old {
        known.forget_log(folder);
        assert!(known.run(folder, &[]).status.success(), "{what}");
    }
    assert_eq!(known.state(folder), State::New, "{what}");
}

fn kill_in_turn(scene: Scene) {
    let known = scene.known();
    let (_folder, trace) = known.trace();
    for (number, call) in (1..).zip(calls(&trace)) {
        for how in ["kill", "tear"] {
            let folder = known.set_up();
            let what = format!("{}: {how} at call {number}, {call}", scene.name);
            let done = known.run(folder.path(), &[("LORATOOL_FAULT", format!("{number}:{how}"))]);
            assert!(killed(done.status) || (how == "tear" && number == calls(&trace).len()), "{what}");
            let state = known.state(folder.path());
            assert!(!matches!(state, State::Wrong(_)), "{what}: {state:?}");
            go_on(&known, folder.path(), &what);
        }
    }
}

#[test]
fn killed_at_every_call_out_of_place() {
    ALL.into_iter().filter(|scene| !scene.in_place()).for_each(kill_in_turn);
}

#[test]
fn killed_at_every_call_in_place() {
    ALL.into_iter().filter(Scene::in_place).for_each(kill_in_turn);
}

/// A recovery is killed at every call, and so is the recovery after it.
#[test]
fn a_recovery_is_killed_at_every_call() {
    for scene in ALL.into_iter().filter(Scene::in_place) {
        let known = scene.known();
        let (_folder, trace) = known.trace();
        let (mut pending, mut runs) = (0, 0);
        for number in (1..=calls(&trace).len()).rev().step_by(7) {
            let folder = known.set_up();
            known.run(folder.path(), &[("LORATOOL_FAULT", format!("{number}:tear"))]);
            if known.state(folder.path()) != State::Pending {
                continue;
            }
            pending += 1;
            let left = read(folder.path());
            for again in 1.. {
                let folder = tempfile::tempdir().unwrap();
                write(folder.path(), &left);
                let done = known.recover(folder.path(), &[("LORATOOL_FAULT", format!("{again}:tear"))]);
                let what = format!("{}: torn at call {number}, then at {again} of the recovery", scene.name);
                if !killed(done.status) {
                    assert!(done.status.success(), "{what}");
                    break;
                }
                runs += 1;
                go_on(&known, folder.path(), &what);
            }
        }
        assert!(pending > 3 && runs > 50, "{}: {pending} states, {runs} recoveries", scene.name);
    }
}

/// Killed wherever it may be, and killed again while it is resumed, a merge that is resumed ends in the bytes of an undisturbed one.
#[test]
fn a_resumed_merge_is_killed_at_every_call() {
    let known = RESUMED.known();
    let (_folder, trace) = known.trace();
    let mut taken_over = 0;
    for number in 1..=calls(&trace).len() {
        let folder = known.set_up();
        let what = format!("killed at call {number}");
        assert!(killed(known.run(folder.path(), &[("LORATOOL_FAULT", format!("{number}:kill"))]).status), "{what}");
        known.run(folder.path(), &[("LORATOOL_FAULT", format!("{}:tear", 15 + number % 20))]);
        assert!(matches!(known.state(folder.path()), State::Old | State::New), "{what}");
        if known.state(folder.path()) == State::Old {
            let done = known.run(folder.path(), &[]);
            assert!(done.status.success(), "{what}: {}", String::from_utf8_lossy(&done.stderr));
            taken_over += usize::from(String::from_utf8_lossy(&done.stdout).contains("resumed"));
        }
        assert_eq!(known.state(folder.path()), State::New, "{what}");
        let ledgers = read(folder.path()).into_keys().filter(|path| path.extension().is_some_and(|x| x == "resume"));
        let left: Vec<_> = ledgers.filter(|path| is_staging(path.to_str().unwrap())).collect();
        assert!(left.len() <= 1, "{what}: {left:?}");
    }
    assert!(taken_over > 10, "{taken_over}");
}
