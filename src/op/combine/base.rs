//! Whether adapters are of one base, as far as they say, and what their combination says of it.

use crate::adapter::{Adapter, BaseIdentity};
use crate::error::{Diagnostic, Error, Result};
use crate::rules;

/// What the combination says of its base: whatever all that say something agree on.
///
/// # Errors
/// `A-027` if two adapters name different bases by their digests, unless that is allowed; `A-010` if their layers are repeated differently.
pub(super) fn agree(adapters: &[&Adapter], allow_mismatch: bool) -> Result<(BaseIdentity, Vec<Diagnostic>)> {
    let (mut problems, mut warnings) = (Vec::new(), Vec::new());
    let mut common = BaseIdentity::default();
    let Some((first, rest)) = adapters.split_first() else { return Ok((common, warnings)) };
    for other in rest {
        if other.replication() != first.replication() {
            let message = format!("its layers are repeated in another order than those of {}", first.label());
            let diagnostic = Diagnostic::new(rules::METHOD_SUPPORTED, message).file(other.label());
            problems.push(diagnostic.help("adapters of one model have one layer_replication"));
        }
    }
    let structure = said(adapters, |base| base.structure.as_deref());
    match structure {
        Said::Nothing => {}
        Said::One(root) => common.structure = Some(root.to_owned()),
        Said::Two(one, other) => {
            let message =
                format!("it names another base than {} does: their tensors have other names, dtypes or shapes", one.label());
            let diagnostic = Diagnostic::new(rules::BASE_IDENTITY, message).file(other.label());
            let help = "adapters of different bases have no sum; pass --allow-base-mismatch if you know better";
            if allow_mismatch { &mut warnings } else { &mut problems }.push(diagnostic.help(help));
        }
    }
    match said(adapters, |base| base.name.as_deref()) {
        Said::Nothing => {}
        Said::One(name) => common.name = Some(name.to_owned()),
        Said::Two(one, other) => {
            common.name.clone_from(&one.base().name);
            let name = |adapter: &Adapter| adapter.base().name.clone().unwrap_or_default();
            let message = format!("its base is called {:?}, and that of {} {:?}", name(other), one.label(), name(one));
            let help = "make sure that they are copies of one model";
            warnings.push(Diagnostic::new(rules::BASE_IDENTITY, message).file(other.label()).help(help));
        }
    }
    Error::check(problems)?;
    Ok((common, warnings))
}

/// What adapters say of something.
enum Said<'a> {
    Nothing,
    One(&'a str),
    /// The first that says something, and the first that says something else.
    Two(&'a Adapter, &'a Adapter),
}

fn said<'a>(adapters: &[&'a Adapter], of: impl Fn(&'a BaseIdentity) -> Option<&'a str>) -> Said<'a> {
    let mut first: Option<(&Adapter, &str)> = None;
    for adapter in adapters {
        match (first, of(adapter.base())) {
            (_, None) => {}
            (None, Some(what)) => first = Some((adapter, what)),
            (Some((one, said)), Some(what)) if said != what => return Said::Two(one, adapter),
            _ => {}
        }
    }
    first.map_or(Said::Nothing, |(_, what)| Said::One(what))
}
