//! The plan: what every output file consists of, byte for byte, from where. Untouched tensors are copied; everything else is a
//! [`Change`]: a tensor computed from an origin and the contributions of the adapters.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use super::bind::{self, Binding, Ignored};
use super::options::{BindOptions, Weighted};
use super::outline::{self, Outline};
use super::output::{Mixing, OutputOptions, Rounding};
use super::quantised::{self, Quantised, Role};
use super::rename::Renaming;
use super::shape::{Along, Contribution, Gain, Over, Panel};
use super::tied;
use crate::adapter::Factor;
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Error, Result};
use crate::kernel::fusion::{Drops, Keep};
use crate::limits::Limits;
use crate::rules;
use crate::tensor::{Dtype, TensorInfo, TensorSource, is_plain_float};

/// Where the values of a tensor come from before anything is added.
#[derive(Debug, Clone)]
pub(crate) enum Origin<'a> {
    /// A tensor of the base.
    Base { shard: usize, begin: u64, info: TensorInfo },
    /// A full tensor of an adapter.
    Adapter(&'a Factor),
}

/// One tensor of the output that is not a copy of the base's bytes.
#[derive(Debug, Clone)]
pub(crate) struct Change<'a> {
    pub(crate) name: String,
    pub(crate) info: TensorInfo,
    /// Offset of the first byte in the output file.
    pub(crate) begin: u64,
    pub(crate) origin: Origin<'a>,
    /// What the adapters add, in the order given; empty for a plain replacement or copy.
    pub(crate) contributions: Vec<Contribution>,
    /// The base had no tensor of this name.
    pub(crate) added: bool,
    /// Rows that take the place of the origin's, sorted by row.
    pub(crate) patches: Vec<Patch<'a>>,
    /// Norms of the columns of base plus update, where the values are divided by them.
    pub(crate) norms: Norms,
    /// How several updates become one, if not as their sum.
    pub(crate) mixing: Option<Arc<Mixing>>,
    /// What is kept of the updates, where some of it is dropped.
    pub(crate) keeps: Keeps,
    /// It is the codes or the scales of a weight that is stored as both.
    pub(crate) quantised: Option<Quantised<'a>>,
}

/// A row that is replaced.
#[derive(Debug, Clone)]
pub(crate) struct Patch<'a> {
    pub(crate) row: u64,
    pub(crate) with: &'a Factor,
    /// Its row in `with`.
    pub(crate) index: u64,
}

/// A cell for the norms of columns, one list per contribution. They need all of a tensor's bytes, so whoever needs them first fills it.
pub(crate) type Norms = Arc<Mutex<Option<Arc<Vec<Vec<f64>>>>>>;

/// A cell for what is kept of each contribution, for each slice. It depends on all of their values, so whoever needs it first fills it.
pub(crate) type Keeps = Arc<Mutex<Option<Arc<Vec<Vec<Keep>>>>>>;

impl Change<'_> {
    /// Every factor that is read for it.
    pub(crate) fn factors(&self) -> impl Iterator<Item = &Factor> {
        let whole = match self.origin {
            Origin::Adapter(factor) => Some(factor),
            Origin::Base { .. } => None,
        };
        let rows = self.patches.iter().map(|patch| patch.with);
        whole.into_iter().chain(self.contributions.iter().flat_map(Contribution::factors)).chain(rows)
    }

    /// Has it another shape than in the base?
    pub(crate) fn moves(&self, base: &Checkpoint) -> bool {
        base.info(&self.name).is_some_and(|info| info.shape != self.info.shape)
    }

    /// Is it more than the sum of base and updates: multiplied by something, or made of updates value by value?
    pub(crate) fn is_scaled(&self) -> bool {
        self.mixing.is_some() || self.contributions.iter().any(|contribution| contribution.gain.is_some())
    }

    /// Does a value depend on others of its row?
    pub(crate) fn needs_whole_rows(&self) -> bool {
        let of_rows = |gain: &Gain| gain.over == Over::Norm && gain.along == Along::Rows;
        let by_rank = |mixing: &Arc<Mixing>| matches!(mixing.method.drops, Drops::ByRank { .. });
        self.mixing.as_ref().is_some_and(by_rank)
            || self.contributions.iter().any(|contribution| contribution.gain.as_ref().is_some_and(of_rows))
    }

    /// Is it the scales of a weight?
    pub(crate) fn is_of_scales(&self) -> bool {
        matches!(&self.quantised, Some(Quantised { role: Role::Scales(_), .. }))
    }

    /// Rows of one slice of a stack; all rows of anything else.
    pub(crate) fn slice_rows(&self) -> u64 {
        match self.contributions.first() {
            Some(contribution) if self.info.shape.dims().len() > 1 => {
                self.info.shape.dims().get(contribution.lead - 1).copied().unwrap_or(1)
            }
            _ => 1,
        }
        .max(1)
    }
}

