//! There and back: what is written is read as the same adapter, twice the same bytes, and each rule is broken once.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{is_container, read, write};
use crate::adapter::{
    Adapter, AdapterParts, BaseIdentity, BiasDelta, Factor, Kind, Lineage, LineageInput, Orientation, Replacement, Scaling,
    ScalingRule, Target,
};
use crate::codec::safetensors::{Layout, SafetensorsFile, Strictness};
use crate::error::Result;
use crate::io::{ReadMode, tensor_digest};
use crate::limits::Limits;
use crate::tensor::{Dtype, MemorySource, Shape, TensorInfo, TensorSource};

fn open(path: &Path) -> Result<Adapter> {
    let limits = Limits::default();
    let file = Arc::new(SafetensorsFile::open(path, ReadMode::Read, Strictness::Strict, &limits)?);
    read(file, &limits)
}

/// The bytes of the container that an adapter becomes.
fn bytes_of(adapter: &Adapter, step: Option<Lineage>) -> Result<Vec<u8>> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let written = write(adapter, None, step, file.as_file(), file.path(), |_| Ok(()))?;
    let bytes = std::fs::read(file.path()).unwrap();
    assert_eq!(written.bytes, bytes.len() as u64);
    Ok(bytes)
}

fn step() -> Lineage {
    let input = LineageInput { role: "adapter".into(), dialect: "memory".into(), content: "0".repeat(64) };
    Lineage { op: "make".into(), tool: "test 1".into(), inputs: vec![input], parameters: "{ \"x\": 1e-5 }".into() }
}

/// An adapter with every kind, a bias update and replacements, whose factors are larger than one piece in one place.
fn sample() -> Adapter {
    let mut source = MemorySource::new();
    let mut put = |name: &str, dtype: Dtype, dims: &[u64]| {
        let info = TensorInfo { dtype, shape: Shape::new(dims.to_vec()).unwrap() };
        let bytes = (0..info.bytes()).map(|i| (i % 61) as u8).collect();
        source.insert(name, info, bytes).unwrap();
    };
    put("1", Dtype::F32, &[2, 300_000]);
    put("2", Dtype::F32, &[3, 2]);
    put("3", Dtype::BF16, &[4, 6]);
    put("4", Dtype::BF16, &[6, 4]);
    put("5", Dtype::F16, &[1, 9]);
    put("6", Dtype::F64, &[5, 1]);
    put("7", Dtype::F16, &[6]);
    put("8", Dtype::F32, &[3]);
    let source: Arc<dyn TensorSource> = Arc::new(source);
    let factor = |name: &str| Factor::new(&source, name).unwrap();
    let target = |tensor: &str, kind, a, b, rank, rule| Target {
        tensor: tensor.into(),
        kind,
        a: factor(a),
        b: factor(b),
        scaling: Scaling { rank, alpha: 3.0, rule },
        bias: None,
        magnitude: None,
        singular_values: None,
    };
    let mut square = target("h.c_attn.weight", Kind::Linear(Orientation::InOut), "3", "4", 4, ScalingRule::Standard);
    square.singular_values = Some(vec![4.5, 0.1, 0.1, 0.0]);
    square.bias = Some(BiasDelta { tensor: "h.c_attn.bias".into(), delta: factor("7") });
    let parts = AdapterParts {
        label: "sample".into(),
        dialect: "memory",
        targets: vec![
            target("q.weight", Kind::Linear(Orientation::OutIn), "1", "2", 2, ScalingRule::RankStabilized),
            square,
            target("wte.weight", Kind::Embedding, "5", "6", 1, ScalingRule::Standard),
        ],
        replacements: vec![
            Replacement { tensor: "q.bias".into(), with: factor("8"), shared: false },
            Replacement { tensor: "norm.weight".into(), with: factor("7"), shared: false },
        ],
        base: BaseIdentity { name: Some("a \"base\"\u{1f}é".into()), structure: Some("ab".repeat(32)), targets: None },
        origin_config: Some("{\"r\": 8, \"lora_alpha\": 1e-05,\n \"z\": {\"a\": -1}}".into()),
        ..AdapterParts::default()
    };
    Adapter::new(parts, &Limits::default()).unwrap()
}

