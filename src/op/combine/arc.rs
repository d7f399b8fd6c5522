//! The weights of two updates on the arc between them: `slerp`.

use super::align::Sum;
use super::measure::Pair;
use crate::error::{Error, Result};
use crate::kernel::product_inner;
use crate::rules;

/// Beyond this cosine, either way, the two are taken for parallel, as mergekit does (`merge_methods/slerp.py`).
const PARALLEL: f64 = 0.9995;

/// What multiplies each B·A, for each sum in the order of its parts.
///
/// # Errors
/// `U-001` if a tensor is not updated by two adapters at most, with weights above 0; `A-008`, `E-001`, `E-004`.
pub(super) fn gains(sums: &[Sum]) -> Result<Vec<Vec<f64>>> {
    sums.iter().map(one).collect()
}

fn one(sum: &Sum) -> Result<Vec<f64>> {
    let plain: Vec<f64> = sum.parts.iter().map(super::align::Part::scale).collect();
    let refuse = |message: &str| {
        Err(Error::new(rules::ARGUMENT, message).tensor(&sum.tensor).help("give two adapters, such as A:0.7 B:0.3"))
    };
    if sum.parts.iter().any(|part| part.weight < 0.0) {
        return refuse("an arc between two updates has no weights below 0");
    }
    let [first, second] = &sum.parts[..] else {
        // What one adapter alone updates has nothing to turn to.
        return if sum.parts.len() < 2 { Ok(plain) } else { refuse("there is an arc between two updates, and not between more") };
    };
    let (mut inner, mut one, mut two) = (0.0, 0.0, 0.0);
    for expert in 0..sum.experts() {
        let (x, y) = (Pair::of(&first.target, expert)?, Pair::of(&second.target, expert)?);
        inner += product_inner((&x.b, &x.a, x.rank), (&y.b, &y.a, y.rank));
        (one, two) = (one + x.norm_squared(), two + y.norm_squared());
    }
    let cosine = inner / (one * two).sqrt();
    // Nothing is the cosine with a zero.
    if !cosine.is_finite() || cosine.abs() > PARALLEL {
        return Ok(plain);
    }
    let (angle, whole) = (cosine.acos(), first.weight + second.weight);
    let gain =
        |part: &super::align::Part| whole * (part.weight / whole * angle).sin() / angle.sin() * part.target.scaling.effective();
    Ok(vec![gain(first), gain(second)])
}
