//! Tensors that are computed from those of another source: stored in another order, or a product of several. A tensor is computed whole
//! when it is first read, and the last few are kept; until then it costs nothing but its shape.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::{TensorInfo, TensorSource};
use crate::error::{Error, Result};
use crate::rules;

/// Gives all bytes of a tensor, little-endian, row-major.
type Compute = Box<dyn Fn(&dyn TensorSource) -> Result<Vec<u8>> + Send + Sync>;

/// Tensors that are kept: what a few threads work on at a time.
const KEPT: usize = 16;

/// A source of computed tensors.
pub(crate) struct Derived {
    label: PathBuf,
    of: Arc<dyn TensorSource>,
    tensors: BTreeMap<String, (TensorInfo, Compute)>,
    kept: Mutex<VecDeque<(String, Arc<Vec<u8>>)>>,
}

impl Derived {
    /// None yet, of the tensors of `of`.
    pub(crate) fn new(of: &Arc<dyn TensorSource>) -> Self {
        Derived { label: of.label().to_path_buf(), of: Arc::clone(of), tensors: BTreeMap::new(), kept: Mutex::default() }
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
        let lock = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bytes)) = lock().iter().find(|(kept, _)| kept == name) {
            return Ok(Arc::clone(bytes));
        }
        // Not under the lock: two threads may compute the same tensor, but none waits for another's.
        let missing = || Error::new(rules::READ, "no such tensor").file(&self.label).tensor(name);
        let (_, compute) = self.tensors.get(name).ok_or_else(missing)?;
        let bytes = Arc::new(compute(&*self.of)?);
        let mut kept = lock();
        if kept.len() >= KEPT {
            kept.pop_front();
        }
        kept.push_back((name.to_owned(), Arc::clone(&bytes)));
        Ok(bytes)
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
        for i in 0..=KEPT {
            let count = Arc::clone(&computed);
            derived.insert(format!("{i}"), info.clone(), move |of| {
                *count.lock().unwrap() += 1;
                Ok(read_all(of, "x")?.into_iter().map(|byte| byte + i as u8).collect())
            });
        }
        let (mut buf, read) = ([0; 2], |name: &str, buf: &mut [u8]| derived.read(name, 1, buf));
        for name in ["0", "0", "1"] {
            read(name, &mut buf).unwrap();
        }
        assert_eq!((buf, *computed.lock().unwrap()), ([3, 4], 2));
        for i in 2..=KEPT {
            read(&i.to_string(), &mut buf).unwrap();
        }
        read("0", &mut buf).unwrap();
        assert_eq!((buf, *computed.lock().unwrap()), ([2, 3], KEPT + 2));
        assert!(derived.read("0", 2, &mut buf).is_err() && derived.read("none", 0, &mut buf).is_err());
    }
}
