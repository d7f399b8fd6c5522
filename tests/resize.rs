//! A resized adapter is the best of its rank, by the singular values of the dense update in f64, and says what it lost.

mod common;

use std::path::Path;

use common::updates::{adapter, dense, norm, raw};
use faer::Mat;
use loratool::{
    Adapter, ConvertOptions, ConvertTo, Dtype, Factor, Loader, MemorySource, RankRule, ResizeOptions, convert, open_adapter,
    resize,
};

fn options(rank: RankRule) -> ResizeOptions {
    let mut options = ResizeOptions::default();
    options.rank = rank;
    options
}

fn with(rank: RankRule, change: impl FnOnce(&mut ResizeOptions)) -> ResizeOptions {
    let mut options = options(rank);
    change(&mut options);
    options
}

/// The smallest error at a rank, from the dense singular values.
fn best(matrix: &Mat<f64>, rank: u64) -> f64 {
    let values = matrix.singular_values().unwrap();
    values.iter().skip(rank as usize).map(|v| v * v).sum::<f64>().sqrt()
}

fn resized(original: &Adapter, folder: &Path, options: &ResizeOptions) -> (loratool::report::ResizeReport, Adapter) {
    let out = folder.join("out");
    if out.exists() {
        std::fs::remove_dir_all(&out).unwrap();
    }
    let report = resize(original, &out, options, &()).unwrap();
    (report, open_adapter(&out).unwrap())
}

#[test]
fn every_update_is_the_best_of_its_rank() {
    let folder = tempfile::tempdir().unwrap();
    for name in
        ["llama-qv-r8", "llama-all-r4", "llama-patterns", "llama-rslora", "gpt2-all", "llama-bf16", "llama-embed", "bert-qv"]
    {
        let original = adapter(name);
        for rank in [1, 3, 64] {
            let (report, again) = resized(&original, folder.path(), &with(RankRule::Fixed(rank), |o| o.dtype = Some(Dtype::F32)));
            for ((before, after), told) in original.targets().iter().zip(again.targets()).zip(&report.targets) {
                let (old, new) = (dense(before), dense(after));
                let (error, best) = (norm(&(&old - &new)), best(&old, rank));
                assert_eq!((before.tensor.as_str(), before.kind), (after.tensor.as_str(), after.kind), "{name}");
                assert!(after.scaling.rank <= rank.min(before.scaling.rank), "{name}");
                // 1e-6 of the update is the rounding of the factors to f32.
                assert!(error <= best * (1.0 + 1e-6) + 1e-6 * norm(&old), "{name} rank {rank}: {error} for {best}");
                assert!(
                    (told.error * norm(&old) - error).abs() <= 1e-6 * norm(&old),
                    "{name}: {} told, {error} found",
                    told.error
                );
            }
        }
    }
}

#[test]
fn rules_choose_the_smallest_rank_that_does() {
    let folder = tempfile::tempdir().unwrap();
    let original = adapter("llama-qv-r8");
    for error in [0.1, 0.5, 0.8] {
        let (report, _) = resized(&original, folder.path(), &options(RankRule::Error(error)));
        for (target, told) in original.targets().iter().zip(&report.targets) {
            let whole = dense(target);
            let enough = |rank: u64| best(&whole, rank) <= error * norm(&whole) * (1.0 + 1e-9);
            assert!(enough(told.rank) && (told.rank == 0 || !enough(told.rank - 1)), "{error}: {}", told.rank);
        }
    }
    let (report, _) = resized(&adapter("llama-f16"), folder.path(), &options(RankRule::Error(1e-4)));
    assert!(
        report.targets.iter().all(|told| told.error <= 1e-4) || report.warnings.iter().any(|w| w.message.contains("rounding")),
        "{report:?}"
    );
    let before = original.parameters();
    let (report, again) = resized(&original, folder.path(), &options(RankRule::Parameters(before / 2)));
    assert!(again.parameters() <= before / 2 && again.parameters() > before / 3);
    assert_eq!(report.parameters, again.parameters());
}

#[test]
fn ranks_come_up_to_the_room_that_vllm_makes_anyway() {
    let folder = tempfile::tempdir().unwrap();
    let original = adapter("llama-qv-r8");
    let (report, again) = resized(&original, folder.path(), &with(RankRule::Error(0.5), |o| o.loader = Some(Loader::Vllm)));
    assert_eq!(report.room, Some(8));
    assert!(again.targets().iter().all(|target| target.scaling.rank == 8));
}

