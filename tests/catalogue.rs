//! Bad input, one test per kind of badness: damaged headers, damaged values, folders that do not hold together, wrong adapters, pairs
//! that do not fit, wrong configs. Each is refused
//! with the class, the rule, the place and the words that help, and nothing is left behind by the attempt. Tests are numbered as in
//! the catalogue of bad inputs: H (headers), T (values of tensors), X (folders and indices), A (adapters), M (adapter and base),
//! J (configs).

#[path = "catalogue/adapter.rs"]
mod adapter;
#[path = "catalogue/bad.rs"]
mod bad;
#[cfg(feature = "cli")]
#[path = "catalogue/binary.rs"]
mod binary;
#[path = "catalogue/binding.rs"]
mod binding;
#[path = "catalogue/bytes.rs"]
mod bytes;
#[path = "catalogue/config.rs"]
mod config;
#[path = "catalogue/folder.rs"]
mod folder;
#[path = "catalogue/header.rs"]
mod header;
#[path = "catalogue/scene.rs"]
mod scene;
#[path = "catalogue/values.rs"]
mod values;
