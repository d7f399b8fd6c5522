//! `convert`: the same adapter in another dialect, bit for bit. A PEFT folder that is written here holds a container as its
//! `adapter_model.safetensors`, so nothing is lost on the way and back.

use std::path::Path;
use std::sync::Arc;

use super::digests::{content, verify};
use super::identity;
use super::write;
use crate::adapter::{Adapter, BaseIdentity, Factor, Kind, Lineage, LineageInput, Orientation, Target};
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Error, Result};
use crate::exec::{self, Progress};
use crate::io::{Overwrite, check_output};
use crate::limits::Limits;
use crate::plan::{BindOptions, Binding, Panel, Weighted};
use crate::report::{ConvertReport, Note};
use crate::rules;
use crate::tensor::{Shape, TensorInfo, TensorSource, Window};

/// What to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConvertTo {
    /// One container file.
    Container,
    /// A PEFT folder: `adapter_model.safetensors` and `adapter_config.json`.
    Peft,
}

/// How to convert.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ConvertOptions<'a> {
    /// What to write. Default: a container.
    pub to: ConvertTo,
    /// The base, if it is at hand: the adapter is bound to it, and its identity is recorded. Default none.
    pub base: Option<&'a Checkpoint>,
    /// What may be relaxed in binding to the base.
    pub bind: BindOptions,
    /// What to do if the output exists. Default: refuse.
    pub overwrite: Overwrite,
    /// Bounds on input.
    pub limits: Limits,
}

impl Default for ConvertOptions<'_> {
    fn default() -> Self {
        ConvertOptions {
            to: ConvertTo::Container,
            base: None,
            bind: BindOptions::default(),
            overwrite: Overwrite::Refuse,
            limits: Limits::default(),
        }
    }
}

