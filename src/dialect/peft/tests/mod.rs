//! Tests of the dialect, each file beside what it tests. Helpers build configs and adapters in memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "tests")]

mod config;
mod keys;
mod patterns;
mod read;
mod real;
mod write;

use std::path::Path;
use std::sync::Arc;

use super::PeftConfig;
use crate::error::{Diagnostic, Result};
use crate::limits::Limits;
use crate::tensor::{Dtype, MemorySource, Shape, TensorInfo, TensorSource};

/// Parses a config with `body` between `{"peft_type": "LORA", "r": 8, "lora_alpha": 16` and the closing brace.
fn config(body: &str) -> PeftConfig {
    parse(&lora(body)).unwrap()
}

/// The text of [`config`]. A field of `body` may not be one of the three.
fn lora(body: &str) -> String {
    let comma = if body.is_empty() { "" } else { ", " };
    format!(r#"{{"peft_type": "LORA", "r": 8, "lora_alpha": 16{comma}{body}}}"#)
}

fn parse(text: &str) -> Result<PeftConfig> {
    PeftConfig::parse(text.as_bytes(), Path::new("adapter_config.json"), &Limits::default())
}

/// The rule ids of an outcome, in order.
fn rules<T>(outcome: &Result<T>) -> Vec<&'static str> {
    outcome.as_ref().err().map_or_else(Vec::new, |error| ids(error.diagnostics()))
}

fn ids(diagnostics: &[Diagnostic]) -> Vec<&'static str> {
    diagnostics.iter().map(|d| d.rule().id).collect()
}

/// An F32 source of zeros from names and shapes.
fn source(tensors: &[(&str, &[u64])]) -> Arc<dyn TensorSource> {
    let mut source = MemorySource::new();
    for (name, dims) in tensors {
        let info = TensorInfo { dtype: Dtype::F32, shape: Shape::new(dims.to_vec()).unwrap() };
        let bytes = vec![0; usize::try_from(info.bytes()).unwrap()];
        source.insert(*name, info, bytes).unwrap();
    }
    Arc::new(source)
}

/// The factors of `modules` with PEFT's names, all of rank 8, in 60 and out 40.
fn factors(modules: &[&str]) -> Vec<(String, Vec<u64>)> {
    let pair = |module: &&str| {
        let name = |end: &str| format!("base_model.model.{module}.{end}.weight");
        [(name("lora_A"), vec![8, 60]), (name("lora_B"), vec![40, 8])]
    };
    modules.iter().flat_map(pair).collect()
}

/// A source of [`factors`] and of `more`.
fn adapter_source(modules: &[&str], more: &[(&str, &[u64])]) -> Arc<dyn TensorSource> {
    let owned = factors(modules);
    let mut tensors: Vec<(&str, &[u64])> = owned.iter().map(|(name, dims)| (name.as_str(), dims.as_slice())).collect();
    tensors.extend(more);
    source(&tensors)
}
