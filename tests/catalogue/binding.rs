//! Table M: adapters and bases that are sound and do not fit each other.

use std::path::{Path, PathBuf};

use loratool::{ConvertOptions, MergeOptions, Weighted, convert, dry_run, merge, open_adapter, open_checkpoint};

use crate::bad::{Bad, rows};
use crate::bytes::{floats, raw, safetensors, stored, tensor};
use crate::scene::{A, B, MODEL, NORM, Scene, WEIGHT, factors, norm, values, weight};

/// A base whose weight has this name and shape.
fn base_of(name: &str, shape: &[u64]) -> Scene {
    let values = vec![0.5; shape.iter().product::<u64>() as usize];
    Scene::sound().base(&[floats(name, "F32", shape, &values), norm()])
}

/// The sound adapter with its module renamed.
fn renamed(module: &str) -> Scene {
    let rename = |name: &str| name.replace("layers.0.q_proj", module);
    let [a, b] = [(A, [2u64, 3]), (B, [4, 2])]
        .map(|(name, shape)| floats(&rename(name), "F32", &shape, &[1.0; 8][..(shape[0] * shape[1]) as usize]));
    Scene::sound().adapter(2, &[a, b])
}

/// A second target, which the base does not have.
fn one_layer_too_many() -> Scene {
    let rename = |name: &str| name.replace("layers.0", "layers.9");
    let mut tensors = factors();
    tensors.push(floats(&rename(A), "F32", &[2, 3], &[1.0; 6]));
    tensors.push(floats(&rename(B), "F32", &[4, 2], &[1.0; 8]));
    Scene::sound().adapter(2, &tensors)
}

rows! {
    m01_no_target_in_the_base => {
        vec![
            Bad::scene(4, "A-020", base_of("tower.layers.0.q_proj.weight", &[4, 3]))
                .says("no target")
                .says("layers.0.q_proj.weight")
                .says("tower.layers.0.q_proj.weight")
                .says("longest common suffix")
                .says("--prefix"),
            Bad::scene(4, "A-020", renamed("encoder.deep.gate")),
        ]
    };
    m02_some_targets_missing => {
        vec![Bad::scene(4, "A-021", one_layer_too_many()).says("layers.9.q_proj.weight").says("nearest").says("--allow-missing")]
    };
    m03_two_renamings_that_fit => {
        let two = [("model.layers.0.q_proj.weight", 1.0), ("bert.layers.0.q_proj.weight", 2.0)];
        let tensors = two.map(|(name, x)| floats(name, "F32", &[4, 3], &[x; 12]));
        vec![Bad::scene(4, "A-022", Scene::sound().base(&tensors)).says("ambiguous").says("--prefix")]
    };
    m04_a_suffix_is_no_match => {
        let two = ["left.layers.0.q_proj.weight", "right.layers.0.q_proj.weight"];
        let tensors = two.map(|name| floats(name, "F32", &[4, 3], &[1.0; 12]));
        vec![Bad::scene(4, "A-020", Scene::sound().base(&tensors))]
    };
    m05_shapes_that_differ_by_a_little => {
        vec![
            Bad::scene(4, "A-023", base_of(WEIGHT, &[4, 4])).says("(4, 3)").says("(4, 4)"),
            Bad::scene(4, "A-023", base_of(WEIGHT, &[5, 3])).says("(5, 3)"),
        ]
    };
    m05_a_padded_vocabulary => {
        let name = "lm_head.weight";
        let a = floats("base_model.model.lm_head.lora_A.weight", "F32", &[1, 2], &[1.0; 2]);
        let b = floats("base_model.model.lm_head.lora_B.weight", "F32", &[32000, 1], &[0.0; 32000]);
        let base = [name, "model.embed_tokens.weight"].map(|name| floats(name, "BF16", &[32064, 2], &vec![0.0; 64128]));
        vec![Bad::scene(4, "A-023", Scene::sound().base(&base).adapter(1, &[a, b])).says("vocabulary")]
    };
    m06_nothing_is_broadcast => {
        vec![
            Bad::scene(4, "A-023", base_of(WEIGHT, &[1, 3])).says("(1, 3)"),
            Bad::scene(4, "A-023", base_of(WEIGHT, &[3])).says("(3,)"),
            Bad::scene(4, "A-023", base_of(WEIGHT, &[1, 4, 3])).says("(1, 4, 3)"),
        ]
    };
    m07_a_fused_base => {
        vec![Bad::scene(4, "A-020", base_of("layers.0.qkv_proj.weight", &[12, 3])).says("qkv_proj")]
    };
    m16_packed_bases => {
        let packed = |suffix: &str| {
            let name = format!("layers.0.q_proj.{suffix}");
            Scene::sound().base(&[tensor(&name, "I32", &[1], [0u8; 4]), norm()])
        };
        let stored_as = |dtype: &'static str, bytes: usize| Scene::sound().base(&[tensor(WEIGHT, dtype, &[4, 3], vec![0u8; bytes])]);
        vec![
            Bad::scene(4, "A-025", packed("qweight")).says("GPTQ or AWQ").says("unquantised base"),
            Bad::scene(4, "A-025", packed("weight_packed")).says("compressed-tensors"),
            Bad::scene(4, "A-025", packed("weight.absmax")).says("bitsandbytes"),
            Bad::scene(4, "A-025", stored_as("U8", 12)).says("U8"),
            Bad::scene(4, "A-025", stored_as("F8_E4M3", 12)).says("F8_E4M3"),
        ]
    };
    m17_arguments_that_are_swapped => {
        let adapter_as_base = Scene::sound().base(&factors());
        let model_as_adapter = Scene::sound().adapter(2, &[weight(), norm()]);
        let folders = Scene::sound().without(MODEL).with("base/adapter_model.safetensors", safetensors(&factors())).with("base/adapter_config.json", "{}");
        let model_folder = Scene::sound().without("adapter").with("adapter/model.safetensors", safetensors(&[weight()]));
        vec![
            Bad::scene(4, "A-029", adapter_as_base).says("swapped"),
            Bad::scene(4, "A-029", model_as_adapter).says("swapped"),
            Bad::scene(4, "A-029", folders).says("swapped"),
            Bad::scene(4, "A-029", model_folder).says("swapped"),
        ]
    };
}

