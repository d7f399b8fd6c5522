//! A merge in place ends in the bytes of a merge elsewhere, or is refused with nothing changed; interrupted, it is closed to readers
//! until `recover` has completed it.

mod common;

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};

use common::{bytes, copy_folder, fixture};
use loratool::{MergeOptions, Progress, RecoverOptions, Weighted, merge, merge_in_place, open_adapter, open_checkpoint, recover};

/// Model, adapter: each dtype, both orientations, factors of embeddings, full tensors; one file (the first) and several.
const PAIRS: [(&str, &str); 8] = [
    ("models/llama-tiny-f32", "adapters/llama-qv-r8"),
    ("models/llama-tiny", "adapters/llama-qv-r8"),
    ("models/llama-tiny-f16", "adapters/llama-f16"),
    ("models/llama-tiny-f32", "adapters/llama-embed"),
    ("models/llama-tiny-f64", "adapters/llama-all-r4"),
    ("models/gpt2-tiny", "adapters/gpt2-all"),
    ("models/bert-tiny", "adapters/bert-bias-all"),
    ("models/t5-tiny", "adapters/t5-qv"),
];

/// A copy of a model, and what a merge elsewhere makes of it.
struct Scene {
    folder: tempfile::TempDir,
    adapter: PathBuf,
}

impl Scene {
    fn new(model: &str, adapter: &str) -> Scene {
        let folder = tempfile::tempdir().unwrap();
        copy_folder(&fixture(model), &folder.path().join("model"));
        let scene = Scene { folder, adapter: fixture(adapter) };
        let base = open_checkpoint(scene.model()).unwrap();
        let adapter = open_adapter(&scene.adapter).unwrap();
        merge(&base, &[Weighted::full(&adapter)], &scene.elsewhere(), &MergeOptions::default(), &()).unwrap();
        scene
    }

    fn model(&self) -> PathBuf {
        self.folder.path().join("model")
    }

    fn elsewhere(&self) -> PathBuf {
        self.folder.path().join("elsewhere")
    }

    fn journal(&self) -> PathBuf {
        self.model().join("loratool.journal")
    }

    fn in_place(&self, progress: &dyn Progress) -> loratool::Result<loratool::report::MergeReport> {
        let base = open_checkpoint(self.model())?;
        let adapter = open_adapter(&self.adapter)?;
        merge_in_place(&base, &[Weighted::full(&adapter)], None, &MergeOptions::default(), progress)
    }

    fn assert_merged(&self) {
        assert!(bytes(&self.model()) == bytes(&self.elsewhere()), "the bytes are not those of a merge elsewhere");
    }
}

/// Cancels once so many bytes are written.
struct After(AtomicU64);

impl Progress for After {
    fn advance(&self, bytes: u64) {
        let _ = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| Some(left.saturating_sub(bytes)));
    }

    fn cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }
}

fn loratool(args: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_loratool")).args(args).output().unwrap()
}

#[test]
fn in_place_is_elsewhere_byte_for_byte() {
    for (model, adapter) in PAIRS {
        let scene = Scene::new(model, adapter);
        let report = scene.in_place(&()).unwrap();
        assert!(report.in_place && report.survived.is_some());
        scene.assert_merged();
    }
}

#[test]
fn an_interrupted_merge_is_closed_to_readers_until_it_is_recovered() {
    let scene = Scene::new(PAIRS[0].0, PAIRS[0].1);
    let before = bytes(&scene.model());
    let error = scene.in_place(&After(AtomicU64::new(1))).unwrap_err();
    assert_eq!(error.class().exit_code(), 130, "{error}");
    assert!(error.diagnostics().iter().any(|d| d.help_text().is_some_and(|help| help.contains("loratool recover"))), "{error}");
    assert!(scene.journal().exists() && bytes(&scene.model()) != before);

    let model = scene.model();
    for args in [
        vec![Path::new("inspect"), &model],
        vec![Path::new("merge"), &model, Path::new("-a"), &scene.adapter, Path::new("--in-place")],
    ] {
        let output = loratool(&args);
        assert_eq!(output.status.code(), Some(8), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("loratool recover"));
    }
    let weights = fs::read(model.join("model.safetensors")).unwrap();
    assert!(safetensors::SafeTensors::deserialize(&weights).is_err(), "the reference reader takes a half merged file");

    let output = loratool(&[Path::new("recover"), &model]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    scene.assert_merged();
    // Again: nothing to do.
    let output = loratool(&[Path::new("recover"), &model]);
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("no merge is pending"), "{output:?}");
    scene.assert_merged();
}

