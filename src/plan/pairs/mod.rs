//! Which tensors of a tuned checkpoint are differences of which tensors of its base, and what becomes of each: from headers alone. Every
//! tensor of either is in exactly one list.

mod kinds;

use std::collections::BTreeMap;

pub(crate) use kinds::Whole;

use super::bind::is_resized;
use super::rename::{self, Renaming};
use crate::adapter::Kind;
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Error, Result};
use crate::rules;
use crate::tensor::{TensorInfo, TensorSource, is_plain_float};

/// A weight whose change is factorised.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    /// Its name in the base, or, without one, in the only checkpoint.
    pub(crate) tensor: String,
    /// Its name in the tuned checkpoint.
    pub(crate) tuned: String,
    pub(crate) kind: Kind,
    pub(crate) shape: Vec<u64>,
    /// Matrices of the tensor: the experts of a stack, or 1.
    pub(crate) slices: u64,
    /// Of each of them, as they are stored.
    pub(crate) rows: u64,
    pub(crate) cols: u64,
}

/// A tensor without factors.
#[derive(Debug, Clone)]
pub(crate) struct Rest {
    pub(crate) tensor: String,
    pub(crate) tuned: String,
    pub(crate) why: Whole,
    /// The base has a tensor of the same shape to compare it with.
    pub(crate) compares: bool,
}

/// Everything, balanced.
#[derive(Debug)]
pub(crate) struct Pairs {
    pub(crate) layers: Vec<Layer>,
    pub(crate) rest: Vec<Rest>,
    /// Tensors of the base that the tuned checkpoint does not have.
    pub(crate) only_in_base: Vec<String>,
    /// From the tuned checkpoint's names to the base's.
    pub(crate) renaming: Renaming,
}

/// What is chosen by name.
pub(crate) struct Choice<'c> {
    /// Whether a tensor is named as a target; `None` if nothing was named.
    pub(crate) targets: Option<&'c dyn Fn(&str) -> bool>,
    /// Whether a tensor is named as none.
    pub(crate) excluded: &'c dyn Fn(&str) -> bool,
}

impl Pairs {
    /// Pairs the tensors of `tuned` with those of `base`, under one renaming of a prefix if the names differ. Without a base the weights
    /// themselves are factorised.
    ///
    /// # Errors
    /// `A-020` if no tensor of `tuned` is in the base; `A-025` if a weight is quantised or packed.
    pub(crate) fn new(base: Option<&Checkpoint>, tuned: &Checkpoint, choice: &Choice<'_>) -> Result<Self> {
        let renaming = match base {
            Some(base) => renaming(base, tuned)?,
            None => Renaming::identity(),
        };
        let exists = |name: &str| base.is_some_and(|base| base.info(name).is_some());
        let mut named = BTreeMap::<String, String>::new();
        let mut problems = Vec::new();
        for name in tuned.names() {
            let tensor = renaming.apply(name, &exists);
            if let Some(other) = named.insert(tensor.clone(), name.to_owned()) {
                let message = format!("{other:?} and {name:?} are both {tensor:?} of the base");
                let problem = Diagnostic::new(rules::TARGETS_UNIQUE, message).file(tuned.path()).tensor(name);
                problems
                    .push(problem.help("one of them is another copy, such as an average of weights: save the model without it"));
            }
        }
        let mut pairs = Pairs { layers: Vec::new(), rest: Vec::new(), only_in_base: Vec::new(), renaming };
        if let Some(base) = base {
            pairs.only_in_base = base.names().filter(|name| !named.contains_key(*name)).map(str::to_owned).collect();
            pairs.only_in_base.sort();
        }
        for (tensor, tuned_name) in named {
            let Some(info) = tuned.info(&tuned_name) else { continue };
            let before = base.map(|base| base.info(&tensor));
            let compares = before.flatten().is_some_and(|before| before.shape == info.shape);
            match judge(&tensor, info, before, base.unwrap_or(tuned), choice) {
                Judged::Layer(kind) => pairs.layers.push(layer(tensor, tuned_name, kind, info)),
                Judged::Rest(why) => pairs.rest.push(Rest { tensor, tuned: tuned_name, why, compares }),
                Judged::Refused(problem) => problems.push(problem.file(tuned.path())),
            }
        }
        Error::check(problems)?;
        Ok(pairs)
    }
}