#[test]
fn m02_targets_may_be_missing_by_name() {
    let merged = one_layer_too_many().merged_with(|o| o.bind.allow_missing = vec!["layers.9.*".to_owned()]);
    assert_eq!(merged.tensor(WEIGHT), Scene::sound().merged().tensor(WEIGHT));
    let ignored: Vec<_> = merged.report.ignored.iter().map(|i| i.flag.as_str()).collect();
    assert_eq!(ignored, ["--allow-missing", "--allow-missing"]);
    assert_eq!((merged.report.balance.applied, merged.report.balance.ignored), (2, 2));
}

/// The prefixes of the known renamings, both ways, with the same result as exact names.
#[test]
fn m03_one_renaming_maps_every_target() {
    let expected = Scene::sound().merged().tensor(WEIGHT);
    for prefix in ["model.", "bert.", "transformer.", "roberta."] {
        let name = format!("{prefix}{WEIGHT}");
        let weight = floats(&name, "F32", &[4, 3], &values(&stored(&safetensors(&[weight()]), WEIGHT)));
        let merged = Scene::sound().base(&[weight, norm()]).merged();
        assert_eq!(merged.tensor(&name), expected, "{prefix}");
        assert!(merged.report.adapters[0].renaming.is_some());
    }
}

#[test]
fn m03_the_user_s_prefix_is_used_and_no_other() {
    let scene = || base_of("tower.layers.0.q_proj.weight", &[4, 3]);
    let merged = scene().merged_with(|o| o.bind.prefix = Some((String::new(), "tower.".to_owned())));
    assert_eq!(merged.report.balance.modified, 1);
    let wrong =
        Scene::sound().merge(loratool::ReadMode::Read, |o| o.bind.prefix = Some(("layers.".to_owned(), "blocks.".to_owned())));
    // The name is there as it stands, but a renaming that was asked for is used or refused.
    let error = wrong.unwrap_err();
    assert_eq!(error.diagnostics()[0].rule().id, "A-020");
    assert!(error.to_string().contains("\"blocks.0.q_proj.weight\""), "{error}");
}

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