#[test]
fn what_is_wrong_with_a_value_is_found_before_anything_changes() {
    let scene = Scene::new(PAIRS[0].0, PAIRS[0].1);
    let path = scene.model().join("model.safetensors");
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let bytes_of = fs::read(&path).unwrap();
    let found = safetensors::SafeTensors::deserialize(&bytes_of).unwrap();
    let view = found.tensor("model.layers.1.self_attn.v_proj.weight").unwrap();
    let last = view.data().as_ptr() as usize - bytes_of.as_ptr() as usize + view.data().len() - 2;
    file.write_all_at(&[0xc0, 0x7f], last as u64).unwrap();
    let before = bytes(&scene.model());
    let error = scene.in_place(&()).unwrap_err();
    assert_eq!((error.class().exit_code(), error.diagnostics()[0].rule().id), (5, "A-030"), "{error}");
    assert!(bytes(&scene.model()) == before);
}

#[test]
fn a_file_with_other_names_is_refused() {
    let scene = Scene::new(PAIRS[0].0, PAIRS[0].1);
    let (model, weights) = (scene.model(), scene.model().join("model.safetensors"));
    let check = |what: &str| {
        let error = scene.in_place(&()).unwrap_err();
        assert_eq!((error.class().exit_code(), error.diagnostics()[0].rule().id), (2, "U-005"), "{what}: {error}");
        assert!(!scene.journal().exists());
    };
    fs::hard_link(&weights, scene.folder.path().join("other")).unwrap();
    check("hard link");
    fs::remove_file(scene.folder.path().join("other")).unwrap();
    fs::rename(&weights, model.join("a".repeat(64))).unwrap();
    symlink("a".repeat(64), &weights).unwrap();
    check("link");
}

#[test]
fn a_journal_that_is_damaged_or_foreign_is_never_applied() {
    let scene = Scene::new(PAIRS[0].0, PAIRS[0].1);
    scene.in_place(&After(AtomicU64::new(1))).unwrap_err();
    let (sound, half) = (fs::read(scene.journal()).unwrap(), bytes(&scene.model()));
    let try_recover = || recover(&scene.model(), &RecoverOptions::default(), &());
    let untouched = || {
        let now = bytes(&scene.model());
        now.iter().zip(&half).all(|(n, h)| n.0 == Path::new("loratool.journal") || n == h)
    };
    let header = u64::from_le_bytes(sound[..8].try_into().unwrap()) as usize;
    // The marks follow the header: one changed there is seen by the bytes that it does not describe.
    for at in [0, 9, 40, header / 2, header - 10, sound.len() - 3] {
        let mut broken = sound.clone();
        broken[at] ^= 0x10;
        fs::write(scene.journal(), &broken).unwrap();
        let error = try_recover().unwrap_err();
        assert_eq!(error.class().exit_code(), 9, "byte {at}: {error}");
        assert!(untouched(), "byte {at}");
    }
    for len in [0, 7, 100, header, sound.len() - 1] {
        fs::write(scene.journal(), &sound[..len]).unwrap();
        assert_eq!(try_recover().unwrap_err().class().exit_code(), 9, "{len} bytes");
        assert!(untouched(), "{len} bytes");
    }
    // Another file of the same name.
    fs::write(scene.journal(), &sound).unwrap();
    let weights = scene.model().join("model.safetensors");
    let good = fs::read(&weights).unwrap();
    let mut other = good.clone();
    other[20] ^= 1;
    fs::write(&weights, &other).unwrap();
    assert_eq!(try_recover().unwrap_err().class().exit_code(), 9);
    assert!(fs::read(&weights).unwrap() == other);
    fs::write(&weights, &good).unwrap();
    try_recover().unwrap();
    scene.assert_merged();
}

#[test]
fn a_value_that_was_edited_after_the_interruption_is_not_merged_over() {
    let scene = Scene::new(PAIRS[0].0, PAIRS[0].1);
    scene.in_place(&After(AtomicU64::new(1))).unwrap_err();
    let weights = scene.model().join("model.safetensors");
    let bytes_of = fs::read(scene.elsewhere().join("model.safetensors")).unwrap();
    let found = safetensors::SafeTensors::deserialize(&bytes_of).unwrap();
    for name in ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight"] {
        let view = found.tensor(name).unwrap();
        let at = view.data().as_ptr() as usize - bytes_of.as_ptr() as usize + 10;
        let good = fs::read(&weights).unwrap();
        let mut edited = good.clone();
        edited[at] ^= 4;
        fs::write(&weights, &edited).unwrap();
        let error = recover(&scene.model(), &RecoverOptions::default(), &()).unwrap_err();
        assert_eq!(error.class().exit_code(), 9, "{name}: {error}");
        assert_eq!(error.diagnostics()[0].place().tensor.as_deref(), Some(name), "{error}");
        fs::write(&weights, &good).unwrap();
    }
    recover(&scene.model(), &RecoverOptions::default(), &()).unwrap();
    scene.assert_merged();
}
