//! What was merged is taken out again: bit for bit by the undo log, and by subtraction as exactly as it says.

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use common::{bytes, copy_folder, fixture};
use safetensors::SafeTensors;

/// Model, adapter: each dtype, both orientations, biases, embeddings, full tensors.
const PAIRS: [(&str, &str); 7] = [
    ("models/llama-tiny", "adapters/llama-qv-r8"),
    ("models/llama-tiny-f16", "adapters/llama-f16"),
    ("models/llama-tiny-f32", "adapters/llama-embed"),
    ("models/llama-tiny-f64", "adapters/llama-all-r4"),
    ("models/gpt2-tiny", "adapters/gpt2-all"),
    ("models/bert-tiny", "adapters/bert-bias-all"),
    ("models/t5-tiny", "adapters/t5-qv"),
];

struct Scene {
    folder: tempfile::TempDir,
    adapter: PathBuf,
}

impl Scene {
    fn new(model: &str, adapter: &str) -> Scene {
        let folder = tempfile::tempdir().unwrap();
        copy_folder(&fixture(model), &folder.path().join("model"));
        Scene { folder, adapter: fixture(adapter) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `@` is the folder, `+` at the start of a word the adapter.
    fn run(&self, command: &str) -> Output {
        let words = command.split(' ').map(|word| match word {
            _ if word.starts_with('+') => word.replace('+', self.adapter.to_str().unwrap()),
            _ => word.replace('@', self.folder.path().to_str().unwrap()),
        });
        Command::new(env!("CARGO_BIN_EXE_loratool")).args(words).output().unwrap()
    }

    fn good(&self, command: &str) -> serde_json::Value {
        let output = self.run(&format!("{command} --json"));
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stdout));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()["report"].take()
    }

    /// The command ends with `code` and says `text`; the model is not changed.
    fn refused(&self, command: &str, code: i32, text: &str) {
        let before = bytes(&self.path("model"));
        let output = self.run(command);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(code) && said.contains(text), "{command}: {:?} {said}", output.status);
        assert!(bytes(&self.path("model")) == before);
    }
}

#[test]
fn the_undo_log_brings_back_every_byte() {
    for (model, adapter) in PAIRS {
        let scene = Scene::new(model, adapter);
        let before = bytes(&scene.path("model"));
        scene.good("merge @/model -a + --in-place --undo-log @/undo");
        let merged = bytes(&scene.path("model"));
        assert!(merged != before);
        // Elsewhere first: what is merged stays as it is.
        scene.good("unmerge @/model --undo-log @/undo -o @/restored");
        assert!(bytes(&scene.path("restored")) == before && bytes(&scene.path("model")) == merged, "{model}");
        let report = scene.good("unmerge @/model --undo-log @/undo --in-place");
        assert!(bytes(&scene.path("model")) == before, "{model}");
        assert!(report["exact"] == true && report["certain"] == report["values"] && report["error_bound"] == 0.0);
    }
}

#[test]
fn the_reference_reader_finds_the_old_tensors_in_the_undo_log() {
    let scene = Scene::new("models/llama-tiny-f32", "adapters/llama-qv-r8");
    let before = fs::read(scene.path("model/model.safetensors")).unwrap();
    scene.good("merge @/model -a + --in-place --undo-log @/undo");
    let log = fs::read(scene.path("undo")).unwrap();
    let (log, before) = (SafeTensors::deserialize(&log).unwrap(), SafeTensors::deserialize(&before).unwrap());
    let mut found = 0;
    for (name, view) in log.tensors().iter().filter(|(name, _)| !name.starts_with("loratool.")) {
        assert_eq!(view.data(), before.tensor(name).unwrap().data());
        found += 1;
    }
    assert_eq!(found, 4);
}

