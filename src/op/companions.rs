//! What lies beside the weights of an output, and the last look at all of it before it gets its name.

use std::path::Path;

use super::lineage::RECORD;
use crate::checkpoint::{stored_as, with_vocabulary};
use crate::codec::safetensors::{SafetensorsFile, Strictness};
use crate::codec::shards::ShardIndex;
use crate::error::{Error, Result};
use crate::io::{ReadMode, Staging};
use crate::limits::Limits;
use crate::plan::{OutShard, OutTensor, Plan};
use crate::rules;
use crate::tensor::{Dtype, TensorSource};

const CONFIG: &str = "config.json";

/// The small files, in folder `within` of the staging: copied as they are, but for the index and the config where the plan changes what
/// they say.
pub(super) fn write_companions(plan: &Plan<'_>, staging: &Staging, within: &Path) -> Result<()> {
    let base = plan.base;
    let config = config(plan);
    let is_rewritten = |name: &Path| name == Path::new(RECORD) || config.is_some() && name == Path::new(CONFIG);
    for companion in base.companions().iter().filter(|c| c.copy && !is_rewritten(&c.relative)) {
        staging.copy(&base.path().join(&companion.relative), within.join(&companion.relative))?;
    }
    if let Some(name) = plan.index_name() {
        staging.write(within.join(&name), index(plan, &name).as_bytes())?;
    }
    if let Some(text) = config {
        staging.write(within.join(CONFIG), text.as_bytes())?;
    }
    Ok(())
}

/// The index of the output: the base's with its order, where the files are the base's; otherwise in the order of the files.
fn index(plan: &Plan<'_>, name: &str) -> String {
    let total = plan.shards.iter().flat_map(|shard| &shard.tensors).map(|tensor| tensor.info.bytes()).sum();
    let entry = |shard: &OutShard<'_>, tensor: &str| (tensor.to_owned(), shard.file_name.clone());
    let all = || plan.shards.iter().flat_map(|shard| shard.tensors.iter().map(move |tensor| entry(shard, &tensor.name)));
    let is_kept = plan.output.max_shard_bytes.is_none() && plan.base.replication().is_empty();
    match plan.base.index().filter(|index| index.file_name() == name && is_kept) {
        Some(index) => {
            let mut map = index.weight_map().to_vec();
            let added = |shard: &&OutShard<'_>| shard.changes.iter().any(|change| change.added);
            for shard in plan.shards.iter().filter(added) {
                map.extend(shard.changes.iter().filter(|change| change.added).map(|change| entry(shard, &change.name)));
            }
            index.render(&map, total)
        }
        None => {
            let map: Vec<_> = all().collect();
            match plan.base.index() {
                Some(index) => index.render(&map, total),
                None => ShardIndex::empty(name).render(&map, total),
            }
        }
    }
}

/// `config.json` of the output, if it says something else than the base's.
fn config(plan: &Plan<'_>) -> Option<String> {
    let text = plan.base.config().text()?;
    // The plan made sure that it can be untied.
    let untied = plan.base.config().untied().filter(|_| plan.untied);
    let resized = plan.vocabulary().and_then(|rows| with_vocabulary(untied.as_deref().unwrap_or(text), rows));
    let untied = resized.or(untied);
    let stored = plan.output.dtype.and_then(|dtype| stored_as(untied.as_deref().unwrap_or(text), torch_name(dtype)));
    // A base whose layers are repeated has another config already.
    let repeated = || (!plan.base.replication().is_empty()).then(|| text.to_owned());
    stored.or(untied).or_else(repeated)
}

/// What transformers calls a dtype.
fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    }
}

/// Reads back what was written: every header parses, and holds the planned tensors.
pub(super) fn reread(plan: &Plan<'_>, staging: &Staging, within: &Path, limits: &Limits) -> Result<()> {
    for shard in &plan.shards {
        let name = within.join(&shard.file_name);
        let target = staging.target_of(&name);
        let opened = SafetensorsFile::open(&staging.path_of(&name), ReadMode::Read, Strictness::Lenient, limits);
        let file = opened.map_err(|e| e.file(&target))?;
        for OutTensor { name, info, .. } in &shard.tensors {
            if file.info(name) != Some(info) {
                return Err(Error::new(rules::REREAD, format!("{name:?} did not read back as written"))
                    .file(&target)
                    .help("check the disk"));
            }
        }
    }
    Ok(())
}
