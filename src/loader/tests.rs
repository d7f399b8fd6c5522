//! Every row has a case in which it is true, and nothing but what holds of every adapter is true of a plain one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use super::{Effect, Files, Loader, Subject, check};
use crate::adapter::{Adapter, AdapterParts, BiasDelta, Factor, Kind, Orientation, Replacement, Scaling, ScalingRule, Target};
use crate::error::Result;
use crate::limits::Limits;
use crate::tensor::{Dtype, Shape, TensorInfo, TensorSource};

/// Tensors without bytes: a header is all that the rules look at.
#[derive(Default)]
struct Header(BTreeMap<String, TensorInfo>);

impl TensorSource for Header {
    fn label(&self) -> &Path {
        Path::new("(header)")
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.0.keys().map(String::as_str))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.0.get(name)
    }

    fn read(&self, _: &str, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
}

fn factor(name: &str, dtype: Dtype, dims: &[u64]) -> Factor {
    let info = TensorInfo { dtype, shape: Shape::new(dims.to_vec()).unwrap() };
    let source: Arc<dyn TensorSource> = Arc::new(Header([(name.to_owned(), info)].into()));
    Factor::new(&source, name).unwrap()
}

/// A layer of 64 by 64 with rank 8 and a scale of 2.
fn target(module: &str) -> Target {
    shaped(module, 64, 64, 8)
}

fn shaped(module: &str, out: u64, inner: u64, rank: u64) -> Target {
    let name = |part: &str| format!("base_model.model.{module}.{part}.weight");
    Target {
        tensor: format!("{module}.weight"),
        kind: Kind::Linear(Orientation::OutIn),
        a: factor(&name("lora_A"), Dtype::F32, &[rank, inner]),
        b: factor(&name("lora_B"), Dtype::F32, &[out, rank]),
        scaling: Scaling { rank, alpha: 16.0, rule: ScalingRule::Standard },
        bias: None,
        magnitude: None,
        singular_values: None,
    }
}

/// Queries, keys and values of two layers.
fn layers() -> Vec<Target> {
    let members = |i: u32| ["q_proj", "k_proj", "v_proj"].map(|name| target(&format!("model.layers.{i}.self_attn.{name}")));
    [members(0), members(1)].concat()
}

