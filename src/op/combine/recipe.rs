//! A combination as a file: what is combined and how, so that it can be kept, read and done again to the same bytes.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::method::CombineMethod;
use super::named::MethodNumbers;
use super::options::{CombineOptions, LayerWeight, PartsPolicy, Stated};
use super::peft::MajoritySign;
use crate::error::{Class, Error, Result};
use crate::io::{Durability, OutputKind, Overwrite, Staging, check_output, parent_of, read_small};
use crate::loader::Loader;
use crate::op::extract::Split;
use crate::op::rank::RankRule;
use crate::rules;
use crate::tensor::Dtype;

/// Bytes: thousands of adapters.
const LIMIT: u64 = 16 << 20;

/// A recipe: TOML, as `docs/combine.md` describes it.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The adapters, in order.
    pub adapters: Vec<RecipeAdapter>,
    /// How they are combined; what is not in the file has its default.
    pub options: CombineOptions,
}

/// An adapter of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecipeAdapter {
    /// The folder or file; in the file relative to the recipe's folder.
    pub path: PathBuf,
    /// Its weight.
    #[serde(default = "one")]
    pub weight: f64,
    /// The content root that it has to have, if it is stated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// The digest of the scales that it has to have, if it is stated: see [`CombinedAdapter`](crate::report::CombinedAdapter).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<String>,
}

impl RecipeAdapter {
    /// What it has to be.
    pub fn stated(&self) -> Stated {
        Stated { content: self.content.clone(), scaling: self.scaling.clone() }
    }
}

fn one() -> f64 {
    1.0
}

/// As it is written.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Written {
    method: Option<String>,
    density: Option<f64>,
    epsilon: Option<f64>,
    outliers: Option<f64>,
    seed: Option<u64>,
    majority_sign: Option<String>,
    rank: Option<u64>,
    energy: Option<f64>,
    error: Option<f64>,
    budget_parameters: Option<u64>,
    budget_bytes: Option<u64>,
    #[serde(rename = "for")]
    loader: Option<String>,
    dtype: Option<String>,
    split: Option<String>,
    parts: Option<String>,
    allow_base_mismatch: Option<bool>,
    prefix: Option<String>,
    adapter: Vec<RecipeAdapter>,
    layer: Vec<WrittenLayer>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenLayer {
    pattern: String,
    factor: f64,
    /// From 1 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    adapter: Option<usize>,
}

/// The value of a name among pairs of both.
fn named<T: Copy>(what: &str, name: Option<&String>, all: &[(&str, T)]) -> Result<Option<T>, String> {
    let Some(name) = name else { return Ok(None) };
    let found = all.iter().find(|(known, _)| known == name).map(|(_, value)| Some(*value));
    let known = || all.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    found.ok_or_else(|| format!("{what} is {name:?}, and not one of {}", known()))
}

const SPLITS: [(&str, Split); 3] = [("sqrt", Split::Sqrt), ("b", Split::B), ("a", Split::A)];
const PARTS: [(&str, PartsPolicy); 3] =
    [("error", PartsPolicy::Refuse), ("first", PartsPolicy::First), ("average", PartsPolicy::Average)];
const DTYPES: [(&str, Dtype); 3] = [("f32", Dtype::F32), ("bf16", Dtype::BF16), ("f16", Dtype::F16)];
const SIGNS: [(&str, MajoritySign); 2] = [("total", MajoritySign::Total), ("frequency", MajoritySign::Frequency)];

/// A recipe that is written, and has no name yet; without one it is removed.
pub struct StagedRecipe(Staging);

impl StagedRecipe {
    /// Gives it its name.
    ///
    /// # Errors
    /// `U-002`, `E-002`.
    pub fn publish(self) -> Result<()> {
        self.0.publish(Durability::Synced)
    }
}

