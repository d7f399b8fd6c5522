//! What one adapter has of something that several may have.

use crate::adapter::Factor;
use crate::error::{Error, Result};
use crate::exec::float_of;
use crate::rules;

/// One adapter's version of something.
#[derive(Clone)]
pub(super) struct Version<'a> {
    /// The adapter's place among those that were given.
    pub(super) adapter: usize,
    pub(super) weight: f64,
    pub(super) factor: &'a Factor,
    /// The first of its values that count, and how many do.
    pub(super) first: u64,
    pub(super) count: u64,
}

impl<'a> Version<'a> {
    pub(super) fn whole(adapter: usize, weight: f64, factor: &'a Factor) -> Self {
        Version { adapter, weight, factor, first: 0, count: factor.info().shape.elements() }
    }

    pub(super) fn read(&self, from: u64, count: u64) -> Result<Vec<f64>> {
        let float = float_of(self.factor.info().dtype).unwrap_or_else(|| unreachable!("adapters hold plain floats only"));
        let size = float.size() as u64;
        let mut raw = vec![0; (count * size) as usize];
        self.factor.read((self.first + from) * size, &mut raw)?;
        let mut values = vec![0.0f64; count as usize];
        float.widen(&raw, &mut values);
        match values.iter().all(|value| value.is_finite()) {
            true => Ok(values),
            false => {
                let message = format!("{:?} holds a value that is not finite", self.factor.name());
                Err(Error::new(rules::FACTORS_FINITE, message).file(self.factor.source().label()).tensor(self.factor.name()))
            }
        }
    }

    pub(super) fn equals(&self, other: &Version<'_>) -> Result<bool> {
        if self.count == self.factor.info().shape.elements() && other.count == other.factor.info().shape.elements() {
            return self.factor.equals(other.factor);
        }
        Ok(self.count == other.count && self.read(0, self.count)? == other.read(0, other.count)?)
    }
}