#[test]
fn nothing_is_undone_that_was_not_done_or_has_changed_since() {
    let scene = Scene::new("models/llama-tiny-f32", "adapters/llama-qv-r8");
    let undo = "unmerge @/model --undo-log @/undo --in-place";
    scene.good("merge @/model -a + --in-place --undo-log @/undo");
    scene.refused("merge @/model -a + --allow-repeat --in-place --undo-log @/undo", 2, "U-002");
    scene.refused("merge @/model -a + --allow-repeat --in-place --undo-log @/model/undo", 2, "U-003");
    // Something else was merged on top.
    scene.good(&format!("merge @/model -a {}:0.5 --in-place", fixture("adapters/llama-all-r4").display()));
    scene.refused(undo, 9, "changed since");
    let scene = Scene::new("models/llama-tiny-f32", "adapters/llama-qv-r8");
    scene.good("merge @/model -a + --in-place --undo-log @/undo");
    let merged = bytes(&scene.path("model"));
    scene.good(undo);
    scene.refused(undo, 9, "nothing to undo");
    // The log is damaged: in its header, in its table, in a tensor, in a factor, or cut off.
    for (name, content) in &merged {
        fs::write(scene.path("model").join(name), content).unwrap();
    }
    let log = fs::read(scene.path("undo")).unwrap();
    let header = u64::from_le_bytes(log[..8].try_into().unwrap()) as usize;
    for at in [3, 20, header / 2, 8 + header + 3, 8 + header + 1000, log.len() / 2, log.len() - 1] {
        let mut broken = log.clone();
        broken[at] ^= 0x40;
        fs::write(scene.path("undo"), &broken).unwrap();
        scene.refused(undo, 9, "E-010");
    }
    fs::write(scene.path("undo"), &log[..log.len() - 1]).unwrap();
    scene.refused(undo, 9, "E-010");
    scene.refused("unmerge @/model --undo-log @/model/model.safetensors --in-place", 9, "no undo log");
}

/// What the report says of a subtraction is held against the base, which the tool does not see.
#[test]
fn subtraction_is_as_exact_as_it_says() {
    let mut inexact = 0;
    for (model, adapter) in [PAIRS[0], PAIRS[1], PAIRS[3], PAIRS[4]] {
        let scene = Scene::new(model, adapter);
        scene.good("merge @/model -a +:0.75 -o @/merged");
        let report = scene.good("unmerge @/merged -a +:0.75 -o @/restored");
        let (mut same, mut square, mut size) = (0, 0.0, 0.0);
        let (base, restored) =
            (loratool::open_checkpoint(scene.path("model")), loratool::open_checkpoint(scene.path("restored")));
        let (base, restored, merged) =
            (base.unwrap(), restored.unwrap(), loratool::open_checkpoint(scene.path("merged")).unwrap());
        use loratool::TensorSource;
        let read = |c: &loratool::Checkpoint, name: &str| {
            let info = c.info(name).unwrap();
            let mut bytes = vec![0; info.bytes() as usize];
            c.read(name, 0, &mut bytes).unwrap();
            (info.dtype, bytes)
        };
        for name in base.names().filter(|name| read(&base, name) != read(&merged, name)) {
            let ((dtype, w), (_, r)) = (read(&base, name), read(&restored, name));
            let wide = |b: &[u8]| match dtype {
                loratool::Dtype::BF16 => half::bf16::from_le_bytes([b[0], b[1]]).to_f64(),
                loratool::Dtype::F16 => half::f16::from_le_bytes([b[0], b[1]]).to_f64(),
                loratool::Dtype::F32 => f64::from(f32::from_le_bytes(b.try_into().unwrap())),
                _ => f64::from_le_bytes(b.try_into().unwrap()),
            };
            let each = w.len() / base.info(name).unwrap().shape.elements() as usize;
            for (w, r) in w.chunks(each).zip(r.chunks(each)) {
                same += u64::from(w == r);
                square += (wide(w) - wide(r)).powi(2);
                size += wide(r).powi(2);
            }
        }
        let (certain, values) = (report["certain"].as_u64().unwrap(), report["values"].as_u64().unwrap());
        let bound = report["error_bound"].as_f64().unwrap();
        assert!(certain <= same && same <= values, "{model}: {certain} are said to be certain, {same} are the same");
        assert!((square / size).sqrt() <= bound * (1.0 + 1e-5), "{model}: {} is over {bound}", (square / size).sqrt());
        assert!(model.contains("f64") || certain > values / 2, "{model}: only {certain} of {values}");
        inexact += u64::from(same < values);
        assert_eq!(report["exact"], certain == values);
    }
    assert!(inexact > 0, "every subtraction was exact: the test shows nothing");
}

#[test]
fn what_subtracting_cannot_do_is_refused() {
    let scene = Scene::new("models/bert-tiny", "adapters/bert-bias-all");
    scene.good("merge @/model -a + -o @/merged");
    let output = scene.run("unmerge @/merged -a + -o @/restored");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(4) && said.contains("[A-010]") && !scene.path("restored").exists(), "{said}");
    for command in ["unmerge @/merged -o @/x", "unmerge @/merged -a +", "unmerge @/merged -a + --undo-log @/u -o @/x"] {
        assert_eq!(scene.run(command).status.code(), Some(2), "{command}");
    }
}