/// A run of bytes that is the same in base and output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CopyRange {
    /// Index of the base's file.
    pub(crate) shard: usize,
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) len: u64,
}

/// The header of an output shard.
#[derive(Debug, Clone)]
pub(crate) enum Head {
    /// That of the base's file of this index, all of whose tensors keep their places.
    Kept(usize),
    /// A new one.
    New(Vec<u8>),
}

/// One file of weights of the output.
#[derive(Debug, Clone)]
pub(crate) struct OutShard<'a> {
    /// Name inside the output folder.
    pub(crate) file_name: String,
    pub(crate) head: Head,
    pub(crate) len: u64,
    /// In the order of the file.
    pub(crate) changes: Vec<Change<'a>>,
    /// All tensors, in the order of the file.
    pub(crate) tensors: Vec<OutTensor>,
}

/// A tensor of an output file.
#[derive(Debug, Clone)]
pub(crate) struct OutTensor {
    pub(crate) name: String,
    pub(crate) info: TensorInfo,
    /// Offset of the first byte in the output file.
    pub(crate) begin: u64,
    /// The base's file and the offset in it from which it is copied; `None` if it is one of the changes.
    pub(crate) from: Option<(usize, u64)>,
}

/// Everything that a merge will do.
#[derive(Debug)]
pub struct Plan<'a> {
    pub(crate) base: &'a Checkpoint,
    pub(crate) shards: Vec<OutShard<'a>>,
    /// `config.json` must say that embeddings are no longer tied.
    pub(crate) untied: bool,
    pub(crate) keep_nonfinite: bool,
    pub(crate) output: OutputOptions,
    renamings: Vec<Renaming>,
    ignored: Vec<Ignored>,
    copies: Vec<&'a Factor>,
    warnings: Vec<Diagnostic>,
}

impl<'a> Plan<'a> {
    /// Makes sure that the files that were read are what they were when they were opened.
    ///
    /// # Errors
    /// `E-004`.
    pub(crate) fn unchanged(&self) -> Result<()> {
        let mut sources: Vec<_> = self.changes().flat_map(Change::factors).map(Factor::source).collect();
        sources.dedup_by(|one, other| Arc::ptr_eq(one, other));
        self.base.unchanged()?;
        sources.into_iter().try_for_each(|source| source.unchanged())
    }

