//! LoHa, ΔW = s·(P₁ ∘ P₂) with Pᵢ = Lᵢ·Rᵢ of rank r (Hyeon-Woo et al. 2022), is a product of the row-wise Kronecker products of L₁ and L₂
//! and of the column-wise ones of R₁ and R₂, of rank r². LoKr, ΔW = s·(P₁ ⊗ P₂), is (L₁ ⊗ L₂)·(R₁ ⊗ R₂), of rank r₁·r₂. Both are
//! identities, and in f64 their entries are exact (PEFT `tuners/loha/layer.py`, `tuners/lokr/layer.py`, `get_delta_weight`).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::thin::{Matrix, computed};
use super::{Made, Parts};
use crate::adapter::{Kind, Scaling, ScalingRule, Target};
use crate::error::{Diagnostic, Result};
use crate::rules;
use crate::tensor::TensorSource;

/// How the two halves are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Hadamard,
    Kronecker,
}

/// One half of the product, by the names of its tensors.
#[derive(Debug, Clone)]
enum Half {
    /// As it stands.
    Whole(String),
    /// L (rows, r) and R (r, cols).
    Product(String, String),
    /// L (r, rows), R (r, cols) and between them a core (r, r, k…), whose kernel goes into the columns.
    Core(String, String, String),
}

/// Rows, columns and rank of a half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size {
    rows: u64,
    cols: u64,
    rank: u64,
}

pub(super) fn make(
    form: Form,
    modules: &BTreeMap<String, Parts<'_>>,
    source: &Arc<dyn TensorSource>,
    scales: &dyn Fn(&str) -> f64,
    made: &mut Made,
) {
    for (module, parts) in modules {
        let halves = match form {
            Form::Hadamard => [half(parts, "hada_w1", "hada_t1"), half(parts, "hada_w2", "hada_t2")],
            Form::Kronecker => [half(parts, "lokr_w1", ""), half(parts, "lokr_w2", "lokr_t2")],
        };
        let used: usize = halves.iter().flatten().map(|half| half.names().len()).sum();
        let [Some(first), Some(second)] = halves else {
            made.incomplete(module, parts, "the factors of two matrices");
            continue;
        };
        if let Half::Whole(name) = &second
            && source.info(name).is_some_and(|info| info.shape.dims().len() == 3)
        {
            let message = format!("{name:?} has three dimensions, over which PEFT's Kronecker product mixes channels and kernel");
            let help = "no low-rank form equals it; merge it with PEFT (merge_and_unload)";
            made.problems.push(Diagnostic::new(rules::METHOD_SUPPORTED, message).tensor(name).help(help));
            continue;
        }
        if let Half::Whole(name) = &first
            && source.info(name).is_some_and(|info| info.shape.dims().len() != 2)
        {
            made.incomplete(module, parts, "factors that fit each other: the first is no matrix");
            continue;
        }
        let sizes = first.size(&**source).zip(second.size(&**source));
        let Some((rows, cols, rank)) = sizes.filter(|_| used == parts.len()).and_then(|(x, y)| combined(form, x, y)) else {
            made.incomplete(module, parts, "factors that fit each other");
            continue;
        };
        // B is called after the first tensor and A after the last one.
        let name = |half: &Half, last: bool| {
            let names = half.names();
            if last { names.last().cloned() } else { names.first().cloned() }.unwrap_or_default()
        };
        let (lefts, rights) = ((first.clone(), second.clone()), (first.clone(), second.clone()));
        let b = computed(source, &name(&first, false), (rows, rank), move |source| {
            let (x, y) = (lefts.0.left(source)?, lefts.1.left(source)?);
            Ok(match form {
                Form::Hadamard => Matrix::of(x.rows, x.cols * y.cols, |i, k| x.at(i, k / y.cols) * y.at(i, k % y.cols)),
                Form::Kronecker => x.kron(&y),
            })
        });
        let a = computed(source, &name(&second, true), (rank, cols), move |source| {
            let (x, y) = (rights.0.right(source)?, rights.1.right(source)?);
            Ok(match form {
                Form::Hadamard => Matrix::of(x.rows * y.rows, x.cols, |k, j| x.at(k / y.rows, j) * y.at(k % y.rows, j)),
                Form::Kronecker => x.kron(&y),
            })
        });
        // Written so that alpha / rank is the scale.
        let alpha = scales(module) * rank as f64;
        let Some((a, b)) = a.zip(b) else {
            made.too_large(module);
            continue;
        };
        made.targets.push(Target {
            tensor: format!("{module}.weight"),
            kind: Kind::Flat,
            a,
            b,
            scaling: Scaling { rank, alpha, rule: ScalingRule::Standard },
            bias: None,
            magnitude: None,
            singular_values: None,
        });
    }
}

