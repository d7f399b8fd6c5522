//! What once went wrong, each named after what broke.

use std::fs;
use std::path::{Path, PathBuf};

use loratool::{
    ConvertOptions, ConvertTo, MergeOptions, Overwrite, Weighted, convert, dry_run, merge, open_adapter, open_checkpoint,
};

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

fn rule(error: loratool::Error) -> (u8, &'static str) {
    (error.class().exit_code(), error.diagnostics()[0].rule().id)
}

#[test]
fn convert_does_not_overwrite_the_base_that_it_reads() {
    let scratch = tempfile::tempdir().unwrap();
    let model = scratch.path().join("model");
    copy(&fixture("models/llama-tiny"), &model);
    let (base, adapter) = (open_checkpoint(&model).unwrap(), open_adapter(fixture("adapters/llama-qv-r8")).unwrap());
    let mut options = ConvertOptions::default();
    (options.to, options.base, options.overwrite) = (ConvertTo::Peft, Some(&base), Overwrite::Replace);
    assert_eq!(rule(convert(&adapter, &model, &options, &()).unwrap_err()), (2, "U-003"));
    assert!(open_checkpoint(&model).is_ok());
}

#[test]
fn convert_does_not_overwrite_a_folder_whose_weights_are_a_link() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("adapter");
    copy(&fixture("adapters/llama-qv-r8"), &folder);
    let blob = scratch.path().join("blob");
    fs::rename(folder.join("adapter_model.safetensors"), &blob).unwrap();
    std::os::unix::fs::symlink(&blob, folder.join("adapter_model.safetensors")).unwrap();
    let mut options = ConvertOptions::default();
    (options.to, options.overwrite) = (ConvertTo::Peft, Overwrite::Replace);
    assert_eq!(rule(convert(&open_adapter(&folder).unwrap(), &folder, &options, &()).unwrap_err()), (2, "U-003"));
    assert!(folder.join("adapter_config.json").exists());
}

#[test]
fn overwrite_does_not_remove_a_folder_of_other_things() {
    let scratch = tempfile::tempdir().unwrap();
    let models = scratch.path().join("models");
    copy(&fixture("models/llama-tiny"), &models.join("one"));
    let (base, adapter) =
        (open_checkpoint(fixture("models/llama-tiny")).unwrap(), open_adapter(fixture("adapters/llama-qv-r8")).unwrap());
    let mut options = MergeOptions::default();
    options.overwrite = Overwrite::Replace;
    let error = merge(&base, &[Weighted::full(&adapter)], &models, &options, &()).unwrap_err();
    assert_eq!(rule(error), (2, "U-002"));
    assert!(models.join("one/config.json").exists());
    // A folder with weights is replaced whole, and nothing of the old one is left beside it.
    let error = merge(&base, &[Weighted::full(&adapter)], &models.join("one"), &options, &());
    assert!(error.is_ok());
    assert_eq!(fs::read_dir(&models).unwrap().count(), 1);
}

#[test]
fn a_weight_does_not_leave_full_tensors_at_full_strength() {
    let scratch = tempfile::tempdir().unwrap();
    let (base, adapter) =
        (open_checkpoint(fixture("models/bert-cls")).unwrap(), open_adapter(fixture("adapters/bert-seqcls")).unwrap());
    let run = |weight: f64, skip: bool| {
        let mut options = MergeOptions::default();
        options.bind.skip_replacements = skip;
        dry_run(&base, &[Weighted { adapter: &adapter, weight }], &scratch.path().join("out"), &options)
    };
    assert_eq!(rule(run(0.5, false).unwrap_err()), (4, "A-010"));
    assert_eq!(rule(run(-1.0, false).unwrap_err()), (4, "A-010"));
    assert!(run(0.5, true).is_ok() && run(1.0, false).is_ok());
    assert_eq!(rule(run(0.0, false).unwrap_err()), (4, "A-012"));
}

#[test]
fn untying_needs_a_config_to_say_it_in() {
    let scratch = tempfile::tempdir().unwrap();
    let base = open_checkpoint(fixture("models/llama-tied/model.safetensors")).unwrap();
    let adapter = open_adapter(fixture("adapters/llama-embed-unsaved")).unwrap();
    let mut options = MergeOptions::default();
    options.bind.untie = true;
    let error = dry_run(&base, &[Weighted::full(&adapter)], &scratch.path().join("out.safetensors"), &options).unwrap_err();
    assert!(error.diagnostics().iter().any(|problem| problem.rule().id == "A-026"), "{error}");
    assert_eq!(error.class().exit_code(), 4);
}

