//! Factors of bare parameters as PEFT packs and names them: the reverse of `place` and `experts`. PEFT has no name for a parameter; the first
//! that its module registers is wrapped first, and so has the most `base_layer` before its factors.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::experts;
use super::keys::PREFIX;
use super::place;
use crate::adapter::{Adapter, Factor, Kind, Target};
use crate::error::{Error, Result};
use crate::rules;
use crate::tensor::{Derived, Shape, TensorInfo, TensorSource, read_all};

/// Whether the target is a bare parameter and no module's weight.
pub(super) fn is_parameter(adapter: &Adapter, target: &Target) -> bool {
    let bare = !target.tensor.ends_with(".weight") && adapter.attention_of(target).is_none();
    bare && matches!(target.kind, Kind::Linear(_) | Kind::Experts(_))
}

/// Does PEFT pack some factors of the adapter otherwise than a container does?
pub(crate) fn is_packed(adapter: &Adapter) -> bool {
    adapter.targets().iter().any(|target| is_parameter(adapter, target))
}

/// The tensors of a PEFT file, from those of a container by their names there.
///
/// # Errors
/// `P-006` if the order in which a module registers its parameters is not known, or a stack has factors of another rank in each.
pub(crate) fn packed(adapter: &Adapter, mut named: BTreeMap<String, Factor>) -> Result<BTreeMap<String, Factor>> {
    let mut modules: BTreeMap<&str, Vec<&Target>> = BTreeMap::new();
    for target in adapter.targets().iter().filter(|target| is_parameter(adapter, target)) {
        let (module, _) = target.tensor.rsplit_once('.').unwrap_or(("", &target.tensor));
        modules.entry(module).or_default().push(target);
    }
    for (module, mut targets) in modules {
        let names: Vec<&str> = targets.iter().map(|target| parameter(target)).collect();
        let Some(order) = place::order(&names) else {
            let message = format!("the order in which {module:?} registers its parameters {names:?} is not known");
            let help = "PEFT stores no names of parameters, so the file would be ambiguous; keep the container";
            return Err(Error::new(rules::CONFIG_METHOD, message).tensor(module).help(help));
        };
        targets.sort_by_key(|target| order.iter().position(|name| *name == parameter(target)));
        let count = targets.len();
        for (place, target) in targets.into_iter().enumerate() {
            let wrapped = ".base_layer".repeat(count - 1 - place);
            for (part, factor, is_b) in [("lora_A", &target.a, false), ("lora_B", &target.b, true)] {
                named.remove(&format!("{PREFIX}{}.{part}.weight", target.tensor));
                let name = format!("{PREFIX}{module}{wrapped}.{part}.weight");
                named.insert(name.clone(), repacked(target, factor, &name, is_b)?);
            }
        }
    }
    Ok(named)
}

fn parameter(target: &Target) -> &str {
    target.tensor.rsplit_once('.').map_or(target.tensor.as_str(), |(_, parameter)| parameter)
}

/// A factor of a stack as a matrix; any other as it is.
fn repacked(target: &Target, factor: &Factor, name: &str, is_b: bool) -> Result<Factor> {
    let &[experts, rows, cols] = factor.info().shape.dims() else { return Ok(factor.clone()) };
    let dims = if is_b { vec![rows, experts.saturating_mul(cols)] } else { vec![experts.saturating_mul(rows), cols] };
    let too_large = || Error::new(rules::CONFIG_METHOD, "the packed factor is too large").tensor(&target.tensor);
    let info = TensorInfo { dtype: factor.info().dtype, shape: Shape::new(dims).ok_or_else(too_large)? };
    let (unpacked, from) = (factor.info().clone(), factor.name().to_owned());
    let mut derived = Derived::new(factor.source());
    derived.insert(
        name,
        info,
        move |source| {
            if is_b { experts::pack(source, &from, &unpacked) } else { read_all(source, &from) }
        },
    );
    let derived: Arc<dyn TensorSource> = Arc::new(derived);
    Factor::new(&derived, name).ok_or_else(too_large)
}
