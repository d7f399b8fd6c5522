//! Small bases and adapters that a test describes tensor by tensor.

use std::path::{Path, PathBuf};

use loratool::{Error, MergeOptions, Weighted, merge, open_adapter, open_checkpoint};
use safetensors::tensor::{Dtype, TensorView};

use super::read_folder;

/// A tensor: name, dtype, shape, bytes.
pub type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

pub fn f32s(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    (name.to_owned(), Dtype::F32, shape.to_vec(), bytes)
}

/// Values that are all different.
pub fn some(name: &str, shape: &[usize]) -> Tensor {
    let count = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..count).map(|i| 0.25 + (i as f32 * 0.37).sin()).collect();
    f32s(name, shape, &values)
}

fn save(file: &Path, tensors: &[Tensor]) {
    let views = tensors.iter().map(|(n, dtype, shape, data)| (n.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    std::fs::write(file, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A small base and an adapter of PEFT in a folder that goes away.
pub struct Scene {
    folder: tempfile::TempDir,
}

impl Scene {
    pub fn new(base: &[Tensor], config: &str, adapter: &[Tensor]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir_all(at("base")).unwrap();
        std::fs::create_dir_all(at("adapter")).unwrap();
        save(&at("base/model.safetensors"), base);
        std::fs::write(at("base/config.json"), r#"{"model_type": "toy", "tie_word_embeddings": false}"#).unwrap();
        let prefixed: Vec<Tensor> =
            adapter.iter().map(|(n, d, s, b)| (format!("base_model.model.{n}"), *d, s.clone(), b.clone())).collect();
        save(&at("adapter/adapter_model.safetensors"), &prefixed);
        std::fs::write(at("adapter/adapter_config.json"), config).unwrap();
        Scene { folder }
    }

    /// The same base, whose config says that the head is tied to the embedding.
    pub fn tied(self) -> Self {
        std::fs::write(self.at("base/config.json"), r#"{"model_type": "llama", "tie_word_embeddings": true}"#).unwrap();
        self
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn merged(
        &self,
        edit: impl FnOnce(&mut MergeOptions),
    ) -> Result<std::collections::BTreeMap<String, super::Values>, Error> {
        let (base, adapter) = (open_checkpoint(self.at("base"))?, open_adapter(self.at("adapter"))?);
        let mut options = MergeOptions::default();
        edit(&mut options);
        merge(&base, &[Weighted::full(&adapter)], &self.at("out"), &options, &())?;
        Ok(read_folder(&self.at("out")))
    }

    pub fn refused(&self, rule: &str) {
        let error = self.merged(|_| {}).map(drop).unwrap_err();
        assert_eq!(error.diagnostics()[0].rule().id, rule, "{error}");
        assert!(!self.at("out").exists());
    }
}
