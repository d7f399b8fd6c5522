//! The binary in the folder of a scene: under the limits of a shell, without the rights of root, on a small disk of its own, and with
//! something else going on at a known time. What a machine does not offer is said, and the test is passed over.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Once;

use loratool::report::MergeReport;
use loratool::{MergeOptions, Progress, Result, Weighted, merge, merge_in_place, open_adapter, open_checkpoint};

use crate::bytes::{file, floats};
use crate::scene::{A, B, Entry, MODEL, Scene, WEIGHT, within};

pub const MERGE: &[&str] = &["merge", "base", "--adapter", "adapter", "-o", "out"];
pub const IN_PLACE: &[&str] = &["merge", "base", "--adapter", "adapter", "--in-place"];

/// How a run ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ended {
    /// With this exit code, and these words in the message.
    #[track_caller]
    pub fn says(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        for said in words {
            assert!(self.err.contains(said), "{said:?} is not said: {}", self.err);
        }
    }
}

/// Runs a command to its end.
pub fn run(mut command: Command) -> Ended {
    command.stdin(Stdio::null());
    let output = within(move || command.output().unwrap());
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    Ended { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
}

/// The binary in the scene's folder.
pub fn loratool(scene: &Scene, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loratool"));
    command.current_dir(scene.path()).args(args);
    command
}

/// The same, started by a shell: `before` is what it does first, `after` its redirections. `$$` is the number of the process.
pub fn shell(scene: &Scene, before: &str, args: &[&str], after: &str) -> Command {
    let mut command = Command::new("sh");
    command.current_dir(scene.path()).args(["-c", &format!("{before} exec \"$0\" \"$@\" {after}")]);
    command.arg(env!("CARGO_BIN_EXE_loratool")).args(args);
    command
}

/// The same with the rights of its owner alone, also if that is root. `None` where that cannot be.
pub fn as_anyone(scene: &Scene, args: &[&str]) -> Option<Command> {
    if !rustix::process::geteuid().is_root() {
        return Some(loratool(scene, args));
    }
    let bare = ["--bounding-set=-all", "--inh-caps=-all"];
    if !Command::new("setpriv").args(bare).arg("true").status().is_ok_and(|status| status.success()) {
        return skip("there is no setpriv that gives up the rights of root");
    }
    let mut command = Command::new("setpriv");
    command.current_dir(scene.path()).args(bare).arg(env!("CARGO_BIN_EXE_loratool")).args(args);
    Some(command)
}

/// Says why a test, or the rest of it, is passed over.
pub fn skip<T>(why: &str) -> Option<T> {
    eprintln!("passed over: {why}");
    None
}

/// Runs a command that is to be refused: exit code, words of the message, and nothing else in the folder.
#[track_caller]
pub fn refused(scene: &Scene, command: Command, code: i32, words: &[&str]) -> Ended {
    let before = scene.snapshot();
    let ended = run(command);
    ended.says(code, words);
    assert!(scene.snapshot() == before, "something was left behind, or an input changed: {}", ended.err);
    ended
}

/// Runs a command that is to write `out` like an undisturbed merge, and nothing else.
#[track_caller]
pub fn done(scene: &Scene, command: Command) -> Ended {
    let before = scene.snapshot();
    let ended = run(command);
    ended.says(0, &[]);
    let now = scene.snapshot();
    let rest: BTreeMap<_, _> = now.into_iter().filter(|(path, _)| !path.starts_with("out")).collect();
    assert!(rest == before, "something was left beside the output, or an input changed");
    assert!(output(scene, "out") == merged(scene), "the output is not that of an undisturbed merge");
    ended
}

/// Everything in a folder of the scene, or the file itself.
pub fn output(scene: &Scene, name: impl AsRef<Path>) -> BTreeMap<PathBuf, Entry> {
    let all = scene.snapshot().into_iter();
    all.filter_map(|(path, entry)| Some((path.strip_prefix(name.as_ref()).ok()?.to_owned(), entry))).collect()
}

/// What an undisturbed merge writes.
pub fn merged(scene: &Scene) -> BTreeMap<PathBuf, Entry> {
    let _gone = Gone(scene.at("undisturbed"));
    run(loratool(scene, &["merge", "base", "--adapter", "adapter", "-o", "undisturbed"])).says(0, &[]);
    output(scene, "undisturbed")
}

struct Gone(PathBuf);

impl Drop for Gone {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0).or_else(|_| std::fs::remove_file(&self.0));
    }
}

