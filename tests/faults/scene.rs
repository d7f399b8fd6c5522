//! Commands under test, the files that they start from, and what the files may be afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// Relative names and contents; folders end in a slash and are empty.
pub type Files = BTreeMap<PathBuf, Vec<u8>>;

/// A command, with `@` for the folder that it works in.
#[derive(Clone, Copy)]
pub struct Scene {
    pub name: &'static str,
    pub args: &'static [&'static str],
    /// From the fixtures to names in the folder.
    pub inputs: &'static [(&'static str, &'static str)],
    /// A command to run first, to the end.
    pub before: &'static [&'static str],
}

const LLAMA: [(&str, &str); 2] = [("models/llama-tiny", "model"), ("adapters/llama-qv-r8", "adapter")];
const FILE: [(&str, &str); 2] =
    [("models/llama-tiny-f32/model.safetensors", "model.safetensors"), ("adapters/llama-all-r4", "adapter")];

pub const FOLDER: Scene = Scene {
    name: "to a folder",
    args: &["merge", "@/model", "-a", "@/adapter", "-o", "@/out", "--threads", "1"],
    inputs: &LLAMA,
    before: &[],
};
pub const RESUMED: Scene = Scene {
    name: "to a folder, to be resumed",
    args: &["merge", "@/model", "-a", "@/adapter", "-o", "@/out", "--resume", "--threads", "1"],
    inputs: &LLAMA,
    before: &[],
};
pub const REPLACED: Scene = Scene {
    name: "over a folder",
    args: &["merge", "@/model", "-a", "@/adapter", "-o", "@/out", "--overwrite", "--threads", "1"],
    inputs: &LLAMA,
    before: &["merge", "@/model", "-a", "@/adapter:0.5", "-o", "@/out"],
};
pub const REPLACED_FILE: Scene = Scene {
    name: "over a file",
    args: &["merge", "@/model.safetensors", "-a", "@/adapter", "-o", "@/out", "--overwrite", "--threads", "1"],
    inputs: &FILE,
    before: &["merge", "@/model.safetensors", "-a", "@/adapter:0.5", "-o", "@/out"],
};
pub const IN_PLACE: Scene = Scene {
    name: "in place, shards",
    args: &["merge", "@/model", "-a", "@/adapter", "--in-place", "--threads", "1"],
    inputs: &LLAMA,
    before: &[],
};
pub const UNDO: Scene = Scene {
    name: "in place with an undo log",
    args: &["merge", "@/model.safetensors", "-a", "@/adapter", "--in-place", "--undo-log", "@/undo", "--threads", "1"],
    inputs: &FILE,
    before: &[],
};
pub const UNMERGE: Scene = Scene {
    name: "unmerge in place",
    args: &["unmerge", "@/model.safetensors", "--undo-log", "@/undo", "--in-place", "--threads", "1"],
    inputs: &FILE,
    before: UNDO.args,
};
pub const IN_PLACE_FILE: Scene = Scene {
    name: "in place, one file",
    args: &["merge", "@/model.safetensors", "-a", "@/adapter", "--in-place", "--threads", "1"],
    inputs: &FILE,
    before: &[],
};
pub const CONVERT: Scene = Scene {
    name: "convert",
    args: &["convert", "@/adapter", "--to", "peft", "-o", "@/out"],
    inputs: &[("adapters/llama-qv-r8", "adapter")],
    before: &[],
};
pub const EXTRACT: Scene = Scene {
    name: "extract",
    args: &[
        "extract",
        "--base-name",
        "llama",
        "--base",
        "@/model.safetensors",
        "--tuned",
        "@/tuned.safetensors",
        "--rank",
        "2",
        "--targets",
        "layers.0.*q_proj",
        "--rest",
        "skip",
        "-o",
        "@/out.safetensors",
        "--threads",
        "1",
    ],
    inputs: &[
        ("models/llama-tiny-f32/model.safetensors", "model.safetensors"),
        ("goldens/llama-qv-r8--llama-tiny-f32/peft.safetensors", "tuned.safetensors"),
    ],
    before: &[],
};
pub const RESIZE: Scene = Scene {
    name: "resize over a folder",
    args: &["resize", "@/adapter", "--rank", "4", "-o", "@/out", "--overwrite", "--threads", "1"],
    inputs: &[("adapters/llama-qv-r8", "adapter")],
    before: &["resize", "@/adapter", "--rank", "2", "-o", "@/out"],
};
pub const COMBINE: Scene = Scene {
    name: "combine by values",
    args: &[
        "combine",
        "@/adapter:0.5",
        "@/other",
        "--method",
        "ties",
        "--rank",
        "2",
        "--weight",
        "layers.1=0",
        "-o",
        "@/out",
        "--threads",
        "1",
    ],
    inputs: &[("adapters/llama-qv-r8", "adapter"), ("adapters/llama-odd-scale", "other")],
    before: &[],
};
pub const ALL: [Scene; 11] =
    [FOLDER, REPLACED, REPLACED_FILE, IN_PLACE, IN_PLACE_FILE, UNDO, UNMERGE, CONVERT, EXTRACT, RESIZE, COMBINE];

/// What a run left.
#[derive(Debug, PartialEq, Eq)]
pub enum State {
    /// What was there before.
    Old,
    /// What the command makes.
    New,
    /// A merge in place that `recover` can complete.
    Pending,
    /// Something else.
    Wrong(String),
}

