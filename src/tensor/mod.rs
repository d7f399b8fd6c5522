//! What a named tensor is, before anyone knows what it means: dtype, shape with checked sizes, and a source that bytes are read
//! from. No files here, and no LoRA.

mod derived;
mod shape;
mod source;
mod window;

pub(crate) use derived::{Derived, read_all};
pub use safetensors::Dtype;
pub use shape::Shape;
pub(crate) use source::pieces;
pub use source::{MemorySource, TensorInfo, TensorSource};
pub(crate) use window::Window;

/// True for the dtypes that are widened exactly to f64 and rounded back: F64, F32, F16, BF16.
pub fn is_plain_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}
