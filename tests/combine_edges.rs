//! Combinations at the edge: what is too large or too small, what cancels, what stands beside the updates, what a file does not say, and what
//! was merged before. None of it may end in a wrong value or in silence.
#![cfg(feature = "cli")]

mod common;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use common::fixture;
use common::updates::{adapter, combined, dense, memory, norm, raw, wave};
use faer::Mat;
use loratool::{
    Adapter, CombineMethod, CombineOptions, CompareOptions, Dtype, Factor, MemorySource, PartsPolicy, Target, TensorInfo,
    TensorSource, Weighted, combine, compare, open_adapter,
};

fn run(folder: &Path, arguments: &str) -> Output {
    let root = fixture("").display().to_string();
    let words = arguments.split_whitespace().map(|word| word.replace("@/", &root));
    Command::new(env!("CARGO_BIN_EXE_loratool")).args(words).current_dir(folder).output().unwrap()
}

/// Runs it, and gives the exit code and what it said.
fn told(folder: &Path, arguments: &str) -> (i32, String) {
    let output = run(folder, arguments);
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn with(method: CombineMethod) -> CombineOptions {
    let mut options = CombineOptions::default();
    options.method = method;
    options
}

fn refused(adapters: &[(&Adapter, f64)], options: &CombineOptions) -> String {
    let folder = tempfile::tempdir().unwrap();
    let weighted: Vec<_> = adapters.iter().map(|(adapter, weight)| Weighted { adapter, weight: *weight }).collect();
    let error = combine(&weighted, &folder.path().join("out"), options, &()).unwrap_err();
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none(), "something was written");
    error.diagnostics().iter().map(|d| format!("{} {}", d.rule().id, d.message())).collect::<Vec<_>>().join("\n")
}

fn scaled(by: f64, matrix: &Mat<f64>) -> Mat<f64> {
    faer::Scale(by) * matrix
}

const BY_VALUE: [CombineMethod; 4] = [
    CombineMethod::Ties { density: 0.3 },
    CombineMethod::MagnitudePrune { density: 0.3 },
    CombineMethod::DareTies { density: 0.5, seed: 1 },
    CombineMethod::Breadcrumbs { density: 0.8, outliers: 0.01 },
];

#[test]
fn an_update_out_of_the_range_of_f64_is_refused_and_never_dropped() {
    let plain = memory(&wave(40, 3, 0.1), &wave(3, 50, 0.5));
    let huge = memory(&scaled(1e200, &wave(40, 3, 0.3)), &scaled(1e200, &wave(3, 50, 0.9)));
    let tiny = memory(&scaled(1e-200, &wave(40, 3, 0.3)), &scaled(1e-200, &wave(3, 50, 0.9)));
    for method in BY_VALUE.into_iter().chain([CombineMethod::Linear, CombineMethod::Slerp, CombineMethod::Tsv]) {
        let told = refused(&[(&plain, 1.0), (&huge, 1.0)], &with(method));
        assert!(told.contains("A-031"), "{}: {told}", method.name());
    }
    let told = refused(&[(&tiny, 1.0)], &CombineOptions::default());
    assert!(told.contains("A-031") && told.contains("square"), "{told}");
    for weight in [1e-170, 1e250] {
        assert!(refused(&[(&plain, weight)], &CombineOptions::default()).starts_with("U-001"));
    }
}

/// What F32 cannot hold of factors, alpha holds.
#[test]
fn small_weights_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (adapter("llama-qv-r8"), adapter("llama-all-r4"));
    for weight in [1e-50, 1e50] {
        let (report, again) = combined(&[(&one, weight), (&two, 0.3 * weight)], folder.path(), &CombineOptions::default());
        assert!(report.error < 1e-7, "{weight:e}: {}", report.error);
        let (plain, target) =
            (combined(&[(&one, 1.0), (&two, 0.3)], folder.path(), &CombineOptions::default()).1, &again.targets()[0]);
        let wanted = scaled(weight, &dense(&plain.targets()[0]));
        assert!(norm(&(&dense(target) - &wanted)) < 1e-6 * norm(&wanted));
    }
}

#[test]
fn what_cancels_is_called_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let one = adapter("llama-qv-r8");
    let (report, _) = combined(&[(&one, 1.0), (&one, -1.0)], folder.path(), &CombineOptions::default());
    assert!(report.targets.iter().all(|target| target.norm == 0.0), "{:?}", report.targets);
    assert!(report.warnings.iter().any(|note| note.message.contains("cancel")), "{:?}", report.warnings);
    let told = refused(&[(&one, 1.0), (&one, -1.0)], &with(CombineMethod::IsoC));
    assert!(told.contains("A-012"), "{told}");
    assert!(refused(&[(&one, 0.0)], &CombineOptions::default()).contains("weights of everything"));
}