fn half(parts: &Parts<'_>, stem: &str, core: &str) -> Option<Half> {
    let part = |name: &str| parts.get(name).map(|name| (*name).to_owned());
    match (part(stem), part(&format!("{stem}_a")), part(&format!("{stem}_b")), part(core)) {
        (Some(whole), None, None, None) => Some(Half::Whole(whole)),
        (None, Some(a), Some(b), None) => Some(Half::Product(a, b)),
        (None, Some(a), Some(b), Some(core)) => Some(Half::Core(a, b, core)),
        _ => None,
    }
}

/// Rows, columns and rank of the whole update.
fn combined(form: Form, x: Size, y: Size) -> Option<(u64, u64, u64)> {
    let rank = x.rank.checked_mul(y.rank)?;
    match form {
        Form::Hadamard => ((x.rows, x.cols) == (y.rows, y.cols)).then_some((x.rows, x.cols, rank)),
        Form::Kronecker => Some((x.rows.checked_mul(y.rows)?, x.cols.checked_mul(y.cols)?, rank)),
    }
}

impl Half {
    /// The tensors, that of L first.
    fn names(&self) -> Vec<String> {
        match self {
            Half::Whole(whole) => vec![whole.clone()],
            Half::Product(l, r) => vec![l.clone(), r.clone()],
            Half::Core(l, r, core) => vec![l.clone(), r.clone(), core.clone()],
        }
    }

    fn size(&self, source: &dyn TensorSource) -> Option<Size> {
        let split = |name: &str| source.info(name).map(|info| info.shape.split(1));
        match self {
            Half::Whole(whole) => {
                let (rows, cols) = split(whole)?;
                Some(Size { rows, cols, rank: rows.min(cols) })
            }
            Half::Product(l, r) => {
                let ((rows, rank), (inner, cols)) = (split(l)?, split(r)?);
                (rank == inner).then_some(Size { rows, cols, rank })
            }
            Half::Core(l, r, core) => {
                let ((rank, rows), (inner, cols)) = (split(l)?, split(r)?);
                let dims = source.info(core)?.shape.dims();
                let kernel: u64 = dims.get(2..)?.iter().product();
                let fits = dims.first() == Some(&rank) && dims.get(1) == Some(&inner);
                fits.then_some(Size { rows, cols: cols.checked_mul(kernel)?, rank })
            }
        }
    }

    /// L (rows, rank).
    fn left(&self, source: &dyn TensorSource) -> Result<Matrix> {
        Ok(match self {
            Half::Whole(whole) => {
                let whole = Matrix::read(source, whole)?;
                if whole.rows <= whole.cols { Matrix::identity(whole.rows) } else { whole }
            }
            Half::Product(l, _) => Matrix::read(source, l)?,
            Half::Core(l, ..) => Matrix::read(source, l)?.transposed(),
        })
    }

    /// R (rank, cols).
    fn right(&self, source: &dyn TensorSource) -> Result<Matrix> {
        Ok(match self {
            Half::Whole(whole) => {
                let whole = Matrix::read(source, whole)?;
                if whole.rows <= whole.cols { whole } else { Matrix::identity(whole.cols) }
            }
            Half::Product(_, r) => Matrix::read(source, r)?,
            Half::Core(_, r, core) => {
                let (r, core) = (Matrix::read(source, r)?, Matrix::read(source, core)?);
                // Core (rank, inner · kernel), R (inner, cols): their product over inner, the kernel last.
                let kernel = core.cols / r.rows.max(1);
                let value = |k: usize, col: usize| {
                    let (j, x) = (col / kernel, col % kernel);
                    (0..r.rows).fold(0.0, |sum, i| sum + core.at(k, i * kernel + x) * r.at(i, j))
                };
                Matrix::of(core.rows, r.cols * kernel, value)
            }
        })
    }
}
