//! The index against the shards: every shard is there, every tensor is where the index says, and in no other place. A tensor that is
//! in two shards, or in a shard but not in the index, means one model to a program that reads the index and another to one that
//! reads the files. The rules are `K-004`, `K-006`, `K-007` and `K-010`.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use super::{Shard, links};
use crate::codec::safetensors::{SafetensorsFile, Strictness};
use crate::codec::shards::{ShardIndex, TotalSize};
use crate::error::{Diagnostic, Problems, Result};
use crate::io::ReadMode;
use crate::limits::Limits;
use crate::rules;
use crate::tensor::TensorSource;

/// Opens the files of a folder.
///
/// # Errors
/// `K-004` for all that are missing, else the first of `K-008`, `K-009` and the rules of the files.
pub(super) fn open_shards(folder: &Path, names: &[&str], mode: ReadMode, limits: &Limits) -> Result<Vec<Shard>> {
    missing(folder, names, limits)?;
    let mut shards = Vec::with_capacity(names.len());
    for name in names {
        links::admit(folder, Path::new(name))?;
        let path = folder.join(name);
        let file = SafetensorsFile::open(&path, mode, Strictness::Lenient, limits)?;
        shards.push(Shard { file_name: (*name).to_owned(), file, blob: links::blob(&path) });
    }
    Ok(shards)
}

/// Refuses if files of the folder are not there; a link that leads nowhere counts as there, and opening it says what is wrong.
fn missing(folder: &Path, names: &[&str], limits: &Limits) -> Result<()> {
    let absent = |name: &&&str| fs::symlink_metadata(folder.join(name)).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound);
    let absent: Vec<_> = names.iter().filter(absent).collect();
    let help = match absent.is_empty() || !is_unfinished(folder) {
        true => "download the missing shards",
        false => "the download is unfinished (there are .incomplete files): run it again",
    };
    let message = format!("the shard is missing ({} of {} shards are)", absent.len(), names.len());
    let mut problems = Problems::new(limits.problems_shown);
    for name in absent {
        problems.push(|| Diagnostic::new(rules::SHARD_PRESENT, &message).file(folder.join(name)).help(help));
    }
    problems.check()
}

/// Whether a download of the Hub's client stopped midway: into the folder, or into the cache that the folder is a snapshot of.
fn is_unfinished(folder: &Path) -> bool {
    let places = [folder.to_owned(), folder.join(".cache/huggingface/download"), folder.join("../../blobs")];
    let entries = places.iter().filter_map(|place| fs::read_dir(place).ok()).flatten().flatten();
    entries.map(|entry| entry.file_name()).any(|name| name.to_string_lossy().ends_with(".incomplete"))
}

/// Holds the index against the headers of its shards.
///
/// # Errors
/// Every broken `K-006`, then every broken `K-007`, as far as they are shown.
pub(super) fn check_index(index: &ShardIndex, shards: &[Shard], path: &Path, limits: &Limits) -> Result<()> {
    let mut held: HashMap<&str, Vec<&str>> = HashMap::new();
    for shard in shards {
        for tensor in shard.file.names() {
            held.entry(tensor).or_default().push(&shard.file_name);
        }
    }
    let mut problems = Problems::new(limits.problems_shown);
    for (tensor, shard) in index.weight_map() {
        let holders = held.get(tensor.as_str()).map_or(&[][..], Vec::as_slice);
        if !holders.contains(&shard.as_str()) {
            problems.push(|| {
                let message = match holders.first() {
                    Some(other) => format!("the index places {tensor:?} in {shard:?}, but {other:?} holds it"),
                    None => format!("the index places {tensor:?} in {shard:?}, and no shard holds it"),
                };
                Diagnostic::new(rules::INDEX_HOLDS, message).file(path).tensor(tensor)
            });
        }
    }
    let placed: HashMap<&str, &str> = index.weight_map().iter().map(|(t, s)| (t.as_str(), s.as_str())).collect();
    for shard in shards {
        for tensor in shard.file.names() {
            let holds = |first: &str| held.get(tensor).is_some_and(|holders| holders.contains(&first));
            let message = match placed.get(tensor) {
                None => format!("{:?} holds {tensor:?}, which the index does not name", shard.file_name),
                Some(first) if *first != shard.file_name && holds(first) => {
                    format!("{tensor:?} is in two shards, {first:?} and {:?}", shard.file_name)
                }
                Some(_) => continue,
            };
            let help = "shards of two models may be mixed: download the model again";
            problems.push(|| Diagnostic::new(rules::INDEX_COMPLETE, message).file(path).tensor(tensor).help(help));
        }
    }
    problems.check()
}

/// A warning if the index states a wrong size. Nothing here relies on it, and whoever writes an index computes it anew.
pub(super) fn check_total(index: &ShardIndex, shards: &[Shard], path: &Path) -> Option<Diagnostic> {
    let sizes = shards.iter().flat_map(|s| s.file.names().filter_map(|name| s.file.info(name)));
    let sum = sizes.fold(0u64, |sum, info| sum.saturating_add(info.bytes()));
    let stated = match index.total_size() {
        TotalSize::Absent => return None,
        TotalSize::Bytes(stated) if stated == sum => return None,
        TotalSize::Bytes(stated) => stated.to_string(),
        TotalSize::Odd(raw) => raw.chars().take(40).collect(),
    };
    let message = format!("total_size is {stated:?} but the tensors have {sum} bytes");
    Some(Diagnostic::new(rules::TOTAL_SIZE, message).file(path).tensor("total_size"))
}
