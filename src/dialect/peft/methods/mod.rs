//! PEFT's methods that are not LoRA and whose update is nevertheless a product of two thin matrices, or a multiplication of rows or
//! columns. Each becomes targets or rescalings whose factors are computed from the file's tensors when they are read: in f64, where a
//! product of two values of f32 is exact.
//!
//! | file | method | what it becomes |
//! |---|---|---|
//! | `adalora` | AdaLoRA | B with the columns multiplied by E |
//! | `product` | LoHa, LoKr | row-wise and plain Kronecker products of the factors |
//! | `vera` | VeRA | the shared matrices with their rows and columns multiplied |
//! | `ia3` | IA3 | rescalings |
//! | `variant` | BD-LoRA, QALoRA, KaSA, which are LoRA with a twist | A or B written out |
//! | `thin` | | matrices in f64, and factors that are computed |

mod adalora;
mod ia3;
mod product;
pub(super) mod thin;
pub(super) mod variant;
mod vera;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::config::PeftConfig;
use super::keys::PREFIX;
use crate::adapter::{Factor, Rescaling, Target};
use crate::error::Diagnostic;
use crate::rules;
use crate::tensor::{TensorSource, is_plain_float};

/// What `peft_type` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::dialect::peft) enum Method {
    Lora,
    AdaLora,
    LoHa,
    LoKr,
    Vera,
    Ia3,
    /// Rows of embeddings alone.
    Tokens,
}

impl Method {
    pub(in crate::dialect::peft) fn from_name(name: &str) -> Option<Self> {
        match name {
            "LORA" => Some(Method::Lora),
            "ADALORA" => Some(Method::AdaLora),
            "LOHA" => Some(Method::LoHa),
            "LOKR" => Some(Method::LoKr),
            "VERA" => Some(Method::Vera),
            "IA3" => Some(Method::Ia3),
            "TRAINABLE_TOKENS" => Some(Method::Tokens),
            _ => None,
        }
    }

    /// Whether the rank stands in the field `r`.
    pub(in crate::dialect::peft) fn has_rank(self) -> bool {
        matches!(self, Method::Lora | Method::LoHa | Method::LoKr | Method::Vera)
    }

    /// The last parts of the names of its tensors.
    fn parts(self) -> &'static [&'static str] {
        match self {
            Method::Lora | Method::Tokens => &[],
            Method::AdaLora => &["lora_A", "lora_B", "lora_E"],
            Method::LoHa => &["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"],
            Method::LoKr => &["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"],
            Method::Vera => &["vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"],
            Method::Ia3 => &["ia3_l"],
        }
    }
}

/// The tensors of one module, by the last part of their names.
type Parts<'a> = BTreeMap<&'a str, &'a str>;

/// What the tensors of a method amount to.
#[derive(Default)]
pub(super) struct Made {
    pub(super) targets: Vec<Target>,
    pub(super) rescalings: Vec<Rescaling>,
    pub(super) problems: Vec<Diagnostic>,
    pub(super) warnings: Vec<Diagnostic>,
}

impl Made {
    /// A target whose factors would be too large to be computed.
    fn too_large(&mut self, module: &str) {
        let message = format!("the factors of {module:?} would be larger than {} bytes each", thin::MOST);
        let help = "the adapter is not a small one, or its file is damaged";
        self.problems.push(Diagnostic::new(rules::CONFIG_LIMIT, message).tensor(module).help(help));
    }

    /// A tensor is missing, or is none that the method has.
    fn incomplete(&mut self, module: &str, parts: &Parts<'_>, wanted: &str) {
        let names: Vec<&str> = parts.values().copied().collect();
        let message = format!("module {module:?} has {names:?}, which are not {wanted}");
        let tensor = names.first().copied().unwrap_or(module);
        let help = "the file is incomplete; save the adapter again";
        self.problems.push(Diagnostic::new(rules::FACTORS_PAIRED, message).tensor(tensor).help(help));
    }
}

/// The tensors of a method, sorted.
#[derive(Default)]
pub(super) struct Sorted<'a> {
    /// By module and part.
    pub(super) modules: BTreeMap<String, Parts<'a>>,
    /// Those that are none of the method's.
    pub(super) others: Vec<&'a str>,
    /// Two tensors for one part, or several adapters in one file.
    pub(super) problems: Vec<Diagnostic>,
}

/// Sorts the tensors of a file.
pub(super) fn sorted<'a>(method: Method, names: &[&'a str]) -> Sorted<'a> {
    let mut sorted = Sorted::default();
    let help = "the file holds two adapters, or one under two names; save one on its own";
    let mut adapters: BTreeMap<Option<&str>, &str> = BTreeMap::new();
    for &name in names {
        let Some((module, part, adapter)) = split(method, name) else {
            sorted.others.push(name);
            continue;
        };
        adapters.entry(adapter).or_insert(name);
        if let Some(first) = sorted.modules.entry(module).or_default().insert(part, name) {
            let message = format!("{first:?} and {name:?} are the same part of one module");
            sorted.problems.push(Diagnostic::new(rules::ONE_ADAPTER, message).tensor(name).help(help));
        }
    }
    if adapters.len() > 1 {
        let names: Vec<&str> = adapters.into_values().collect();
        let message = format!("the file holds several adapters, by the names in its tensors, such as {names:?}");
        sorted.problems.push(Diagnostic::new(rules::ONE_ADAPTER, message).help(help));
    }
    sorted
}

/// `<module>.<part>` or `<module>.<part>.<adapter>`.
fn split(method: Method, name: &str) -> Option<(String, &str, Option<&str>)> {
    let mut rest = name;
    while let Some(inner) = rest.strip_prefix(PREFIX) {
        rest = inner;
    }
    // What all modules share lies beside the model.
    let rest = rest.strip_prefix("base_model.").unwrap_or(rest);
    let segments: Vec<&str> = rest.split('.').collect();
    let known = |part: &str| method.parts().contains(&part);
    match segments[..] {
        [ref module @ .., part] if known(part) => Some((module.join("."), part, None)),
        [ref module @ .., part, adapter] if known(part) => Some((module.join("."), part, Some(adapter))),
        _ => None,
    }
}

/// Makes what the method's tensors amount to.
pub(super) fn make(
    config: &PeftConfig,
    modules: &BTreeMap<String, Parts<'_>>,
    source: &Arc<dyn TensorSource>,
    scales: &dyn Fn(&str) -> f64,
) -> Made {
    let mut made = Made::default();
    let names = modules.values().flat_map(BTreeMap::values);
    for (name, info) in names.filter_map(|name| Some((*name, source.info(name)?))) {
        if !is_plain_float(info.dtype) {
            let message = format!("{name:?} is {}; factors are F64, F32, F16 or BF16", info.dtype);
            made.problems.push(Diagnostic::new(rules::FACTOR_DTYPE, message).tensor(name));
        }
    }
    match config.method {
        Method::Lora | Method::Tokens => {}
        Method::AdaLora => adalora::make(config, modules, source, &mut made),
        Method::LoHa => product::make(product::Form::Hadamard, modules, source, scales, &mut made),
        Method::LoKr => product::make(product::Form::Kronecker, modules, source, scales, &mut made),
        Method::Vera => vera::make(config, modules, source, &mut made),
        Method::Ia3 => ia3::make(config, modules, source, &mut made),
    }
    made
}

/// The tensor of a name that the source listed.
fn factor(source: &Arc<dyn TensorSource>, name: &str) -> Factor {
    Factor::new(source, name).unwrap_or_else(|| unreachable!("{name:?} is listed by the source"))
}
