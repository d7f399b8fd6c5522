//! The same inputs and options give the same bytes: whatever the threads, the tiles, the way of reading and the instruction set.

mod common;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;

use common::fixture;
use loratool::{MergeOptions, OpenOptions, ReadMode, Weighted, merge, open_adapter_with, open_checkpoint_with};

/// Every file of a folder, sub-folders too.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        match path.is_dir() {
            true => found.extend(files(&path).into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes))),
            false => drop(found.insert(name, std::fs::read(&path).unwrap())),
        }
    }
    found
}

fn merged(
    base: &str,
    adapters: &[(&str, f64)],
    mode: ReadMode,
    edit: impl FnOnce(&mut MergeOptions),
) -> BTreeMap<String, Vec<u8>> {
    let scratch = tempfile::tempdir().unwrap();
    let mut open = OpenOptions::default();
    open.mode = mode;
    let base = open_checkpoint_with(fixture(&format!("models/{base}")), &open).unwrap();
    let opened: Vec<_> =
        adapters.iter().map(|(path, _)| open_adapter_with(fixture(&format!("adapters/{path}")), &open).unwrap()).collect();
    let weighted: Vec<_> =
        opened.iter().zip(adapters).map(|(adapter, (_, weight))| Weighted { adapter, weight: *weight }).collect();
    let mut options = MergeOptions::default();
    edit(&mut options);
    let output = scratch.path().join("out");
    merge(&base, &weighted, &output, &options, &()).unwrap();
    files(&output)
}

/// Pairs that between them have every dtype, both orientations, embeddings, bias updates, replacements, and two adapters.
const PAIRS: &[(&str, &[(&str, f64)])] = &[
    ("llama-tiny", &[("llama-all-r4", 1.0), ("llama-odd-scale", -0.3)]),
    ("llama-tiny-f16", &[("llama-qv-r8", 1.0)]),
    ("llama-tiny-f32", &[("llama-embed", 1.0)]),
    ("llama-tiny-f64", &[("llama-qv-r8", 0.7)]),
    ("gpt2-tiny-bf16", &[("gpt2-all", 1.0)]),
    ("bert-tiny", &[("bert-lora-bias", 1.0)]),
    ("bert-cls", &[("bert-seqcls", 1.0)]),
];

#[test]
fn threads_tiles_maps_and_instruction_sets_do_not_change_a_byte() {
    for (base, adapters) in PAIRS {
        let reference = merged(base, adapters, ReadMode::Read, |_| {});
        let same = |what: &str, found: BTreeMap<String, Vec<u8>>| assert!(found == reference, "{base}: {what} changes the bytes");
        for threads in [1, 2, 8] {
            same(
                &format!("{threads} threads"),
                merged(base, adapters, ReadMode::Read, |o| o.exec.threads = NonZeroUsize::new(threads)),
            );
        }
        for tile in [64, 100, 1000, 4096, 1 << 26] {
            same(&format!("tiles of {tile}"), merged(base, adapters, ReadMode::Read, |o| o.exec.tile_bytes = tile));
        }
        same("a map", merged(base, adapters, ReadMode::Map, |_| {}));
        same("little memory", merged(base, adapters, ReadMode::Read, |o| o.exec.memory = Some(1 << 17)));
        same("no sync", merged(base, adapters, ReadMode::Read, |o| o.durability = loratool::Durability::Fast));
        same("the portable kernel", merged(base, adapters, ReadMode::Read, |o| o.exec.portable = true));
    }
}

/// Of the weights only the touched tensors differ from the base, and no header does; small files are copies; one is new.
#[test]
fn nothing_else_in_the_files_changes() {
    let base = files(&fixture("models/llama-tiny"));
    let mut out = merged("llama-tiny", &[("llama-qv-r8", 1.0)], ReadMode::Read, |_| {});
    assert!(out.remove("loratool.merge.json").is_some());
    assert_eq!(base.keys().collect::<Vec<_>>(), out.keys().collect::<Vec<_>>());
    for (name, bytes) in &base {
        if !name.ends_with(".safetensors") {
            assert_eq!(bytes, &out[name], "{name}");
            continue;
        }
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!(bytes[..header], out[name][..header], "header of {name}");
        let (before, after) =
            (safetensors::SafeTensors::deserialize(bytes).unwrap(), safetensors::SafeTensors::deserialize(&out[name]).unwrap());
        for (tensor, view) in before.tensors() {
            let touched = tensor.ends_with("q_proj.weight") || tensor.ends_with("v_proj.weight");
            assert_eq!(view.data() != after.tensor(&tensor).unwrap().data(), touched, "{tensor}");
        }
    }
}
