//! A combination is the sum of the updates of its adapters, by the dense updates in f64, whatever the adapters are like.

mod common;

use std::sync::Arc;

use common::fixture;
use common::updates::{combined, dense, memory, norm, raw, wave};
use faer::Mat;
use loratool::{
    Adapter, CombineMethod, CombineOptions, Dtype, Factor, LayerWeight, MemorySource, OpenOptions, Orientation, PartsPolicy,
    RankRule, Target, TensorSource, Weighted, combine, open_adapter, open_adapter_with,
};
use proptest::prelude::*;

fn with(change: impl FnOnce(&mut CombineOptions)) -> CombineOptions {
    let mut options = CombineOptions::default();
    change(&mut options);
    options
}

fn adapter(name: &str) -> Adapter {
    let path = fixture("adapters").join(name);
    let mut options = OpenOptions::default();
    options.expert_axes = name.starts_with("experts").then_some(Orientation::OutIn);
    open_adapter_with(if path.exists() { path } else { fixture("kinds").join(name).join("adapter-f32") }, &options).unwrap()
}

fn target<'a>(adapter: &'a Adapter, tensor: &str) -> Option<&'a Target> {
    adapter.targets().iter().find(|target| target.tensor == tensor)
}

fn names(adapters: &[&Adapter]) -> Vec<String> {
    let mut names: Vec<String> = adapters.iter().flat_map(|a| a.targets().iter().map(|t| t.tensor.clone())).collect();
    names.sort();
    names.dedup();
    names
}

/// Σ wₜ·Δₜ of a tensor, and Σ |wₜ|·‖Δₜ‖, by which rounding is measured: the sum itself may cancel.
fn sum(adapters: &[(&Adapter, f64)], tensor: &str) -> (Mat<f64>, f64) {
    let mut parts = adapters.iter().filter_map(|(adapter, weight)| Some((dense(target(adapter, tensor)?), *weight)));
    let (first, weight) = parts.next().unwrap();
    let (mut total, mut size) = (faer::Scale(weight) * &first, weight.abs() * norm(&first));
    for (delta, weight) in parts {
        total += faer::Scale(weight) * &delta;
        size += weight.abs() * norm(&delta);
    }
    (total, size)
}

fn refused(adapters: &[(&Adapter, f64)], options: &CombineOptions) -> Vec<(&'static str, String)> {
    let folder = tempfile::tempdir().unwrap();
    let weighted: Vec<_> = adapters.iter().map(|(adapter, weight)| Weighted { adapter, weight: *weight }).collect();
    let error = combine(&weighted, &folder.path().join("out"), options, &()).unwrap_err();
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none(), "something was written");
    error.diagnostics().iter().map(|d| (d.rule().id, d.message().to_owned())).collect()
}

