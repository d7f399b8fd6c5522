//! A folder with a base and an adapter that fit, in which a test then breaks one thing.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use loratool::report::MergeReport;
use loratool::{ConvertOptions, MergeOptions, OpenOptions, ReadMode, Result, Weighted};
use loratool::{convert, merge, open_adapter, open_adapter_with, open_checkpoint_with};

use crate::bytes::{Tensor, floats, safetensors};

/// The base tensor that the adapter updates, `(4, 3)`.
pub const WEIGHT: &str = "layers.0.q_proj.weight";
/// A base tensor that no adapter here updates, `(3,)`.
pub const NORM: &str = "norm.weight";
pub const A: &str = "base_model.model.layers.0.q_proj.lora_A.weight";
pub const B: &str = "base_model.model.layers.0.q_proj.lora_B.weight";
/// Files of the base.
pub const MODEL: &str = "base/model.safetensors";
pub const INDEX: &str = "base/model.safetensors.index.json";
pub const ONE: &str = "model-00001-of-00002.safetensors";
pub const TWO: &str = "model-00002-of-00002.safetensors";
/// The file of the adapter.
pub const FACTORS: &str = "adapter/adapter_model.safetensors";

/// The config of an adapter whose scale is 1.
const CONFIG: &str =
    r#"{"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"], "fan_in_fan_out": false, MORE}"#;

/// The weight of the sound base.
pub fn weight() -> Tensor {
    floats(WEIGHT, "F32", &[4, 3], &[1.0, -2.0, 3.0, 4.0, 5.0, -6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0])
}

/// The other tensor of the sound base.
pub fn norm() -> Tensor {
    floats(NORM, "F32", &[3], &[1.0, 0.5, 0.25])
}

/// The factors of the sound adapter; its scale is 1.
pub fn factors() -> Vec<Tensor> {
    let a = floats(A, "F32", &[2, 3], &[1.0, 2.0, 3.0, 0.5, 0.25, 0.125]);
    let b = floats(B, "F32", &[4, 2], &[1.0, 0.0, 0.0, 1.0, -1.0, 1.0, 2.0, 2.0]);
    vec![a, b]
}

/// A folder of its own, removed when dropped.
pub struct Scene(tempfile::TempDir);

impl Scene {
    /// `base/` and `adapter/`, with nothing wrong.
    pub fn sound() -> Scene {
        let scene = Scene(tempfile::tempdir().unwrap());
        scene.base(&[weight(), norm()]).adapter(2, &factors())
    }

    /// The same with the base in two shards and an index.
    pub fn sharded() -> Scene {
        let scene = Scene::sound().without(MODEL);
        let scene = scene.shard(ONE, &[weight()]).shard(TWO, &[norm()]);
        scene.index(&[(WEIGHT, ONE), (NORM, TWO)])
    }

