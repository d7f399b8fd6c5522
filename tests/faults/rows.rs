//! Rows of table F in which a certain call fails in a certain way, or a signal comes at a certain time, beyond what the loops ask of all.

use super::scene::{ALL, CONVERT, FOLDER, IN_PLACE, Known, REPLACED, REPLACED_FILE, Scene, State, calls};

/// Runs with a fault; exit code and standard error, and what is left.
fn faulty(known: &Known, fault: String) -> (Option<i32>, String, tempfile::TempDir) {
    let folder = known.set_up();
    let done = known.run(folder.path(), &[("LORATOOL_FAULT", fault)]);
    (done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned(), folder)
}

/// One failure for each call of some name. A config of the model that cannot be read is a warning: the merge is as without it.
fn each_call(scene: Scene, name: &str, errno: i32, check: impl Fn(&str)) {
    let known = scene.known();
    let (_folder, trace) = known.trace();
    let numbers: Vec<_> = (1..).zip(calls(&trace)).filter(|(_, call)| *call == name).map(|(number, _)| number).collect();
    assert!(!numbers.is_empty(), "{}: there is no {name}", scene.name);
    for number in numbers {
        let (code, said, folder) = faulty(&known, format!("{number}:{errno}"));
        let what = format!("{}: {name}, call {number}, errno {errno}: {said}", scene.name);
        if said.contains("warning: ") && said.contains("/model/config.json") {
            assert!(code == Some(0) && known.state(folder.path()) == State::New, "{what}");
            continue;
        }
        assert_eq!(code, Some(6), "{what}");
        assert!(known.state(folder.path()) == State::Old && known.strays(folder.path()).is_empty(), "{what}");
        check(&said);
    }
}

fn says(said: &str, words: &[&str]) {
    assert!(words.iter().all(|word| said.contains(word)), "{words:?} are not all said: {said}");
}

const EXDEV: i32 = 18;
const EBUSY: i32 = 16;
const ENOTEMPTY: i32 = 39;
const EIO: i32 = 5;
const EDQUOT: i32 = 122;
const ESTALE: i32 = 116;

#[test]
fn f03_a_quota_that_is_used_up_is_said() {
    for call in ["allocate", "write"] {
        each_call(FOLDER, call, EDQUOT, |said| says(said, &["/out/", "the disk quota is used up", "help: free some space"]));
    }
}

#[test]
fn f04_a_failed_read_names_the_file_and_the_place() {
    each_call(FOLDER, "read", EIO, |said| says(said, &["cannot read", "  --> /", "byte ", "help: check the disk"]));
}

#[test]
fn f09_a_failed_rename_removes_what_was_staged() {
    for scene in [FOLDER, REPLACED, REPLACED_FILE, CONVERT] {
        for errno in [EXDEV, EBUSY, ENOTEMPTY] {
            each_call(scene, "rename", errno, |said| says(said, &["/out", "cannot write", "[E-002]", "help: "]));
        }
    }
}

#[test]
fn f22_a_stale_handle_is_a_file_that_changed() {
    for scene in [FOLDER, CONVERT] {
        each_call(scene, "read", ESTALE, |said| says(said, &["changed or replaced while it was read", "[E-004]", "help: "]));
    }
}

/// A signal before every call: what was staged is removed, or the result is complete; in place, it can be completed. After the last look
/// at the signals everything is done, and a signal changes nothing.
#[test]
fn f23_a_signal_at_any_time_ends_with_the_old_or_the_new() {
    for scene in ALL {
        let known = scene.known();
        let (_folder, trace) = known.trace();
        let calls = calls(&trace);
        for (number, call) in (1..).zip(&calls) {
            let (signal, code) = [("int", 130), ("term", 143), ("hup", 129)][number % 3];
            let (found, said, folder) = faulty(&known, format!("{number}:{signal}"));
            let (state, what) =
                (known.state(folder.path()), format!("{}: {signal} at call {number}, {call}: {said}", scene.name));
            match found {
                Some(0) => assert!(state == State::New && known.strays(folder.path()).is_empty(), "{what} {state:?}"),
                found => {
                    assert_eq!(found, Some(code), "{what}");
                    assert!(said.contains("interrupted"), "{what}");
                    assert!(state == State::Pending || known.strays(folder.path()).is_empty(), "{what} {state:?}");
                    assert!(state == State::Old || scene.in_place(), "{what} {state:?}");
                }
            }
            if state == State::Pending {
                assert!(known.recover(folder.path(), &[]).status.success(), "{what}");
                assert_eq!(known.state(folder.path()), State::New, "{what}");
            }
        }
        // Between the last file that is forced to disk and the rename there is still time.
        let rename = calls.iter().position(|call| *call == "rename").unwrap();
        let synced = calls[..rename].iter().rposition(|call| matches!(*call, "sync" | "syncdir")).unwrap();
        let (found, said, folder) = faulty(&known, format!("{}:int", synced + 1));
        assert_eq!((found, known.state(folder.path())), (Some(130), State::Old), "{}: {said}", scene.name);
    }
}

/// The second signal ends the process where it is: nothing has the output's name that is not the whole output.
#[test]
fn f23_a_second_signal_ends_at_once() {
    for scene in [FOLDER, REPLACED, IN_PLACE] {
        let known = scene.known();
        let (_folder, trace) = known.trace();
        let count = calls(&trace).len();
        for number in 1..count {
            let (found, said, folder) = faulty(&known, format!("{number}:int:from"));
            let state = known.state(folder.path());
            assert_eq!(found, Some(130), "{}: from call {number} of {count} on: {said}", scene.name);
            assert!(!matches!(state, State::Wrong(_)), "{}: from call {number} on: {state:?}", scene.name);
        }
    }
}