const LLAMAS: [&str; 8] =
    ["llama-qv-r8", "llama-all-r4", "llama-patterns", "llama-rslora", "llama-bf16", "llama-f16", "llama-odd-scale", "llama-r1"];

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]

    #[test]
    fn the_sum_is_the_sum_of_the_updates(
        picked in proptest::sample::subsequence((0..LLAMAS.len()).collect::<Vec<_>>(), 1..5),
        weights in proptest::array::uniform4(-2.0f64..2.0),
        turned in any::<usize>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let adapters: Vec<Adapter> = picked.iter().map(|i| adapter(LLAMAS[*i])).collect();
        let mut weighted: Vec<(&Adapter, f64)> = adapters.iter().zip(weights).collect();
        let (report, again) = combined(&weighted, folder.path(), &CombineOptions::default());
        prop_assert_eq!(again.targets().len(), names(&adapters.iter().collect::<Vec<_>>()).len());
        for found in again.targets() {
            let (wanted, size) = sum(&weighted, &found.tensor);
            let off = norm(&(&dense(found) - &wanted));
            prop_assert!(off <= 1e-6 * size, "{}: {off:e} of {size}", found.tensor);
            let told = report.targets.iter().find(|told| told.tensor == found.tensor).unwrap();
            prop_assert!((told.norm - norm(&wanted)).abs() <= 1e-9 * size);
            prop_assert!((told.error * told.norm - off).abs() <= 1e-9 * size, "{} told, {off} found", told.error * told.norm);
        }
        // The order that is given changes no value.
        let by = turned % weighted.len();
        weighted.rotate_left(by);
        combined(&weighted, folder.path(), &CombineOptions::default());
        let turned = open_adapter(folder.path().join("out")).unwrap();
        for (one, two) in again.targets().iter().zip(turned.targets()) {
            prop_assert!(raw(&one.a) == raw(&two.a) && raw(&one.b) == raw(&two.b));
        }
    }

    #[test]
    fn a_lower_rank_is_the_best_one(
        picked in proptest::sample::subsequence((0..LLAMAS.len()).collect::<Vec<_>>(), 2..4),
        weights in proptest::array::uniform4(-2.0f64..2.0),
        rank in 1u64..14,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let adapters: Vec<Adapter> = picked.iter().map(|i| adapter(LLAMAS[*i])).collect();
        let weighted: Vec<(&Adapter, f64)> = adapters.iter().zip(weights).collect();
        let (report, again) = combined(&weighted, folder.path(), &with(|o| o.rank = Some(RankRule::Fixed(rank))));
        for found in again.targets() {
            let (wanted, size) = sum(&weighted, &found.tensor);
            let values = wanted.singular_values().unwrap();
            let best = values.iter().skip(rank as usize).map(|v| v * v).sum::<f64>().sqrt();
            let off = norm(&(&dense(found) - &wanted));
            prop_assert!(found.scaling.rank <= rank && off <= best * (1.0 + 1e-6) + 1e-6 * size, "{off} for {best}");
            let told = report.targets.iter().find(|told| told.tensor == found.tensor).unwrap();
            prop_assert!((told.error * norm(&wanted) - off).abs() <= 1e-6 * size);
            prop_assert_eq!(told.error, told.from_sum);
        }
    }
}

/// B·G and G⁻¹·A are the same adapter, and no method may see the difference.
#[test]
fn the_gauge_of_the_factors_does_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    let (b, a) = (wave(20, 3, 0.1), wave(3, 30, 0.5));
    let gauge = Mat::from_fn(3, 3, |i, j| if i == j { 40.0 } else { 0.3 * (i as f64 - 2.0 * j as f64) });
    let inverse = faer::linalg::solvers::DenseSolveCore::inverse(&gauge.partial_piv_lu());
    let (one, two, other) =
        (memory(&b, &a), memory(&(&b * &gauge), &(&inverse * &a)), memory(&wave(20, 2, 0.9), &wave(2, 30, 0.2)));
    for options in
        [CombineOptions::default(), with(|o| o.rank = Some(RankRule::Fixed(2))), with(|o| o.method = CombineMethod::Svd)]
    {
        let of = |x: &Adapter| dense(&combined(&[(x, 0.6), (&other, -0.4)], folder.path(), &options).1.targets()[0]);
        let (one, two) = (of(&one), of(&two));
        assert!(norm(&(&one - &two)) <= 1e-6 * norm(&one), "{options:?}");
    }
}

#[test]
fn a_negative_weight_takes_out_what_was_added() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (adapter("llama-qv-r8"), adapter("llama-all-r4"));
    let (_, both) = combined(&[(&one, 1.0), (&two, 0.7)], folder.path(), &CombineOptions::default());
    let kept = folder.path().join("both");
    std::fs::rename(folder.path().join("out"), &kept).unwrap();
    drop(both);
    let both = open_adapter(&kept).unwrap();
    let (_, again) = combined(&[(&both, 1.0), (&two, -0.7)], folder.path(), &with(|o| o.rank = Some(RankRule::Fixed(8))));
    for original in one.targets() {
        let (was, is) = (dense(original), dense(target(&again, &original.tensor).unwrap()));
        assert!(norm(&(&was - &is)) <= 1e-6 * norm(&was), "{}", original.tensor);
    }
    // What only the other one had is the rounding of f32, which is not worth a rank but is not zero either.
    for gone in again.targets().iter().filter(|t| target(&one, &t.tensor).is_none()) {
        assert!(norm(&dense(gone)) <= 1e-6 * norm(&dense(target(&two, &gone.tensor).unwrap())), "{}", gone.tensor);
    }
}

