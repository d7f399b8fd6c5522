//! Folders as people have them, and as somebody might hand them out.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::{Checkpoint, TieReason};
use crate::codec::safetensors::Layout;
use crate::error::{Error, Result};
use crate::io::ReadMode;
use crate::limits::Limits;
use crate::tensor::{Dtype, Shape, TensorInfo, TensorSource};

fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
    Checkpoint::open(path.as_ref(), ReadMode::Read, &Limits::default())
}

/// The rules that opening a path breaks.
fn broken(path: impl AsRef<Path>) -> Vec<&'static str> {
    rules_of(open(path).err())
}

fn rules_of(error: Option<Error>) -> Vec<&'static str> {
    error.map_or(Vec::new(), |e| e.diagnostics().iter().map(|d| d.rule().id).collect())
}

fn warned(checkpoint: &Checkpoint) -> Vec<&'static str> {
    checkpoint.warnings().iter().map(|d| d.rule().id).collect()
}

/// The bytes of a file whose tensors hold one F32 each, its number.
fn weights(tensors: &[(&str, f32)]) -> Vec<u8> {
    let info = TensorInfo { dtype: Dtype::F32, shape: Shape::new(vec![1]).unwrap() };
    let named: Vec<_> = tensors.iter().map(|(name, _)| (*name, &info)).collect();
    let mut bytes = Layout::new(&[], &named).head;
    bytes.extend(tensors.iter().flat_map(|(_, value)| value.to_le_bytes()));
    bytes
}

