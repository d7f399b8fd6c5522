//! Methods that work on singular vectors: each matrix by itself, in f64, into a spool.

use std::sync::Arc;

use super::align::Sum;
use super::measure::Pair;
use super::method::CombineMethod;
use super::mixed::Mixed;
use super::options::CombineOptions;
use super::wanted::{name, shapes, targets};
use crate::adapter::Target;
use crate::error::{Error, Result};
use crate::exec::{self, Progress};
use crate::kernel::Float;
use crate::kernel::fusion::{Product, Term, core_space, iso_c, knots, tsv};
use crate::op::crew;
use crate::op::extract::bytes;
use crate::op::spool::Spool;
use crate::rules;
use crate::tensor::{Dtype, TensorInfo, TensorSource};

/// The updates that the method wants, as factors in F64.
///
/// # Errors
/// `A-008`, `E-012`, `E-001`, `E-002`, `E-004`, `E-006`.
pub(super) fn wanted(
    sums: &[Sum],
    mixed: &Mixed,
    spool: Spool,
    options: &CombineOptions,
    progress: &dyn Progress,
) -> Result<Vec<Target>> {
    let sizes: Vec<u64> = sums.iter().map(|sum| sum.rank() * (sum.out_in().0 + sum.out_in().1) * sum.experts()).collect();
    let ranks: Vec<u64> = exec::on_threads(&options.exec, || {
        crew::each(&sizes, |i| {
            if progress.cancelled() {
                return Err(exec::interrupted());
            }
            one(&sums[i], options.method, &spool)
        })
    })?;
    let source: Arc<dyn TensorSource> = Arc::new(spool.finish());
    targets(sums, ranks.into_iter().map(|rank| (rank, 1.0)), &source, mixed)
}

/// One sum; gives the rank.
fn one(sum: &Sum, method: CombineMethod, spool: &Spool) -> Result<u64> {
    let products = (0..sum.experts()).map(|expert| product(sum, expert, method)).collect::<Result<Vec<_>>>()?;
    // A stack has one rank for all of its matrices, and what has none is a zero of rank 1.
    let rank = products.iter().map(|product| product.b.ncols()).max().unwrap_or(0).max(1);
    let (shape_a, shape_b) = shapes(sum, rank as u64)?;
    let place_a = spool.reserve(&name(sum, "A"), TensorInfo { dtype: Dtype::F64, shape: shape_a });
    let place_b = spool.reserve(&name(sum, "B"), TensorInfo { dtype: Dtype::F64, shape: shape_b });
    let (out, inner) = sum.out_in();
    for (expert, product) in products.iter().enumerate() {
        let a = bytes(Some(product.a.as_ref()), (rank, inner as usize), Float::F64);
        let b = bytes(Some(product.b.as_ref()), (out as usize, rank), Float::F64);
        spool.put(place_a, (expert * a.len()) as u64, &a)?;
        spool.put(place_b, (expert * b.len()) as u64, &b)?;
    }
    Ok(rank as u64)
}

fn product(sum: &Sum, expert: u64, method: CombineMethod) -> Result<Product> {
    let mut pairs = Vec::with_capacity(sum.parts.len());
    for part in &sum.parts {
        let mut pair = Pair::of(&part.target, expert)?;
        pair.a.iter_mut().for_each(|value| *value *= part.weight);
        pairs.push(pair);
    }
    let terms: Vec<Term<'_>> = pairs.iter().map(|pair| Term { b: &pair.b, a: &pair.a, rank: pair.rank }).collect();
    let product = match method {
        CombineMethod::Knots { density } => knots(&terms, density),
        CombineMethod::CoreSpace { density } => core_space(&terms, density),
        CombineMethod::Tsv => tsv(&terms),
        _ => iso_c(&terms),
    };
    product.ok_or_else(|| {
        let message = format!("no singular value decomposition of {:?} was found: it does not converge", sum.tensor);
        Error::new(rules::DECOMPOSED, message).tensor(&sum.tensor)
    })
}