impl Recipe {
    /// Reads a recipe. Paths in it are relative to its folder.
    ///
    /// # Errors
    /// `E-001` if it cannot be read; `U-001` if it is no recipe, with the line.
    pub fn read(path: &Path) -> Result<Recipe> {
        let bad = |message: String| Error::new(rules::ARGUMENT, message).file(path).class_of(Class::Usage);
        let bytes = read_small(path, LIMIT)?.ok_or_else(|| bad(format!("the recipe is longer than {LIMIT} bytes")))?;
        let text = String::from_utf8(bytes).map_err(|_| bad("the recipe is not UTF-8".to_owned()))?;
        let written: Written =
            toml::from_str(&text).map_err(|error| bad(format!("not a recipe: {}", shown(&error.to_string()))))?;
        let mut recipe = written.recipe().map_err(bad)?;
        for adapter in &mut recipe.adapters {
            adapter.path = parent_of(path).join(&adapter.path);
        }
        Ok(recipe)
    }

    /// What can be said of a file to be written before there is anything to write: it is no part of the `adapters`, nor of the `output` that
    /// is written with it.
    ///
    /// # Errors
    /// `U-001`, `U-002`, `U-003`, `E-002`.
    pub fn check_output(path: &Path, adapters: &[&Path], output: &Path, overwrite: Overwrite) -> Result<()> {
        if let Some(unnamed) = adapters.iter().find(|path| path.to_str().is_none()) {
            let message = "a recipe is UTF-8, and cannot name this path";
            return Err(Error::new(rules::ARGUMENT, message).file(unnamed).help("rename it, or leave out --save-recipe"));
        }
        check_output(path, OutputKind::File, adapters, overwrite)?;
        check_output(path, OutputKind::File, &[output], overwrite).map_err(|_| {
            let message = format!("the recipe and the output {output:?} lie within each other");
            Error::new(rules::OUTPUT_IS_INPUT, message).file(path).help("keep the recipe beside the output")
        })
    }

    /// Writes a recipe beside its place, with paths as they are, so that nothing but its name is left to be made.
    ///
    /// # Errors
    /// `U-002`, `U-003`, `E-002`; `U-001` if it cannot be written down.
    pub fn stage(&self, path: &Path, overwrite: Overwrite) -> Result<StagedRecipe> {
        let text = self.text()?;
        let staging = Staging::new(path, OutputKind::File, overwrite)?;
        staging.write("", text.as_bytes())?;
        staging.sync()?;
        Ok(StagedRecipe(staging))
    }

    fn text(&self) -> Result<String> {
        let options = &self.options;
        let method = options.method;
        let numbers = method.given();
        let layer = |layer: &LayerWeight| WrittenLayer {
            pattern: layer.pattern.clone(),
            factor: layer.factor,
            adapter: layer.adapter.map(|place| place + 1),
        };
        let mut written = Written {
            method: Some(method.name().to_owned()),
            density: numbers.density,
            epsilon: numbers.epsilon,
            outliers: numbers.outliers,
            seed: numbers.seed,
            majority_sign: numbers.majority.map(|sign| sign.name().to_owned()),
            loader: options.loader.map(|loader| loader.name().to_owned()),
            dtype: options.dtype.map(|dtype| dtype.to_string().to_lowercase()),
            split: Some(options.split.name().to_owned()),
            parts: Some(options.parts.name().to_owned()),
            allow_base_mismatch: options.allow_base_mismatch.then_some(true),
            prefix: options.prefix.as_ref().map(|(from, to)| format!("{from}={to}")),
            adapter: self.adapters.clone(),
            layer: options.layers.iter().map(layer).collect(),
            ..Written::default()
        };
        match options.rank {
            Some(RankRule::Fixed(rank)) => written.rank = Some(rank),
            Some(RankRule::Energy(share)) => written.energy = Some(share),
            Some(RankRule::Error(share)) => written.error = Some(share),
            Some(RankRule::Parameters(budget)) => written.budget_parameters = Some(budget),
            Some(RankRule::Bytes(budget)) => written.budget_bytes = Some(budget),
            Some(RankRule::Auto) | None => {}
        }
        toml::to_string(&written).map_err(|error| Error::new(rules::ARGUMENT, format!("no recipe can say this: {error}")))
    }
}

/// A message of the parser, which shows whole lines of the file, however long they are.
fn shown(message: &str) -> String {
    const WIDTH: usize = 160;
    let cut = |line: &str| line.chars().take(WIDTH).collect::<String>();
    message.trim_end().lines().map(cut).collect::<Vec<_>>().join("\n")
}

