//! Bad input and bad circumstances, one test per kind of badness: damaged headers, damaged values, folders that do not hold together,
//! wrong adapters, pairs that do not fit, wrong configs; disks, limits and other programs that are in the way. Each is refused
//! with the class, the rule, the place and the words that help, and nothing is left behind by the attempt. Tests are numbered as in
//! the catalogue: H (headers), T (values of tensors), X (folders and indices), A (adapters), M (adapter and base), J (configs),
//! F (disks), R (limits), C (concurrency).

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
#[cfg(feature = "cli")]
#[path = "catalogue/concurrency.rs"]
mod concurrency;
#[path = "catalogue/config.rs"]
mod config;
#[cfg(feature = "cli")]
#[path = "catalogue/disk.rs"]
mod disk;
#[path = "catalogue/folder.rs"]
mod folder;
#[path = "catalogue/header.rs"]
mod header;
#[cfg(feature = "cli")]
#[path = "catalogue/limits.rs"]
mod limits;
#[cfg(feature = "cli")]
#[path = "catalogue/runs.rs"]
mod runs;
#[path = "catalogue/scene.rs"]
mod scene;
#[path = "catalogue/values.rs"]
mod values;