const INDEX: &str = "model.safetensors.index.json";
const ONE: &str = "model-00001-of-00002.safetensors";
const TWO: &str = "model-00002-of-00002.safetensors";

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    /// A model of two shards with `a` in the first and `b` in the second.
    fn sharded() -> Self {
        let folder = Self::new();
        folder.put(ONE, weights(&[("a", 1.0)])).put(TWO, weights(&[("b", 2.0)])).index(&[("a", ONE), ("b", TWO)]);
        folder
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn at(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    fn put(&self, name: &str, content: impl AsRef<[u8]>) -> &Self {
        fs::create_dir_all(self.at(name).parent().unwrap()).unwrap();
        fs::write(self.at(name), content).unwrap();
        self
    }

    fn index(&self, map: &[(&str, &str)]) -> &Self {
        let entries: Vec<_> = map.iter().map(|(tensor, shard)| format!("{tensor:?}:{shard:?}")).collect();
        self.put(INDEX, format!("{{\"metadata\":{{\"total_size\":8}},\"weight_map\":{{{}}}}}", entries.join(",")))
    }
}

#[test]
fn a_tensor_is_found_in_the_shard_that_the_index_names() {
    let folder = Folder::sharded();
    let checkpoint = open(folder.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!((checkpoint.locate("b"), checkpoint.locate("c")), (Some(1), None));
    let mut bytes = [0; 4];
    checkpoint.read("b", 0, &mut bytes).unwrap();
    assert_eq!(f32::from_le_bytes(bytes), 2.0);
    assert!(checkpoint.warnings().is_empty() && checkpoint.companions().is_empty() && checkpoint.is_folder());
}

#[test]
fn roots_do_not_depend_on_sharding() {
    let (sharded, single) = (Folder::sharded(), Folder::new());
    single.put("any name.safetensors", weights(&[("b", 2.0), ("a", 1.0)]));
    let (x, y) = (open(sharded.path()).unwrap(), open(single.path()).unwrap());
    assert_eq!(x.structure_root(), y.structure_root());
    assert_eq!(x.content_root(&["a", "b"]).unwrap(), y.content_root(&["b", "a"]).unwrap());
    assert_ne!(x.content_root(&["a"]).unwrap(), x.content_root(&["b"]).unwrap());
    assert_eq!(rules_of(x.content_root(&["c"]).err()), ["E-001"]);
}

#[test]
fn what_a_folder_without_a_model_holds_is_named() {
    let folder = Folder::new();
    assert_eq!(broken(folder.path()), ["K-001"]);
    folder.put("pytorch_model.bin", "PK");
    assert!(open(folder.path()).unwrap_err().to_string().contains("pytorch_model.bin"));
    folder.put(ONE, weights(&[("a", 1.0)]));
    assert!(open(folder.path()).unwrap_err().to_string().contains("no index"));
    folder.put("x.safetensors", weights(&[("a", 1.0)]));
    assert_eq!(broken(folder.path()), ["K-001"]);
    assert_eq!(broken(folder.at("nothing")), ["E-001"]);

    let adapter = Folder::new();
    adapter.put("adapter_model.safetensors", weights(&[("a", 1.0)])).put("adapter_config.json", "{}");
    assert_eq!(broken(adapter.path()), ["A-029"]);
}

#[test]
fn the_index_must_agree_with_the_shards() {
    let folder = Folder::sharded();
    folder.index(&[("a", TWO), ("b", TWO)]);
    assert_eq!(broken(folder.path()), ["K-006"]);
    folder.index(&[("a", ONE), ("b", TWO), ("c", TWO)]);
    assert_eq!(broken(folder.path()), ["K-006"]);
    folder.put(TWO, weights(&[("a", 2.0), ("b", 2.0), ("c", 2.0)])).index(&[("a", ONE), ("b", TWO)]);
    assert_eq!(broken(folder.path()), ["K-007", "K-007"]);
}

#[test]
fn every_missing_shard_is_listed_and_an_unfinished_download_recognised() {
    let folder = Folder::new();
    folder.index(&[("a", ONE), ("b", TWO)]);
    assert_eq!(broken(folder.path()), ["K-004", "K-004"]);
    folder.put(".cache/huggingface/download/x.incomplete", "");
    let error = open(folder.path()).unwrap_err();
    assert!(error.diagnostics()[0].help_text().unwrap().contains("unfinished"), "{error}");
}

#[test]
fn a_truncated_or_empty_shard_is_named() {
    let folder = Folder::sharded();
    let bytes = fs::read(folder.at(TWO)).unwrap();
    folder.put(TWO, &bytes[..bytes.len() - 1]);
    let error = open(folder.path()).unwrap_err();
    assert_eq!((error.diagnostics()[0].rule().id, error.place().file.clone()), ("C-015", Some(folder.at(TWO))));
    assert_eq!(broken(folder.put(TWO, "").path()), ["C-001"]);
}

#[test]
fn leftovers_and_a_wrong_size_are_warnings() {
    let folder = Folder::sharded();
    folder.put("model.safetensors", weights(&[("a", 9.0)])).put("model-00001-of-00004.safetensors", weights(&[("a", 9.0)]));
    folder
        .put("._model.safetensors", "AppleDouble")
        .put(INDEX, fs::read_to_string(folder.at(INDEX)).unwrap().replace(":8}", ":\"8\"}"));
    let checkpoint = open(folder.path()).unwrap();
    assert_eq!(warned(&checkpoint), ["K-011", "K-010"]);
    assert_eq!(checkpoint.shards().len(), 2);
    assert!(checkpoint.companions().iter().all(|c| !c.copy));
}

#[test]
fn nothing_but_regular_files_is_opened() {
    for make in [
        |p: &Path| drop(fs::create_dir(p)),
        |p: &Path| drop(std::os::unix::net::UnixListener::bind(p)),
        |p: &Path| {
            let mode = rustix::fs::Mode::RUSR;
            rustix::fs::mknodat(rustix::fs::CWD, p, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        },
    ] {
        let folder = Folder::sharded();
        fs::remove_file(folder.at(TWO)).unwrap();
        make(&folder.at(TWO));
        assert_eq!(broken(folder.path()), ["K-009"]);
        assert!(broken(folder.at(TWO)).iter().all(|id| id.starts_with('E') || *id == "K-001"));
    }
}

#[test]
fn links_lead_within_the_folder_or_into_a_model_cache() {
    let (folder, elsewhere) = (Folder::sharded(), Folder::new());
    let relink = |target: &Path| {
        let _ = fs::remove_file(folder.at(TWO));
        symlink(target, folder.at(TWO)).unwrap();
    };
    folder.put("inside", weights(&[("b", 2.0)]));
    relink(Path::new("inside"));
    assert_eq!(broken(folder.path()), [""; 0]);

    elsewhere.put("b.safetensors", weights(&[("b", 2.0)]));
    relink(&elsewhere.at("b.safetensors"));
    assert_eq!(broken(folder.path()), ["K-008"]);
    relink(Path::new("nowhere"));
    assert_eq!(broken(folder.path()), ["E-001"]);
    relink(Path::new(TWO));
    assert_eq!(broken(folder.path()), ["E-001"]);
}

#[test]
fn a_model_cache_is_followed_and_its_digests_hold() {
    let cache = Folder::new();
    let bytes = weights(&[("a", 1.0)]);
    let digest: String = <sha2::Sha256 as sha2::Digest>::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    let blob = format!("blobs/{digest}");
    cache.put(&blob, &bytes).put("snapshots/abc/config.json", "{}");
    symlink(format!("../../{blob}"), cache.at("snapshots/abc/model.safetensors")).unwrap();
    let checkpoint = open(cache.at("snapshots/abc")).unwrap();
    checkpoint.verify_blobs().unwrap();

    // A folder that links into the cache: two hops.
    let folder = Folder::new();
    symlink(cache.at("snapshots/abc/model.safetensors"), folder.at("model.safetensors")).unwrap();
    open(folder.path()).unwrap().verify_blobs().unwrap();

    cache.put(&blob, weights(&[("a", 1.5)]));
    assert_eq!(rules_of(open(cache.at("snapshots/abc")).unwrap().verify_blobs().err()), ["K-012"]);
    fs::remove_file(cache.at(&blob)).unwrap();
    assert_eq!(broken(cache.at("snapshots/abc")), ["E-001"]);
}

#[test]
fn companions_are_what_a_copy_needs() {
    let folder = Folder::sharded();
    for name in
        ["config.json", "1_Pooling/config.json", "a/b/c/x.json", "a/b/c/d/x.json", ".git/x.json", "checkpoint-9/config.json"]
    {
        folder.put(name, "{}");
    }
    folder.put("run.py", "").put("LICENSE", "");
    symlink("/etc/hostname", folder.at("leak.txt")).unwrap();
    let checkpoint = open(folder.path()).unwrap();
    let listed: Vec<_> = checkpoint.companions().iter().map(|c| (c.relative.to_str().unwrap(), c.copy)).collect();
    let expected = [
        ("1_Pooling/config.json", true),
        ("LICENSE", true),
        ("a/b/c/x.json", true),
        ("config.json", true),
        ("leak.txt", false),
        ("run.py", false),
    ];
    assert_eq!(listed, expected);
}

#[test]
fn tied_names_are_known_whether_or_not_they_are_stored() {
    let (embed, head) = ("model.embed_tokens.weight", "lm_head.weight");
    let model = |config: &str, names: &[&str]| {
        let folder = Folder::new();
        let tensors: Vec<_> = names.iter().map(|name| (*name, 1.0)).collect();
        folder.put("model.safetensors", weights(&tensors)).put("config.json", config);
        open(folder.path()).unwrap()
    };
    let tied = model(r#"{"model_type":"llama","tie_word_embeddings":true}"#, &[embed]);
    let tie = tied.tied(head).unwrap();
    assert_eq!((tie.present, tie.absent, tie.reason), (vec![embed], vec![], TieReason::Config));
    assert_eq!(tied.tied(embed).unwrap().absent, [head]);

    assert_eq!(model(r#"{"model_type":"llama"}"#, &[embed, head]).tied(embed), None);
    assert_eq!(model(r#"{"model_type":"gemma2"}"#, &[embed]).tied(head).unwrap().reason, TieReason::ModelType);
    assert_eq!(model("{}", &[embed]).tied(head).unwrap().reason, TieReason::OneStored);
    assert_eq!(model("{}", &[embed, head]).tied(head), None);
    assert_eq!(model("{}", &["x"]).tied(head), None);
    let body = r#"{"model_type":"gemma2","architectures":["Gemma2ForSequenceClassification"]}"#;
    assert_eq!(model(body, &[embed]).tied(embed), None);

    // T5 shares its embeddings even where the config unties the head.
    let t5 = model(r#"{"model_type":"t5","tie_word_embeddings":false}"#, &["shared.weight", head]);
    let tie = t5.tied("shared.weight").unwrap();
    assert_eq!((tie.present.len(), tie.absent.len(), tie.reason), (0, 2, TieReason::Architecture));
    assert_eq!(t5.tied(head), None);
}

#[test]
fn the_config_beside_a_single_file_counts() {
    let folder = Folder::new();
    folder.put("model.safetensors", weights(&[("a", 1.0)])).put("config.json", r#"{"model_type":"gpt2"}"#);
    let checkpoint = open(folder.at("model.safetensors")).unwrap();
    assert_eq!((checkpoint.config().model_type.as_deref(), checkpoint.is_folder()), (Some("gpt2"), false));
    assert_eq!(broken(folder.at("model.safetensors.index.json")), ["K-001"]);
}

/// The checkpoints among the vectors of the specification.
#[test]
fn vectors_come_out_as_the_specification_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("spec/vectors");
    let Ok(manifest) = fs::read_to_string(root.join("manifest.json")) else { return };
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    let strings = |value: &serde_json::Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
    };
    for vector in manifest["vectors"].as_array().unwrap().iter().filter(|v| v["kind"] == "checkpoint") {
        let path = vector["path"].as_str().unwrap();
        let opened = open(root.join(path));
        if vector["expect"] == "accept" {
            assert_eq!(warned(&opened.unwrap()), strings(&vector["warns"]), "{path}");
        } else {
            let error = opened.unwrap_err();
            assert_eq!(error.class().name(), vector["expect"], "{path}: {error}");
            assert!(strings(&vector["rules"]).iter().any(|id| id == error.diagnostics()[0].rule().id), "{path}: {error}");
        }
    }
}

/// An index that transformers wrote, written again unchanged.
#[test]
fn an_index_of_transformers_is_reproduced_byte_for_byte() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/models/llama-tiny");
    let checkpoint = open(&model).unwrap();
    let index = checkpoint.index().unwrap();
    let total = checkpoint.names().filter_map(|name| checkpoint.info(name)).map(TensorInfo::bytes).sum();
    assert_eq!(index.render(index.weight_map(), total), fs::read_to_string(model.join(index.file_name())).unwrap());
    assert!(checkpoint.warnings().is_empty());
}
