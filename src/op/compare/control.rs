//! What is left to chance in a comparison: the sample of values whose signs are counted, and the random adapter that is compared as a control.
//! Of 958 adapters in the wild, which are merged hardly mattered, and random ones did about as well (2602.12323): so a figure is only worth
//! something beside that of a random adapter.

use crate::kernel::Dice;
use crate::kernel::fusion::key;
use crate::kernel::product_norm;
use crate::op::combine::Pair;

/// Values of each matrix whose signs are counted; a share of them is uncertain by 0.005 at most (one standard deviation).
const SAMPLE: u64 = 10_000;

/// Values whose signs differ, and values of which neither is 0: all of a small matrix, or a sample.
pub(super) fn conflict(tensor: &str, one: &Pair, two: &Pair, (out, inner): (usize, usize)) -> [f64; 2] {
    let all = (out * inner) as u64;
    let key = key(0, tensor, 0, "signs");
    let place = |n: u64| {
        if all <= SAMPLE { n } else { (Dice::unit(key, 2 * n) * all as f64) as u64 + (Dice::unit(key, 2 * n + 1) * 8.0) as u64 }
    };
    let value = |pair: &Pair, n: usize| -> f64 {
        let (i, j) = (n / inner, n % inner);
        (0..pair.rank).map(|k| pair.b[i * pair.rank + k] * pair.a[k * inner + j]).sum()
    };
    let (mut differ, mut count) = (0.0, 0.0);
    for n in 0..all.min(SAMPLE) {
        let at = place(n).min(all - 1) as usize;
        let (x, y) = (value(one, at), value(two, at));
        if x != 0.0 && y != 0.0 {
            count += 1.0;
            differ += f64::from(u8::from((x > 0.0) != (y > 0.0)));
        }
    }
    [differ, count]
}

/// Normal factors of the shape and the norm of another update.
pub(super) fn random(tensor: &str, expert: u64, like: &Pair) -> Pair {
    let normal = |what: &str, count: usize| -> Vec<f64> {
        let key = key(1, tensor, expert, what);
        // Box and Muller 1958; the first of the two numbers, away from the logarithm of 0.
        let at = |n: u64| {
            let (u, v) = (1.0 - Dice::unit(key, 2 * n), Dice::unit(key, 2 * n + 1));
            (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
        };
        (0..count as u64).map(at).collect()
    };
    let (b, mut a) = (normal("b", like.b.len()), normal("a", like.a.len()));
    let (wanted, found) = (product_norm(&like.b, &like.a, like.rank), product_norm(&b, &a, like.rank));
    let scale = if found > 0.0 { wanted / found } else { 0.0 };
    a.iter_mut().for_each(|value| *value *= scale);
    Pair { b, a, rank: like.rank }
}