#[test]
fn one_adapter_under_two_names_is_one_adapter() {
    let scratch = tempfile::tempdir().unwrap();
    let twin = scratch.path().join("twin");
    copy(&fixture("adapters/llama-qv-r8"), &twin);
    let base = open_checkpoint(fixture("models/llama-tiny")).unwrap();
    let adapters = [open_adapter(fixture("adapters/llama-qv-r8")).unwrap(), open_adapter(&twin).unwrap()];
    let weighted = [Weighted::full(&adapters[0]), Weighted::full(&adapters[1])];
    let out = scratch.path().join("out");
    assert_eq!(rule(dry_run(&base, &weighted, &out, &MergeOptions::default()).unwrap_err()), (2, "A-032"));
    let mut options = MergeOptions::default();
    options.allow_repeat = true;
    assert!(dry_run(&base, &weighted, &out, &options).is_ok());
}

/// fancy-regex misses matches of references back that Python finds, and takes `{2,1}`, which Python refuses.
#[test]
fn patterns_that_would_mean_something_else_here_are_refused() {
    let scratch = tempfile::tempdir().unwrap();
    copy(&fixture("adapters/llama-qv-r8"), scratch.path());
    let config = scratch.path().join("adapter_config.json");
    let text = fs::read_to_string(&config).unwrap();
    for pattern in [r"((.)+)+\\1", "q_proj{2,1}"] {
        fs::write(&config, text.replace("\"alpha_pattern\": {}", &format!("\"alpha_pattern\": {{\"{pattern}\": 4}}"))).unwrap();
        assert_eq!(rule(open_adapter(scratch.path()).unwrap_err()), (4, "P-008"), "{pattern}");
    }
}

#[test]
fn a_container_is_not_renamed_to_another_base() {
    let scratch = tempfile::tempdir().unwrap();
    let (base, other) =
        (open_checkpoint(fixture("models/llama-tiny-f32")).unwrap(), open_checkpoint(fixture("models/llama-tied")).unwrap());
    let adapter = open_adapter(fixture("adapters/llama-qv-r8")).unwrap();
    let container = scratch.path().join("a.safetensors");
    let mut options = ConvertOptions::default();
    options.base = Some(&base);
    convert(&adapter, &container, &options, &()).unwrap();
    options.base = Some(&other);
    let error = convert(&open_adapter(&container).unwrap(), &scratch.path().join("b.safetensors"), &options, &()).unwrap_err();
    assert_eq!(rule(error), (4, "A-027"));
}

/// PEFT shares one update between a tied embedding and its head then; the tensors alone do not say so.
#[test]
fn a_tied_update_is_refused_by_its_name() {
    let scratch = tempfile::tempdir().unwrap();
    for (adapter, refused) in [("llama-embed-unsaved", true), ("llama-qv-r8", false)] {
        let folder = scratch.path().join(adapter);
        copy(&fixture(&format!("adapters/{adapter}")), &folder);
        let config = folder.join("adapter_config.json");
        let text = fs::read_to_string(&config).unwrap();
        assert!(text.contains("\"ensure_weight_tying\": false"));
        fs::write(&config, text.replace("\"ensure_weight_tying\": false", "\"ensure_weight_tying\": true")).unwrap();
        assert_eq!(open_adapter(&folder).map(drop).map_err(rule), if refused { Err((4, "P-006")) } else { Ok(()) });
    }
}

/// transformers fills the embeddings of both halves at random, or scales outputs otherwise, when T5's tie is set to false.
#[test]
fn an_encoder_decoder_is_not_untied() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("adapter");
    copy(&fixture("adapters/llama-lmhead"), &folder);
    let (base, adapter) = (open_checkpoint(fixture("models/t5-tiny")).unwrap(), open_adapter(&folder).unwrap());
    let mut options = MergeOptions::default();
    options.bind.untie = true;
    let error = dry_run(&base, &[Weighted::full(&adapter)], &scratch.path().join("out"), &options).unwrap_err();
    assert!(error.diagnostics().iter().any(|problem| problem.rule().id == "A-026"), "{error}");
    assert_eq!(error.class().exit_code(), 4);
}