    /// The same with the adapter in a container, its header edited.
    pub fn container(edit: impl FnOnce(Vec<u8>) -> Vec<u8>) -> Scene {
        let scene = Scene::sound();
        let adapter = open_adapter(scene.at("adapter")).unwrap();
        convert(&adapter, &scene.at("container"), &ConvertOptions::default(), &()).unwrap();
        let bytes = fs::read(scene.at("container")).unwrap();
        scene.without("adapter").without("container").with("adapter", edit(bytes))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn at(&self, path: &str) -> PathBuf {
        self.path().join(path)
    }

    pub fn with(self, path: &str, content: impl AsRef<[u8]>) -> Scene {
        fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
        fs::write(self.at(path), content).unwrap();
        self
    }

    pub fn without(self, path: &str) -> Scene {
        let found = self.at(path);
        if found.is_dir() { fs::remove_dir_all(found) } else { fs::remove_file(found) }.unwrap();
        self
    }

    pub fn link(self, path: &str, target: impl AsRef<Path>) -> Scene {
        fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(target, self.at(path)).unwrap();
        self
    }

    pub fn fifo(self, path: &str) -> Scene {
        rustix::fs::mkfifoat(rustix::fs::CWD, self.at(path), rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
        self
    }

    pub fn base(self, tensors: &[Tensor]) -> Scene {
        self.with(MODEL, safetensors(tensors))
    }

    pub fn shard(self, name: &str, tensors: &[Tensor]) -> Scene {
        self.with(&format!("base/{name}"), safetensors(tensors))
    }

    /// An adapter of rank `rank` whose scale is 1.
    pub fn adapter(self, rank: u64, tensors: &[Tensor]) -> Scene {
        self.adapter_with(rank, tensors, r#""bias": "none""#)
    }

    /// The same with other members in its config.
    pub fn adapter_with(self, rank: u64, tensors: &[Tensor], members: &str) -> Scene {
        let config = CONFIG.replace("RANK", &rank.to_string()).replace("MORE", members);
        self.with(FACTORS, safetensors(tensors)).with("adapter/adapter_config.json", config)
    }

    /// An index with the right size of all tensors of the sound base.
    pub fn index(self, map: &[(&str, &str)]) -> Scene {
        let members: Vec<_> =
            map.iter().map(|(tensor, shard)| format!("{tensor:?}: {}", serde_json::Value::from(*shard))).collect();
        let text = format!("{{\"metadata\": {{\"total_size\": 60}}, \"weight_map\": {{{}}}}}", members.join(", "));
        self.with(INDEX, text)
    }

    /// Merges `adapter` into `base`, into `out`.
    pub fn merge(&self, mode: ReadMode, edit: impl FnOnce(&mut MergeOptions)) -> Result<MergeReport> {
        let mut options = MergeOptions::default();
        edit(&mut options);
        let (base, adapter, out) = (self.at("base"), self.at("adapter"), self.at("out"));
        within(move || {
            let mut open = OpenOptions::default();
            open.mode = mode;
            let base = open_checkpoint_with(base, &open)?;
            let adapter = open_adapter_with(adapter, &open)?;
            merge(&base, &[Weighted::full(&adapter)], &out, &options, &())
        })
    }

    /// Merges, and sees to it that the inputs are what they were and that only the output is new.
    pub fn merged(&self) -> Merged {
        self.merged_with(|_| {})
    }

    pub fn merged_with(&self, edit: impl FnOnce(&mut MergeOptions)) -> Merged {
        let before = self.snapshot();
        let report = self.merge(ReadMode::Read, edit).unwrap_or_else(|e| panic!("{e}"));
        let (out, rest): (BTreeMap<_, _>, BTreeMap<_, _>) =
            self.snapshot().into_iter().partition(|(path, _)| path.starts_with("out"));
        assert!(before == rest, "the merge changed its inputs, or left something beside its output");
        let files = out.into_iter().filter_map(|(path, entry)| match entry {
            Entry::File(bytes) => Some((path.strip_prefix("out").unwrap().to_str().unwrap().to_owned(), bytes)),
            _ => None,
        });
        Merged { report, files: files.collect() }
    }

    /// Everything in the folder, links not followed.
    pub fn snapshot(&self) -> BTreeMap<PathBuf, Entry> {
        let mut found = BTreeMap::new();
        walk(self.path(), Path::new(""), &mut found);
        found
    }
}

/// What a merge wrote.
pub struct Merged {
    pub report: MergeReport,
    /// Path inside the output, and bytes.
    pub files: BTreeMap<String, Vec<u8>>,
}

impl Merged {
    /// The bytes of a tensor of the one file of weights.
    pub fn tensor(&self, name: &str) -> Vec<u8> {
        crate::bytes::stored(&self.files["model.safetensors"], name)
    }

    pub fn warned(&self) -> Vec<&str> {
        self.report.warnings.iter().map(|note| note.rule).collect()
    }
}

/// What a path of a folder is.
#[derive(PartialEq, Eq)]
pub enum Entry {
    File(Vec<u8>),
    Folder,
    Link(PathBuf),
    Other,
}

fn walk(root: &Path, below: &Path, found: &mut BTreeMap<PathBuf, Entry>) {
    for entry in fs::read_dir(root.join(below)).unwrap() {
        let entry = entry.unwrap();
        let (path, kind) = (below.join(entry.file_name()), entry.file_type().unwrap());
        let full = root.join(&path);
        let what = if kind.is_symlink() {
            Entry::Link(fs::read_link(full).unwrap())
        } else if kind.is_dir() {
            walk(root, &path, found);
            Entry::Folder
        } else if kind.is_file() {
            Entry::File(fs::read(full).unwrap())
        } else {
            Entry::Other
        };
        found.insert(path, what);
    }
}

/// Does the work on a thread of its own; a test that would hang fails instead. The time is generous: only a hang exceeds it.
pub fn within<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (send, receive) = mpsc::channel();
    let worker = thread::spawn(move || send.send(work()));
    match receive.recv_timeout(Duration::from_secs(120)) {
        Ok(done) => done,
        Err(RecvTimeoutError::Timeout) => panic!("the work hangs"),
        Err(RecvTimeoutError::Disconnected) => match worker.join() {
            Err(payload) => std::panic::resume_unwind(payload),
            Ok(_) => unreachable!("the worker sends before it ends"),
        },
    }
}

/// The values of F32 bytes.
pub fn values(bytes: &[u8]) -> Vec<f64> {
    bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
}
