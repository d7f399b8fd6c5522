//! The steps of TIES (Yadav et al. 2023, section 3): trim, elect a sign, and take the mean of what agrees with it.

/// The last value that is kept of those of one update, where they are kept by falling size; those of one size by ascending index.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Cut {
    /// |x|.
    pub(crate) size: f64,
    pub(crate) index: u64,
}

impl Cut {
    /// Everything is kept.
    pub(crate) const ALL: Cut = Cut { size: 0.0, index: u64::MAX };

    /// That after which `count` of the values are kept; `None` if none is.
    pub(crate) fn of(values: &[f64], count: usize) -> Option<Cut> {
        if count >= values.len() {
            return Some(Cut::ALL);
        }
        let mut order: Vec<usize> = (0..values.len()).collect();
        let before = |x: &usize, y: &usize| values[*y].abs().total_cmp(&values[*x].abs()).then(x.cmp(y));
        let (_, last, _) = order.select_nth_unstable_by(count.checked_sub(1)?, before);
        Some(Cut { size: values[*last].abs(), index: *last as u64 })
    }

    /// Is this value among those that are kept?
    #[inline(always)]
    pub(crate) fn keeps(self, value: f64, index: u64) -> bool {
        let size = value.abs();
        size > self.size || size == self.size && index <= self.index
    }
}

/// How many of `len` values a density keeps: its share, rounded down, but one at least.
pub(super) fn kept(density: f64, len: u64) -> u64 {
    ((density * len as f64) as u64).clamp(1, len.max(1))
}

/// The mean of the values whose votes have the sign of the sum of all votes; + if that is 0. Votes of 0 have none.
#[inline(always)]
pub(super) fn agreed(values: impl Iterator<Item = (f64, f64)> + Clone) -> f64 {
    let total: f64 = values.clone().map(|(vote, _)| vote).sum();
    let (mut sum, mut count) = (0.0, 0.0);
    for (vote, value) in values {
        let agrees = if total >= 0.0 { vote > 0.0 } else { vote < 0.0 };
        if agrees {
            sum += value;
            count += 1.0;
        }
    }
    if count > 0.0 { sum / count } else { 0.0 }
}

/// TIES of whole updates, each as long as the others.
pub(super) fn ties(updates: &[Vec<f64>], density: f64) -> Vec<f64> {
    let len = updates.first().map_or(0, Vec::len);
    let count = kept(density, len as u64) as usize;
    let cuts: Vec<Option<Cut>> = updates.iter().map(|update| Cut::of(update, count)).collect();
    let at = |i: usize| {
        let kept = updates
            .iter()
            .zip(&cuts)
            .map(move |(update, cut)| if cut.is_some_and(|cut| cut.keeps(update[i], i as u64)) { update[i] } else { 0.0 })
            .map(|value| (value, value));
        agreed(kept)
    };
    (0..len).map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_kept_and_of_equal_ones_the_first() {
        let values = [1.0, -3.0, 2.0, -2.0, 0.0, 2.0];
        for (count, kept) in
            [(1, vec![1]), (2, vec![1, 2]), (3, vec![1, 2, 3]), (4, vec![1, 2, 3, 5]), (6, vec![0, 1, 2, 3, 4, 5])]
        {
            let cut = Cut::of(&values, count).unwrap();
            let found: Vec<usize> = (0..6).filter(|i| cut.keeps(values[*i], *i as u64)).collect();
            assert_eq!(found, kept);
        }
        assert!(Cut::of(&values, 0).is_none() && kept(0.2, 3) == 1 && kept(0.5, 7) == 3 && kept(1.0, 7) == 7);
    }

    #[test]
    fn what_agrees_with_the_sum_is_averaged() {
        let of = |values: &[f64]| agreed(values.iter().map(|value| (*value, *value)));
        assert_eq!(of(&[3.0, 1.0, -2.0]), 2.0);
        assert_eq!(of(&[1.0, -4.0, 0.0, -2.0]), -3.0);
        assert_eq!(of(&[1.0, -1.0]), 1.0);
        assert_eq!((of(&[0.0, 0.0]), of(&[])), (0.0, 0.0));
        assert_eq!(agreed([(1.0, -2.0), (-3.0, 5.0), (-1.0, 1.0)].into_iter()), 3.0);
        // Two equal updates are one of them, and not twice.
        assert_eq!(ties(&[vec![1.0, -2.0], vec![1.0, -2.0]], 1.0), [1.0, -2.0]);
        assert_eq!(ties(&[vec![1.0, -2.0], vec![1.0, 3.0]], 0.5), [0.0, 3.0]);
    }
}