    /// Binds all adapters to the base and lays out the output.
    ///
    /// # Errors
    /// Everything that is wrong with any of the bindings, at once; `A-012` if nothing would change; `A-009` if two adapters bring a
    /// replacement of the same tensor.
    pub fn new(base: &'a Checkpoint, adapters: &[Weighted<'a>], options: &BindOptions, limits: &Limits) -> Result<Self> {
        Self::with_output(base, adapters, options, &OutputOptions::default(), limits)
    }

    /// [`new`](Plan::new), for an output that is not like the base.
    ///
    /// # Errors
    /// As [`new`](Plan::new); `U-001` if the output cannot be like that, `A-025` for another dtype of a base that is quantised.
    pub fn with_output(
        base: &'a Checkpoint,
        adapters: &[Weighted<'a>],
        options: &BindOptions,
        output: &OutputOptions,
        limits: &Limits,
    ) -> Result<Self> {
        check_output(base, output)?;
        let mut problems = Vec::new();
        let mut class = None;
        let mut bindings = Vec::new();
        for (index, weighted) in adapters.iter().enumerate() {
            match Binding::new(base, *weighted, index, options, limits) {
                Ok(binding) => bindings.push(binding),
                Err(error) => {
                    class.get_or_insert(error.class());
                    problems.extend(error.into_diagnostics());
                }
            }
        }
        Error::check(problems).map_err(|e| match class {
            Some(class) => e.class_of(class),
            None => e,
        })?;
        Self::from_bindings(base, bindings, options, output)
    }

    fn from_bindings(
        base: &'a Checkpoint,
        bindings: Vec<Binding<'a>>,
        options: &BindOptions,
        output: &OutputOptions,
    ) -> Result<Self> {
        let mut updates: BTreeMap<String, Vec<Contribution>> = BTreeMap::new();
        let mut patches: BTreeMap<String, Vec<Patch<'a>>> = BTreeMap::new();
        let mut shared = BTreeSet::new();
        let mut replacements: BTreeMap<String, &'a Factor> = BTreeMap::new();
        let (mut ignored, mut warnings, mut renamings) = (Vec::new(), Vec::new(), Vec::new());
        let mut problems = Vec::new();
        for binding in &bindings {
            let all_of = |name: &&String| {
                let others = bindings.iter().filter(|other| other.index != binding.index);
                others.into_iter().any(|other| other.updates.contains_key(*name) || other.replacements.contains_key(*name))
            };
            if let Some((name, rows)) = binding.rows.iter().find(|(name, _)| all_of(name)) {
                let message = format!("one adapter replaces rows of {name:?} and another changes all of it");
                let help = "merge one of them first, then the other into the result";
                problems.push(Diagnostic::new(rules::TARGETS_UNIQUE, message).tensor(rows.with.name()).help(help));
            }
        }
        let mut copies = Vec::new();
        for binding in bindings {
            copies.extend(binding.copies);
            for (name, contribution) in binding.updates {
                updates.entry(name).or_default().push(contribution);
            }
            for (name, with) in binding.replacements {
                if let Some(first) = replacements.insert(name.clone(), with) {
                    let message = format!(
                        "{name:?} is replaced by two adapters, from {:?} and {:?}",
                        first.source().label(),
                        with.source().label()
                    );
                    let help = "merge one of them with --skip-replacements first";
                    problems.push(Diagnostic::new(rules::TARGETS_UNIQUE, message).tensor(with.name()).help(help));
                }
            }
            for (name, rows) in binding.rows {
                let new = rows.rows.iter().enumerate();
                patches.entry(name).or_default().extend(new.map(|(i, row)| Patch {
                    row: *row,
                    with: &rows.with,
                    index: i as u64,
                }));
            }
            shared.extend(binding.shared);
            ignored.extend(binding.ignored);
            warnings.extend(binding.warnings);
            renamings.push(binding.renaming);
        }
        for (name, patches) in &mut patches {
            patches.sort_by_key(|patch| patch.row);
            if let Some([first, second]) = patches.windows(2).find(|pair| pair[0].row == pair[1].row) {
                let (of, and) = (first.with.source().label().display(), second.with.source().label().display());
                let message = format!("row {} of {name:?} is replaced by two adapters, from {of} and {and}", first.row);
                problems.push(Diagnostic::new(rules::TARGETS_UNIQUE, message).tensor(second.with.name()));
            }
        }
        for (name, contributions) in &updates {
            if contributions.iter().any(|c| c.lead != contributions[0].lead) {
                let message = format!("one adapter takes {name:?} for a convolution and another for a stack of experts");
                problems.push(Diagnostic::new(rules::SHAPE_FITS, message).tensor(name));
            }
        }
        let quantised = quantised_weights(base, updates.keys(), &mut problems);
        for (weight, scales) in quantised.iter().map(|(weight, how)| (weight, &how.scales)) {
            if updates.contains_key(scales) || replacements.contains_key(scales) || patches.contains_key(scales) {
                let message = format!("{scales:?} are the scales of {weight:?}, and both are changed");
                problems.push(Diagnostic::new(rules::TARGETS_UNIQUE, message).tensor(scales));
            }
        }
        Error::check(problems)?;
        let mut changed: BTreeSet<String> = updates.keys().chain(replacements.keys()).chain(patches.keys()).cloned().collect();
        if changed.is_empty() {
            let message = "nothing would change: every update is left out by a flag or has weight 0";
            return Err(Error::new(rules::ADAPTER_NOT_EMPTY, message).file(base.path()));
        }
        // What is replaced, or has rows replaced, under all of its names at once stays tied.
        let alone: BTreeSet<String> =
            updates.keys().chain(replacements.keys().filter(|name| !shared.contains(*name))).cloned().collect();
        changed.extend(tied::heads_to_write(base, &alone));
        let untied = tied::is_broken(base, &alone);
        if untied && base.config().untied().is_none() {
            let message = "there is no config.json in the base that could say that the embeddings are no longer tied";
            let help = "give the folder of the model as the base, with its config.json";
            return Err(Error::new(rules::TIED_WEIGHTS, message).file(base.path()).help(help));
        }
        changed.extend(quantised.values().map(|how| how.scales.clone()));
        let shards = Outline { base, output, updates, replacements, shared, patches, quantised, changed }.shards();
        let keep_nonfinite = options.allow_nonfinite_base;
        let plan = Plan { base, shards, untied, keep_nonfinite, output: output.clone(), renamings, ignored, copies, warnings };
        plan.check_mixing()?;
        plan.check_replay()?;
        plan.check_vocabulary()?;
        Ok(plan)
    }

    /// The base.
    pub fn base(&self) -> &'a Checkpoint {
        self.base
    }

    /// Rows of the embedding, if they are others than the base's.
    pub(crate) fn vocabulary(&self) -> Option<u64> {
        let resized = self.changes().find(|change| change.moves(self.base))?;
        resized.info.shape.dims().first().copied()
    }

    /// The renaming of each adapter, in order.
    pub fn renamings(&self) -> &[Renaming] {
        &self.renamings
    }

    /// Adapter tensors that are left out, each by a flag.
    pub fn ignored(&self) -> &[Ignored] {
        &self.ignored
    }

    /// Adapter tensors that are equal to another one of the adapter, which is applied in their place too: a tied weight has two names.
    pub(crate) fn copies(&self) -> &[&'a Factor] {
        &self.copies
    }

    /// What is worth saying before the merge.
    pub fn warnings(&self) -> &[Diagnostic] {
        &self.warnings
    }

    /// Bytes of weights that will be written.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().fold(0, |n, shard| n.saturating_add(shard.len))
    }

    /// All tensors that will not be copies, in the order of the files.
    pub(crate) fn changes(&self) -> impl Iterator<Item = &Change<'a>> {
        self.shards.iter().flat_map(|shard| &shard.changes)
    }

    /// Tensors that the base does not have.
    pub(crate) fn added(&self) -> impl Iterator<Item = &Change<'a>> {
        self.changes().filter(|change| change.added)
    }

    /// The name of the output's index, if it has one.
    pub(crate) fn index_name(&self) -> Option<String> {
        match (self.base.index(), self.output.max_shard_bytes) {
            (Some(index), None) => Some(index.file_name().to_owned()),
            (None, None) => None,
            (_, Some(_)) if self.shards.len() == 1 => None,
            (_, Some(_)) => Some(format!("{}.safetensors.index.json", outline::stem(self.base))),
        }
    }

    /// What has a row for each token has as many rows as anything else that has.
    fn check_vocabulary(&self) -> Result<()> {
        let rows = |change: &Change<'_>| change.info.shape.dims().first().copied();
        let mut moved = self.changes().filter(|change| change.moves(self.base));
        let Some(first) = moved.next() else { return Ok(()) };
        let help = "PEFT saved one of them alone; save the adapter with both in modules_to_save, or resize the base in transformers first";
        let stays = |name: &&str| {
            let same = self.base.info(name).zip(self.base.info(&first.name)).is_some_and(|(x, y)| x.shape == y.shape);
            same && bind::is_vocabulary(name) && !self.changes().any(|change| change.name == **name && change.moves(self.base))
        };
        if let Some(name) = self.base.names().find(stays) {
            let message = format!(
                "{:?} would be {}, and {name:?} would stay as it is, so that no model could load both",
                first.name, first.info.shape
            );
            return Err(Error::new(rules::REPLACEMENT_SHAPE, message).file(self.base.path()).tensor(name).help(help));
        }
        match moved.find(|other| rows(other) != rows(first)) {
            None => Ok(()),
            Some(other) => {
                let message = format!("{:?} would be {} and {:?} {}", first.name, first.info.shape, other.name, other.info.shape);
                let help = "embedding and output layer have one vocabulary; use adapters that agree about it";
                Err(Error::new(rules::REPLACEMENT_SHAPE, message).tensor(&other.name).help(help))
            }
        }
    }

    /// What is made value by value is made of plain updates.
    fn check_mixing(&self) -> Result<()> {
        for change in self.changes().filter(|change| change.mixing.is_some()) {
            let refuse =
                |message: String, help: &str| Err(Error::new(rules::METHOD_SUPPORTED, message).tensor(&change.name).help(help));
            if change.contributions.iter().any(|contribution| contribution.gain.is_some()) {
                let message =
                    format!("the magnitudes of {:?} (DoRA) have no place in a method that works on values", change.name);
                return refuse(message, "merge the adapter by itself, without --method");
            }
            let is_turned = |contribution: &Contribution| matches!(contribution.left, Panel::Transposed(_));
            if change.needs_whole_rows() && change.contributions.iter().any(is_turned) {
                let message = format!(
                    "{:?} is stored (in, out), and a chance by the rank in a row of outputs needs (out, in)",
                    change.name
                );
                return refuse(message, "combine the adapters first: loratool combine --method della");
            }
        }
        Ok(())
    }

    /// PEFT computes with factors of f32; those of F64 have other bits there, about which nothing is known.
    fn check_replay(&self) -> Result<()> {
        if self.output.rounding != Rounding::Nearest
            && let Some(change) = self.changes().find(|change| change.is_scaled() || !change.patches.is_empty())
        {
            let what = if change.mixing.is_some() { "is changed by a method" } else { "is multiplied, or has rows replaced" };
            let message = format!("{:?} {what}, and is rounded to nearest only", change.name);
            return Err(Error::new(rules::ARGUMENT, message).tensor(&change.name).help("leave out --rounding"));
        }
        if self.output.rounding != Rounding::Nearest
            && let Some(change) = self.changes().find(|change| change.quantised.is_some())
        {
            let message =
                format!("{:?} is quantised to {}, and its codes are rounded to nearest only", change.name, Dtype::F8_E4M3);
            return Err(Error::new(rules::ARGUMENT, message).tensor(&change.name).help("leave out --rounding"));
        }
        if !matches!(self.output.rounding, Rounding::Peft | Rounding::PeftSafe) {
            return Ok(());
        }
        let wide = self.changes().find(|change| change.factors().any(|factor| factor.info().dtype == Dtype::F64));
        match wide {
            None => Ok(()),
            Some(change) => {
                Err(Error::new(rules::ARGUMENT, "PEFT's rounding is defined for factors of F32, F16 and BF16, not F64")
                    .tensor(&change.name)
                    .help("leave out --rounding"))
            }
        }
    }
}