#[test]
fn what_is_not_rounded_keeps_its_dtype() {
    let folder = tempfile::tempdir().unwrap();
    let half = adapter("llama-bf16");
    let (report, negated) = combined(&[(&half, -1.0)], folder.path(), &CombineOptions::default());
    assert_eq!((report.error, report.dtype.as_str()), (0.0, "BF16"));
    for (was, is) in half.targets().iter().zip(negated.targets()) {
        assert_eq!(norm(&(&dense(was) + &dense(is))), 0.0);
    }
    let (report, _) = combined(&[(&half, 0.3), (&half, 0.3)], folder.path(), &CombineOptions::default());
    assert_eq!((report.error, report.dtype.as_str()), (0.0, "BF16"));
    let (report, _) = combined(&[(&half, 0.3), (&adapter("llama-f16"), 0.3)], folder.path(), &CombineOptions::default());
    assert_eq!(report.dtype, "F32");
    let (report, small) =
        combined(&[(&half, 0.3), (&adapter("llama-qv-r8"), 0.4)], folder.path(), &with(|o| o.dtype = Some(Dtype::BF16)));
    assert!(report.dtype == "BF16" && (1e-4..1e-2).contains(&report.error));
    for found in small.targets() {
        let told = report.targets.iter().find(|told| told.tensor == found.tensor).unwrap();
        let (wanted, _) = sum(&[(&half, 0.3), (&adapter("llama-qv-r8"), 0.4)], &found.tensor);
        assert!((norm(&(&dense(found) - &wanted)) - told.error * told.norm).abs() < 1e-9 * told.norm);
    }
}

#[test]
fn layers_have_weights_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (adapter("llama-qv-r8"), adapter("llama-all-r4"));
    let layer = |adapter, pattern: &str, factor| LayerWeight { adapter, pattern: pattern.to_owned(), factor };
    let options =
        with(|o| o.layers = vec![layer(None, "layers.0.*", 0.5), layer(Some(1), "q_proj", 0.0), layer(Some(1), "mlp", -2.0)]);
    let (report, again) = combined(&[(&one, 1.0), (&two, 3.0)], folder.path(), &options);
    for found in again.targets() {
        let first = if found.tensor.contains("layers.0.") { 0.5 } else { 1.0 };
        let second = match &found.tensor {
            name if name.contains("mlp") => -6.0,
            name if name.contains("q_proj") => 0.0,
            _ => 3.0 * first,
        };
        let (wanted, size) = sum(&[(&one, first), (&two, second)], &found.tensor);
        assert!(norm(&(&dense(found) - &wanted)) <= 1e-6 * size, "{}", found.tensor);
    }
    assert!(report.warnings.iter().any(|w| w.message.starts_with("2 tensors with weight 0")), "{:?}", report.warnings);
    let unused = with(|o| o.layers = vec![layer(None, "layers.7.*", 0.5)]);
    assert_eq!(refused(&[(&one, 1.0)], &unused)[0].0, "U-001");
}

#[test]
fn a_weight_of_zero_is_noted_and_one_that_is_no_number_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (adapter("llama-qv-r8"), adapter("llama-all-r4"));
    let (report, again) = combined(&[(&one, 1.0), (&two, 0.0)], folder.path(), &CombineOptions::default());
    assert!(again.targets().len() == one.targets().len() && report.adapters[1].targets == 0);
    assert!(report.warnings.iter().any(|w| w.message.contains("its weight is 0")), "{:?}", report.warnings);
    for weight in [f64::NAN, f64::INFINITY] {
        assert_eq!(refused(&[(&one, weight)], &CombineOptions::default())[0].0, "U-001");
    }
    assert_eq!(refused(&[(&one, 0.0)], &CombineOptions::default())[0].0, "A-012");
    assert_eq!(refused(&[(&one, 1.0), (&one, -1.0)], &with(|o| o.rank = Some(RankRule::Fixed(4))))[0].0, "A-012");
}