/// Writes `adapter` in another dialect. Factors keep their bytes. `progress` counts the bytes of the tensors.
///
/// # Errors
/// `A-008` if a value is not finite, `C-037` if a stated digest does not match, `A-024` if an orientation is undeclared and no base
/// settles it, what [`Binding::new`] finds if there is a base, `U-002`, `U-003`, `E-002` for the output; `E-006` if
/// `progress` cancels. On any error the output is what it was before.
pub fn convert(adapter: &Adapter, output: &Path, options: &ConvertOptions<'_>, progress: &dyn Progress) -> Result<ConvertReport> {
    let (kind, to) = write::kind(options.to);
    let mut inputs = vec![Path::new(adapter.label())];
    inputs.extend(options.base.map(Checkpoint::path));
    check_output(output, kind, &inputs, options.overwrite)?;
    let go_on = || if progress.cancelled() { Err(exec::interrupted()) } else { Ok(()) };
    for factor in adapter.factors() {
        go_on()?;
        exec::check_finite(factor)?;
    }
    let root = content(adapter, go_on)?;
    verify(adapter, &root)?;
    let mut warnings = adapter.warnings().to_vec();
    let (adapter, identity) = match options.base {
        Some(base) => settle(adapter, base, options, &mut warnings)?,
        None => (adapter.clone(), adapter.base().clone()),
    };
    go_on()?;
    let is_recomputed = adapter.parts().made_of.is_some();
    let input = adapter.parts().made_of.clone().unwrap_or_else(|| root.finish());
    let step = Lineage {
        op: "convert".to_owned(),
        tool: format!("loratool {}", env!("CARGO_PKG_VERSION")),
        inputs: vec![LineageInput { role: "adapter".to_owned(), dialect: adapter.dialect().to_owned(), content: input }],
        parameters: if is_recomputed { r#"{"recompute_residual":true}"#.to_owned() } else { "{}".to_owned() },
    };
    let unchanged = || adapter.unchanged();
    let written = write::write(&adapter, &identity, step, (output, options.to, options.overwrite), unchanged, progress)?;
    Ok(ConvertReport {
        input: adapter.label().to_owned(),
        from: adapter.dialect(),
        to,
        output: output.display().to_string(),
        targets: adapter.targets().len() as u64,
        replacements: adapter.replacements().len() as u64,
        bytes: written.bytes,
        content: written.content,
        losses: written.losses.iter().map(Note::from).collect(),
        warnings: warnings.iter().map(Note::from).collect(),
    })
}

/// Binds the adapter to the base: orientations become known, and the base's identity is recorded.
fn settle(
    adapter: &Adapter,
    base: &Checkpoint,
    options: &ConvertOptions<'_>,
    warnings: &mut Vec<Diagnostic>,
) -> Result<(Adapter, BaseIdentity)> {
    warnings.extend(identity::check(base, adapter, &options.bind, &options.limits)?.1);
    let bind = BindOptions { add_new_tensors: true, untie: true, residual_base: true, ..options.bind.clone() };
    let binding = Binding::new(base, Weighted::full(adapter), 0, &bind, &options.limits)?;
    let mut parts = adapter.parts().clone();
    for target in &mut parts.targets {
        if matches!(target.kind, Kind::Flat | Kind::Shared(_)) {
            *target = decided(target, base, &binding)?;
            continue;
        }
        if target.kind.orientation().is_some() {
            let transposed = binding.is_transposed(&target.tensor).ok_or_else(|| {
                Error::new(rules::EVERY_TARGET, format!("{:?} is not in the base", target.tensor))
                    .file(adapter.label())
                    .tensor(&target.tensor)
            })?;
            target.kind = target.kind.oriented(if transposed { Orientation::InOut } else { Orientation::OutIn });
        }
    }
    warnings.extend(binding.warnings().iter().cloned());
    let names = identity::tensors(base, adapter, &options.bind, &options.limits)?;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let identity = BaseIdentity {
        name: adapter.base().name.clone(),
        structure: Some(base.structure_root()),
        targets: Some(base.content_root(&names)?),
    };
    Ok((Adapter::new(parts, &options.limits)?, identity))
}

/// A target of which the base decides what kind of layer it is, or how wide.
fn decided(target: &Target, base: &Checkpoint, binding: &Binding<'_>) -> Result<Target> {
    let missing = || Error::new(rules::EVERY_TARGET, format!("{:?} is not in the base", target.tensor)).tensor(&target.tensor);
    let (name, contribution) = binding.settled(&target.tensor).ok_or_else(missing)?;
    let dims = base.info(name).map(|info| info.shape.dims().to_vec()).ok_or_else(missing)?;
    let factor = |panel: &Panel| panel.factor().cloned().ok_or_else(missing);
    let (left, right) = (factor(&contribution.left)?, factor(&contribution.right)?);
    let (a, b, kind) = match (&contribution.left, &dims[..]) {
        (Panel::Transposed(_), _) => (left, right, Kind::Linear(Orientation::InOut)),
        (_, [_, _]) => (right, left, Kind::Linear(Orientation::OutIn)),
        (_, [out, kernel @ ..]) => {
            let rank = contribution.rank;
            let of_a: Vec<u64> = std::iter::once(rank).chain(kernel.iter().copied()).collect();
            let of_b: Vec<u64> = [*out, rank].into_iter().chain(kernel.iter().skip(1).map(|_| 1)).collect();
            (shaped(&right, of_a).ok_or_else(missing)?, shaped(&left, of_b).ok_or_else(missing)?, Kind::Conv)
        }
        (_, []) => return Err(missing()),
    };
    Ok(Target { a, b, kind, ..target.clone() })
}

/// The same values in another shape.
fn shaped(factor: &Factor, dims: Vec<u64>) -> Option<Factor> {
    let stride = dims.last().copied()?;
    let info = TensorInfo { dtype: factor.info().dtype, shape: Shape::new(dims)? };
    let (of, name) = (Arc::clone(factor.source()), factor.name().to_owned());
    let source: Arc<dyn TensorSource> = Arc::new(Window { of, name, first: 0, stride, info });
    Factor::new(&source, factor.name())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

    use super::*;

    /// Goes on so many times, and counts the bytes.
    #[derive(Default)]
    struct Patience {
        left: AtomicUsize,
        bytes: AtomicU64,
    }

    impl Progress for Patience {
        fn advance(&self, bytes: u64) {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        }

        fn cancelled(&self) -> bool {
            self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err()
        }
    }

    #[test]
    fn a_conversion_that_is_cancelled_anywhere_leaves_nothing() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        let adapter = crate::open_adapter(fixtures.join("adapters/llama-qv-r8")).unwrap();
        let base = crate::open_checkpoint(fixtures.join("models/llama-tiny")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        for to in [ConvertTo::Container, ConvertTo::Peft] {
            let options = ConvertOptions { to, base: Some(&base), ..Default::default() };
            // Before each of 8 tensors is checked, before it is hashed, after it is written, and twice besides.
            let questions = 3 * 8 + 2;
            for n in 0..=questions {
                let patience = Patience { left: n.into(), ..Default::default() };
                let done = convert(&adapter, &folder.path().join("out"), &options, &patience);
                match done {
                    Ok(_) => assert_eq!((n, patience.bytes.into_inner()), (questions, 14336)),
                    Err(error) => {
                        assert!(n < questions);
                        assert_eq!(error.diagnostics()[0].rule().id, "E-006");
                        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
                    }
                }
            }
            let out = folder.path().join("out");
            if out.is_dir() { fs::remove_dir_all(out).unwrap() } else { fs::remove_file(out).unwrap() }
        }
    }
}
