//! Table X: indices, shards and links.

use std::fs;
use std::os::unix::net::UnixListener;

use loratool::{Limits, OpenOptions, open_checkpoint, open_checkpoint_with};
use sha2::{Digest, Sha256};

use crate::bad::{Ask, Bad, rows};
use crate::bytes::{floats, safetensors};
use crate::scene::{FACTORS, INDEX, MODEL, NORM, ONE, Scene, TWO, WEIGHT, norm, weight, within};

/// A sound file outside the model's folder, which nothing in the folder may lead to.
const SECRET: &str = "secret.safetensors";

/// An index that says `shard` of the weight's place.
fn placed_in(shard: &str) -> Scene {
    Scene::sharded().index(&[(WEIGHT, shard), (NORM, TWO)]).with(SECRET, safetensors(&[weight()]))
}

/// An index with this text.
fn of_index(text: impl AsRef<[u8]>) -> Scene {
    Scene::sharded().with(INDEX, text)
}

/// The base of a sharded scene without its first shard, for something else in its place.
fn without_first() -> Scene {
    Scene::sharded().without(&format!("base/{ONE}"))
}

fn first() -> String {
    format!("base/{ONE}")
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The layout of a model cache, `base` being a link to the snapshot: a file of the snapshot leads to a blob of this name.
fn cached(blob: &str, bytes: &[u8]) -> Scene {
    Scene::sound()
        .without("base")
        .with(&format!("hub/blobs/{blob}"), bytes)
        .link("hub/snapshots/main/model.safetensors", format!("../../blobs/{blob}"))
        .link("base", "hub/snapshots/main")
}

rows! {
    x01_shard_names_that_lead_elsewhere => {
        let evil = |shard: &str| {
            Bad::scene(3, "K-003", placed_in(shard))
                .tensor(WEIGHT)
                .file_named("model.safetensors.index.json")
                .says(format!("{shard:?}"))
        };
        let mut row: Vec<Bad> = [
            "../secret.safetensors",
            "../../etc/passwd",
            "/etc/passwd",
            "C:\\x",
            "C:x",
            "\\\\server\\share",
            "a/../../secret.safetensors",
            "./x",
            "a/b.safetensors",
            "x.safetensors/",
            "/",
            "..",
            ".",
            "",
            "x\0y",
            "x\ny",
            "\u{1b}[31m",
            "x\u{9b}y",
        ]
        .map(evil)
        .into();
        let absolute = Scene::sharded().with(SECRET, safetensors(&[weight()]));
        let path = absolute.at(SECRET).display().to_string();
        row.push(Bad::scene(3, "K-003", absolute.index(&[(WEIGHT, &path), (NORM, TWO)])).tensor(WEIGHT).says(path));
        row
    };
    x02_shard_that_is_a_link_out_of_the_folder => {
        let out = |target: &str| {
            Bad::scene(3, "K-008", without_first().with(SECRET, safetensors(&[weight()])).link(&first(), target))
                .says("leads out of the folder")
                .says("copy the file")
                .file_named(ONE)
        };
        let blobs = without_first().with("blobs/secret", safetensors(&[weight()])).link(&first(), "../blobs/secret");
        let twice = without_first()
            .with(SECRET, safetensors(&[weight()]))
            .link(&first(), "hop")
            .link("base/hop", "../secret.safetensors");
        vec![out("../secret.safetensors"), out("/dev/zero"), Bad::scene(3, "K-008", blobs), Bad::scene(3, "K-008", twice)]
    };
    x03_shard_that_is_a_fifo => {
        vec![
            Bad::scene(6, "K-009", without_first().fifo(&first())).says("FIFO").file_named(ONE),
            Bad::scene(6, "K-009", Scene::sharded().without(INDEX).fifo(INDEX)).says("FIFO").file_named("index.json"),
            Bad::scene(6, "K-009", Scene::sound().without(MODEL).fifo(MODEL)).says("FIFO"),
            Bad::scene(6, "E-007", Scene::sound().without(FACTORS).fifo(FACTORS))
                .says("FIFO")
                .file_named("adapter_model.safetensors"),
            Bad::scene(6, "E-007", Scene::sound().without("base").fifo("base")).says("FIFO").file_named("base"),
            Bad::scene(6, "E-007", Scene::sound().without("adapter").fifo("adapter")).says("FIFO").file_named("adapter"),
        ]
    };
    x03_shard_that_is_a_device => {
        vec![
            Bad::scene(6, "E-007", Scene::sound().without("base").link("base", "/dev/zero")).says("device"),
            Bad::scene(6, "E-007", Scene::sound().without("adapter").link("adapter", "/dev/null")).says("device"),
            Bad::scene(6, "E-007", Scene::sound().without(FACTORS).link(FACTORS, "/dev/zero")).says("device"),
        ]
    };
    x03_shard_that_is_a_socket => {
        let socket = |scene: Scene, path: &str| {
            drop(UnixListener::bind(scene.at(path)).unwrap());
            scene
        };
        vec![
            Bad::scene(6, "K-009", socket(without_first(), &first())).says("socket").file_named(ONE),
            Bad::scene(6, "E-007", socket(Scene::sound().without(FACTORS), FACTORS)).says("socket"),
        ]
    };
    x03_shard_that_is_a_folder => {
        vec![
            Bad::scene(6, "K-009", without_first().with(&format!("base/{ONE}/x"), "")).says("folder").file_named(ONE),
            Bad::scene(6, "E-007", Scene::sound().without(FACTORS).with(&format!("{FACTORS}/x"), "")).says("folder"),
        ]
    };
    x04_link_that_leads_nowhere => {
        vec![
            Bad::scene(6, "E-001", without_first().link(&first(), "../gone.safetensors"))
                .says("../gone.safetensors")
                .says("download")
                .file_named(ONE),
            Bad::scene(6, "E-001", Scene::sound().without(FACTORS).link(FACTORS, "gone"))
                .says("gone")
                .file_named("adapter_model.safetensors"),
        ]
    };
    x04_link_that_leads_back_to_itself => {
        vec![
            Bad::scene(6, "E-001", without_first().link(&first(), ONE)).says("link").file_named(ONE),
            Bad::scene(6, "E-001", without_first().link(&first(), "hop").link("base/hop", ONE)).says("link").file_named(ONE),
            Bad::scene(6, "E-001", Scene::sound().without(FACTORS).link(FACTORS, "adapter_model.safetensors")).says("link"),
        ]
    };
    x05_shard_that_is_missing => {
        vec![
            Bad::scene(6, "K-004", without_first()).says("missing").says("1 of 2").says("download").file_named(ONE),
            Bad::scene(6, "K-004", without_first().without(&format!("base/{TWO}"))).says("2 of 2").says(TWO),
            Bad::scene(6, "K-004", without_first().with("base/0a1b.incomplete", ""))
                .says("download is unfinished")
                .file_named(ONE),
            Bad::scene(6, "K-004", without_first().with("base/.cache/huggingface/download/x.incomplete", ""))
                .says("download is unfinished"),
        ]
    };
    x05_shard_of_no_bytes => {
        vec![Bad::scene(3, "C-001", Scene::sharded().with(&first(), "")).says("empty").says("download").file_named(ONE)]
    };
    x06_tensor_twice_in_the_index => {
        let twice = |second: &str| {
            of_index(format!(r#"{{"weight_map": {{"{WEIGHT}": "{ONE}", "{NORM}": "{TWO}", {second}: "{TWO}"}}}}"#))
        };
        vec![
            Bad::scene(3, "K-005", twice(&format!("{WEIGHT:?}"))).tensor(WEIGHT).says("twice").says(ONE).says(TWO),
            Bad::scene(3, "K-005", twice("\"norm\\u002eweight\"")).tensor(NORM),
            Bad::scene(3, "K-005", of_index(format!(r#"{{"weight_map": {{"a": "{ONE}"}}, "weight_map": {{"a": "{TWO}"}}}}"#)))
                .says("weight_map"),
        ]
    };
    x07_shard_without_the_tensor => {
        vec![
            Bad::scene(3, "K-006", Scene::sharded().index(&[(WEIGHT, TWO), (NORM, TWO)])).tensor(WEIGHT).says(TWO),
            Bad::scene(3, "K-006", Scene::sharded().index(&[(WEIGHT, ONE), (NORM, TWO), ("ghost", ONE)]))
                .tensor("ghost")
                .says("no shard holds it"),
            Bad::scene(3, "K-006", Scene::sharded().index(&[(WEIGHT, TWO), (NORM, ONE)])).says(WEIGHT).says(NORM),
        ]
    };
    x08_tensor_that_the_index_omits => {
        vec![
            Bad::scene(3, "K-007", Scene::sharded().shard(TWO, &[norm(), floats("extra", "F32", &[1], &[1.0])]))
                .tensor("extra")
                .says(TWO),
        ]
    };
    x08_tensor_in_two_shards => {
        vec![Bad::scene(3, "K-007", Scene::sharded().shard(TWO, &[norm(), weight()])).tensor(WEIGHT).says("two shards")]
    };
    x11_index_that_is_no_index => {
        let no = |text: &str| Bad::scene(3, "K-002", of_index(text)).file_named("index.json");
        let mut row: Vec<Bad> = [
            "",
            "[]",
            "null",
            "3",
            "{}",
            "{",
            r#"{"weight_map": []}"#,
            r#"{"weight_map": null}"#,
            r#"{"weight_map": {}}"#,
            r#"{"weight_map": {"a": 3}}"#,
            r#"{"weight_map": {"a": null}}"#,
            r#"{"weight_map": {"a": ["x"]}}"#,
            "\u{feff}{\"weight_map\": {\"a\": \"x\"}}",
        ]
        .map(no)
        .into();
        row.push(Bad::scene(3, "K-002", of_index(b"{\"weight_map\": {\"\xff\": \"x\"}}")).at(17));
        row
    };
    x11_index_that_is_nested_too_deep => {
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        vec![
            Bad::scene(3, "K-002", of_index(&deep)),
            Bad::scene(3, "K-002", of_index(format!(r#"{{"weight_map": {{"a": {deep}}}}}"#))).tensor("a"),
            Bad::scene(3, "K-002", of_index(format!(r#"{{"weight_map": {deep}}}"#))),
            Bad::scene(3, "K-002", of_index("[".repeat(100_000))),
        ]
    };
    x11_index_of_too_many_tensors => {
        let members: Vec<String> = (0..=1_000_000).map(|i| format!("\"{i}\":\"a\"")).collect();
        vec![
            Bad::scene(7, "K-013", of_index(format!("{{\"weight_map\":{{{}}}}}", members.join(","))))
                .says("1000001")
                .says("1000000"),
        ]
    };
    x13_shards_that_differ_by_case_alone => {
        let other = ONE.to_uppercase();
        vec![Bad::scene(3, "K-014", Scene::sharded().index(&[(WEIGHT, ONE), (NORM, &other)])).tensor(NORM).says(ONE).says(other)]
    };
    x14_one_truncated_shard_among_many => {
        let shards: Vec<String> = (1..=6).map(|i| format!("model-0000{i}-of-00006.safetensors")).collect();
        let tensor = |i: usize| floats(&format!("t{i}"), "F32", &[8], &[1.0; 8]);
        let mut scene = Scene::sound().without(MODEL);
        for (i, shard) in shards.iter().enumerate() {
            scene = scene.shard(shard, &[tensor(i)]);
        }
        let names: Vec<String> = (0..6).map(|i| format!("t{i}")).collect();
        let map: Vec<(&str, &str)> = names.iter().zip(&shards).map(|(n, s)| (n.as_str(), s.as_str())).collect();
        let whole = safetensors(&[tensor(3)]);
        let scene = scene.index(&map).with(&format!("base/{}", shards[3]), &whole[..whole.len() - 13]);
        vec![Bad::scene(3, "C-015", scene).file_named(&shards[3]).tensor("t3").says("truncated by 13 bytes")]
    };
    x15_blob_whose_digest_is_another => {
        let bytes = safetensors(&[weight(), norm()]);
        let stated = hex(b"something else");
        vec![
            Bad::scene(9, "K-012", cached(&stated, &bytes))
                .ask(Ask::ValidateBase)
                .says(stated)
                .says(hex(&bytes))
                .says("download"),
        ]
    };
}

/// The target of a traversal is not opened: not read, not looked into, not waited for.
#[cfg(target_os = "linux")]
#[test]
fn x01_the_target_of_a_traversal_is_never_opened() {
    let scene = placed_in(ONE);
    let absolute = scene.at(SECRET).display().to_string();
    let watch = Watch::new(&scene.at(SECRET));
    fs::read(scene.at(SECRET)).unwrap();
    assert!(watch.saw_something(), "the watch does not see a file being opened");
    let mut scene = scene;
    for shard in [
        "../secret.safetensors",
        "x/../../secret.safetensors",
        "./../secret.safetensors",
        "../base/../secret.safetensors",
        &absolute,
    ] {
        scene = scene.index(&[(WEIGHT, shard), (NORM, TWO)]);
        assert_eq!(open_checkpoint(scene.at("base")).unwrap_err().class().exit_code(), 3);
        assert!(!watch.saw_something(), "{shard} was opened");
    }
    // A link is followed no further than its name.
    let scene = scene.index(&[(WEIGHT, ONE), (NORM, TWO)]).without(&first()).link(&first(), "../secret.safetensors");
    assert_eq!(open_checkpoint(scene.at("base")).unwrap_err().class().exit_code(), 3);
    assert!(!watch.saw_something(), "the link was followed");
    // A FIFO that nobody writes to would be waited for.
    let scene = scene.without(&first()).without(SECRET).fifo(SECRET).index(&[(WEIGHT, "../secret.safetensors"), (NORM, TWO)]);
    let base = scene.at("base");
    assert_eq!(within(move || open_checkpoint(base)).unwrap_err().class().exit_code(), 3);
}

/// Sees whether files are opened.
#[cfg(target_os = "linux")]
struct Watch(std::os::fd::OwnedFd);

#[cfg(target_os = "linux")]
impl Watch {
    fn new(path: &std::path::Path) -> Watch {
        use rustix::fs::inotify;
        let watch = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&watch, path, inotify::WatchFlags::OPEN | inotify::WatchFlags::ACCESS).unwrap();
        Watch(watch)
    }

    /// Whether anything was opened since the last question.
    fn saw_something(&self) -> bool {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut events = rustix::fs::inotify::Reader::new(&self.0, &mut buffer);
        let mut seen = false;
        while events.next().is_ok() {
            seen = true;
        }
        seen
    }
}

/// An index of a million wrong entries does not become a report of a million problems: the first are told, the rest counted.
#[test]
fn x05_x07_problems_are_counted_beyond_the_ones_that_are_shown() {
    let ghosts: Vec<String> = (0..1000).map(|i| format!("ghost.{i}")).collect();
    let shards: Vec<String> = (0..1000).map(|i| format!("{i}.safetensors")).collect();
    let nowhere = ghosts.iter().map(|ghost| (ghost.as_str(), ONE)).chain([(WEIGHT, ONE), (NORM, TWO)]).collect::<Vec<_>>();
    let missing = ghosts.iter().zip(&shards).map(|(ghost, shard)| (ghost.as_str(), shard.as_str())).collect::<Vec<_>>();
    for (rule, map) in [("K-006", nowhere), ("K-004", missing)] {
        let error = open_checkpoint(Scene::sharded().index(&map).at("base")).unwrap_err();
        let shown = Limits::default().problems_shown;
        assert_eq!(error.diagnostics()[0].rule().id, rule);
        assert!(error.diagnostics().len() <= shown + 1, "{} problems are reported", error.diagnostics().len());
        assert!(error.to_string().contains("950") || error.to_string().contains("1000"), "the rest is not counted: {error}");
    }
}

/// Links of a model cache are followed, over one or two links; so are links within the folder.
#[test]
fn x02_links_of_a_model_cache_are_followed() {
    let bytes = safetensors(&[weight(), norm()]);
    let expected = Scene::sound().merged().tensor(WEIGHT);
    let one_hop = || cached(&hex(&bytes), &bytes);
    assert_eq!(one_hop().merged().tensor(WEIGHT), expected);
    assert_eq!(cached(&"0a".repeat(20), &bytes).merged().tensor(WEIGHT), expected);
    let two_hops = one_hop().without("hub/snapshots/main/model.safetensors");
    let two_hops = two_hops.link("hub/snapshots/main/model.safetensors", "../other/model.safetensors");
    let two_hops = two_hops.link("hub/snapshots/other/model.safetensors", format!("../../blobs/{}", hex(&bytes)));
    assert_eq!(two_hops.merged().tensor(WEIGHT), expected);
    let inside = Scene::sound().without(MODEL).with("base/store/weights", &bytes).link(MODEL, "store/weights");
    assert_eq!(inside.merged().tensor(WEIGHT), expected);
}

/// A merge never writes through a link of a cache: the blob is what it was. ([`Scene::merged`] compares the inputs.)
#[test]
fn x02_the_output_of_a_cached_base_is_a_file_of_its_own() {
    let bytes = safetensors(&[weight(), norm()]);
    let scene = cached(&hex(&bytes), &bytes);
    scene.merged();
    assert!(fs::symlink_metadata(scene.at("out/model.safetensors")).unwrap().is_file());
}

/// A link out of the folder beside the weights: what it leads to does not travel into the output.
#[test]
fn x02_other_files_that_are_links_out_of_the_folder_are_not_copied() {
    let scene = Scene::sound()
        .with("secrets/config.json", r#"{"model_type": "secret"}"#)
        .link("base/config.json", "../secrets/config.json");
    let scene = scene.link("base/tokenizer.json", "/etc/hostname").link("base/sub", "../secrets").link("base/vocab.txt", "gone");
    let merged = scene.merged();
    assert_eq!(merged.files.keys().collect::<Vec<_>>(), ["loratool.merge.json", "model.safetensors"]);
    let left: Vec<&str> = merged.report.files_left.iter().map(|left| left.file.as_str()).collect();
    assert_eq!(left, ["config.json", "sub", "tokenizer.json", "vocab.txt"]);
    assert_eq!(merged.warned(), ["K-008"]);
}

/// What the index names is read; what else lies there is named, and neither read nor copied.
#[test]
fn x09_a_second_set_of_weights_is_left_and_named() {
    let stale = "model-00001-of-00004.safetensors";
    for extra in [stale, "model.safetensors", "consolidated.safetensors"] {
        let scene = Scene::sharded().with(&format!("base/{extra}"), safetensors(&[floats(WEIGHT, "F32", &[1], &[0.0])]));
        let merged = scene.merged();
        assert_eq!(merged.warned(), ["K-011"]);
        assert!(merged.report.warnings[0].message.contains(extra), "{}", merged.report.warnings[0].message);
        assert_eq!(merged.files.keys().collect::<Vec<_>>(), ["loratool.merge.json", ONE, TWO, "model.safetensors.index.json"]);
        assert_eq!(merged.files[ONE], Scene::sharded().merged().files[ONE]);
    }
}

/// A wrong size is said, relied upon by nothing, and right in the output.
#[test]
fn x10_a_wrong_total_size_is_a_warning_and_is_computed_anew() {
    for odd in ["1", "-1", "\"60\"", "60.5", "1e400", "null", "18446744073709551616"] {
        let text =
            format!(r#"{{"metadata": {{"total_size": {odd}}}, "weight_map": {{"{WEIGHT}": "{ONE}", "{NORM}": "{TWO}"}}}}"#);
        let merged = of_index(text).merged();
        assert_eq!(merged.warned(), ["K-010"], "{odd}");
        let index: serde_json::Value = serde_json::from_slice(&merged.files["model.safetensors.index.json"]).unwrap();
        assert_eq!(index["metadata"]["total_size"], 60, "{odd}");
    }
    assert!(Scene::sharded().merged().warned().is_empty());
}

/// An index longer than the limit is not read into memory; the limits hold on both sides.
#[test]
fn x11_an_index_is_limited_in_bytes_and_in_tensors() {
    let scene = Scene::sharded();
    let len = fs::metadata(scene.at(INDEX)).unwrap().len();
    let verdict = |limits: Limits| {
        let mut options = OpenOptions::default();
        options.limits = limits;
        open_checkpoint_with(scene.at("base"), &options)
            .map_or_else(|e| (e.class().exit_code(), e.diagnostics()[0].rule().id), |_| (0, ""))
    };
    let of = |bytes, tensors| {
        let mut limits = Limits::default();
        (limits.index_bytes, limits.tensors) = (bytes, tensors);
        limits
    };
    assert_eq!(verdict(of(len, 2)), (0, ""));
    assert_eq!(verdict(of(len - 1, 2)), (7, "K-013"));
    assert_eq!(verdict(of(len, 1)), (7, "K-013"));
    fs::File::create(scene.at(INDEX)).unwrap().set_len(100_000_001).unwrap();
    assert_eq!(verdict(Limits::default()), (7, "K-013"));
}

/// Members of an index that nobody reads may hold anything, as deep as they like.
#[test]
fn x11_an_unknown_member_of_an_index_is_kept() {
    let deep = "[".repeat(100_000) + &"]".repeat(100_000);
    let text = format!(
        r#"{{"note": {deep}, "metadata": {{"total_size": 60}}, "weight_map": {{"{WEIGHT}": "{ONE}", "{NORM}": "{TWO}"}}}}"#
    );
    let merged = of_index(text).merged();
    assert!(String::from_utf8(merged.files["model.safetensors.index.json"].clone()).unwrap().contains(&deep));
}

#[test]
fn x15_a_blob_with_its_own_digest_is_validated() {
    let bytes = safetensors(&[weight(), norm()]);
    let scene = cached(&hex(&bytes), &bytes);
    assert!(loratool::validate_checkpoint(&open_checkpoint(scene.at("base")).unwrap(), loratool::Values::Read).is_ok());
}

/// Code and pickles are not opened and not copied; what a copy of the model needs is copied. All of it is reported.
#[cfg(target_os = "linux")]
#[test]
fn x16_code_and_pickles_are_neither_read_nor_copied() {
    let left = ["configuration_x.py", "modeling_x.py", "optimizer.pt", "pytorch_model.bin", "training_args.bin", "x.pkl"];
    let copied = ["LICENSE", "config.json", "tokenizer.json", "tokenizer.model", "vocab.txt"];
    let mut scene = Scene::sound();
    for name in left.iter().chain(&copied) {
        scene = scene.with(&format!("base/{name}"), "{}");
    }
    let watches: Vec<Watch> = left.iter().map(|name| Watch::new(&scene.at(&format!("base/{name}")))).collect();
    let report = scene.merge(loratool::ReadMode::Read, |_| {}).unwrap();
    assert!(!watches.iter().any(Watch::saw_something), "a file that is not needed was opened");
    let mut found: Vec<String> =
        fs::read_dir(scene.at("out")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    found.sort_unstable();
    assert_eq!(
        found,
        ["LICENSE", "config.json", "loratool.merge.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "vocab.txt"]
    );
    assert_eq!(report.files_copied, copied);
    assert_eq!(report.files_left.iter().map(|left| left.file.as_str()).collect::<Vec<_>>(), left);
}