impl Written {
    fn recipe(self) -> Result<Recipe, String> {
        let told = |error: Error| error.diagnostics().first().map(|told| told.message().to_owned()).unwrap_or_default();
        let numbers = MethodNumbers {
            density: self.density,
            epsilon: self.epsilon,
            outliers: self.outliers,
            seed: self.seed,
            majority: named("majority_sign", self.majority_sign.as_ref(), &SIGNS)?,
        };
        let rules: Vec<RankRule> = [
            self.rank.map(RankRule::Fixed),
            self.energy.map(RankRule::Energy),
            self.error.map(RankRule::Error),
            self.budget_parameters.map(RankRule::Parameters),
            self.budget_bytes.map(RankRule::Bytes),
        ]
        .into_iter()
        .flatten()
        .collect();
        if rules.len() > 1 {
            return Err("more than one rule for ranks is given".to_owned());
        }
        if self.adapter.is_empty() {
            return Err("no [[adapter]] is given".to_owned());
        }
        let mut layers = Vec::with_capacity(self.layer.len());
        for WrittenLayer { pattern, factor, adapter } in self.layer {
            let adapter = match adapter {
                Some(0) => return Err("adapters of a [[layer]] are counted from 1 on".to_owned()),
                place => place.map(|place| place - 1),
            };
            layers.push(LayerWeight { adapter, pattern, factor });
        }
        let options = CombineOptions {
            method: CombineMethod::named(self.method.as_deref().unwrap_or("linear"), &numbers).map_err(told)?,
            layers,
            rank: rules.first().copied(),
            loader: named("for", self.loader.as_ref(), &Loader::ALL.map(|loader| (loader.name(), loader)))?,
            split: named("split", self.split.as_ref(), &SPLITS)?.unwrap_or(Split::Sqrt),
            dtype: named("dtype", self.dtype.as_ref(), &DTYPES)?,
            parts: named("parts", self.parts.as_ref(), &PARTS)?.unwrap_or(PartsPolicy::Refuse),
            allow_base_mismatch: self.allow_base_mismatch.unwrap_or(false),
            prefix: match self.prefix.as_deref().map(|prefix| prefix.split_once('=').ok_or(prefix)).transpose() {
                Ok(pair) => pair.map(|(from, to)| (from.to_owned(), to.to_owned())),
                Err(prefix) => return Err(format!("the prefix {prefix:?} is not of the form FROM=TO")),
            },
            ..Default::default()
        };
        Ok(Recipe { adapters: self.adapter, options })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Recipe, String> {
        toml::from_str::<Written>(text).map_err(|error| error.to_string())?.recipe()
    }

    #[test]
    fn what_is_written_is_read() {
        let text = r#"
            method = "della"
            density = 0.4
            epsilon = 0.1
            seed = 7
            rank = 16
            dtype = "bf16"
            parts = "average"
            [[adapter]]
            path = "a"
            weight = 0.7
            content = "00"
            [[adapter]]
            path = "b"
            [[layer]]
            pattern = "layers.[0-7].*"
            factor = 0.1
            adapter = 2
        "#;
        let one = parse(text).unwrap();
        assert_eq!(one.options.method, CombineMethod::Della { density: 0.4, epsilon: 0.1, seed: 7 });
        assert_eq!((one.adapters[1].weight, one.options.layers[0].adapter), (1.0, Some(1)));
        let two = parse(&one.text().unwrap()).unwrap();
        assert_eq!(format!("{one:?}"), format!("{two:?}"));
    }

    #[test]
    fn what_is_wrong_is_told() {
        for (text, told) in [
            ("method = \"ties\"", "no [[adapter]]"),
            ("metod = \"ties\"\n[[adapter]]\npath = \"a\"", "unknown field"),
            ("method = \"mean\"\n[[adapter]]\npath = \"a\"", "not a method"),
            ("rank = 4\nerror = 0.1\n[[adapter]]\npath = \"a\"", "more than one rule"),
            ("density = 0.1\n[[adapter]]\npath = \"a\"", "does not take a density"),
            ("dtype = \"int8\"\n[[adapter]]\npath = \"a\"", "f32, bf16, f16"),
            ("[[adapter]]\npath = \"a\"\n[[layer]]\npattern = \"q\"\nfactor = 1\nadapter = 0", "from 1 on"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(told), "{text}: {error}");
        }
    }
}