/// A mounted file system, until it is dropped.
pub struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Mounts a file system in memory on a new folder. `None` where that is not allowed.
pub fn small_disk(scene: &Scene, at: &str, options: &str) -> Option<Mounted> {
    std::fs::create_dir_all(scene.at(at)).unwrap();
    mounted(&["-t", "tmpfs", "-o", options, "none"], &scene.at(at))
}

/// `mount` with these arguments.
pub fn mounted(args: &[&str], at: &Path) -> Option<Mounted> {
    let mount = Command::new("mount").args(args).arg(at).stderr(Stdio::null()).status();
    match mount.is_ok_and(|status| status.success()) {
        true => Some(Mounted(at.to_owned())),
        false => skip("mounting needs root"),
    }
}

/// A file of these tensors, all zeros; what is not header is a hole.
pub fn zeros(path: &Path, tensors: &[(&str, &str, [u64; 2])]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut end = 0;
    let entries = tensors.iter().map(|(name, dtype, [rows, cols])| {
        let begin = end;
        end += rows * cols * if *dtype == "F32" { 4 } else { 2 };
        format!(r#""{name}":{{"dtype":"{dtype}","shape":[{rows},{cols}],"data_offsets":[{begin},{end}]}}"#)
    });
    let mut header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    // Values are aligned, as writers do it and a merge in place demands it.
    header.push_str(&" ".repeat(header.len().wrapping_neg() % 8));
    let header = file(header, &[]);
    std::fs::write(path, &header).unwrap();
    File::options().write(true).open(path).unwrap().set_len(header.len() as u64 + end).unwrap();
}

/// A base of holes in which an adapter of rank 1 changes [`WEIGHT`], `(rows, cols)` of F32; `others` come before it.
pub fn holes(rows: u64, cols: u64, others: &[(&str, &str, [u64; 2])]) -> Scene {
    let scene = Scene::sound();
    zeros(&scene.at(MODEL), &[others, &[(WEIGHT, "F32", [rows, cols])]].concat());
    let ones = |n: u64| vec![1.0; n as usize];
    scene.adapter(1, &[floats(A, "F32", &[1, cols], &ones(cols)), floats(B, "F32", &[rows, 1], &ones(rows))])
}

/// A base of so many shards, each with a tensor that the adapter changes.
pub fn shards(count: usize) -> Scene {
    let scene = Scene::sound().without(MODEL);
    let (mut map, mut factors) = (Vec::new(), Vec::new());
    for i in 0..count {
        let (weight, shard) = (format!("layers.{i}.q_proj.weight"), format!("model-{i:05}-of-{count:05}.safetensors"));
        zeros(&scene.at("base").join(&shard), &[(&weight, "F32", [2, 3])]);
        factors.push(floats(&A.replace(".0.", &format!(".{i}.")), "F32", &[1, 3], &[1.0, 2.0, 3.0]));
        factors.push(floats(&B.replace(".0.", &format!(".{i}.")), "F32", &[2, 1], &[1.0, -1.0]));
        map.push((weight, shard));
    }
    let map: Vec<_> = map.iter().map(|(weight, shard)| (weight.as_str(), shard.as_str())).collect();
    scene.index(&map).adapter(1, &factors)
}

/// Does something once, when the first bytes of the output are written.
pub struct Meanwhile<F>(Once, F);

impl<F: Fn() + Sync> Progress for Meanwhile<F> {
    fn advance(&self, _: u64) {
        self.0.call_once(&self.1);
    }
}

pub fn meanwhile<F: Fn() + Sync>(act: F) -> Meanwhile<F> {
    Meanwhile(Once::new(), act)
}

/// Merges into `out` by the library, watched.
pub fn merge_watched(scene: &Scene, edit: impl FnOnce(&mut MergeOptions), watch: &dyn Progress) -> Result<MergeReport> {
    let mut options = MergeOptions::default();
    edit(&mut options);
    let (base, adapter) = (open_checkpoint(scene.at("base"))?, open_adapter(scene.at("adapter"))?);
    merge(&base, &[Weighted::full(&adapter)], &scene.at("out"), &options, watch)
}

/// Merges in place by the library on one thread, watched.
pub fn in_place_watched(scene: &Scene, watch: &dyn Progress) -> Result<MergeReport> {
    let mut options = MergeOptions::default();
    options.exec.threads = std::num::NonZeroUsize::new(1);
    let (base, adapter) = (open_checkpoint(scene.at("base"))?, open_adapter(scene.at("adapter"))?);
    merge_in_place(&base, &[Weighted::full(&adapter)], None, &options, watch)
}
