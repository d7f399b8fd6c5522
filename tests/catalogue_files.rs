//! Bad files, one test per kind of badness: damaged headers, damaged values, folders that do not hold together. Each is refused
//! with the class, the rule, the place and the words that help, and nothing is left behind by the attempt. Tests are numbered as in
//! the catalogue of bad inputs: H (headers), T (values of tensors), X (folders and indices).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "catalogue_files/bad.rs"]
mod bad;
#[cfg(feature = "cli")]
#[path = "catalogue_files/binary.rs"]
mod binary;
#[path = "catalogue_files/bytes.rs"]
mod bytes;
#[path = "catalogue_files/folder.rs"]
mod folder;
#[path = "catalogue_files/header.rs"]
mod header;
#[path = "catalogue_files/scene.rs"]
mod scene;
#[path = "catalogue_files/values.rs"]
mod values;