#[test]
fn what_cannot_belong_together_is_refused_by_name() {
    let options = CombineOptions::default();
    let one = adapter("llama-qv-r8");
    let other = memory(&wave(20, 2, 0.1), &wave(2, 30, 0.2));
    let told = refused(&[(&one, 1.0), (&other, 1.0)], &options);
    assert!(told[0].0 == "A-023" && told[0].1.contains("q_proj") && told[0].1.contains("(20, 30)"), "{told:?}");
    let berts = [adapter("bert-seqcls"), adapter("bert-qv")];
    let told = refused(&[(&berts[0], 1.0), (&berts[1], 1.0)], &options);
    assert_eq!(told[0].0, "A-020");
    let folder = tempfile::tempdir().unwrap();
    let under_one_name = with(|o| o.prefix = Some(("bert.".into(), String::new())));
    let (_, both) = combined(&[(&berts[0], 1.0), (&berts[1], 1.0)], folder.path(), &under_one_name);
    assert_eq!(both.targets().len(), berts[1].targets().len());
    let under_the_other = with(|o| o.prefix = Some((String::new(), "bert.".into())));
    let (report, both) = combined(&[(&berts[0], 1.0), (&berts[1], 1.0)], folder.path(), &under_the_other);
    assert!(
        both.targets().iter().all(|t| t.tensor.starts_with("bert.encoder")) && report.targets.iter().all(|t| t.adapters == 2)
    );
    assert_eq!(refused(&[(&adapter("pissa"), 1.0)], &options)[0].0, "P-007");
    assert_eq!(refused(&[], &options)[0].0, "U-001");
    let cat = with(|o| (o.method, o.rank) = (CombineMethod::Cat, Some(RankRule::Fixed(4))));
    assert_eq!(refused(&[(&one, 1.0)], &cat)[0].0, "U-001");
    let many: Vec<(&Adapter, f64)> = std::iter::repeat_n((&one, 0.1), 513).collect();
    let told = refused(&many, &options);
    assert!(told[0].0 == "A-003" && told[0].1.contains("4104"), "{told:?}");
}

#[test]
fn full_tensors_follow_the_policy_and_are_never_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let head = adapter("bert-seqcls");
    let (report, again) = combined(&[(&head, 1.0)], folder.path(), &CombineOptions::default());
    assert!(again.replacements().len() == head.replacements().len() && report.decided.is_empty());
    let told = refused(&[(&head, 0.5)], &CombineOptions::default());
    assert!(told.len() == head.replacements().len() && told.iter().all(|(rule, _)| *rule == "A-010"), "{told:?}");
    // The same twice with weights that add up to 1 are what they are.
    let (report, _) = combined(&[(&head, 0.5), (&head, 0.5)], folder.path(), &CombineOptions::default());
    assert!(report.decided.is_empty());
    let changed = doubled_head(&head);
    let (_, first) = combined(&[(&changed, 0.2), (&head, 0.6)], folder.path(), &with(|o| o.parts = PartsPolicy::First));
    let value = |adapter: &Adapter| f32::from_le_bytes(raw(&adapter.replacements()[0].with)[..4].try_into().unwrap());
    assert_eq!(value(&first), value(&changed));
    let (report, mean) = combined(&[(&changed, 0.2), (&head, 0.6)], folder.path(), &with(|o| o.parts = PartsPolicy::Average));
    let wanted = (0.2 * f64::from(value(&changed)) + 0.6 * f64::from(value(&head))) / 0.8;
    assert_eq!(value(&mean), wanted as f32);
    assert!(report.decided[0].message.contains("mean by weight"), "{:?}", report.decided);
    let told = refused(&[(&changed, 0.5), (&head, -0.5)], &with(|o| o.parts = PartsPolicy::Average));
    assert!(told[0].1.contains("add up to 0"), "{told:?}");
}