/// A scene with its two outcomes known.
pub struct Known {
    pub scene: Scene,
    pub before: Files,
    pub after: Files,
}

impl Scene {
    /// Runs it undisturbed.
    pub fn known(self) -> Known {
        let folder = tempfile::tempdir().unwrap();
        for (from, to) in self.inputs {
            copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(from), &folder.path().join(to));
        }
        if !self.before.is_empty() {
            assert!(run(folder.path(), self.before, &[]).status.success());
        }
        let before = read(folder.path());
        let done = run(folder.path(), self.args, &[]);
        assert!(done.status.success(), "{}: {}", self.name, String::from_utf8_lossy(&done.stderr));
        let after = read(folder.path());
        assert!(before != after);
        Known { scene: self, before, after }
    }

    pub fn in_place(&self) -> bool {
        self.args.contains(&"--in-place")
    }
}

impl Known {
    /// A fresh folder as it was before.
    pub fn set_up(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &self.before);
        folder
    }

    pub fn run(&self, folder: &Path, env: &[(&str, String)]) -> Output {
        run(folder, self.scene.args, env)
    }

    /// Completes what was interrupted.
    pub fn recover(&self, folder: &Path, env: &[(&str, String)]) -> Output {
        run(folder, &["recover", self.scene.args[1], "--threads", "1"], env)
    }

    /// Removes the undo log of a merge that was not begun.
    pub fn forget_log(&self, folder: &Path) {
        if !self.before.contains_key(Path::new("undo")) {
            let _ = fs::remove_file(folder.join("undo"));
        }
    }

    /// The state of a folder; staging of a killed run is not looked at.
    pub fn state(&self, folder: &Path) -> State {
        let (mut found, journal) = (read(folder), |path: &PathBuf| path.extension().is_some_and(|x| x == "journal"));
        found.retain(|path, _| !path.components().any(|part| is_staging(part.as_os_str().to_str().unwrap())));
        if found == self.before {
            return State::Old;
        }
        if found == self.after {
            return State::New;
        }
        // Interrupted before the journal got its name, a merge was not begun: its undo log says so.
        let mut without_log = found.clone();
        without_log.remove(Path::new("undo"));
        if without_log == self.before {
            return State::Old;
        }
        if self.scene.in_place() && found.keys().any(journal) {
            return State::Pending;
        }
        let differ = |path: &&PathBuf| found.get(*path) != self.before.get(*path) || found.get(*path) != self.after.get(*path);
        State::Wrong(format!("{:?}", found.keys().filter(differ).collect::<Vec<_>>()))
    }

    /// Are there files that a finished run does not leave?
    pub fn strays(&self, folder: &Path) -> Vec<PathBuf> {
        read(folder).into_keys().filter(|path| !self.before.contains_key(path) && !self.after.contains_key(path)).collect()
    }

    /// How many calls to the disk it makes, and the lines of its trace.
    pub fn trace(&self) -> (TempDir, Vec<String>) {
        let folder = self.set_up();
        let trace = tempfile::NamedTempFile::new().unwrap();
        let done = self.run(folder.path(), &[("LORATOOL_FAULT_TRACE", trace.path().display().to_string())]);
        assert!(done.status.success());
        let lines: Vec<String> = fs::read_to_string(trace.path()).unwrap().lines().map(str::to_owned).collect();
        assert!(calls(&lines).len() > 20, "is the program built with the feature `faults`?");
        (folder, lines)
    }
}

/// The names of the calls of a trace.
pub fn calls(trace: &[String]) -> Vec<&str> {
    trace.iter().filter_map(|line| line.strip_prefix("call ")).collect()
}

pub fn is_staging(name: &str) -> bool {
    name.starts_with(".loratool-")
}

fn run(folder: &Path, args: &[&str], env: &[(&str, String)]) -> Output {
    let args = args.iter().map(|arg| arg.replace('@', folder.to_str().unwrap()));
    // What a shell starts in the background ignores SIGINT, and so would what it starts.
    let mut command = Command::new("env");
    command
        .args(["--default-signal=INT", env!("CARGO_BIN_EXE_loratool")])
        .args(args)
        .envs(env.iter().map(|(key, value)| (*key, value)))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn copy(from: &Path, to: &Path) {
    if from.is_dir() {
        fs::create_dir(to).unwrap();
        for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
            copy(&entry.path(), &to.join(entry.file_name()));
        }
    } else {
        fs::copy(from, to).unwrap();
    }
}

pub fn read(folder: &Path) -> Files {
    let mut files = Files::new();
    collect(folder, Path::new(""), &mut files);
    files
}

fn collect(root: &Path, relative: &Path, files: &mut Files) {
    for entry in fs::read_dir(root.join(relative)).unwrap().map(Result::unwrap) {
        let name = relative.join(entry.file_name());
        if entry.path().is_dir() {
            files.insert(name.join(""), Vec::new());
            collect(root, &name, files);
        } else {
            files.insert(name, fs::read(entry.path()).unwrap());
        }
    }
}

pub fn write(folder: &Path, files: &Files) {
    for (name, bytes) in files {
        let path = folder.join(name);
        if name.as_os_str().to_str().unwrap().ends_with('/') {
            fs::create_dir_all(path).unwrap();
        } else {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }
}
