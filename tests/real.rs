//! Real adapters from public repositories, and a real base. The adapters lie outside the repository (they are not ours to commit) and
//! the base is fetched by `fixtures/fetch.sh`; a test that misses its input says so and passes.

mod common;

use std::path::{Path, PathBuf};

use common::{fixture, read_file, read_folder, ulp};
use loratool::{
    CombineMethod, CombineOptions, ConvertOptions, ConvertTo, MajoritySign, MergeOptions, PeftCombination, PeftKind, Weighted,
    combine, convert, delta_rows, inspect_adapter, merge, open_adapter, open_checkpoint,
};
use safetensors::Dtype;

fn present(path: PathBuf) -> Option<PathBuf> {
    if !path.exists() {
        eprintln!("skipped: {} is not here", path.display());
        return None;
    }
    Some(path)
}

fn real(path: &str) -> Option<PathBuf> {
    present(Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/real").join(path))
}

/// all-MiniLM-L6-v2, as `fixtures/fetch.sh` leaves it.
fn minilm() -> Option<PathBuf> {
    let cache = std::env::var_os("LORATOOL_CACHE").map_or_else(|| PathBuf::from("target/fetched"), PathBuf::from);
    present(Path::new(env!("CARGO_MANIFEST_DIR")).join(cache).join("all-MiniLM-L6-v2"))
}

/// Real PEFT adapters with what is in them: targets, rank, scale, replacements.
const PEFT: &[(&str, usize, u64, f64, usize)] = &[
    ("Dee66__contract-buddy/peft_adapter_r4_a16_d0.0_e1_b16", 12, 4, 4.0, 0),
    ("Dee66__contract-buddy/peft_adapter_r4_a16_d0.1_e1_b16", 12, 4, 4.0, 0),
    ("BK7195__deltacompression-poc/adapter", 24, 1, 32.0, 0),
    ("branbot6__sift-opf-zh/adapter", 32, 16, 2.0, 2),
    ("abrhaleyarefaine1997__gpt2-tigrinya-lora", 36, 8, 4.0, 0),
];

#[test]
fn real_peft_adapters_are_what_their_configs_say() {
    for (path, targets, rank, scale, replacements) in PEFT {
        let Some(folder) = real(path) else { continue };
        let report = inspect_adapter(&open_adapter(folder).unwrap(), &Default::default()).unwrap();
        assert_eq!((report.targets.len(), report.replacements.len()), (*targets, *replacements), "{path}");
        assert!(report.targets.iter().all(|t| t.rank == *rank && t.scale == *scale), "{path}: {:?}", report.targets[0]);
    }
}

#[test]
fn real_adapters_of_other_tools_are_refused_by_their_name() {
    for (path, name) in [
        ("wyek1n__MLX-CLI/adapters/adapters.safetensors", "MLX"),
        ("catundchat__stable-diffusion-v1.5-lora/pytorch_lora_weights.safetensors", "diffusers"),
    ] {
        let Some(file) = real(path) else { continue };
        let error = open_adapter(file).unwrap_err();
        assert_eq!((error.class().exit_code(), error.diagnostics()[0].rule().id), (4, "P-018"));
        assert!(error.to_string().contains(name), "{error}");
    }
}

/// PEFT → container → PEFT keeps every tensor bit for bit, and the config's meaning.
#[test]
fn real_adapters_survive_the_way_through_the_container() {
    let scratch = tempfile::tempdir().unwrap();
    for (i, (path, ..)) in PEFT.iter().enumerate() {
        let Some(folder) = real(path) else { continue };
        let (container, back) = (scratch.path().join(format!("{i}.safetensors")), scratch.path().join(format!("{i}")));
        let mut options = ConvertOptions::default();
        convert(&open_adapter(&folder).unwrap(), &container, &options, &()).unwrap();
        options.to = ConvertTo::Peft;
        let report = convert(&open_adapter(&container).unwrap(), &back, &options, &()).unwrap();
        assert_eq!(report.losses, [], "{path}");
        let tensors = |folder: &Path| {
            let bytes = std::fs::read(folder.join("adapter_model.safetensors")).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let mut all: Vec<_> =
                file.tensors().into_iter().map(|(n, v)| (n, v.dtype(), v.shape().to_vec(), v.data().to_vec())).collect();
            all.sort_by(|x, y| x.0.cmp(&y.0));
            all
        };
        assert!(tensors(&folder) == tensors(&back), "{path}");
        let config = |folder: &Path| -> serde_json::Value {
            serde_json::from_str(&std::fs::read_to_string(folder.join("adapter_config.json")).unwrap()).unwrap()
        };
        assert_eq!(config(&folder), config(&back), "{path}");
    }
}

/// The finding that a merge can erase an adapter: almost every weight changes in F32, and almost none would in a 16-bit format.
#[test]
fn the_minilm_pair_changes_in_f32_and_hardly_in_bf16() {
    let Some(base_path) = minilm() else { return };
    let base = open_checkpoint(&base_path).unwrap();
    let before = read_folder(&base_path);
    for (path, ..) in &PEFT[..2] {
        let Some(folder) = real(path) else { continue };
        let scratch = tempfile::tempdir().unwrap();
        let (adapter, output) = (open_adapter(&folder).unwrap(), scratch.path().join("out"));
        let report = merge(&base, &[Weighted::full(&adapter)], &output, &MergeOptions::default(), &()).unwrap();
        let (all, changed) = report.changed();
        let (_, narrowed) = report.changed_if_narrowed().unwrap();
        let percent = |n: u64| (1000.0 * n as f64 / all as f64).round() / 10.0;
        assert_eq!(all, 12 * 384 * 384);
        assert_eq!(percent(changed), 99.9, "{path}");
        assert!((1.9..=2.0).contains(&percent(narrowed.bf16)), "{path}: {}", percent(narrowed.bf16));
        assert!((10.0..10.6).contains(&percent(narrowed.f16)), "{path}: {}", percent(narrowed.f16));
        // The figures of the report are those of the files.
        let after = read_folder(&output);
        let differ = |name: &str| before[name].data.iter().zip(&after[name].data).filter(|(w, m)| w != m).count() as u64;
        assert_eq!(before.keys().map(|name| differ(name)).sum::<u64>(), changed);
        assert!(report.tensors.iter().all(|t| (t.gain.unwrap() - 1.0).abs() < 0.01));
    }
}

#[test]
fn an_adapter_trained_by_peft_merges_as_peft_merges_it_and_brings_its_head() {
    let Some(base) = minilm() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("out");
    let (base, adapter) = (open_checkpoint(base).unwrap(), open_adapter(fixture("adapters/minilm-reviews")).unwrap());
    let refused = merge(&base, &[Weighted::full(&adapter)], &output, &MergeOptions::default(), &()).unwrap_err();
    assert_eq!(refused.diagnostics()[0].rule().id, "A-033");
    let mut options = MergeOptions::default();
    options.bind.add_new_tensors = true;
    let report = merge(&base, &[Weighted::full(&adapter)], &output, &options, &()).unwrap();
    assert_eq!((report.balance.modified, report.balance.added, report.balance.ignored), (12, 2, 0));
    let (ours, peft) = (read_folder(&output), read_file(&fixture("goldens/minilm-reviews/sample.safetensors")));
    let head = read_file(&fixture("adapters/minilm-reviews/adapter_model.safetensors"));
    assert_eq!(ours["classifier.weight"], head["base_model.model.classifier.weight"]);
    for (name, theirs) in &peft {
        let largest = theirs.data.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let far =
            ours[name].data.iter().zip(&theirs.data).filter(|(m, p)| (**m - **p).abs() > 2.0 * ulp(Dtype::F32, largest)).count();
        assert_eq!(far, 0, "{name}");
    }
}

/// Every method on two real adapters of one base: what the report says of the distance from the sum is what the dense updates say.
#[test]
fn real_adapters_are_combined_by_every_method() {
    let path = |dropout: &str| real(&format!("Dee66__contract-buddy/peft_adapter_r4_a16_d{dropout}_e1_b16"));
    let (Some(one), Some(other)) = (path("0.0"), path("0.1")) else { return };
    let adapters = [one, other].map(|path| open_adapter(path).unwrap());
    let weighted = adapters.each_ref().map(Weighted::full);
    let half = loratool::MethodNumbers::default();
    let methods = CombineMethod::NAMES.map(|name| CombineMethod::named(name, &half).unwrap());
    let peft = PeftKind::ALL
        .map(|kind| CombineMethod::Peft(PeftCombination { kind, density: 0.5, majority: MajoritySign::Total, seed: 0 }));
    let folder = tempfile::tempdir().unwrap();
    for method in methods.into_iter().chain(peft) {
        let mut options = CombineOptions::default();
        (options.method, options.overwrite) = (method, loratool::Overwrite::Replace);
        let out = folder.path().join("out");
        let report = combine(&weighted, &out, &options, &()).unwrap();
        let made = open_adapter(&out).unwrap();
        let (mut whole, mut off) = (0.0, 0.0);
        for target in made.targets() {
            let (rows, _) = target.out_in();
            let mut sum = vec![0.0; delta_rows(target, 0..rows).unwrap().len()];
            for adapter in &adapters {
                let of = adapter.targets().iter().find(|of| of.tensor == target.tensor).unwrap();
                sum.iter_mut().zip(delta_rows(of, 0..rows).unwrap()).for_each(|(sum, delta)| *sum += delta);
            }
            let found = delta_rows(target, 0..rows).unwrap();
            whole += sum.iter().map(|x| x * x).sum::<f64>();
            off += sum.iter().zip(found).map(|(x, y)| (x - y).powi(2)).sum::<f64>();
        }
        let off = (off / whole).sqrt();
        assert!(
            (report.from_sum - off).abs() <= 1e-6 * off.max(1e-1),
            "{}: {} told, {off} found",
            method.name(),
            report.from_sum
        );
        assert_eq!(report.targets.len(), 12);
        let is_sum = ["linear", "cat", "peft:cat"].contains(&method.name());
        assert!(is_sum == (off < 1e-6), "{}: {off}", method.name());
    }
}
