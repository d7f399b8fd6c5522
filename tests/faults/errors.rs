//! Every call fails in turn. What was there is then still there, or the result is complete, or it can be completed; never anything else.

use super::scene::{ALL, Known, Scene, State, calls};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const EINTR: i32 = 4;

fn check(known: &Known, call: &str, fault: &str, harmless: bool, persistent: bool) {
    let folder = known.set_up();
    let done = known.run(folder.path(), &[("LORATOOL_FAULT", fault.to_owned())]);
    let (state, stderr) = (known.state(folder.path()), String::from_utf8_lossy(&done.stderr).into_owned());
    let what = format!("{}: {call} with {fault}: {:?}, {state:?}\n{stderr}", known.scene.name, done.status);
    match done.status.code() {
        Some(0) => assert!(state == State::New && known.strays(folder.path()).is_empty(), "{what}"),
        _ if harmless => panic!("{what}"),
        Some(6) => {
            assert!(stderr.contains("[E-0") && stderr.contains("help: "), "{what}");
            // Once a name is given, only forcing it to disk, or removing what it replaced, can fail.
            let named = matches!(call, "syncdir" | "remove") || persistent;
            assert!(state == State::Old || state == State::Pending || (named && state == State::New), "{what}");
            let strays = known.strays(folder.path());
            // A folder that was replaced is kept, and named, if the new one's name may not be on disk.
            let kept = matches!(call, "remove" | "syncdir") && stderr.contains(".loratool-");
            assert!(state == State::Pending || persistent || kept || strays.is_empty(), "{what} {strays:?}");
        }
        _ => panic!("{what}"),
    }
    assert!(!matches!(call, "sync" | "syncdir") || harmless || done.status.code() == Some(6), "{what}");
    if state == State::Pending {
        assert!(stderr.contains("loratool recover"), "{what}");
        let done = known.recover(folder.path(), &[]);
        assert!(done.status.success(), "{what}\n{}", String::from_utf8_lossy(&done.stderr));
        assert_eq!(known.state(folder.path()), State::New, "{what}");
    }
}

fn fail_in_turn(scene: Scene) {
    let known = scene.known();
    let (_folder, trace) = known.trace();
    for (index, call) in calls(&trace).into_iter().enumerate() {
        let number = index + 1;
        check(&known, call, &format!("{number}:{EIO}"), false, false);
        check(&known, call, &format!("{number}:{ENOSPC}:from"), false, true);
        check(&known, call, &format!("{number}:{EINTR}"), true, false);
        check(&known, call, &format!("{number}:short"), true, false);
    }
}

#[test]
fn every_call_fails_in_turn_out_of_place() {
    ALL.into_iter().filter(|scene| !scene.in_place()).for_each(fail_in_turn);
}

#[test]
fn every_call_fails_in_turn_in_place() {
    ALL.into_iter().filter(Scene::in_place).for_each(fail_in_turn);
}

#[test]
fn all_transfers_short_change_nothing() {
    for scene in ALL {
        let known = scene.known();
        let folder = known.set_up();
        assert!(known.run(folder.path(), &[("LORATOOL_FAULT", "1:short:from".to_owned())]).status.success());
        assert_eq!(known.state(folder.path()), State::New, "{}", scene.name);
    }
}
