//! The writer of headers. Bytes are canonical (`C-040`): the same tensors and metadata give the same header, byte for byte.

use crate::tensor::TensorInfo;

/// Tensors of a file to be written, with where their data will lie.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// Length field, header and padding.
    pub(crate) head: Vec<u8>,
    /// Offset in the file of each tensor's first byte, in the order of the tensors given.
    pub(crate) offsets: Vec<u64>,
    /// Length of the whole file.
    pub(crate) file_len: u64,
}

impl Layout {
    /// Lays out tensors in the given order.
    pub(crate) fn new(metadata: &[(String, String)], tensors: &[(&str, &TensorInfo)]) -> Self {
        let mut ranges = Vec::with_capacity(tensors.len());
        let mut position = 0u64;
        for (_, info) in tensors {
            let end = position.saturating_add(info.bytes());
            ranges.push((position, end));
            position = end;
        }
        let head = header_bytes(metadata, tensors, &ranges);
        let start = head.len() as u64;
        let offsets = ranges.iter().map(|(begin, _)| begin + start).collect();
        Layout { head, offsets, file_len: start.saturating_add(position) }
    }

    /// The canonical order: wide dtypes first, so that all data is aligned, then by name.
    pub(crate) fn canonical_order(tensors: &mut [(&str, &TensorInfo)]) {
        tensors.sort_by(|(n1, i1), (n2, i2)| i2.dtype.bitsize().cmp(&i1.dtype.bitsize()).then_with(|| n1.cmp(n2)));
    }
}

/// Length field and header for tensors at the given ranges of the data section. `__metadata__` comes first, sorted by key.
pub(crate) fn header_bytes(metadata: &[(String, String)], tensors: &[(&str, &TensorInfo)], ranges: &[(u64, u64)]) -> Vec<u8> {
    let mut text = String::from("{");
    let mut sorted: Vec<_> = metadata.iter().collect();
    sorted.sort();
    if !sorted.is_empty() {
        let pairs: Vec<String> = sorted.iter().map(|(k, v)| format!("{}:{}", quote(k), quote(v))).collect();
        text.push_str(&format!("\"__metadata__\":{{{}}}", pairs.join(",")));
    }
    for ((name, info), (begin, end)) in tensors.iter().zip(ranges) {
        if text.len() > 1 {
            text.push(',');
        }
        let dims: Vec<String> = info.shape.dims().iter().map(u64::to_string).collect();
        text.push_str(&format!(
            "{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{begin},{end}]}}",
            quote(name),
            info.dtype,
            dims.join(",")
        ));
    }
    text.push('}');
    while text.len() % 8 != 0 {
        text.push(' ');
    }
    let mut head = (text.len() as u64).to_le_bytes().to_vec();
    head.extend_from_slice(text.as_bytes());
    head
}

fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{Dtype, Shape};

    #[test]
    fn the_reference_reader_reads_what_is_written() {
        let info = |dtype, dims: &[u64]| TensorInfo { dtype, shape: Shape::new(dims.to_vec()).unwrap() };
        let (wide, narrow) = (info(Dtype::F32, &[2, 2]), info(Dtype::BF16, &[3]));
        let mut tensors = vec![("b", &narrow), ("z\"", &wide), ("a", &wide)];
        Layout::canonical_order(&mut tensors);
        let layout = Layout::new(&[("format".into(), "pt".into())], &tensors);
        let mut file = layout.head.clone();
        file.resize(layout.file_len as usize, 0);
        let read = ::safetensors::SafeTensors::deserialize(&file).unwrap();
        assert_eq!(read.tensor("z\"").unwrap().shape(), [2, 2]);
        assert_eq!(layout.head.len() % 8, 0);
        assert_eq!(tensors.iter().map(|t| t.0).collect::<Vec<_>>(), ["a", "z\"", "b"]);
    }
}