/// Merges two fixtures with options; the error's rule, or the output folder.
fn merge_fixtures(base: &str, adapter: &str, edit: impl FnOnce(&mut MergeOptions)) -> Result<tempfile::TempDir, &'static str> {
    let (base, adapter) = (open_checkpoint(fixture(base)).unwrap(), open_adapter(fixture(adapter)).unwrap());
    let mut options = MergeOptions::default();
    edit(&mut options);
    let out = tempfile::tempdir().unwrap();
    match merge(&base, &[Weighted::full(&adapter)], &out.path().join("out"), &options, &()) {
        Ok(_) => Ok(out),
        Err(error) => {
            assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0, "something was left behind");
            assert_eq!(error.class().exit_code(), 4);
            Err(error.diagnostics()[0].rule().id)
        }
    }
}

#[test]
fn m08_m09_tied_weights_are_refused_or_untied() {
    for adapter in ["llama-embed-unsaved", "llama-embed-only", "llama-lmhead"] {
        let adapter = format!("adapters/{adapter}");
        assert_eq!(merge_fixtures("models/llama-tied", &adapter, |_| {}).map(drop), Err("A-026"), "{adapter}");
        let out = merge_fixtures("models/llama-tied", &adapter, |o| o.bind.untie = true).unwrap();
        let out = out.path().join("out");
        let config: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(out.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["tie_word_embeddings"], false, "{adapter}");
        let (before, after) = (
            std::fs::read(fixture("models/llama-tied/model.safetensors")).unwrap(),
            std::fs::read(out.join("model.safetensors")).unwrap(),
        );
        let embedding = stored(&before, "model.embed_tokens.weight");
        let changed = |name: &str| stored(&after, name) != embedding;
        // Each name has its own values now. One that the adapter does not target has the base's, or the stored ones: PEFT saved the shared
        // tensor of another model as `lm_head.base_layer.weight`, and loads it under both names.
        let head = adapter.ends_with("lmhead");
        assert_eq!((changed("model.embed_tokens.weight"), changed("lm_head.weight")), (true, head), "{adapter}");
    }
}

#[test]
fn m09_a_tie_that_both_tensors_contradict_is_refused() {
    let head = floats("lm_head.weight", "F32", &[4, 3], &[1.0; 12]);
    let embed = floats("model.embed_tokens.weight", "F32", &[4, 3], &[1.0; 12]);
    let rename = |name: &str| name.replace("layers.0.q_proj", "lm_head");
    let adapter = [floats(&rename(A), "F32", &[2, 3], &[1.0; 6]), floats(&rename(B), "F32", &[4, 2], &[1.0; 8])];
    let scene = || {
        Scene::sound()
            .base(&[head.clone(), embed.clone()])
            .adapter(2, &adapter)
            .with("base/config.json", r#"{"model_type": "llama", "tie_word_embeddings": true}"#)
    };
    let error = scene().merge(loratool::ReadMode::Read, |_| {}).unwrap_err();
    assert_eq!((error.class().exit_code(), error.diagnostics()[0].rule().id), (4, "A-026"));
    let merged = scene().merged_with(|o| o.bind.untie = true);
    assert!(merged.report.untied);
    assert_eq!(values(&merged.tensor("model.embed_tokens.weight")), [1.0; 12]);
    assert_eq!(values(&merged.tensor("lm_head.weight")), [3.0; 12]);
}

#[test]
fn m10_a_declared_linear_does_not_decide_a_square_of_gpt2() {
    let scratch = tempfile::tempdir().unwrap();
    for name in ["adapter_model.safetensors", "adapter_config.json"] {
        std::fs::copy(fixture("adapters/gpt2-all").join(name), scratch.path().join(name)).unwrap();
    }
    let config = scratch.path().join("adapter_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    assert!(text.contains("\"fan_in_fan_out\": true"));
    std::fs::write(&config, text.replace("\"fan_in_fan_out\": true", "\"fan_in_fan_out\": false")).unwrap();
    let (base, adapter) = (open_checkpoint(fixture("models/gpt2-tiny")).unwrap(), open_adapter(scratch.path()).unwrap());
    let error = dry_run(&base, &[Weighted::full(&adapter)], &scratch.path().join("out"), &Default::default()).unwrap_err();
    assert!(error.diagnostics().iter().all(|d| d.rule().id == "A-024"), "{error}");
}

