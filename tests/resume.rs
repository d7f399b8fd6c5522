//! `--resume`: an interrupted merge of several files goes on where it was, to the bytes of an undisturbed one; and only where everything
//! is as it was.

mod common;

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use common::{bytes, copy_folder, fixture};
use loratool::report::MergeReport;
use loratool::{MergeOptions, Progress, Result, Weighted, merge, open_adapter, open_checkpoint};

struct Scene {
    folder: tempfile::TempDir,
    base: PathBuf,
}

impl Scene {
    fn new() -> Scene {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base");
        copy_folder(&fixture("models/llama-tiny"), &base);
        Scene { folder, base }
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    /// Ledgers and staging folders beside the output.
    fn leftovers(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.folder.path()).unwrap().map(|e| e.unwrap().path());
        let mut found: Vec<_> = entries.filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with(".loratool-")).collect();
        found.sort();
        found
    }

    fn run(&self, weight: f64, edit: impl FnOnce(&mut MergeOptions), progress: &dyn Progress) -> Result<MergeReport> {
        self.run_with(&fixture("adapters/llama-all-r4"), weight, edit, progress)
    }

    fn run_with(
        &self,
        adapter: &std::path::Path,
        weight: f64,
        edit: impl FnOnce(&mut MergeOptions),
        progress: &dyn Progress,
    ) -> Result<MergeReport> {
        let (base, adapter) = (open_checkpoint(&self.base)?, open_adapter(adapter)?);
        let mut options = MergeOptions::default();
        options.resume = true;
        options.exec.threads = std::num::NonZeroUsize::new(1);
        edit(&mut options);
        merge(&base, &[Weighted { adapter: &adapter, weight }], &self.out(), &options, progress)
    }

    /// Interrupts a merge once two of its four files are complete and written down.
    fn interrupt(&self) {
        let error = self.run(1.0, |_| {}, &Interrupt::after(self, 2)).unwrap_err();
        assert_eq!(error.diagnostics()[0].rule().id, "E-006");
        assert!(error.to_string().contains("--resume") || format!("{error:?}").contains("--resume"), "{error:?}");
        assert_eq!((self.leftovers().len(), self.out().exists()), (2, false));
    }

    fn undisturbed(&self) -> std::collections::BTreeMap<PathBuf, Vec<u8>> {
        let other = Scene { folder: tempfile::tempdir().unwrap(), base: self.base.clone() };
        other.run(1.0, |_| {}, &()).unwrap();
        bytes(&other.out())
    }
}

/// Cancels a run when its ledger names so many files.
struct Interrupt<'s> {
    scene: &'s Scene,
    files: usize,
    stop: AtomicBool,
}

impl<'s> Interrupt<'s> {
    fn after(scene: &'s Scene, files: usize) -> Self {
        Interrupt { scene, files, stop: AtomicBool::new(false) }
    }

    fn named(&self) -> usize {
        let ledger = self.scene.leftovers().into_iter().find(|p| p.extension().is_some_and(|x| x == "resume"));
        ledger.map_or(0, |path| fs::read_to_string(path).unwrap_or_default().lines().count().saturating_sub(1))
    }
}

impl Progress for Interrupt<'_> {
    fn advance(&self, _: u64) {
        if self.named() >= self.files {
            self.stop.store(true, Ordering::SeqCst);
        }
    }

    fn cancelled(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

#[test]
fn a_merge_goes_on_where_it_was() {
    let scene = Scene::new();
    scene.interrupt();
    let counted = Counted::default();
    let report = scene.run(1.0, |_| {}, &counted).unwrap();
    assert_eq!(report.resumed, ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]);
    assert!(bytes(&scene.out()) == scene.undisturbed());
    assert!(scene.leftovers().is_empty());
    // Only the other files were written, and the figures are of all of them.
    let sizes = |n: u32| fs::metadata(scene.out().join(format!("model-0000{n}-of-00004.safetensors"))).unwrap().len();
    assert_eq!(counted.0.into_inner(), sizes(3) + sizes(4));
    assert!(report.tensors.iter().all(|tensor| tensor.gain.is_some_and(|gain| gain > 0.9)), "{:?}", report.tensors);
}

#[derive(Default)]
struct Counted(AtomicU64);

impl Progress for Counted {
    fn advance(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::SeqCst);
    }
}

#[test]
fn another_merge_does_not_take_it_over() {
    let scene = Scene::new();
    scene.interrupt();
    let report = scene.run(0.5, |_| {}, &()).unwrap();
    assert!(report.resumed.is_empty());
    assert_eq!(scene.leftovers().len(), 2);
    // Nor does one of other options, nor one that was not told to.
    fs::remove_dir_all(scene.out()).unwrap();
    let report = scene.run(1.0, |o| o.output.rounding = loratool::Rounding::Peft, &()).unwrap();
    assert!(report.resumed.is_empty());
    fs::remove_dir_all(scene.out()).unwrap();
    let report = scene.run(1.0, |o| o.resume = false, &()).unwrap();
    assert!(report.resumed.is_empty());
}