fn values(factor: &Factor) -> Vec<u8> {
    let mut bytes = vec![0; factor.info().bytes() as usize];
    factor.read(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn what_is_written_is_read_as_the_same_adapter() {
    let (adapter, file) = (sample(), tempfile::NamedTempFile::new().unwrap());
    std::fs::write(file.path(), bytes_of(&adapter, Some(step())).unwrap()).unwrap();
    let back = open(file.path()).unwrap();
    for (x, y) in adapter.targets().iter().zip(back.targets()) {
        assert_eq!((&x.tensor, x.kind, x.scaling), (&y.tensor, y.kind, y.scaling));
        assert_eq!(x.singular_values, y.singular_values);
    }
    for (x, y) in adapter.factors().zip(back.factors()) {
        assert_eq!((x.info(), values(x)), (y.info(), values(y)));
    }
    let stated = |factor: &Factor| {
        let mut hash = tensor_digest(factor.info());
        hash.update(&values(factor));
        back.stated_digests().get(factor.name()) == Some(&hash.finish())
    };
    assert!(back.factors().all(stated));
    assert_eq!(adapter.base(), back.base());
    assert_eq!(back.origin_config(), Some(r#"{"r":8,"lora_alpha":0.00001,"z":{"a":-1}}"#));
    assert_eq!(back.lineage(), [Lineage { parameters: r#"{"x":0.00001}"#.into(), ..step() }]);
    assert!(back.warnings().is_empty());
}

#[test]
fn the_same_adapter_gives_the_same_bytes() {
    let adapter = sample();
    let first = bytes_of(&adapter, None).unwrap();
    assert_eq!(first, bytes_of(&adapter, None).unwrap());
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &first).unwrap();
    assert_eq!(first, bytes_of(&open(file.path()).unwrap(), None).unwrap());
}

#[test]
fn the_reference_reader_finds_the_names_of_peft() {
    let bytes = bytes_of(&sample(), None).unwrap();
    let file = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names = file.names();
    names.sort_unstable();
    let expected = [
        "h.c_attn.lora_A.weight",
        "h.c_attn.lora_B.bias",
        "h.c_attn.lora_B.weight",
        "norm.weight",
        "q.base_layer.bias",
        "q.lora_A.weight",
        "q.lora_B.weight",
        "wte.lora_embedding_A",
        "wte.lora_embedding_B",
    ];
    assert_eq!(names, expected.map(|name| format!("base_model.model.{name}")));
    assert_eq!(file.tensor("base_model.model.q.lora_A.weight").unwrap().shape(), [2, 300_000]);
}

#[test]
fn what_a_container_cannot_say_is_refused_before_anything_is_written() {
    let refused = |change: &dyn Fn(&mut AdapterParts)| {
        let mut parts = sample().parts().clone();
        change(&mut parts);
        let file = tempfile::NamedTempFile::new().unwrap();
        let adapter = Adapter::new(parts, &Limits::default()).unwrap();
        let error = write(&adapter, None, None, file.as_file(), file.path(), |_| Ok(())).unwrap_err();
        assert_eq!(file.as_file().metadata().unwrap().len(), 0);
        error.diagnostics()[0].rule().id
    };
    assert_eq!(refused(&|p| p.targets[0].kind = Kind::Linear(Orientation::Undeclared)), "A-024");
    // Of parameters that are no module's weight, PEFT wraps matrices and stacks alone.
    assert_eq!(refused(&|p| p.targets[2].tensor = "wte".into()), "P-011");
    assert_eq!(refused(&|p| p.targets[0].tensor = "q".into()), "C-008");
    assert_eq!(refused(&|p| p.replacements[0].tensor = "q.lora_A.weight".into()), "C-008");
    assert_eq!(refused(&|p| p.replacements[0].tensor = "x".repeat(1020)), "C-019");
    assert_eq!(refused(&|p| p.base.structure = Some("AB".repeat(32))), "C-039");
    assert_eq!(refused(&|p| p.lineage = vec![Lineage { parameters: "[]".into(), ..step() }]), "C-042");
    assert_eq!(refused(&|p| p.origin_config = Some(r#"{"r":1,"r":2}"#.into())), "C-030");
    assert_eq!(refused(&|p| p.base.name = Some("x".repeat(33 << 20))), "C-022");
}

#[test]
fn singular_values_are_as_many_as_the_rank_and_fall() {
    let with = |values: &[f64]| {
        let mut parts = sample().parts().clone();
        let target = parts.targets.iter_mut().find(|target| target.scaling.rank == 2).unwrap();
        target.singular_values = Some(values.to_vec());
        Adapter::new(parts, &Limits::default()).map_or_else(|e| e.diagnostics()[0].rule().id, |_| "accepted")
    };
    assert_eq!(with(&[3.0, 3.0]), "accepted");
    for wrong in [[1.0, 2.0], [1.0, -1.0], [f64::NAN, 1.0], [1.0, f64::NAN], [f64::INFINITY, 1.0]] {
        assert_eq!(with(&wrong), "C-033", "{wrong:?}");
    }
    for wrong in [&[] as &[f64], &[1.0], &[3.0, 2.0, 1.0]] {
        assert_eq!(with(wrong), "C-035", "{wrong:?}");
    }
}

/// A container of one target, with its manifest edited.
fn edited(edit: impl Fn(&mut String)) -> &'static str {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("spec/vectors/y_C-040_example.safetensors");
    let file = SafetensorsFile::open(&root, ReadMode::Read, Strictness::Strict, &Limits::default()).unwrap();
    let mut metadata = file.metadata().to_vec();
    let manifest = metadata.iter_mut().find(|(key, _)| key == super::KEY).unwrap();
    edit(&mut manifest.1);
    let tensors: Vec<_> = file.names().map(|name| (name, file.info(name).unwrap())).collect();
    let mut bytes = Layout::new(&metadata, &tensors).head;
    let data = std::fs::read(&root).unwrap();
    bytes.extend_from_slice(&data[file.header().data_start as usize..]);
    let out = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(out.path(), bytes).unwrap();
    open(out.path()).map_or_else(|e| e.diagnostics()[0].rule().id, |_| "accepted")
}

#[test]
fn each_rule_of_the_manifest_is_broken_by_one_edit() {
    let replaced = |from: &str, to: &str| {
        edited(|text| {
            assert!(text.contains(from), "{from}");
            *text = text.replacen(from, to, 1);
        })
    };
    assert_eq!(edited(|_| ()), "accepted");
    assert_eq!(edited(|text| text.push('x')), "C-030");
    assert_eq!(replaced(r#""x":1"#.replace('x', "rank").as_str(), r#""rank":1,"r\u0061nk":1"#), "C-030");
    assert_eq!(replaced(r#""parameters":{}"#, r#""parameters":{"a":{"b":1,"b":1}}"#), "C-030");
    assert_eq!(replaced(r#""optional":[]"#, &format!(r#""optional":[],"x-y":{}{}"#, "[".repeat(200), "]".repeat(200))), "C-030");
    for version in ["2.0", "1", "01.0", "1.00", "1.", ".0", ""] {
        assert_eq!(replaced(r#""container":"1.0""#, &format!(r#""container":"{version}""#)), "C-031", "{version}");
    }
    assert_eq!(replaced(r#""container":"1.0""#, r#""container":"1.17""#), "accepted");
    assert_eq!(replaced(r#""required":[]"#, r#""required":["lattice"],"new":1"#), "C-032");
    assert_eq!(replaced(r#""required":[]"#, r#""required":["experts"]"#), "accepted");
    for (from, to) in [
        (r#""optional":[],"#, ""),
        (r#""optional":[]"#, r#""optional":[],"new":1"#),
        (r#""name":"tiny""#, r#""name":7"#),
        (r#""rank":1"#, r#""rank":1.0"#),
        (r#""alpha":2.0"#, r#""alpha":"2""#),
        (r#""shape":[2,3]"#, r#""shape":[2,-3]"#),
        (r#""kind":"linear""#, r#""kind":"linear_transposed""#),
        (r#""kind":"linear""#, r#""kind":"conv2d""#),
        (r#""kind":"linear""#, r#""kind":"lattice""#),
        (r#""kind":"linear""#, r#""kind":"experts""#),
        (r#""kind":"linear""#, r#""kind":"experts","axes":"rows""#),
        (r#""scale":2.0"#, r#""scale":2.0,"magnitude":"base_model.model.q.lora_A.weight""#),
        (r#""replacements":[]"#, r#""replacements":[],"rows":null"#),
        (r#""replacements":[]"#, r#""replacements":[],"rows":[{"tensor":"x","rows":[1],"with":"y"}]"#),
        (r#""replacements":[]"#, r#""replacements":[],"rescalings":[{}]"#),
        (r#""replacements":[]"#, r#""replacements":[],"residual":{"why":"x","removed":"all"}"#),
        (r#""replacements":[]"#, r#""replacements":[],"residual":{"why":"x","removed":"unknown"}"#),
        (r#""replacements":[]"#, r#""replacements":[{"tensor":"x","with":"y","shared":1}]"#),
        (r#""scaling":"alpha/rank""#, r#""scaling":"rank""#),
        (r#""targets":[{"#, r#""targets":[{"axes":"in_out","#),
    ] {
        assert_eq!(replaced(from, to), "C-033", "{to}");
    }
    assert_eq!(replaced(r#""optional":[]"#, r#""optional":["x"],"x-mine":[{}]"#), "accepted");
    assert_eq!(replaced(r#""op":"convert","#, ""), "C-042");
    assert_eq!(replaced(r#""parameters":{}"#, r#""parameters":[]"#), "C-042");
    assert_eq!(replaced(r#""structure":null"#, r#""structure":"00""#), "C-039");
    assert_eq!(replaced("lora_A.weight", "lora_B.weight"), "C-034");
    assert_eq!(replaced(r#""digests":{"base"#, r#""digests":{"case"#), "C-034");
    assert_eq!(replaced(r#""shape":[2,3]"#, r#""shape":[3,2]"#), "C-035");
    assert_eq!(replaced(r#""rank":1"#, r#""rank":2"#), "C-035");
    assert_eq!(replaced(r#""scale":2.0"#, r#""scale":2.00000001"#), "C-036");
    assert_eq!(replaced(r#""content":"3"#, r#""content":"4"#), "C-038");
}

/// The containers among the vectors of the specification, as far as the rules of this dialect go: A rules are the model's, and `C-037`
/// needs the tensors' bytes.
#[test]
fn vectors_come_out_as_the_specification_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("spec/vectors");
    let manifest = std::fs::read_to_string(root.join("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    let mut seen = 0;
    for vector in manifest["vectors"].as_array().unwrap().iter().filter(|v| v["kind"] == "container") {
        let path = vector["path"].as_str().unwrap();
        let opened = open(&root.join(path));
        let rules: Vec<&str> = vector["rules"].as_array().unwrap().iter().filter_map(|rule| rule.as_str()).collect();
        if !rules[0].starts_with("C-") {
            continue;
        }
        if vector["expect"] == "accept" || rules == ["C-037"] {
            let adapter = opened.unwrap_or_else(|e| panic!("{path}: {e}"));
            if let Some(content) = vector["content"].as_str() {
                assert_eq!(adapter.stated_content(), Some(content), "{path}");
            }
        } else {
            let error = opened.expect_err(path);
            assert_eq!(
                (error.class().name(), error.diagnostics()[0].rule().id),
                (vector["expect"].as_str().unwrap(), rules[0]),
                "{path}: {error}"
            );
        }
        seen += 1;
    }
    assert!(seen > 50);
}

/// Vectors of each kind and member beyond plain matrices.
const OF_EACH_KIND: [&str; 12] = [
    "C-035_conv1d",
    "C-035_conv2d",
    "C-035_conv3d",
    "C-035_experts_in_out",
    "C-035_experts_out_in",
    "C-035_flat",
    "C-034_attention",
    "C-034_magnitudes",
    "C-034_rows",
    "C-034_rescalings",
    "C-034_shared",
    "C-034_every_member",
];

/// Files that somebody else wrote in the canonical form are written again byte for byte.
#[test]
fn canonical_vectors_are_reproduced() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("spec/vectors");
    for name in ["C-040_example", "C-034_every_kind", "C-036_rslora", "C-033_origin", "C-034_only_replacements", "C-035_dtypes"]
        .into_iter()
        .chain(OF_EACH_KIND)
    {
        let path: PathBuf = root.join(format!("y_{name}.safetensors"));
        let again = bytes_of(&open(&path).unwrap(), None).unwrap();
        assert!(again == std::fs::read(&path).unwrap(), "{name}");
    }
}

#[test]
fn a_plain_file_is_no_container() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("spec/vectors/y_C-009_no_metadata.safetensors");
    let file = SafetensorsFile::open(&path, ReadMode::Read, Strictness::Strict, &Limits::default()).unwrap();
    assert!(!is_container(&file));
    assert_eq!(read(Arc::new(file), &Limits::default()).unwrap_err().diagnostics()[0].rule().id, "C-030");
}