/// A container that was made with a base names it by digests.
fn bound_container(folder: &Path) -> PathBuf {
    let (base, adapter) =
        (open_checkpoint(fixture("models/llama-tiny-f32")).unwrap(), open_adapter(fixture("adapters/llama-qv-r8")).unwrap());
    let container = folder.join("adapter.safetensors");
    let mut options = ConvertOptions::default();
    options.base = Some(&base);
    convert(&adapter, &container, &options, &()).unwrap();
    container
}

/// A copy of the base with one byte of a tensor changed.
fn with_flipped_byte(folder: &Path, tensor: &str) -> PathBuf {
    let copy = folder.join(tensor);
    std::fs::create_dir(&copy).unwrap();
    let mut bytes = std::fs::read(fixture("models/llama-tiny-f32/model.safetensors")).unwrap();
    let data = stored(&bytes, tensor);
    let at = bytes.windows(64).position(|window| window == &data[..64]).unwrap();
    bytes[at] ^= 1;
    std::fs::write(copy.join("model.safetensors"), bytes).unwrap();
    copy
}

#[test]
fn m11_m12_another_base_than_the_one_that_the_adapter_names() {
    let scratch = tempfile::tempdir().unwrap();
    let container = bound_container(scratch.path());
    let adapter = open_adapter(&container).unwrap();
    let run = |base: &Path, allow: bool| {
        let mut options = MergeOptions::default();
        options.bind.allow_base_mismatch = allow;
        dry_run(&open_checkpoint(base).unwrap(), &[Weighted::full(&adapter)], &scratch.path().join("out"), &options)
    };
    assert_eq!(run(&fixture("models/llama-tiny-f32"), false).unwrap().adapters[0].base_identity, "verified");
    // M11: a targeted tensor differs, by one bit; M12: another structure.
    for other in [with_flipped_byte(scratch.path(), "model.layers.0.self_attn.q_proj.weight"), fixture("models/llama-tiny-f16")] {
        let error = run(&other, false).unwrap_err();
        assert_eq!((error.class().exit_code(), error.diagnostics()[0].rule().id), (4, "A-027"));
        assert!(error.to_string().contains("different base"), "{error}");
        let allowed = run(&other, true).unwrap();
        assert!(allowed.warnings.iter().any(|w| w.rule == "A-027"));
        assert_eq!(allowed.adapters[0].base_identity, "mismatch");
    }
    // A tensor that the adapter does not touch is not its business.
    let untouched = with_flipped_byte(scratch.path(), "model.layers.0.mlp.up_proj.weight");
    assert_eq!(run(&untouched, false).unwrap().adapters[0].base_identity, "verified");
}

#[test]
fn m13_a_base_that_the_adapter_does_not_name_is_reported_as_unverified() {
    assert_eq!(Scene::sound().merged().report.adapters[0].base_identity, "unverified");
}

#[test]
fn m18_each_tensor_of_a_mixed_base_keeps_its_dtype() {
    let bf16 = floats(WEIGHT, "BF16", &[4, 3], &[1.0; 12]);
    let merged = Scene::sound().base(&[bf16, norm()]).merged();
    let file = &merged.files["model.safetensors"];
    let read = safetensors::SafeTensors::deserialize(file).unwrap();
    assert_eq!(
        (read.tensor(WEIGHT).unwrap().dtype(), read.tensor(NORM).unwrap().dtype()),
        (safetensors::Dtype::BF16, safetensors::Dtype::F32)
    );
    assert_eq!(stored(file, NORM), raw("F32", &[1.0, 0.5, 0.25]));
    assert_eq!(stored(file, WEIGHT)[..6], raw("BF16", &[2.0, 3.0, 4.0]));
}
