//! The weight of an adapter in each target: its own, times the factor of the last pattern that matches the target's name.

use std::cmp::Ordering;

use globset::{GlobBuilder, GlobMatcher};

use super::options::LayerWeight;
use crate::error::{Error, Result};
use crate::rules;

/// A glob over whole parts of a name, between dots.
struct Pattern {
    exact: GlobMatcher,
    /// What lies below a module that the pattern names.
    below: GlobMatcher,
}

impl Pattern {
    fn new(text: &str) -> Result<Pattern> {
        let glob = |text: &str| {
            let glob = GlobBuilder::new(text).literal_separator(false).build();
            glob.map(|glob| glob.compile_matcher()).map_err(|error| {
                let message = format!("{text:?} is not a pattern: {}", error.kind());
                Error::new(rules::ARGUMENT, message).help("write it as a shell would, such as layers.[0-7].* or *.{q,v}_proj")
            })
        };
        Ok(Pattern { exact: glob(text)?, below: glob(&format!("{text}.*"))? })
    }

    fn matches(&self, name: &str) -> bool {
        let starts = std::iter::once(0).chain(name.match_indices('.').map(|(at, _)| at + 1));
        let mut rests = starts.filter_map(|at| name.get(at..));
        rests.any(|rest| self.exact.is_match(rest) || self.below.is_match(rest))
    }
}

/// Sizes of weights: of others the squares, and those of their products with factors, leave the range of f64.
const RANGE: std::ops::Range<f64> = 1e-60..1e60;

/// The weights of all adapters in all targets.
pub(in super::super) struct Weights<'o> {
    /// Of each adapter.
    whole: Vec<f64>,
    layers: Vec<(Pattern, &'o LayerWeight)>,
}

impl<'o> Weights<'o> {
    /// # Errors
    /// `U-001` for a weight that is no finite number, or far too large or small, a pattern that is none, or an adapter that was not given.
    pub(in super::super) fn new(whole: Vec<f64>, layers: &'o [LayerWeight]) -> Result<Self> {
        let refuse = |message: String| Err(Error::new(rules::ARGUMENT, message));
        if let Some(weight) = whole.iter().chain(layers.iter().map(|layer| &layer.factor)).find(|weight| !weight.is_finite()) {
            return refuse(format!("the weight {weight} is not a finite number"));
        }
        let is_extreme = |weight: &&f64| **weight != 0.0 && !RANGE.contains(&weight.abs());
        if let Some(weight) = whole.iter().chain(layers.iter().map(|layer| &layer.factor)).find(is_extreme) {
            return refuse(format!("the weight {weight:e} is neither 0 nor between {:e} and {:e}", RANGE.start, RANGE.end));
        }
        if let Some(place) = layers.iter().filter_map(|layer| layer.adapter).find(|place| *place >= whole.len()) {
            return refuse(format!("a weight is for adapter {}, and {} are given", place + 1, whole.len()));
        }
        let layers = layers.iter().map(|layer| Ok((Pattern::new(&layer.pattern)?, layer))).collect::<Result<_>>()?;
        Ok(Weights { whole, layers })
    }

    /// That of an adapter in a tensor.
    pub(in super::super) fn of(&self, adapter: usize, tensor: &str) -> f64 {
        let matches = |(pattern, layer): &&(Pattern, &LayerWeight)| {
            layer.adapter.is_none_or(|place| place == adapter) && pattern.matches(tensor)
        };
        self.whole[adapter] * self.layers.iter().rev().find(matches).map_or(1.0, |(_, layer)| layer.factor)
    }

    /// The order of two adapters by all that is said of their weights.
    pub(super) fn compared(&self, one: usize, other: usize) -> Ordering {
        let layers = |place: usize| self.layers.iter().filter(move |(_, layer)| layer.adapter == Some(place));
        let said = |place: usize| layers(place).map(|(_, layer)| (&layer.pattern, layer.factor.to_bits()));
        self.whole[one].total_cmp(&self.whole[other]).then_with(|| said(one).cmp(said(other)))
    }

    /// The adapter's own.
    pub(super) fn whole(&self, adapter: usize) -> f64 {
        self.whole[adapter]
    }

    /// The first pattern that matches none of an adapter's tensors; `tensors` gives the names of each adapter's.
    ///
    /// # Errors
    /// `U-001`.
    pub(super) fn check_used(&self, tensors: &[Vec<&str>]) -> Result<()> {
        for (pattern, layer) in &self.layers {
            let of = tensors.iter().enumerate().filter(|(place, _)| layer.adapter.is_none_or(|wanted| wanted == *place));
            let mut names = of.flat_map(|(_, names)| names.iter().copied());
            if !names.by_ref().any(|name| pattern.matches(name)) {
                let first = tensors.iter().flatten().next().copied().unwrap_or_default();
                let message = format!("the pattern {:?} matches no target", layer.pattern);
                return Err(Error::new(rules::ARGUMENT, message).help(format!("targets are called {first:?}, for example")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_of_whole_parts_of_a_name() {
        let matches = |pattern: &str, name: &str| Pattern::new(pattern).unwrap().matches(name);
        let name = "model.layers.3.self_attn.q_proj.weight";
        for yes in
            ["layers.[0-7].*", "layers.3", "q_proj", "*.q_proj.weight", "model.*", "*", "{q,v}_proj", "layers.?.self_attn", name]
        {
            assert!(matches(yes, name), "{yes}");
        }
        for no in ["layers.[4-7].*", "proj", "layer", "q_pro", "layers.3.self_attn.v_proj", "mod"] {
            assert!(!matches(no, name), "{no}");
        }
        assert!(!matches("layers.1", "model.layers.11.mlp.weight"));
    }

    #[test]
    fn the_last_pattern_counts() {
        let layer = |adapter, pattern: &str, factor| LayerWeight { adapter, pattern: pattern.to_owned(), factor };
        let layers = [layer(None, "q", 0.5), layer(Some(1), "*", 3.0)];
        let weights = Weights::new(vec![2.0, -1.0], &layers).unwrap();
        assert_eq!((weights.of(0, "q.weight"), weights.of(1, "q.weight"), weights.of(0, "v.weight")), (1.0, -3.0, 2.0));
        assert!(weights.check_used(&[vec!["q.weight"], vec!["v.weight"]]).is_ok());
        assert!(weights.check_used(&[vec!["v.weight"], vec!["v.weight"]]).is_err());
        assert!(Weights::new(vec![1.0], &layers).is_err() && Weights::new(vec![f64::NAN], &[]).is_err());
        assert!(Weights::new(vec![1e-170], &[]).is_err() && Weights::new(vec![-1e61, 1.0], &[]).is_err());
        assert!(Weights::new(vec![0.0, 1e-59], &[]).is_ok());
        assert!(Weights::new(vec![1.0], &[layer(None, "[", 1.0)]).is_err());
    }
}