/// Its time of change was put back, as archives and synchronisers do.
#[test]
#[cfg(not(feature = "faults"))]
fn a_base_that_looks_untouched_is_another_merge() {
    let scene = Scene::new();
    let shard = scene.base.join("model-00003-of-00004.safetensors");
    let time = fs::metadata(&shard).unwrap().modified().unwrap();
    scene.interrupt();
    let mut other = fs::read(&shard).unwrap();
    let middle = other.len() - 100;
    other[middle] ^= 1;
    fs::write(&shard, other).unwrap();
    fs::OpenOptions::new().write(true).open(&shard).unwrap().set_modified(time).unwrap();
    assert!(scene.run(1.0, |_| {}, &()).unwrap().resumed.is_empty());
    assert!(bytes(&scene.out()) == scene.undisturbed());
}

#[test]
fn a_base_that_was_touched_is_another_merge() {
    let scene = Scene::new();
    scene.interrupt();
    let shard = scene.base.join("model-00003-of-00004.safetensors");
    touch(&shard);
    assert!(scene.run(1.0, |_| {}, &()).unwrap().resumed.is_empty());
}

/// Gives a file another time of change, whatever the clock's steps are.
fn touch(path: &std::path::Path) {
    fs::OpenOptions::new().write(true).open(path).unwrap().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).unwrap();
}

/// The tensors are the same, and their scale is another.
#[test]
fn a_config_that_was_edited_is_another_merge() {
    let scene = Scene::new();
    let adapter = scene.folder.path().join("adapter");
    copy_folder(&fixture("adapters/llama-all-r4"), &adapter);
    scene.run_with(&adapter, 1.0, |_| {}, &Interrupt::after(&scene, 2)).unwrap_err();
    let config = adapter.join("adapter_config.json");
    let text = fs::read_to_string(&config).unwrap();
    let edited = text.replace("\"lora_alpha\": 8", "\"lora_alpha\": 16");
    assert_ne!(text, edited);
    fs::write(&config, edited).unwrap();
    assert!(scene.run_with(&adapter, 1.0, |_| {}, &()).unwrap().resumed.is_empty());
}

#[test]
fn a_file_that_was_touched_is_written_again() {
    let scene = Scene::new();
    scene.interrupt();
    let staging = scene.leftovers().into_iter().find(|p| p.extension().is_some_and(|x| x == "tmp")).unwrap();
    let path = staging.join("model-00001-of-00004.safetensors");
    let mut damaged = fs::read(&path).unwrap();
    *damaged.last_mut().unwrap() ^= 1;
    fs::write(&path, damaged).unwrap();
    touch(&path);
    fs::write(staging.join("stray.bin"), "x").unwrap();
    let report = scene.run(1.0, |_| {}, &()).unwrap();
    assert_eq!(report.resumed, ["model-00002-of-00004.safetensors"]);
    assert!(bytes(&scene.out()) == scene.undisturbed());
}

#[test]
fn a_ledger_that_was_cut_counts_as_far_as_it_goes() {
    for keep in [0, 40, 300] {
        let scene = Scene::new();
        scene.interrupt();
        let ledger = scene.leftovers().into_iter().find(|p| p.extension().is_some_and(|x| x == "resume")).unwrap();
        let text = fs::read(&ledger).unwrap();
        fs::write(&ledger, &text[..keep.min(text.len() - 1)]).unwrap();
        let report = scene.run(1.0, |_| {}, &()).unwrap();
        assert!(report.resumed.len() < 2);
        assert!(bytes(&scene.out()) == scene.undisturbed());
    }
}

/// What fails again the next time is nothing to go on with.
#[test]
fn a_merge_that_cannot_be_leaves_nothing() {
    let scene = Scene::new();
    let error = scene.run(1e7, |o| o.output.dtype = Some(loratool::Dtype::F16), &()).unwrap_err();
    assert_eq!(error.class().exit_code(), 5, "{error}");
    assert!(scene.leftovers().is_empty() && !scene.out().exists());
}

#[test]
fn interrupted_again_it_still_goes_on() {
    let scene = Scene::new();
    scene.interrupt();
    scene.run(1.0, |_| {}, &Interrupt::after(&scene, 3)).unwrap_err();
    let report = scene.run(1.0, |_| {}, &()).unwrap();
    assert_eq!(report.resumed.len(), 3);
    assert!(bytes(&scene.out()) == scene.undisturbed());
}