/// B of zeros, but with an update of the bias.
fn only_biases(adapter: &Adapter) -> Adapter {
    let mut parts = adapter.parts().clone();
    let mut source = MemorySource::new();
    for target in &parts.targets {
        let info: TensorInfo = target.b.info().clone();
        assert_eq!(info.dtype, Dtype::F32);
        source.insert(target.b.name(), info.clone(), vec![0; info.bytes() as usize]).unwrap();
    }
    let source: Arc<dyn TensorSource> = Arc::new(source);
    parts.targets.iter_mut().for_each(|target| target.b = Factor::new(&source, target.b.name()).unwrap());
    Adapter::new(parts, &Default::default()).unwrap()
}

#[test]
fn a_bias_update_stays_where_nothing_is_left_of_the_factors() {
    let folder = tempfile::tempdir().unwrap();
    let biased = only_biases(&adapter("bert-lora-bias"));
    for method in BY_VALUE {
        let (_, again) = combined(&[(&biased, 1.0)], folder.path(), &with(method));
        assert_eq!(again.targets().len(), biased.targets().len(), "{}", method.name());
        // What is added to the bias: its update with the scale.
        let added = |target: &Target| -> Vec<f64> {
            let raw = raw(&target.bias.as_ref().unwrap().delta);
            raw.as_chunks::<4>().0.iter().map(|x| f64::from(f32::from_le_bytes(*x)) * target.scaling.effective()).collect()
        };
        for (found, wanted) in again.targets().iter().zip(biased.targets()) {
            let (found, wanted) = (added(found), added(wanted));
            assert!(wanted.iter().any(|x| *x != 0.0));
            assert!(found.iter().zip(wanted).all(|(x, y)| (x - y).abs() <= 1e-6 * y.abs()), "{}", method.name());
        }
    }
}

#[test]
fn magnitudes_are_no_part_of_a_pruned_update() {
    let dora = open_adapter(fixture("kinds/dora-linear/adapter-f32")).unwrap();
    let told = refused(&[(&dora, 1.0)], &with(CombineMethod::Ties { density: 0.5 }));
    assert!(told.contains("magnitude"), "{told}");
    let folder = tempfile::tempdir().unwrap();
    let (_, again) = combined(&[(&dora, 1.0)], folder.path(), &CombineOptions::default());
    assert!(again.targets().iter().all(|target| target.magnitude.is_some()));
}

#[test]
fn multipliers_have_a_mean() {
    for kind in ["ia3", "ia3-conv1d", "ia3-conv2d"] {
        let folder = tempfile::tempdir().unwrap();
        let one = open_adapter(fixture("kinds").join(kind).join("adapter-f32")).unwrap();
        let mut options = CombineOptions::default();
        options.parts = PartsPolicy::Average;
        let (report, again) = combined(&[(&one, 2.0)], folder.path(), &options);
        assert!(again.rescalings().len() == one.rescalings().len() && !report.decided.is_empty(), "{kind}");
        for (found, wanted) in again.rescalings().iter().zip(one.rescalings()) {
            assert!(found.tensor == wanted.tensor && raw(&found.by) == raw(&wanted.by), "{kind}: {}", found.tensor);
        }
    }
}

/// PEFT before 0.19 laid stacks out in another way, and of squares only the version tells.
#[test]
fn old_stacks_of_square_experts_stay_the_right_way_round() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let kind = "@/kinds/experts-old-square";
    for (i, made) in
        [format!("combine {kind}/adapter-f32 -o x0"), format!("resize {kind}/adapter-f32 --rank 4 -o x1")].iter().enumerate()
    {
        assert_eq!(told(here, made).0, 0, "{}", told(here, made).1);
        for (name, adapter) in [("m", format!("{kind}/adapter-f32")), ("n", format!("x{i}"))] {
            let (code, said) = told(here, &format!("merge {kind}/base-f32 -a {adapter} -o {name}{i}"));
            assert_eq!(code, 0, "{said}");
        }
        let read = |name: &str| common::read_folder(&here.join(format!("{name}{i}")));
        for (tensor, wanted) in read("m") {
            let found = &read("n")[&tensor];
            let off = wanted.data.iter().zip(&found.data).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
            assert!(off < 1e-6, "{made} {tensor}: {off}");
        }
    }
    let (code, said) = told(here, &format!("combine {kind}/adapter-f32 @/kinds/experts-square/adapter-f32 -o y"));
    assert!(code == 4 && said.contains("--expert-axes"), "{code} {said}");
}

#[test]
fn a_recipe_destroys_nothing_and_is_there_with_its_output_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    common::copy_folder(&fixture("adapters/llama-qv-r8"), &here.join("a"));
    let before = common::bytes(&here.join("a"));
    assert_eq!(told(here, "combine a -o old").0, 0);
    let old = common::bytes(&here.join("old"));
    for (output, recipe, code) in [
        ("out", "a/adapter_config.json", 2),
        ("out", "a/adapter_model.safetensors", 2),
        ("out.safetensors", "out.safetensors", 2),
        ("out", "out", 2),
        ("old", "old/adapter_config.json", 2),
        ("out", "nowhere/r.toml", 6),
        ("out", "/proc/r.toml", 6),
    ] {
        let (found, said) = told(here, &format!("combine a -o {output} --overwrite --save-recipe {recipe}"));
        assert_eq!(found, code, "{output} {recipe}: {said}");
        assert!(common::bytes(&here.join("a")) == before && common::bytes(&here.join("old")) == old, "{output} {recipe}");
        assert!(!here.join("out").exists() && !here.join("out.safetensors").exists(), "{output} {recipe}");
    }
    let unnamed = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"bad\xff").to_owned();
    common::copy_folder(&fixture("adapters/llama-qv-r8"), &here.join(&unnamed));
    let output = Command::new(env!("CARGO_BIN_EXE_loratool"))
        .arg("combine")
        .arg(&unnamed)
        .args(["-o", "out", "--save-recipe", "r.toml"])
        .current_dir(here)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!here.join("out").exists() && !here.join("r.toml").exists());
}

