//! What the programs that serve adapters make of one: which parts they refuse, ignore in silence, or take to mean something else.
//! One table of rows, a file per loader; a row is a fact of one version of one loader, a condition over the adapter, and the way out.
//! `docs/loaders.md` is the same table for people, and a test holds the two equal.
//!
//! The rows were read in the loaders' sources and not found out by running them; where a row is concluded rather than read, its
//! [`Basis`] says so. What is not in the table is not known, which is less than "works".

/// The rows of one loader: id, effect, basis, condition, what the adapter has, what the loader does, the way out, and issues.
macro_rules! rows {
    ($($id:literal, $effect:ident, $basis:ident, $condition:ident, $what:literal, $does:literal, $way:expr $(, $issue:literal)*;)*) => {
        pub(super) const RULES: &[$crate::loader::LoaderRule] = &[$($crate::loader::LoaderRule {
            id: $id,
            what: $what,
            effect: $crate::loader::Effect::$effect,
            does: $does,
            basis: $crate::loader::Basis::$basis,
            issues: &[$($issue),*],
            way_out: $way,
            condition: $crate::loader::conditions::$condition,
        }),*];
    };
}

mod conditions;
mod subject;

mod llamacpp;
mod lorax;
mod mistralrs;
mod mlx;
mod sglang;
mod tensorrt_llm;
mod vllm;

pub(crate) use conditions::VLLM_RANKS;
pub(crate) use subject::{Files, Subject};

/// A program that serves adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Loader {
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// TensorRT-LLM.
    TensorrtLlm,
    /// LoRAX, and TGI, which shares its reader.
    Lorax,
    /// mistral.rs.
    Mistralrs,
    /// llama.cpp, by way of its `convert_lora_to_gguf.py`.
    Llamacpp,
    /// mlx-lm.
    Mlx,
}

impl Loader {
    /// Every loader that the table knows.
    pub const ALL: [Loader; 7] =
        [Loader::Vllm, Loader::Sglang, Loader::TensorrtLlm, Loader::Lorax, Loader::Mistralrs, Loader::Llamacpp, Loader::Mlx];

    /// The name on the command line and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Loader::Vllm => "vllm",
            Loader::Sglang => "sglang",
            Loader::TensorrtLlm => "tensorrt-llm",
            Loader::Lorax => "lorax",
            Loader::Mistralrs => "mistralrs",
            Loader::Llamacpp => "llamacpp",
            Loader::Mlx => "mlx",
        }
    }

    /// The loader of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Loader::ALL.into_iter().find(|loader| loader.name() == name)
    }

    /// The name that people know it by.
    pub fn title(self) -> &'static str {
        match self {
            Loader::Vllm => "vLLM",
            Loader::Sglang => "SGLang",
            Loader::TensorrtLlm => "TensorRT-LLM",
            Loader::Lorax => "LoRAX and TGI",
            Loader::Mistralrs => "mistral.rs",
            Loader::Llamacpp => "llama.cpp",
            Loader::Mlx => "mlx-lm",
        }
    }

    /// The version that the rows were read from. Others may differ.
    pub fn version(self) -> &'static str {
        match self {
            Loader::Vllm => "0.33.0",
            Loader::Sglang => "0.5.23",
            Loader::TensorrtLlm => "of unknown date",
            Loader::Lorax => "of 2026-05 and 2026-01",
            Loader::Mistralrs => "of 2026-08-22",
            Loader::Llamacpp => "of 2026-10",
            Loader::Mlx => "of 2026-08",
        }
    }

    /// What was read.
    pub fn read_from(self) -> &'static str {
        match self {
            Loader::Vllm => "the LoRA package of the wheel 0.33.0",
            Loader::Sglang => "the wheel 0.5.23",
            Loader::TensorrtLlm => "lora_manager.py, a single stored file",
            Loader::Lorax => "snapshots of LoRAX (2026-05) and TGI (2026-01)",
            Loader::Mistralrs => "mistralrs-quant, module lora, snapshot of 2026-08-22",
            Loader::Llamacpp => "convert_lora_to_gguf.py and llama_adapter_lora_init, as in llama-cpp-python 0.3.36",
            Loader::Mlx => "snapshot of 2026-08",
        }
    }

    /// The rows of this loader, most severe first.
    pub fn rules(self) -> &'static [LoaderRule] {
        match self {
            Loader::Vllm => vllm::RULES,
            Loader::Sglang => sglang::RULES,
            Loader::TensorrtLlm => tensorrt_llm::RULES,
            Loader::Lorax => lorax::RULES,
            Loader::Mistralrs => mistralrs::RULES,
            Loader::Llamacpp => llamacpp::RULES,
            Loader::Mlx => mlx::RULES,
        }
    }
}