/// What a tensor is.
enum Judged {
    Layer(Kind),
    Rest(Whole),
    Refused(Diagnostic),
}

fn judge(
    tensor: &str,
    info: &TensorInfo,
    before: Option<Option<&TensorInfo>>,
    model: &Checkpoint,
    choice: &Choice<'_>,
) -> Judged {
    let dims = info.shape.dims();
    let kind = kinds::kind(tensor, dims, model.config());
    let named = choice.targets.map(|targets| targets(tensor));
    if (choice.excluded)(tensor) || named == Some(false) {
        return Judged::Rest(Whole::Excluded);
    }
    let floats = is_plain_float(info.dtype) && before.flatten().is_none_or(|before| is_plain_float(before.dtype));
    match (kind, before) {
        (_, Some(None)) => Judged::Rest(Whole::New),
        (_, Some(Some(before))) if before.shape != info.shape => {
            Judged::Rest(if is_resized(tensor, &before.shape, &info.shape) { Whole::Resized } else { Whole::Reshaped })
        }
        (Ok(_), _) if !floats => {
            let message = format!("{tensor:?} is {}, and no difference of packed weights is taken", info.dtype);
            let help = "dequantise both checkpoints first, or leave the tensor out with --exclude";
            Judged::Refused(Diagnostic::new(rules::BASE_DTYPE, message).tensor(tensor).help(help))
        }
        _ if !floats => Judged::Rest(Whole::NoFloat),
        _ if info.shape.elements() == 0 => Judged::Rest(Whole::Empty),
        (Err(why), _) => Judged::Rest(why),
        // Changing one name of a tied weight changes the others too, or none, as the program that loads it likes.
        (Ok(_), _) if model.tied(tensor).is_some() => Judged::Rest(Whole::Tied),
        (Ok(_), _) if kinds::is_head(tensor) && named.is_none() => Judged::Rest(Whole::Head),
        (Ok(Kind::Embedding), None) if named.is_none() => Judged::Rest(Whole::Excluded),
        (Ok(kind), _) => Judged::Layer(kind),
    }
}

fn layer(tensor: String, tuned: String, kind: Kind, info: &TensorInfo) -> Layer {
    let shape = info.shape.dims().to_vec();
    let (slices, (rows, cols)) = match kind {
        Kind::Experts(_) => {
            let slices = shape.first().copied().unwrap_or(0);
            (slices, (shape.get(1).copied().unwrap_or(0), shape.get(2).copied().unwrap_or(0)))
        }
        _ => (1, info.shape.split(1)),
    };
    Layer { tensor, tuned, kind, shape, slices, rows, cols }
}

/// The one renaming under which most names of `tuned` are in the base: none, or a known change of prefix.
fn renaming(base: &Checkpoint, tuned: &Checkpoint) -> Result<Renaming> {
    let exists = |name: &str| base.info(name).is_some();
    let fits = |renaming: &Renaming| {
        let same = |name: &&str| {
            base.info(&renaming.apply(name, &exists)).is_some_and(|b| tuned.info(name).is_some_and(|t| t.shape == b.shape))
        };
        tuned.names().filter(same).count()
    };
    let mut best = (fits(&Renaming::identity()), Renaming::identity());
    for renaming in rename::known() {
        let count = fits(&renaming);
        if count > best.0 {
            best = (count, renaming);
        }
    }
    if best.0 == 0 {
        let one = tuned.names().next().unwrap_or_default();
        let near = rename::nearest(one, base.names()).unwrap_or_default();
        let message = format!("no tensor has the same name and shape in both checkpoints: {one:?} here, {near:?} there");
        return Err(Error::new(rules::SOME_TARGET, message)
            .file(tuned.path())
            .help("these are two models; give the base that this one was tuned from"));
    }
    Ok(best.1)
}