/// The same adapter with all values of its full tensors doubled.
fn doubled_head(adapter: &Adapter) -> Adapter {
    let mut parts = adapter.parts().clone();
    let mut source = MemorySource::new();
    for replacement in &parts.replacements {
        let doubled =
            raw(&replacement.with).as_chunks::<4>().0.iter().flat_map(|x| (2.0 * f32::from_le_bytes(*x)).to_le_bytes()).collect();
        source.insert(replacement.tensor.clone(), replacement.with.info().clone(), doubled).unwrap();
    }
    let source: Arc<dyn TensorSource> = Arc::new(source);
    for replacement in &mut parts.replacements {
        replacement.with = Factor::new(&source, &replacement.tensor).unwrap();
    }
    Adapter::new(parts, &Default::default()).unwrap()
}

#[test]
fn magnitudes_follow_the_policy() {
    let folder = tempfile::tempdir().unwrap();
    let dora = adapter("dora-linear");
    let (_, again) = combined(&[(&dora, 1.0)], folder.path(), &CombineOptions::default());
    assert!(again.targets().iter().all(|target| target.magnitude.is_some()));
    assert!(
        refused(&[(&dora, 0.5)], &CombineOptions::default())
            .iter()
            .all(|(rule, message)| *rule == "A-010" && message.contains("DoRA"))
    );
    let (report, again) = combined(&[(&dora, 0.5)], folder.path(), &with(|o| o.parts = PartsPolicy::First));
    assert!(again.targets().iter().all(|target| target.magnitude.is_some()) && report.decided.len() == 1);
    assert_eq!(raw(again.targets()[0].magnitude.as_ref().unwrap()), raw(dora.targets()[0].magnitude.as_ref().unwrap()));
}

#[test]
fn updates_of_biases_add_up() {
    let folder = tempfile::tempdir().unwrap();
    let one = adapter("bert-lora-bias");
    let options = [CombineOptions::default(), with(|o| o.rank = Some(RankRule::Fixed(2)))];
    for options in options {
        let (_, again) = combined(&[(&one, 0.7), (&one, -0.2)], folder.path(), &options);
        for (was, is) in one.targets().iter().zip(again.targets()) {
            let bias = |target: &Target| -> Vec<f64> {
                let delta = raw(&target.bias.as_ref().unwrap().delta);
                let values = delta.as_chunks::<4>().0.iter().map(|x| f64::from(f32::from_le_bytes(*x)));
                values.map(|x| x * target.scaling.effective()).collect()
            };
            for (x, y) in bias(was).iter().zip(bias(is)) {
                assert!((0.5 * x - y).abs() <= 1e-7 * x.abs(), "{x} {y}");
            }
        }
    }
}

#[test]
fn every_kind_of_layer_adds_up() {
    let folder = tempfile::tempdir().unwrap();
    for name in [
        "conv2d",
        "conv1d",
        "experts-qwen3",
        "experts-mixtral",
        "loha",
        "lokr-conv",
        "mha",
        "gpt2-all",
        "llama-embed",
        "adalora",
        "bdlora",
    ] {
        let one = adapter(name);
        for options in [CombineOptions::default(), with(|o| o.rank = Some(RankRule::Fixed(64)))] {
            let mut options = options;
            (options.parts, options.to) = (PartsPolicy::First, loratool::ConvertTo::Container);
            options.overwrite = loratool::Overwrite::Replace;
            let out = folder.path().join("out.safetensors");
            let weighted = [Weighted { adapter: &one, weight: 0.75 }, Weighted { adapter: &one, weight: -0.25 }];
            combine(&weighted, &out, &options, &()).unwrap();
            let again = open_adapter(&out).unwrap();
            assert_eq!(again.targets().len(), one.targets().len(), "{name}");
            for (was, is) in one.targets().iter().zip(again.targets()) {
                assert_eq!((&was.tensor, was.kind, was.base_shape()), (&is.tensor, is.kind, is.base_shape()), "{name}");
                let (was, is) = (dense(was), dense(is));
                assert!(norm(&(&was * faer::Scale(0.5) - &is)) <= 1e-6 * norm(&was), "{name}");
            }
        }
    }
}
