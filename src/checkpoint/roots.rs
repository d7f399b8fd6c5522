//! What makes a base this base: the structure root over names, dtypes and shapes, and content roots over the bytes of chosen tensors
//! (`spec/container.md`, section 5.2). And the digests that a model cache names its files by (`K-012`).

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::{Checkpoint, Shard};
use crate::error::{Diagnostic, Error, Result};
use crate::io::{ContentRoot, on_threads, structure_digest, tensor_digest};
use crate::rules;
use crate::tensor::{TensorSource, pieces};

impl Checkpoint {
    /// The root over the structure of all tensors. Costs no reads.
    pub fn structure_root(&self) -> String {
        let mut root = ContentRoot::default();
        for name in self.names() {
            if let Some(info) = self.info(name) {
                root.insert(name, structure_digest(info));
            }
        }
        root.finish()
    }

    /// The root over the content of some tensors, whatever the order of their names. Reads them whole, in pieces, several tensors at
    /// a time.
    ///
    /// # Errors
    /// `E-001` if a tensor is not there or cannot be read, `E-004` if its file became shorter.
    pub fn content_root(&self, names: &[&str]) -> Result<String> {
        let digest = || names.par_iter().map(|name| self.tensor_digest(name)).collect::<Result<_>>();
        let digests: Vec<_> = on_threads(0, digest)?;
        let mut root = ContentRoot::default();
        for (name, digest) in names.iter().zip(digests) {
            root.insert(name, digest);
        }
        Ok(root.finish())
    }

    fn tensor_digest(&self, name: &str) -> Result<String> {
        let absent = || Error::new(rules::READ, "no such tensor").file(self.path()).tensor(name);
        let info = self.info(name).ok_or_else(absent)?;
        let mut hash = tensor_digest(info);
        pieces(info.bytes(), |offset, piece| {
            self.read(name, offset, piece)?;
            hash.update(piece);
            Ok(())
        })?;
        Ok(hash.finish())
    }

    /// Reads every shard that a model cache names by its SHA-256 and compares.
    ///
    /// # Errors
    /// Every broken `K-012`; `E-001`, `E-004` if a shard cannot be read.
    pub fn verify_blobs(&self) -> Result<()> {
        let verify = || self.shards().par_iter().map(Shard::verify_blob).collect::<Result<_>>();
        let found: Vec<_> = on_threads(0, verify)?;
        Error::check(found.into_iter().flatten().collect())
    }
}

impl Shard {
    fn verify_blob(&self) -> Result<Option<Diagnostic>> {
        // The cache names files by their Git blob hash, of 40 digits, where the Hub keeps no SHA-256.
        let Some(stated) = self.blob.as_ref().filter(|blob| blob.len() == 64) else { return Ok(None) };
        let mut hash = Sha256::new();
        pieces(self.file.file_len(), |offset, piece| {
            self.file.read_bytes(offset, piece)?;
            hash.update(piece);
            Ok(())
        })?;
        let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        let message = || format!("the cache names the file {stated} but its digest is {found}");
        let broken = || Diagnostic::new(rules::BLOB_DIGEST, message()).file(self.file.path()).help("download the file again");
        Ok((found != *stated).then(broken))
    }
}