fn config(changes: &[(&str, &str)]) -> String {
    let mut fields: BTreeMap<&str, &str> = [
        ("peft_type", r#""LORA""#),
        ("r", "8"),
        ("lora_alpha", "16"),
        ("target_modules", r#"["q_proj", "k_proj", "v_proj"]"#),
        ("bias", r#""none""#),
    ]
    .into();
    fields.extend(changes.iter().copied());
    let fields = fields.iter().filter(|(_, value)| !value.is_empty()).map(|(name, value)| format!("\"{name}\":{value}"));
    format!("{{{}}}", fields.collect::<Vec<_>>().join(","))
}

/// An adapter, its config, and the rows that are true of it and of no plain one.
struct Case {
    targets: Vec<Target>,
    replacements: Vec<&'static str>,
    config: Option<String>,
    others: Vec<String>,
}

impl Case {
    fn of(targets: Vec<Target>) -> Self {
        Case { targets, replacements: Vec::new(), config: Some(config(&[])), others: Vec::new() }
    }

    fn stating(changes: &[(&str, &str)]) -> Self {
        Case { config: Some(config(changes)), ..Case::of(layers()) }
    }

    fn replacing(names: &[&'static str]) -> Self {
        Case { replacements: names.to_vec(), ..Case::of(layers()) }
    }

    /// The ids of the rows that are true.
    fn found(&self) -> BTreeSet<&'static str> {
        let replacements = self.replacements.iter().map(|tensor| {
            let with = factor(&format!("base_model.model.{tensor}"), Dtype::F32, &[64]);
            Replacement { tensor: tensor.replace(".base_layer", ""), with, shared: false }
        });
        let parts = AdapterParts { targets: self.targets.clone(), replacements: replacements.collect(), ..Default::default() };
        let adapter = Adapter::new(parts, &Limits::default()).unwrap();
        let files = Files { config: self.config.clone(), others: self.others.clone() };
        let subject = Subject::new(&adapter, &files);
        Loader::ALL.into_iter().flat_map(|loader| check(loader, &subject)).map(|finding| finding.rule.id).collect()
    }
}

/// What is true of every adapter in PEFT's format.
const ALWAYS: [&str; 2] = ["llamacpp/gguf", "mlx/format"];

/// Rows that no adapter can be made for, as long as factors are matrices.
fn out_of_reach(id: &str) -> bool {
    id.ends_with("/convolution")
}

fn changed(change: impl Fn(&mut Target)) -> Case {
    let mut targets = layers();
    targets.iter_mut().take(1).for_each(change);
    Case::of(targets)
}

fn all(change: impl Fn(&mut Target)) -> Case {
    let mut targets = layers();
    targets.iter_mut().for_each(change);
    Case::of(targets)
}

/// Every case with the whole list of rows that it makes true.
fn cases() -> Vec<(&'static str, Case, &'static [&'static str])> {
    let of_rank = |rank: u64| {
        let targets = ["q_proj", "k_proj", "v_proj"].map(|name| shaped(&format!("layers.0.self_attn.{name}"), 1024, 1024, rank));
        let config = config(&[("r", &rank.to_string()), ("lora_alpha", &(2 * rank).to_string())]);
        let mut case = Case { config: Some(config), ..Case::of(targets.to_vec()) };
        case.targets.iter_mut().for_each(|target| target.scaling.alpha = 2.0 * rank as f64);
        case
    };
    let listed =
        |targets: Vec<Target>, names: &str| Case { config: Some(config(&[("target_modules", names)])), ..Case::of(targets) };
    let embedding = || Target { kind: Kind::Embedding, ..target("model.embed_tokens") };
    let conv1d = |out| Target { kind: Kind::Linear(Orientation::InOut), ..shaped("h.0.attn.c_attn", out, 64, 8) };
    let init = |name: &str| Case::stating(&[("init_lora_weights", name)]);
    vec![
        (
            "no config",
            Case { config: None, ..Case::of(layers()) },
            &[
                "vllm/no-config",
                "sglang/no-config",
                "tensorrt-llm/no-config",
                "lorax/no-config",
                "mistralrs/no-config",
                "llamacpp/no-config",
            ],
        ),
        ("no alpha", Case::stating(&[("lora_alpha", "")]), &["vllm/field-missing"]),
        ("a pattern of modules", Case::stating(&[("target_modules", r#"".*_proj""#)]), &["sglang/target-modules"]),
        (
            "a list that lacks one",
            Case::stating(&[("target_modules", r#"["q_proj", "v_proj"]"#)]),
            &["sglang/not-covered", "mistralrs/not-covered"],
        ),
        ("a path for a base", Case::stating(&[("base_model_name_or_path", r#""/home/me/model""#)]), &["lorax/base-path"]),
        ("activated", Case::stating(&[("alora_invocation_tokens", "[1, 2]")]), &["vllm/activated"]),
        ("repeated layers", Case::stating(&[("layer_replication", "[[0, 2]]")]), &["vllm/layer-replication"]),
        ("BD-LoRA", Case::stating(&[("use_bdlora", "{}")]), &["vllm/bd-lora"]),
        ("QALoRA", Case::stating(&[("use_qalora", "true")]), &["vllm/qalora"]),
        (
            "PiSSA",
            init(r#""pissa_niter_4""#),
            &["vllm/init", "sglang/init", "tensorrt-llm/init", "lorax/init", "mistralrs/init", "llamacpp/init"],
        ),
        ("LoRA-GA", init(r#""lora_ga""#), &["mistralrs/init"]),
        (
            "DoRA",
            Case::stating(&[("use_dora", "true")]),
            &["vllm/dora", "sglang/dora", "lorax/dora", "mistralrs/dora", "llamacpp/dora"],
        ),
        ("a stated bias", Case::stating(&[("bias", r#""all""#)]), &["vllm/bias", "mistralrs/bias"]),
        (
            "other files",
            Case { others: vec!["old.safetensors".to_owned()], ..Case::of(layers()) },
            &["sglang/other-files", "lorax/other-files"],
        ),
        (
            "rsLoRA",
            all(|target| target.scaling.rule = ScalingRule::RankStabilized),
            &["sglang/rslora", "llamacpp/rslora", "vllm/odd-scale", "lorax/odd-scale"],
        ),
        (
            "a rank of its own",
            changed(|target| *target = shaped("model.layers.0.self_attn.q_proj", 64, 64, 4)),
            &["sglang/own-rank", "lorax/own-rank", "lorax/rank-by-layer"],
        ),
        (
            "an alpha of its own",
            changed(|target| target.scaling.alpha = 32.0),
            &["sglang/own-alpha", "tensorrt-llm/own-alpha", "lorax/own-alpha", "llamacpp/own-alpha"],
        ),
        ("rank 16", of_rank(16), &[]),
        ("rank 24", of_rank(24), &["vllm/rank-flag"]),
        ("rank 65", of_rank(65), &["vllm/rank-flag", "tensorrt-llm/rank-flag"]),
        ("rank 512", of_rank(512), &["vllm/rank-flag", "tensorrt-llm/rank-flag", "mistralrs/rank-flag"]),
        ("rank 513", of_rank(513), &["vllm/rank-limit", "tensorrt-llm/rank-flag", "mistralrs/rank-flag"]),
        (
            "16 GiB",
            all(|target| *target = shaped(target.tensor.trim_end_matches(".weight"), 1 << 26, 1 << 26, 8)),
            &["mistralrs/bytes-flag"],
        ),
        (
            "lora_bias",
            all(|target| {
                let delta = factor("b", Dtype::F32, &[64]);
                target.bias = Some(BiasDelta { tensor: target.tensor.replace("weight", "bias"), delta });
            }),
            &[
                "vllm/lora-bias",
                "sglang/lora-bias",
                "tensorrt-llm/lora-bias",
                "lorax/lora-bias",
                "mistralrs/lora-bias",
                "llamacpp/lora-bias",
            ],
        ),
        (
            "trained biases",
            Case::replacing(&["model.layers.0.self_attn.q_proj.bias"]),
            &["vllm/bias", "sglang/bias", "tensorrt-llm/bias", "lorax/bias", "mistralrs/bias", "llamacpp/bias"],
        ),
        (
            "the head of a classifier",
            Case::replacing(&["classifier.weight", "classifier.bias"]),
            &[
                "sglang/modules-to-save",
                "tensorrt-llm/modules-to-save",
                "lorax/modules-to-save",
                "mistralrs/modules-to-save",
                "llamacpp/modules-to-save",
            ],
        ),
        (
            "a saved embedding",
            Case::replacing(&["model.embed_tokens.weight"]),
            &["vllm/modules-to-save", "lorax/modules-to-save", "mistralrs/modules-to-save", "llamacpp/modules-to-save"],
        ),
        (
            "a saved head below a LoRA",
            Case { replacements: vec!["lm_head.base_layer.weight"], ..listed(vec![target("lm_head")], r#"["lm_head"]"#) },
            &[
                "vllm/modules-to-save",
                "tensorrt-llm/vocabulary",
                "lorax/modules-to-save",
                "mistralrs/modules-to-save",
                "mistralrs/vocabulary",
                "llamacpp/own-weight",
            ],
        ),
        (
            "an embedding",
            listed(vec![embedding()], r#"["embed_tokens"]"#),
            &["tensorrt-llm/vocabulary", "lorax/embedding", "mistralrs/vocabulary"],
        ),
        (
            "an embedding that is not listed",
            listed([layers(), vec![embedding()]].concat(), r#""all-linear""#),
            &["sglang/embedding", "tensorrt-llm/vocabulary", "lorax/embedding", "mistralrs/vocabulary"],
        ),
        (
            "a layer without number",
            listed(vec![target("pooler.dense")], r#"["dense"]"#),
            &["sglang/no-layer", "tensorrt-llm/names"],
        ),
        (
            "a name with one part more",
            listed(vec![target("encoder.layer.0.attention.self.query")], r#"["query"]"#),
            &["tensorrt-llm/names"],
        ),
        (
            "no prefix",
            changed(|target| {
                target.a = factor("model.layers.0.self_attn.q_proj.lora_A.weight", Dtype::F32, &[8, 64]);
            }),
            &["lorax/prefix"],
        ),
        (
            "the name of the adapter",
            changed(|target| target.a = factor("base_model.model.q_proj.lora_A.default.weight", Dtype::F32, &[8, 64])),
            &["vllm/adapter-name", "tensorrt-llm/adapter-name", "lorax/adapter-name", "llamacpp/adapter-name"],
        ),
        ("queries without values", Case::of(vec![target("model.layers.0.self_attn.q_proj")]), &["sglang/q-without-v"]),
        (
            "wide queries",
            Case::of(vec![shaped("layers.0.self_attn.q_proj", 128, 64, 8), shaped("layers.0.self_attn.v_proj", 32, 64, 8)]),
            &["tensorrt-llm/wide-q"],
        ),
        (
            "grouped values",
            Case::of(vec![target("layers.0.self_attn.q_proj"), shaped("layers.0.self_attn.v_proj", 32, 64, 8)]),
            &["tensorrt-llm/grouped-kv"],
        ),
        (
            "the last layer only",
            Case::of(layers().into_iter().filter(|target| target.tensor.contains("layers.1.")).collect()),
            &["lorax/layers"],
        ),
        ("Conv1D", listed(vec![conv1d(192)], r#"["c_attn"]"#), &["llamacpp/conv1d"]),
        ("square Conv1D", listed(vec![conv1d(64)], r#"["c_attn"]"#), &["llamacpp/conv1d-square"]),
        (
            "experts",
            listed(vec![target("layers.0.mlp.experts.3.w1")], r#"["w1"]"#),
            &["sglang/experts", "tensorrt-llm/experts", "lorax/experts", "tensorrt-llm/names"],
        ),
        (
            "fused and single experts",
            listed(vec![target("layers.0.mlp.experts"), target("layers.0.mlp.experts.0.w2")], r#"["w2", "experts"]"#),
            &[
                "vllm/stacked-experts",
                "vllm/mixed-experts",
                "sglang/experts",
                "tensorrt-llm/experts",
                "lorax/experts",
                "tensorrt-llm/names",
            ],
        ),
        (
            "two dtypes",
            changed(|target| target.b = factor("b", Dtype::BF16, &[64, 8])),
            &["vllm/dtype", "sglang/dtype", "tensorrt-llm/dtype", "lorax/dtype", "mistralrs/dtype", "llamacpp/dtype"],
        ),
    ]
}

#[test]
fn a_plain_adapter_is_read_by_all_that_read_its_format() {
    assert_eq!(Case::of(layers()).found(), ALWAYS.into());
}

#[test]
fn each_case_makes_its_rows_true_and_no_others() {
    for (what, case, rows) in cases() {
        let expected: BTreeSet<&str> = rows.iter().copied().chain(ALWAYS).collect();
        assert_eq!(case.found(), expected, "{what}");
    }
}

#[test]
fn every_row_has_a_case() {
    let covered: BTreeSet<&str> = cases().into_iter().flat_map(|(.., rows)| rows).copied().chain(ALWAYS).collect();
    let rows = Loader::ALL.into_iter().flat_map(|loader| loader.rules());
    let lacking: Vec<&str> = rows.map(|rule| rule.id).filter(|id| !covered.contains(id) && !out_of_reach(id)).collect();
    assert!(lacking.is_empty(), "{lacking:?}");
}

#[test]
fn the_table_is_in_order() {
    let mut seen = BTreeSet::new();
    for loader in Loader::ALL {
        assert_eq!(Loader::from_name(loader.name()), Some(loader));
        let effects: Vec<Effect> = loader.rules().iter().map(|rule| rule.effect).collect();
        assert!(effects.is_sorted(), "{}", loader.name());
        for rule in loader.rules() {
            assert!(rule.id.starts_with(&format!("{}/", loader.name())) && seen.insert(rule.id), "{}", rule.id);
            assert_eq!(rule.effect == Effect::Unknown, rule.basis == super::Basis::None, "{}", rule.id);
        }
    }
}

#[test]
fn the_way_out_names_the_figure() {
    let case = Case::stating(&[("r", "20")]);
    let parts = AdapterParts { targets: vec![shaped("layers.0.q_proj", 64, 64, 20)], ..Default::default() };
    let adapter = Adapter::new(parts, &Limits::default()).unwrap();
    let files = Files { config: case.config, others: Vec::new() };
    let findings = check(Loader::Vllm, &Subject::new(&adapter, &files));
    let ways: Vec<&str> = findings.iter().map(|finding| finding.way_out.as_str()).collect();
    assert!(ways.contains(&"start it with --max-lora-rank 32"), "{ways:?}");
}
