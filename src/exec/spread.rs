//! Which parts of a tensor are looked at: all of it in blocks, or a share of it in blocks that are spread evenly from the first row
//! to the last. The same tensor and share always give the same parts.

use std::ops::Range;

/// A share of a tensor is read in at least so many places.
const PLACES: u64 = 8;

/// A block of a matrix: rows and columns.
pub(super) type Block = (Range<u64>, Range<u64>);

/// `0..total` in consecutive pieces, or a share of it in pieces that are spread evenly. No piece is longer than `most`; of a share
/// none is shorter than `least` either, unless `total` is.
pub(super) fn pieces(total: u64, most: u64, least: u64, share: f64) -> Vec<Range<u64>> {
    let most = most.max(1);
    if share >= 1.0 {
        return (0..total.div_ceil(most)).map(|i| i * most..total.min((i + 1) * most)).collect();
    }
    let wanted = ((total as f64 * share).ceil() as u64).clamp(1, total.max(1));
    let length = wanted.div_ceil(PLACES).max(least).clamp(1, most);
    let count = wanted.div_ceil(length).max(1);
    let slot = |i: u64| (u128::from(total) * u128::from(i) / u128::from(count)) as u64;
    let piece = |i: u64| {
        let (from, to) = (slot(i), slot(i + 1));
        let length = length.min(to - from);
        let start = from + (to - from - length) / 2;
        start..start + length
    };
    (0..count).map(piece).filter(|piece| !piece.is_empty()).collect()
}

/// A matrix in blocks of at most `values`, or a share of it. Columns are split only where a row of values, or of a right factor of
/// this rank, is longer than a block.
pub(super) fn blocks(rows: u64, cols: u64, rank: u64, values: u64, share: f64) -> Vec<Block> {
    let wide = (4 * values / rank.max(1)).clamp(1, values).min(cols.max(1));
    let high = (values / wide.max(1)).min(4 * values / rank.max(1)).max(1);
    let (tall, long) = if rows > 1 { (share, 1.0) } else { (1.0, share) };
    let across = pieces(cols, wide, 1, long);
    pieces(rows, high, 1, tall).into_iter().flat_map(|rows| across.iter().map(move |cols| (rows.clone(), cols.clone()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_it_is_covered_once() {
        for (total, most) in [(0, 4), (1, 4), (8, 4), (9, 4), (1000, 7)] {
            let mut end = 0;
            for piece in pieces(total, most, 1, 1.0) {
                assert!(piece.start == end && piece.end > end && piece.end - piece.start <= most, "{piece:?}");
                end = piece.end;
            }
            assert_eq!(end, total);
        }
    }

    #[test]
    fn a_share_is_spread_and_does_not_overlap() {
        for (total, share) in [(1000, 0.05), (1000, 0.999), (10, 0.5), (3, 0.01), (1 << 40, 0.001)] {
            let pieces = pieces(total, 1 << 30, 1, share);
            assert!(!pieces.is_empty() && pieces.windows(2).all(|w| w[0].end <= w[1].start), "{total} {pieces:?}");
            let read: u64 = pieces.iter().map(|p| p.end - p.start).sum();
            let wanted = (total as f64 * share).max(1.0);
            assert!(read as f64 >= 0.9 * wanted && read as f64 <= 1.2 * wanted + 8.0, "{total} {share} {read}");
        }
        let spread = pieces(1000, 100, 1, 0.08);
        assert!(spread[0].start < 125 && spread[7].end > 875, "{spread:?}");
    }

    #[test]
    fn blocks_stay_within_their_size() {
        for (rows, cols, rank) in [(64, 64, 8), (1, 1 << 22, 1), (4096, 14336, 256), (3, 1 << 20, 64), (1 << 20, 1, 64)] {
            let all = blocks(rows, cols, rank, 1 << 18, 1.0);
            let size = |(r, c): &Block| (r.end - r.start) * (c.end - c.start);
            assert_eq!(all.iter().map(size).sum::<u64>(), rows * cols);
            assert!(all.iter().all(|b| size(b) <= 1 << 18 && (b.1.end - b.1.start).max(b.0.end - b.0.start) * rank <= 1 << 20));
        }
    }
}