/// What a loader does with an adapter of which the condition of a row is true. Most severe first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Effect {
    /// It ends with an error.
    Refused,
    /// It leaves a part out, says nothing or no more than a warning, and computes something else.
    Ignored,
    /// It applies the part as something else.
    Changed,
    /// It reads it right after an option, or a step, that the way out names.
    NeedsFlag,
    /// It rounds once more than it would have to.
    Rounded,
    /// Nobody has looked.
    Unknown,
}

impl Effect {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Effect::Refused => "refused",
            Effect::Ignored => "ignored in silence",
            Effect::Changed => "changed meaning",
            Effect::NeedsFlag => "needs a flag",
            Effect::Rounded => "rounded once more",
            Effect::Unknown => "not known",
        }
    }

    /// The loader does not compute what the adapter says, whatever options it is given.
    pub fn is_wrong(self) -> bool {
        matches!(self, Effect::Refused | Effect::Ignored | Effect::Changed)
    }
}

/// What a row rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Basis {
    /// The source says so.
    Read,
    /// Concluded from the source.
    Concluded,
    /// The absence of a fact.
    None,
}

impl Basis {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Basis::Read => "read",
            Basis::Concluded => "concluded",
            Basis::None => "none",
        }
    }
}

/// One fact of one loader.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct LoaderRule {
    /// Stable id, unique in the table: `<loader>/<what>`.
    pub id: &'static str,
    /// What the adapter has, in a few words.
    pub what: &'static str,
    /// What the loader does with it.
    pub effect: Effect,
    /// The same as a sentence.
    pub does: &'static str,
    /// What the row rests on.
    pub basis: Basis,
    /// Where users met it.
    pub issues: &'static [&'static str],
    /// What to do. `{}` stands for a figure that the condition gives.
    pub way_out: &'static str,
    condition: fn(&Subject<'_>) -> Option<Found>,
}

/// What a condition found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// How many targets, or full tensors, it is true of.
    pub(crate) targets: u64,
    /// The first of them, by name.
    pub(crate) first: Option<String>,
    /// The figure that the way out asks for.
    pub(crate) figure: Option<String>,
}

/// A row whose condition is true.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) rule: &'static LoaderRule,
    pub(crate) found: Found,
    pub(crate) way_out: String,
}

impl PartialEq for LoaderRule {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for LoaderRule {}

/// Every row of `loader` that is true of the adapter, most severe first.
pub(crate) fn check(loader: Loader, subject: &Subject<'_>) -> Vec<Finding> {
    let found = loader.rules().iter().filter_map(|rule| {
        let found = (rule.condition)(subject)?;
        let way_out = rule.way_out.replace("{}", found.figure.as_deref().unwrap_or_default());
        Some(Finding { rule, found, way_out })
    });
    let mut findings: Vec<Finding> = found.collect();
    findings.sort_by_key(|finding| finding.rule.effect);
    findings
}

/// What several loaders have in common.
mod ways {
    pub(super) const BAKE: &str = "loratool bake";
    pub(super) const CONVERT: &str = "loratool convert --to peft";
    pub(super) const MERGE: &str = "none as an adapter: loratool merge, and serve the merged model";
    pub(super) const CONVERT_INIT: &str =
        "save it again in PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it";
    pub(super) const PEFT_MERGE: &str = "none as an adapter: merge it in PEFT (merge_and_unload), and serve the merged model";
    pub(super) const TRY: &str = "compare the answers of the server with and without the adapter";
    pub(super) const NOTHING: &str = "nothing has to be done; loratool merge rounds once";
}

#[cfg(test)]
mod tests;
