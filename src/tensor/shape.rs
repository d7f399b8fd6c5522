//! A shape whose products were checked when it was made, so that nobody multiplies dimensions from a file again.

use std::fmt;

use super::Dtype;

/// Dimensions, outermost first, with the number of elements known not to overflow.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Shape {
    dims: Vec<u64>,
    elements: u64,
}

impl Shape {
    /// A shape from its dimensions; `None` if the product does not fit 63 bits. The product is taken over the non-zero
    /// dimensions too, so that `[2^32, 2^32, 0]` is refused whatever the order (catalogue row H27).
    pub fn new(dims: Vec<u64>) -> Option<Self> {
        let nonzero = dims.iter().filter(|&&d| d != 0).try_fold(1u64, |n, &d| n.checked_mul(d))?;
        if nonzero > i64::MAX as u64 {
            return None;
        }
        let elements = if dims.contains(&0) { 0 } else { nonzero };
        Some(Shape { dims, elements })
    }

    /// The dimensions.
    pub fn dims(&self) -> &[u64] {
        &self.dims
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.elements
    }

    /// Bytes of a tensor of this shape; `None` on overflow or if a sub-byte dtype does not fill whole bytes.
    pub fn bytes(&self, dtype: Dtype) -> Option<u64> {
        let bits = self.elements.checked_mul(u64::try_from(dtype.bitsize()).ok()?)?;
        (bits % 8 == 0).then_some(bits / 8)
    }

    /// The product of the first `lead` dimensions, and of the others.
    pub(crate) fn split(&self, lead: usize) -> (u64, u64) {
        let (rows, cols) = self.dims.split_at(lead.min(self.dims.len()));
        (rows.iter().product(), cols.iter().product())
    }

    /// `(rows, columns)` of a matrix; `None` for anything but two dimensions.
    pub fn matrix(&self) -> Option<(u64, u64)> {
        match self.dims[..] {
            [rows, cols] => Some((rows, cols)),
            _ => None,
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(")?;
        for (i, dim) in self.dims.iter().enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{dim}")?;
        }
        f.write_str(if self.dims.len() == 1 { ",)" } else { ")" })
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_checked_in_any_order() {
        assert!(Shape::new(vec![1 << 32, 1 << 32]).is_none());
        assert!(Shape::new(vec![1 << 32, 1 << 32, 0]).is_none());
        assert!(Shape::new(vec![0, u64::MAX]).is_none());
        assert_eq!(Shape::new(vec![0, 7]).map(|s| s.elements()), Some(0));
        assert_eq!(Shape::new(vec![]).map(|s| s.elements()), Some(1));
    }

    #[test]
    fn sub_byte_dtypes_fill_whole_bytes() {
        let three = Shape::new(vec![3]).unwrap_or_default();
        assert_eq!(three.bytes(Dtype::F4), None);
        assert_eq!(three.bytes(Dtype::F64), Some(24));
    }

    #[test]
    fn shapes_print_as_python_writes_them() {
        assert_eq!(Shape::new(vec![4, 2]).unwrap_or_default().to_string(), "(4, 2)");
        assert_eq!(Shape::new(vec![4]).unwrap_or_default().to_string(), "(4,)");
    }
}
