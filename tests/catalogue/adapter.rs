//! Table A: adapters that are sound files and wrong adapters.

use loratool::{MergeOptions, ReadMode, Weighted, merge, open_adapter, open_checkpoint};

use crate::bad::{Bad, rows};
use crate::bytes::{Tensor, floats, stored, tensor};
use crate::scene::{A, B, FACTORS, NORM, Scene, WEIGHT, factors, norm, weight};

/// The sound adapter with these factors instead.
fn of_factors(rank: u64, a: &[u64], b: &[u64]) -> Scene {
    Scene::sound().adapter(rank, &[ones(A, a), ones(B, b)])
}

fn ones(name: &str, shape: &[u64]) -> Tensor {
    floats(name, "F32", shape, &vec![1.0; shape.iter().product::<u64>() as usize])
}

/// The sound adapter with one more tensor.
fn with_tensor(name: &str, shape: &[u64]) -> Scene {
    let mut tensors = factors();
    tensors.push(ones(name, shape));
    Scene::sound().adapter(2, &tensors)
}

/// The sound adapter with this config.
fn of_config(text: &str) -> Scene {
    Scene::sound().with("adapter/adapter_config.json", text)
}

fn alpha(value: &str) -> Scene {
    of_config(&format!(r#"{{"peft_type": "LORA", "r": 2, "lora_alpha": {value}, "fan_in_fan_out": false}}"#))
}

/// A square base, and an adapter for it that declares this.
fn square(declared: &str) -> Scene {
    let values: Vec<f64> = (0..9).map(f64::from).collect();
    let a = floats(A, "F32", &[1, 3], &[1.0, 2.0, 3.0]);
    let b = floats(B, "F32", &[3, 1], &[1.0, 10.0, 100.0]);
    Scene::sound()
        .base(&[floats(WEIGHT, "F32", &[3, 3], &values), norm()])
        .adapter(1, &[a, b])
        .with("adapter/adapter_config.json", format!(r#"{{"peft_type": "LORA", "r": 1, "lora_alpha": 1{declared}}}"#))
}

rows! {
    a01_a_factor_without_its_partner => {
        vec![
            Bad::scene(4, "A-001", Scene::sound().adapter(2, &factors()[..1])).tensor(A).says("no factor B"),
            Bad::scene(4, "A-001", Scene::sound().adapter(2, &factors()[1..])).tensor(B).says("no factor A"),
        ]
    };
    a02_rank_zero => {
        vec![Bad::scene(4, "A-002", of_factors(2, &[0, 3], &[4, 0])).says("rank 0")]
    };
    a03_ranks_that_differ => {
        vec![Bad::scene(4, "A-002", of_factors(2, &[2, 3], &[4, 1])).says("(2, 3)").says("(4, 1)")]
    };
    a04_rank_over_the_limit => {
        vec![Bad::scene(7, "P-005", of_factors(4097, &[4097, 3], &[4, 4097])).says("4096")]
    };
    a05_factors_that_are_transposed => {
        vec![Bad::scene(4, "A-002", of_factors(2, &[3, 2], &[2, 4])).says("transposed")]
    };
    a06_square_weight_of_undeclared_orientation => {
        vec![Bad::scene(4, "A-024", square("")).says("square").says("--fan-in-fan-out")]
    };
    a07_factors_that_are_no_matrices => {
        vec![
            Bad::scene(4, "A-004", of_factors(2, &[6], &[8])).says("ZeRO-3"),
            Bad::scene(4, "A-023", of_factors(2, &[2, 3, 1, 1], &[4, 2, 1, 1])).says("(4, 3, 1, 1)"),
            Bad::scene(4, "A-023", of_factors(2, &[2, 3, 3], &[4, 2, 1])),
            Bad::scene(4, "A-004", of_factors(2, &[2, 3, 3], &[4, 2, 3])).says("any known layer"),
            Bad::scene(4, "A-010", of_factors(2, &[2, 3, 3], &[4, 1, 1])).says("groups"),
        ]
    };
    a09_alpha_zero_is_ambiguous => {
        vec![Bad::scene(4, "A-006", alpha("0")).says("ambiguous"), Bad::scene(4, "A-006", alpha("0.0"))]
    };
    a10_alpha_that_is_no_scale => {
        vec![
            Bad::scene(4, "A-007", alpha("-4")).says("--adapter PATH:-1"),
            Bad::scene(3, "P-001", alpha("NaN")),
            Bad::scene(3, "P-001", alpha("Infinity")),
            Bad::scene(3, "P-001", alpha("1e400")),
        ]
    };
    a11_alpha_as_a_tensor => {
        vec![Bad::scene(4, "P-013", with_tensor("base_model.model.layers.0.q_proj.alpha", &[2])).says("alpha")]
    };
    a13_two_adapters_in_one_file => {
        let named = |name: &str| {
            let rename = |t: &str| t.replace(".weight", &format!(".{name}.weight"));
            vec![ones(&rename(A), &[2, 3]), ones(&rename(B), &[4, 2])]
        };
        let two: Vec<Tensor> = named("default").into_iter().chain(named("second")).collect();
        let half: Vec<Tensor> = factors().into_iter().chain(named("second")).collect();
        vec![
            Bad::scene(4, "P-012", Scene::sound().adapter(2, &two)).says("default").says("second"),
            Bad::scene(4, "P-012", Scene::sound().adapter(2, &half)),
        ]
    };
    a14_one_target_by_two_spellings => {
        let bare = |name: &str| name.trim_start_matches("base_model.model.").to_owned();
        let twice: Vec<Tensor> = factors().into_iter().chain([ones(&bare(A), &[2, 3]), ones(&bare(B), &[4, 2])]).collect();
        vec![Bad::scene(4, "P-011", Scene::sound().adapter(2, &twice)).says("layers.0.q_proj")]
    };
    a15_names_of_two_tools => {
        vec![
            Bad::scene(4, "P-018", with_tensor("lora_unet_down_blocks_0.lora_down.weight", &[2, 3])).says("kohya"),
        ]
    };
    a16_tensors_that_nobody_announced => {
        vec![
            Bad::scene(4, "P-013", with_tensor("base_model.model.norm.weight", &[3])).tensor("base_model.model.norm.weight"),
            Bad::scene(4, "P-013", with_tensor("base_model.model.layers.0.q_proj.bias", &[4])),
            Bad::scene(4, "P-011", with_tensor("base_model.model.layers.0.q_proj.lora_C.weight", &[4])).says("lora_C"),
            Bad::scene(4, "P-011", with_tensor("optimizer", &[4])).tensor("optimizer"),
        ]
    };
    a18_full_tensor_that_modules_to_save_does_not_name => {
        vec![Bad::scene(4, "P-013", with_tensor("base_model.model.head.weight", &[3])).says("modules_to_save")]
    };
    a20_rows_of_an_embedding_and_resized_vocabularies => {
        let rows = with_tensor("base_model.model.embed_tokens.token_adapter.trainable_tokens_delta", &[2, 3]);
        vec![
            Bad::scene(4, "P-013", rows).says("trainable_token_indices"),
            Bad::scene(4, "A-033", with_tensor("base_model.model.embed_tokens.weight", &[9, 3])).says("--add-new-tensors"),
        ]
    };
    a21_bias_update_without_a_bias => {
        let mut tensors = factors();
        tensors.push(ones(&B.replace(".weight", ".bias"), &[4]));
        vec![Bad::scene(4, "A-028", Scene::sound().adapter_with(2, &tensors, r#""lora_bias": true"#)).says("q_proj.bias")]
    };
    a23_rank_that_is_not_the_stated_one => {
        vec![Bad::scene(4, "P-010", Scene::sound().adapter(3, &factors())).says("rank 2").says("3")]
    };
}

#[test]
fn a04_a_rank_that_the_weight_cannot_hold_is_a_warning() {
    assert!(of_factors(5, &[5, 3], &[4, 5]).merged().warned().contains(&"A-003"));
}

#[test]
fn a06_a_square_weight_follows_its_declaration() {
    let merged = |declared: &str| crate::scene::values(&square(declared).merged().tensor(WEIGHT));
    // ΔW = B·A has rows (1, 2, 3), (10, 20, 30), (100, 200, 300).
    assert_eq!(merged(r#", "fan_in_fan_out": false"#), [1.0, 3.0, 5.0, 13.0, 24.0, 35.0, 106.0, 207.0, 308.0]);
    assert_eq!(merged(r#", "fan_in_fan_out": true"#), [1.0, 11.0, 102.0, 5.0, 24.0, 205.0, 9.0, 37.0, 308.0]);
}

#[test]
fn a06_a_weight_that_is_not_square_follows_its_shape() {
    let text = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "fan_in_fan_out": true}"#;
    let merged = of_config(text).merged();
    assert!(merged.warned().contains(&"A-024"));
    assert_eq!(merged.tensor(WEIGHT), Scene::sound().merged().tensor(WEIGHT));
}

#[test]
fn a08_an_absent_alpha_is_peft_s_default_and_is_reported() {
    let scene = of_config(r#"{"peft_type": "LORA", "r": 2, "fan_in_fan_out": false}"#);
    assert_eq!(scene.merged().report.tensors[0].contributions[0].scale, 4.0);
}

#[test]
fn a10_a_huge_scale_is_a_warning() {
    assert!(alpha("1e30").merged().warned().contains(&"A-007"));
}

#[test]
fn a12_a_module_called_alpha_is_a_module() {
    let rename = |name: &str| name.replace("q_proj", "alpha_proj");
    let tensors = [ones(&rename(A), &[2, 3]), ones(&rename(B), &[4, 2])];
    let base = [floats(&rename(WEIGHT), "F32", &[4, 3], &[0.0; 12]), norm()];
    let merged = Scene::sound().base(&base).adapter(2, &tensors).merged();
    assert_eq!(crate::scene::values(&merged.tensor(&rename(WEIGHT))), [2.0; 12]);
}

#[test]
fn a13_an_adapter_name_inside_the_names_is_read_over() {
    let rename = |name: &str| name.replace(".weight", ".default.weight");
    let (a, b) = (stored_factor(A, &[2, 3]), stored_factor(B, &[4, 2]));
    let scene = Scene::sound().adapter(2, &[floats(&rename(A), "F32", &[2, 3], &a), floats(&rename(B), "F32", &[4, 2], &b)]);
    assert_eq!(scene.merged().tensor(WEIGHT), Scene::sound().merged().tensor(WEIGHT));
}

fn stored_factor(name: &str, _: &[u64]) -> Vec<f64> {
    crate::scene::values(&stored(&crate::bytes::safetensors(&factors()), name))
}

/// Each was written by PEFT itself, with a method that no merged weight equals, or that is not applied.
#[test]
fn a17_every_other_method_is_refused_by_its_name() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/adapters/refused");
    let names: &[(&str, &str)] = &[("alora", "aLoRA"), ("oft", "OFT"), ("prompt-tuning", "PROMPT_TUNING")];
    let mut found: Vec<String> =
        std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    found.sort();
    assert_eq!(found, names.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    for (name, method) in names {
        let error = open_adapter(folder.join(name)).err().unwrap_or_else(|| panic!("{name} is accepted"));
        let text = error.to_string().to_lowercase();
        assert_eq!(error.class().exit_code(), 4, "{name}: {text}");
        assert!(text.contains(&method.to_lowercase()), "{name} is not called {method}: {text}");
        assert!(error.diagnostics().iter().any(|d| d.help_text().is_some()), "{name}: no way out: {text}");
    }
}

#[test]
fn a18_modules_to_save_replace_and_are_left_out_by_name() {
    let mut tensors = factors();
    tensors.push(floats("base_model.model.norm.weight", "F32", &[3], &[7.0, 8.0, 9.0]));
    let scene = || Scene::sound().adapter_with(2, &tensors, r#""modules_to_save": ["norm"]"#);
    let applied = scene().merged();
    assert_eq!(crate::scene::values(&applied.tensor(NORM)), [7.0, 8.0, 9.0]);
    assert_eq!((applied.report.balance.applied, applied.report.balance.ignored), (3, 0));
    let skipped = scene().merged_with(|o| o.bind.skip_replacements = true);
    assert_eq!(crate::scene::values(&skipped.tensor(NORM)), [1.0, 0.5, 0.25]);
    let ignored: Vec<_> = skipped.report.ignored.iter().map(|i| (i.tensor.as_str(), i.flag.as_str())).collect();
    assert_eq!(ignored, [("base_model.model.norm.weight", "--skip-replacements")]);
    assert_eq!((skipped.report.balance.applied, skipped.report.balance.ignored), (2, 1));
}

/// W (vocab, dim), A (rank, vocab), B (dim, rank): ΔW = (B·A)ᵀ.
#[test]
fn a19_embeddings_are_updated_the_right_way_round() {
    let name = "embed_tokens.weight";
    let key = |factor: &str| format!("base_model.model.embed_tokens.lora_embedding_{factor}");
    let a = floats(&key("A"), "F32", &[1, 3], &[1.0, 2.0, 3.0]);
    let b = floats(&key("B"), "F32", &[2, 1], &[10.0, 100.0]);
    let scene = Scene::sound().base(&[floats(name, "F32", &[3, 2], &[0.0; 6])]).adapter(1, &[a, b]);
    assert_eq!(crate::scene::values(&scene.merged().tensor(name)), [10.0, 100.0, 20.0, 200.0, 30.0, 300.0]);
}

#[test]
fn a19_a_saved_embedding_takes_the_base_s_place_before_the_update() {
    let name = "embed_tokens.weight";
    let key = |rest: &str| format!("base_model.model.embed_tokens.{rest}");
    let tensors = [
        floats(&key("lora_embedding_A"), "F32", &[1, 3], &[1.0, 2.0, 3.0]),
        floats(&key("lora_embedding_B"), "F32", &[2, 1], &[10.0, 100.0]),
        floats(&key("base_layer.weight"), "F32", &[3, 2], &[1.0; 6]),
    ];
    let scene = || Scene::sound().base(&[floats(name, "F32", &[3, 2], &[5.0; 6])]).adapter(1, &tensors);
    let merged = scene().merged();
    assert_eq!(crate::scene::values(&merged.tensor(name)), [11.0, 101.0, 21.0, 201.0, 31.0, 301.0]);
    assert_eq!(merged.report.tensors[0].action, "replace+update");
    let skipped = scene().merged_with(|o| o.bind.skip_replacements = true);
    assert_eq!(crate::scene::values(&skipped.tensor(name)), [15.0, 105.0, 25.0, 205.0, 35.0, 305.0]);
}

#[test]
fn a24_factors_of_two_dtypes_give_what_one_dtype_gives() {
    let b = floats(B, "F16", &[4, 2], &stored_factor(B, &[4, 2]));
    let a = floats(A, "F64", &[2, 3], &stored_factor(A, &[2, 3]));
    assert_eq!(Scene::sound().adapter(2, &[a, b]).merged().tensor(WEIGHT), Scene::sound().merged().tensor(WEIGHT));
}

#[test]
fn a25_weights_multiply_subtract_and_leave_out() {
    let scene = Scene::sound();
    let (base, adapter) = (open_checkpoint(scene.at("base")).unwrap(), open_adapter(scene.at("adapter")).unwrap());
    let run = |weights: &[f64]| {
        let weighted: Vec<_> = weights.iter().map(|&weight| Weighted { adapter: &adapter, weight }).collect();
        let out = tempfile::tempdir().unwrap();
        let mut options = MergeOptions::default();
        options.allow_repeat = true;
        merge(&base, &weighted, &out.path().join("out"), &options, &()).map(|report| {
            (report, crate::scene::values(&stored(&std::fs::read(out.path().join("out/model.safetensors")).unwrap(), WEIGHT)))
        })
    };
    let plain = crate::scene::values(&stored(&crate::bytes::safetensors(&[weight(), norm()]), WEIGHT));
    // A weight and its negative undo each other in one pass, and a weight of zero among others changes nothing.
    assert_eq!(run(&[0.5, -0.5]).unwrap().1, plain);
    let (report, zero) = run(&[1.0, 0.0]).unwrap();
    assert_eq!(zero, run(&[1.0]).unwrap().1);
    assert_eq!((report.balance.applied, report.balance.ignored), (2, 2));
    let nothing = run(&[0.0]).unwrap_err();
    assert_eq!((nothing.class().exit_code(), nothing.diagnostics()[0].rule().id), (4, "A-012"));
    assert_eq!(run(&[f64::NAN]).unwrap_err().class().exit_code(), 2);
    assert_eq!(run(&[f64::INFINITY]).unwrap_err().class().exit_code(), 2);
}

/// Ten thousand adapters are read in linear time; their ranks add up to more than the limit, which is said with the way out.
#[test]
fn a26_ranks_that_add_up_to_more_than_the_limit_are_refused() {
    let scene = Scene::sound();
    let adapter = open_adapter(scene.at("adapter")).unwrap();
    let many: Vec<_> = (0..10_000).map(|i| Weighted { adapter: &adapter, weight: 1.0 + f64::from(i) }).collect();
    let out = tempfile::tempdir().unwrap();
    let mut options = loratool::CombineOptions::default();
    options.rank = Some(loratool::RankRule::Fixed(2));
    let error = loratool::combine(&many, &out.path().join("out"), &options, &()).unwrap_err();
    let told = &error.diagnostics()[0];
    assert_eq!((error.class().exit_code(), told.rule().id), (7, "A-003"));
    assert!(told.message().contains("20000") && told.help_text().unwrap().contains("--rank"), "{told:?}");
    let few = loratool::combine(&many[..1000], &out.path().join("out"), &options, &()).unwrap();
    assert!(few.targets[0].rank_sum == 2000 && few.targets[0].rank == 2 && few.error < 1e-6, "{:?}", few.targets[0]);
}

/// Unpacked integers are no factors, whatever they hold.
#[test]
fn factors_of_integers_are_refused() {
    let scene = Scene::sound().adapter(2, &[tensor(A, "I8", &[2, 3], [1u8; 6]), ones(B, &[4, 2])]);
    let error = scene.merge(ReadMode::Read, |_| {}).unwrap_err();
    assert_eq!(error.diagnostics()[0].rule().id, "A-005");
    assert!(scene.at(FACTORS).exists() && !scene.at("out").exists());
}