#[test]
fn a_recipe_holds_what_no_tensor_says() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    common::copy_folder(&fixture("adapters/llama-qv-r8"), &here.join("a"));
    for loader in ["sglang", "tensorrt-llm", "vllm"] {
        let (code, said) = told(here, &format!("combine a --rank 5 --for {loader} -o {loader} --save-recipe {loader}.toml"));
        assert_eq!(code, 0, "{said}");
        let (code, said) = told(here, &format!("combine --recipe {loader}.toml -o again-{loader}"));
        assert_eq!(code, 0, "{said}");
    }
    let config = here.join("a/adapter_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let changed = text.replace("\"lora_alpha\": 16", "\"lora_alpha\": 32");
    assert_ne!(text, changed);
    std::fs::write(&config, changed).unwrap();
    let (code, said) = told(here, "combine --recipe vllm.toml -o third");
    assert!(code == 9 && said.contains("scales"), "{code} {said}");
    let mha = "@/kinds/mha/adapter-f32";
    assert_eq!(told(here, &format!("combine {mha} --attention-twice -o m1 --save-recipe m.toml")).0, 0);
    assert_eq!(told(here, "combine --recipe m.toml -o m2").0, 9);
    assert_eq!(told(here, "combine --recipe m.toml --attention-twice -o m2").0, 0);
}

#[test]
fn what_a_method_merged_is_not_merged_again() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let (base, one, two) = ("@/models/llama-tiny-f32", "@/adapters/llama-qv-r8", "@/adapters/llama-all-r4");
    for method in ["ties", "tsv"] {
        assert_eq!(told(here, &format!("merge {base} -a {one} -a {one} --method {method} -o twice")).0, 2);
        let output = run(here, &format!("merge {base} -a {one} -a {two} --method {method} -o {method}"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains(&format!("method       {method}")), "{text}");
        let (code, said) = told(here, &format!("merge {method} -a {two} -o again"));
        assert!(code == 2 && said.contains("A-032"), "{code} {said}");
        let (code, said) = told(here, &format!("merge {method} -a {two}:0.5 -a @/adapters/llama-r1 --method ties -o again"));
        assert!(code == 2 && said.contains("A-032") && said.contains("llama-all-r4"), "{code} {said}");
        // It is not in there by itself, so that to subtract it would undo something else.
        let (code, said) = told(here, &format!("unmerge {method} -a {two} -o again"));
        assert!(code == 2 && said.contains("undo log"), "{code} {said}");
        assert!(!here.join("again").exists() && !here.join("twice").exists());
        let record = std::fs::read_to_string(here.join(method).join("loratool.merge.json")).unwrap();
        assert!(record.contains(&format!("\"name\": \"{method}\"")), "{record}");
    }
    // What is wrong is said before anything is computed, and the same whatever the order.
    assert_eq!(told(here, &format!("merge {base} -a {one} -a {two} --method tsv -o ties")).0, 2);
}

#[test]
fn options_that_do_nothing_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let both = "combine @/adapters/llama-qv-r8 @/adapters/llama-qv-r8";
    for how in ["peft:cat --rank 3", "peft:linear --rank 3", "peft:ties --density 0.5 --dtype bf16", "peft:svd --split a"] {
        let (code, said) = told(folder.path(), &format!("{both} --compat {how} -o out"));
        assert!(code == 2 && said.contains("of its own"), "{how}: {code} {said}");
    }
}

#[test]
fn compare_says_what_it_leaves_out_and_what_is_zero() {
    let options = CompareOptions::default();
    let ia3 = open_adapter(fixture("kinds/ia3/adapter-f32")).unwrap();
    let report = compare([&ia3, &ia3], None, &options, &()).unwrap();
    assert!(report.verdict.contains("no low-rank updates") && report.warnings.len() == 2, "{report:?}");
    let head = adapter("bert-seqcls");
    let report = compare([&head, &head], None, &options, &()).unwrap();
    assert!(report.relation == "same" && report.warnings[0].message.contains("full tensor"), "{report:?}");
    let (one, zero) = (memory(&wave(40, 3, 0.1), &wave(3, 50, 0.5)), memory(&Mat::zeros(40, 2), &wave(2, 50, 0.5)));
    let report = compare([&one, &zero], None, &options, &()).unwrap();
    assert!(report.relation == "zero" && report.verdict.contains("zero"), "{report:?}");
}
