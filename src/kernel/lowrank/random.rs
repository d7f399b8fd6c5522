//! The random matrix that an iteration starts with: signs, which are as good as normal values for finding a range (Halko, Martinsson and
//! Tropp 2011, section 4.6), and which no rounding touches. A function of key, row and column, so that it does not depend on the order.

use super::super::stochastic::philox;

/// Fills a row of the matrix with 1 and -1.
pub(crate) fn signs(key: u64, row: u64, out: &mut [f32]) {
    for (block, part) in out.chunks_mut(128).enumerate() {
        let words = philox([row as u32, (row >> 32) as u32, block as u32, 1], [key as u32, (key >> 32) as u32]);
        for (i, value) in part.iter_mut().enumerate() {
            *value = if words[i / 32] >> (i % 32) & 1 == 0 { 1.0 } else { -1.0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_signs_that_differ_and_are_even() {
        let mut rows = vec![vec![0.0f32; 160]; 50];
        rows.iter_mut().enumerate().for_each(|(i, row)| signs(9, i as u64, row));
        assert!(rows.iter().flatten().all(|x| x.abs() == 1.0) && rows[0] != rows[1] && rows[0][..32] != rows[0][128..]);
        let sum: f32 = rows.iter().flatten().sum();
        assert!(sum.abs() < 4.0 * (50.0f32 * 160.0).sqrt());
    }
}