#[test]
fn what_is_not_low_rank_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let original = adapter("bert-seqcls");
    let (_, again) = resized(&original, folder.path(), &options(RankRule::Fixed(1)));
    assert_eq!(again.replacements().len(), original.replacements().len());
    let container = folder.path().join("adapter.safetensors");
    let mut to_container = ConvertOptions::default();
    to_container.to = ConvertTo::Container;
    convert(&again, &container, &to_container, &()).unwrap();
    assert_eq!(open_adapter(&container).unwrap().targets().len(), again.targets().len());
}

#[test]
fn a_target_whose_rank_stays_is_copied() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["llama-bf16", "llama-patterns", "llama-rslora"] {
        let original = adapter(name);
        for rule in [RankRule::Fixed(100), RankRule::Energy(1.0)] {
            let (report, again) = resized(&original, folder.path(), &options(rule));
            assert_eq!(report.error, 0.0, "{name}");
            for (before, after) in original.targets().iter().zip(again.targets()) {
                assert!(raw(&before.a) == raw(&after.a) && raw(&before.b) == raw(&after.b), "{name}");
                assert_eq!(before.scaling.effective(), after.scaling.effective(), "{name}");
            }
        }
    }
}

/// What a target has beside its factors stays when they are zero, or have no room.
#[test]
fn bias_updates_stay_whatever_becomes_of_the_factors() {
    let folder = tempfile::tempdir().unwrap();
    let original = adapter("bert-lora-bias");
    let with_bias = |adapter: &Adapter| adapter.targets().iter().filter(|target| target.bias.is_some()).count();
    assert!(with_bias(&original) > 1);
    let each: u64 = original.targets().iter().map(|target| target.out_in().0 + target.out_in().1).sum();
    let (_, again) = resized(&original, folder.path(), &options(RankRule::Parameters(each)));
    assert_eq!(with_bias(&again), with_bias(&original));
    let out = folder.path().join("none");
    let error = resize(&original, &out, &options(RankRule::Parameters(each - 1)), &()).unwrap_err();
    assert_eq!(error.diagnostics()[0].rule().id, "U-001");

    let mut parts = original.parts().clone();
    let mut zeros = MemorySource::new();
    let target = &mut parts.targets[0];
    zeros.insert("zero", target.b.info().clone(), vec![0; target.b.info().bytes() as usize]).unwrap();
    let zeros: std::sync::Arc<dyn loratool::TensorSource> = std::sync::Arc::new(zeros);
    target.b = Factor::new(&zeros, "zero").unwrap();
    let bias = raw(&target.bias.as_ref().unwrap().delta);
    parts.digests.clear();
    parts.content = None;
    let dead = Adapter::new(parts, &loratool::Limits::default()).unwrap();
    let (_, again) = resized(&dead, folder.path(), &options(RankRule::Fixed(4)));
    assert_eq!((with_bias(&again), again.targets()[0].scaling.rank), (with_bias(&original), 1));
    assert!(raw(&again.targets()[0].bias.as_ref().unwrap().delta) == bias);
}

#[test]
fn an_adapter_that_is_zero_is_called_so() {
    let folder = tempfile::tempdir().unwrap();
    let error = resize(&adapter("llama-zero-b"), &folder.path().join("out"), &options(RankRule::Fixed(2)), &()).unwrap_err();
    assert!(error.diagnostics()[0].message().contains("is zero"), "{error}");
}

#[test]
fn what_cannot_be_resized_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let original = adapter("llama-qv-r8");
    let refused = |options: &ResizeOptions| resize(&original, &out, options, &()).unwrap_err().diagnostics()[0].rule().id;
    assert_eq!(refused(&options(RankRule::Auto)), "U-001");
    assert_eq!(refused(&options(RankRule::Parameters(3))), "U-001");
    assert_eq!(refused(&with(RankRule::Fixed(2), |o| o.loader = Some(Loader::Mlx))), "U-001");
    assert_eq!(refused(&with(RankRule::Fixed(2), |o| o.dtype = Some(Dtype::F64))), "U-001");
    assert_eq!(refused(&with(RankRule::Parameters(9999), |o| o.loader = Some(Loader::Vllm))), "U-001");
    assert_eq!(refused(&with(RankRule::Fixed(600), |o| o.loader = Some(Loader::Vllm))), "U-001");
    assert!(!out.exists());
}
