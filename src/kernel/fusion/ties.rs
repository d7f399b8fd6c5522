//! The steps of TIES (Yadav et al. 2023, section 3): trim, elect a sign, and take the mean of what agrees with it.

use super::prune::Keep;
use super::value::Tally;

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

    /// What the size of a value has to be above for it to be kept, if that is the same at all indices from `first` to `last`.
    pub(super) fn bound(self, first: u64, last: u64) -> Option<f64> {
        match self.index {
            index if last <= index => Some(self.size.next_down()),
            index if first > index => Some(self.size),
            _ => None,
        }
    }
}

/// How many of `len` values a density keeps: its share, rounded down, but one at least.
pub(super) fn kept(density: f64, len: u64) -> u64 {
    ((density * len as f64) as u64).clamp(1, len.max(1))
}

/// TIES of whole updates, each as long as the others.
pub(super) fn ties(mut updates: Vec<Vec<f64>>, density: f64) -> Vec<f64> {
    let len = updates.first().map_or(0, Vec::len);
    let count = kept(density, len as u64) as usize;
    for update in &mut updates {
        if let Some(last) = Cut::of(update, count) {
            Keep::Between { first: None, last }.row(update, 0, 1);
        }
    }
    let terms: Vec<(f64, &[f64])> = updates.iter().map(|update| (1.0, &update[..])).collect();
    let mut out = vec![0.0; len];
    Tally::Elected.of(&terms, &mut out);
    out
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
    fn one_bound_serves_all_indices_on_one_side_of_the_cut() {
        let cut = Cut { size: 2.0, index: 7 };
        for (first, last) in [(0, 7), (3, 6), (8, 20)] {
            let bound = cut.bound(first, last).unwrap();
            for value in [-2.0, 2.0f64.next_up(), 2.0f64.next_down(), 0.0] {
                assert!((first..=last).all(|index| cut.keeps(value, index) == (value.abs() > bound)));
            }
        }
        assert!(cut.bound(7, 8).is_none() && Cut::ALL.bound(0, 9).is_some_and(|bound| 0.0 > bound));
    }

    #[test]
    fn equal_updates_are_one_of_them_and_what_is_small_has_no_vote() {
        assert_eq!(ties(vec![vec![1.0, -2.0], vec![1.0, -2.0]], 1.0), [1.0, -2.0]);
        assert_eq!(ties(vec![vec![1.0, -2.0], vec![1.0, 3.0]], 0.5), [0.0, 3.0]);
    }
}