/// How the weights among the updated tensors that are no plain floats are stored.
fn quantised_weights<'a, 'n>(
    base: &Checkpoint,
    updated: impl Iterator<Item = &'n String>,
    problems: &mut Vec<Diagnostic>,
) -> BTreeMap<String, Quantised<'a>> {
    let mut found = BTreeMap::new();
    for name in updated {
        let Some(info) = base.info(name).filter(|info| !is_plain_float(info.dtype)) else { continue };
        match quantised::of(base, name, info) {
            Ok(how) => _ = found.insert(name.clone(), how),
            Err(problem) => problems.push(problem),
        }
    }
    found
}

/// A float of eight bits.
fn is_eight_bit(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E8M0 | Dtype::F8_E4M3FNUZ | Dtype::F8_E5M2FNUZ)
}

fn check_output(base: &Checkpoint, output: &OutputOptions) -> Result<()> {
    let refuse = |message: String, help: &str| Err(Error::new(rules::ARGUMENT, message).file(base.path()).help(help));
    match output.dtype {
        Some(dtype) if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
            return refuse(format!("the output cannot be {dtype}"), "choose F32, F16 or BF16");
        }
        Some(dtype) => {
            if let Some(method) = &base.config().quantization {
                let message = format!("the base is quantised ({method}): storing it as {dtype} would break what its scales mean");
                return Err(Error::new(rules::BASE_DTYPE, message).file(base.path()).help("merge into the unquantised base"));
            }
            if let Some((name, of)) =
                base.names().find_map(|name| Some((name, base.info(name)?.dtype)).filter(|(_, of)| is_eight_bit(*of)))
            {
                let message =
                    format!("{name:?} is {of} in the base: storing the floats as {dtype} would break what its scales mean");
                let error = Error::new(rules::BASE_DTYPE, message).file(base.path()).tensor(name);
                return Err(error.help("leave out --dtype, or merge into the unquantised base"));
            }
            if matches!(output.rounding, Rounding::Peft | Rounding::PeftSafe) {
                return refuse("PEFT's rounding is to the base's dtype".to_owned(), "leave out --dtype or --rounding");
            }
        }
        None => {}
    }
    match output.max_shard_bytes {
        Some(_) if !base.is_folder() => refuse(
            "a single file is not split".to_owned(),
            "give the folder of the model as the base, or leave out --max-shard-size",
        ),
        Some(0) => refuse("files cannot have 0 bytes".to_owned(), "give a size such as 5GB"),
        _ => Ok(()),
    }
}
