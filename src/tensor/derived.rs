//! Tensors that are computed from those of another source: stored in another order, or a product of several. A tensor is computed whole
//! when it is first read, and what was computed last is kept, up to a number of bytes for the whole program; until then it costs nothing
//! but its shape.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{TensorInfo, TensorSource};
use crate::error::{Error, Result};
use crate::rules;

/// Gives all bytes of a tensor, little-endian, row-major.
type Compute = Box<dyn Fn(&dyn TensorSource) -> Result<Vec<u8>> + Send + Sync>;

/// Bytes of tensors that are kept, of all sources together, but for a single one that is larger.
const KEPT: usize = 64 << 20;

/// What is kept, by source and name, the oldest first.
static CACHE: Mutex<Cache> = Mutex::new(Cache { entries: VecDeque::new(), bytes: 0 });

struct Cache {
    entries: VecDeque<(u64, String, Arc<Vec<u8>>)>,
    bytes: usize,
}

impl Cache {
    fn get(&self, id: u64, name: &str) -> Option<Arc<Vec<u8>>> {
        self.entries.iter().find(|(of, kept, _)| *of == id && kept == name).map(|(_, _, bytes)| Arc::clone(bytes))
    }

    /// Keeps a tensor, and lets go of the oldest ones beyond the limit.
    fn put(&mut self, id: u64, name: &str, bytes: &Arc<Vec<u8>>) {
        if self.get(id, name).is_some() {
            return;
        }
        self.bytes += bytes.len();
        self.entries.push_back((id, name.to_owned(), Arc::clone(bytes)));
        while self.bytes > KEPT && self.entries.len() > 1 {
            let Some((.., oldest)) = self.entries.pop_front() else { break };
            self.bytes -= oldest.len();
        }
    }

    /// Lets go of what a source has left.
    fn forget(&mut self, id: u64) {
        self.entries.retain(|(of, ..)| *of != id);
        self.bytes = self.entries.iter().map(|(.., bytes)| bytes.len()).sum();
    }
}

/// The next source's number.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// A source of computed tensors.
pub(crate) struct Derived {
    label: PathBuf,
    of: Arc<dyn TensorSource>,
    tensors: BTreeMap<String, (TensorInfo, Compute)>,
    id: u64,
}

impl Derived {
    /// None yet, of the tensors of `of`.
    pub(crate) fn new(of: &Arc<dyn TensorSource>) -> Self {
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Derived { label: of.label().to_path_buf(), of: Arc::clone(of), tensors: BTreeMap::new(), id }
    }

    /// Adds a tensor; `compute` must give as many bytes as `info` says.
    pub(crate) fn insert(
        &mut self,
        name: impl Into<String>,
        info: TensorInfo,
        compute: impl Fn(&dyn TensorSource) -> Result<Vec<u8>> + Send + Sync + 'static,
    ) {
        self.tensors.insert(name.into(), (info, Box::new(compute)));
    }

    fn bytes(&self, name: &str) -> Result<Arc<Vec<u8>>> {
        let lock = || CACHE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = lock().get(self.id, name) {
            return Ok(bytes);
        }
        // Not under the lock: two threads may compute the same tensor, but none waits for another's.
        let missing = || Error::new(rules::READ, "no such tensor").file(&self.label).tensor(name);
        let (_, compute) = self.tensors.get(name).ok_or_else(missing)?;
        let bytes = Arc::new(compute(&*self.of)?);
        lock().put(self.id, name, &bytes);
        Ok(bytes)
    }
}

impl Drop for Derived {
    fn drop(&mut self) {
        CACHE.lock().unwrap_or_else(PoisonError::into_inner).forget(self.id);
    }
}

impl TensorSource for Derived {
    fn label(&self) -> &Path {
        &self.label
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.tensors.keys().map(String::as_str))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info)
    }

    fn read(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let bytes = self.bytes(name)?;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        match start.checked_add(buf.len()).and_then(|end| bytes.get(start..end)) {
            Some(found) => buf.copy_from_slice(found),
            None => return Err(Error::new(rules::READ, "read past the end of the tensor").file(&self.label).tensor(name)),
        }
        Ok(())
    }

    fn unchanged(&self) -> Result<()> {
        self.of.unchanged()
    }
}

/// All bytes of a tensor.
///
/// # Errors
/// As [`TensorSource::read`].
pub(crate) fn read_all(source: &dyn TensorSource, name: &str) -> Result<Vec<u8>> {
    let len = source.info(name).map_or(0, TensorInfo::bytes);
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    source.read(name, 0, &mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{Dtype, MemorySource, Shape};

    #[test]
    fn a_tensor_is_computed_when_it_is_read_and_kept_for_a_while() {
        let info = TensorInfo { dtype: Dtype::U8, shape: Shape::new(vec![3]).unwrap_or_default() };
        let mut memory = MemorySource::new();
        memory.insert("x", info.clone(), vec![1, 2, 3]).unwrap();
        let source: Arc<dyn TensorSource> = Arc::new(memory);
        let mut derived = Derived::new(&source);
        let computed = Arc::new(Mutex::new(0));
        let count = Arc::clone(&computed);
        derived.insert("y", info, move |of| {
            *count.lock().unwrap() += 1;
            Ok(read_all(of, "x")?.into_iter().map(|byte| byte + 2).collect())
        });
        let mut buf = [0; 2];
        derived.read("y", 1, &mut buf).unwrap();
        derived.read("y", 0, &mut buf).unwrap();
        assert_eq!((buf, *computed.lock().unwrap()), ([3, 4], 1));
        assert!(derived.read("y", 2, &mut buf).is_err() && derived.read("none", 0, &mut buf).is_err());
    }

    /// However many sources there are, each with few tensors, as adapters have them.
    #[test]
    fn what_is_kept_is_bounded_over_all_sources() {
        let mut cache = Cache { entries: VecDeque::new(), bytes: 0 };
        for id in 0..100 {
            cache.put(id, "b", &Arc::new(vec![0; KEPT / 10]));
            cache.put(id, "b", &Arc::new(vec![0; KEPT / 10]));
        }
        assert_eq!((cache.entries.len(), cache.bytes), (10, KEPT / 10 * 10));
        assert!(cache.get(89, "b").is_none() && cache.get(90, "b").is_some());
        cache.put(100, "large", &Arc::new(vec![0; KEPT + 1]));
        assert_eq!(cache.entries.len(), 1);
        cache.forget(100);
        assert_eq!((cache.entries.len(), cache.bytes), (0, 0));
    }
}
