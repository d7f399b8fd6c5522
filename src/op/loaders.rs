//! `validate --for`: an adapter held against what is known of the programs that serve adapters. Only headers are looked at, and what
//! lies beside the weights.

use std::fs;
use std::path::Path;

use crate::adapter::Adapter;
use crate::error::Result;
use crate::io::{read_error, read_small};
use crate::limits::Limits;
use crate::loader::{self, Files, Finding, Loader, Subject};
use crate::report::{LoaderFinding, LoaderReport};

/// The config of a PEFT folder.
const CONFIG: &str = "adapter_config.json";
/// The weights of a PEFT folder.
const WEIGHTS: &str = "adapter_model.safetensors";

/// What each of `loaders` would make of the adapter, by the table of [`Loader::rules`].
///
/// # Errors
/// `E-001` if the adapter's folder cannot be read.
pub fn check_loaders(adapter: &Adapter, loaders: &[Loader], limits: &Limits) -> Result<Vec<LoaderReport>> {
    let files = files(adapter, limits)?;
    let subject = Subject::new(adapter, &files);
    Ok(loaders.iter().map(|loader| report(*loader, &loader::check(*loader, &subject))).collect())
}

/// What a loader would find where the adapter was read from. A container under a name of its own is no PEFT folder, whatever lies
/// beside it.
fn files(adapter: &Adapter, limits: &Limits) -> Result<Files> {
    let weights = Path::new(adapter.label());
    let Some(folder) = weights.parent().filter(|_| weights.file_name().is_some_and(|name| name == WEIGHTS)) else {
        return Ok(Files::default());
    };
    let path = folder.join(CONFIG);
    let config = match adapter.dialect() {
        "peft" => adapter.origin_config().map(str::to_owned),
        _ if path.is_file() => read_small(&path, limits.config_bytes)?.and_then(|bytes| String::from_utf8(bytes).ok()),
        _ => None,
    };
    if config.is_none() {
        return Ok(Files::default());
    }
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let mut others = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| read_error(folder, e))? {
        let name = entry.map_err(|e| read_error(folder, e))?.file_name();
        let path = Path::new(&name);
        if name != WEIGHTS && path.extension().is_some_and(|extension| extension == "safetensors") {
            others.push(name.to_string_lossy().into_owned());
        }
    }
    others.sort();
    Ok(Files { config, others })
}

fn report(loader: Loader, findings: &[Finding]) -> LoaderReport {
    LoaderReport {
        loader: loader.name(),
        title: loader.title(),
        version: loader.version(),
        read_from: loader.read_from(),
        reads_it: !findings.iter().any(|finding| finding.rule.effect.is_wrong()),
        findings: findings.iter().map(finding_report).collect(),
    }
}

fn finding_report(finding: &Finding) -> LoaderFinding {
    let rule = finding.rule;
    LoaderFinding {
        id: rule.id,
        effect: rule.effect.name(),
        wrong: rule.effect.is_wrong(),
        what: rule.what,
        does: rule.does,
        targets: finding.found.targets,
        first: finding.found.first.clone(),
        way_out: finding.way_out.clone(),
        basis: rule.basis.name(),
        issues: rule.issues.to_vec(),
    }
}
