//! The three digests of `spec/container.md`: of a tensor, of its structure alone, and the content root over many. All SHA-256,
//! the digest of the Hub, of sigstore and of in-toto.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use crate::tensor::TensorInfo;

/// 64 lower-case hexadecimal digits.
pub(crate) type Hex = String;

fn preamble(domain: &str, info: &TensorInfo) -> Sha256 {
    let mut hash = Sha256::new();
    hash.update(domain.as_bytes());
    hash.update([0]);
    hash.update(info.dtype.to_string().as_bytes());
    hash.update([0]);
    hash.update((info.shape.dims().len() as u64).to_le_bytes());
    for dim in info.shape.dims() {
        hash.update(dim.to_le_bytes());
    }
    hash
}

/// A hash that has taken in dtype and shape and waits for the tensor's bytes. Dtype and shape are inside, so that the same bytes
/// under another dtype have another digest.
pub(crate) fn tensor_digest(info: &TensorInfo) -> TensorHash {
    TensorHash(preamble("loratool.tensor.v1", info))
}

/// The digest of dtype and shape alone.
pub(crate) fn structure_digest(info: &TensorInfo) -> Hex {
    hex(preamble("loratool.structure.v1", info))
}

/// A tensor digest in the making.
pub(crate) struct TensorHash(Sha256);

impl TensorHash {
    /// Takes in the next bytes.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all bytes taken in.
    pub(crate) fn finish(self) -> Hex {
        hex(self.0)
    }
}

/// A set of named digests and the root over them: SHA-256 over the lines `name NUL digest LF`, sorted by name.
#[derive(Default)]
pub(crate) struct ContentRoot(BTreeMap<String, Hex>);

impl ContentRoot {
    /// Adds one tensor.
    pub(crate) fn insert(&mut self, name: &str, digest: Hex) {
        self.0.insert(name.to_owned(), digest);
    }

    /// The digests by name, sorted.
    pub(crate) fn digests(&self) -> &BTreeMap<String, Hex> {
        &self.0
    }

    /// The root.
    pub(crate) fn finish(&self) -> Hex {
        let mut hash = Sha256::new();
        for (name, digest) in &self.0 {
            hash.update(name.as_bytes());
            hash.update([0]);
            hash.update(digest.as_bytes());
            hash.update(b"\n");
        }
        hex(hash)
    }
}

fn hex(hash: Sha256) -> Hex {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{Dtype, Shape};

    /// Values computed with Python's hashlib.
    #[test]
    fn digests_are_those_of_the_specification() {
        let info = TensorInfo { dtype: Dtype::F32, shape: Shape::new(vec![1, 2]).unwrap() };
        let mut hash = tensor_digest(&info);
        hash.update(&1.0f32.to_le_bytes());
        hash.update(&2.0f32.to_le_bytes());
        let digest = hash.finish();
        assert_eq!(digest, "bd2d0cccc894ad1e59d9f461f1660d6636e3e905ffc94c18ee81db7de5e782df");
        assert_eq!(structure_digest(&info), "f3b6167bcf0c049726a75e993e9c415098c651505ae389c1fd0e3e28976d2ef3");
        let mut root = ContentRoot::default();
        root.insert("a", digest);
        assert_eq!(root.finish(), "35510607110ed103ed2a390b4c251c0d9254a92686ae0239d01adf7c0fb06bcc");
    }
}
