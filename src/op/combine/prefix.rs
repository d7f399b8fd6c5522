//! Adapters of one model under two names: trained on `BertModel` and on `BertForSequenceClassification`, the same weight is called
//! `encoder.…` and `bert.encoder.…`.

use crate::adapter::Adapter;
use crate::error::Result;
use crate::limits::Limits;

/// The adapter with `from` replaced by `to` at the start of the names that have it. If `from` is empty, `to` is put before those that do not
/// begin with it.
///
/// # Errors
/// `A-009` if two tensors then have one name.
pub(in super::super) fn renamed(adapter: &Adapter, (from, to): (&str, &str), limits: &Limits) -> Result<Adapter> {
    let mut parts = adapter.parts().clone();
    let rename = |name: &mut String| match name.strip_prefix(from) {
        Some(rest) if !from.is_empty() || !name.starts_with(to) => *name = format!("{to}{rest}"),
        _ => {}
    };
    for target in &mut parts.targets {
        rename(&mut target.tensor);
        target.bias.iter_mut().for_each(|bias| rename(&mut bias.tensor));
    }
    parts.replacements.iter_mut().for_each(|it| rename(&mut it.tensor));
    parts.rows.iter_mut().for_each(|it| rename(&mut it.tensor));
    parts.rescalings.iter_mut().for_each(|it| rename(&mut it.tensor));
    Adapter::new(parts, limits)
}
