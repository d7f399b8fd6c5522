//! Files made byte by byte, so that every mistake of a writer can be made.

use serde_json::Value;

/// The length field of `header`, the header and the data, whatever they are.
pub fn file(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let header = header.as_ref();
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// A tensor to be written as it is.
#[derive(Clone)]
pub struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<u64>,
    data: Vec<u8>,
}

/// A tensor of any dtype.
pub fn tensor(name: &str, dtype: &'static str, shape: &[u64], data: impl Into<Vec<u8>>) -> Tensor {
    Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), data: data.into() }
}

/// A tensor of a plain float dtype, each value rounded to it by the standard library and the `half` crate.
pub fn floats(name: &str, dtype: &'static str, shape: &[u64], values: &[f64]) -> Tensor {
    tensor(name, dtype, shape, raw(dtype, values))
}

/// The bytes of `values` in a plain float dtype.
pub fn raw(dtype: &str, values: &[f64]) -> Vec<u8> {
    let one = |value: f64| match dtype {
        "F64" => value.to_le_bytes().to_vec(),
        "F32" => (value as f32).to_le_bytes().to_vec(),
        "F16" => half::f16::from_f64(value).to_le_bytes().to_vec(),
        "BF16" => half::bf16::from_f64(value).to_le_bytes().to_vec(),
        other => panic!("{other} is no plain float"),
    };
    values.iter().flat_map(|&value| one(value)).collect()
}

/// A sound file of these tensors, one after the other, without any padding.
pub fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for t in tensors {
        let (begin, end) = (data.len(), data.len() + t.data.len());
        entries.push(format!(
            r#"{}:{{"dtype":"{}","shape":{:?},"data_offsets":[{begin},{end}]}}"#,
            Value::from(t.name.as_str()),
            t.dtype,
            t.shape
        ));
        data.extend_from_slice(&t.data);
    }
    file(format!("{{{}}}", entries.join(",")), &data)
}

/// Where the data of a sound file begins.
pub fn data_start(bytes: &[u8]) -> usize {
    8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

/// The same data under an edited header.
pub fn edit_header(bytes: &[u8], edit: impl FnOnce(&str) -> String) -> Vec<u8> {
    let start = data_start(bytes);
    file(edit(std::str::from_utf8(&bytes[8..start]).unwrap()), &bytes[start..])
}

/// The bytes of one tensor of a file, by the reference reader.
pub fn stored(file: &[u8], name: &str) -> Vec<u8> {
    safetensors::SafeTensors::deserialize(file).unwrap().tensor(name).unwrap().data().to_vec()
}
