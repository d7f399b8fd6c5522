//! Greedy decoding: the likeliest token, again and again. Without a cache of keys and values, so the cost is quadratic; it is meant for the short
//! replies by which a person sees that an adapter works.

use super::task::largest;
use crate::error::Result;

/// The tokens that follow `ids`, up to one of `ends` or `most` of them; without that end. `next` gives the logits of the token after some.
pub(super) fn continued(ids: &[u32], ends: &[u32], most: usize, next: impl Fn(&[u32]) -> Result<Vec<f32>>) -> Result<Vec<u32>> {
    let mut all = ids.to_vec();
    while all.len() < ids.len() + most {
        let token = largest(&next(&all)?) as u32;
        if ends.contains(&token) {
            break;
        }
        all.push(token);
    }
    Ok(all.split_off(ids.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stops_at_an_end_and_at_the_most() {
        let counting = |ids: &[u32]| {
            let mut logits = vec![0.0; 10];
            logits[(ids.last().unwrap() + 1) as usize] = 1.0;
            Ok(logits)
        };
        assert_eq!(continued(&[1], &[5], 10, counting).unwrap(), [2, 3, 4]);
        assert_eq!(continued(&[1], &[5], 2, counting).unwrap(), [2, 3]);
    }
}
