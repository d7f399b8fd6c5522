//! Llama and its kin (Touvron et al. 2023; transformers 5.23, `modeling_llama.py`, `modeling_qwen3.py`): pre-norm decoders with rotary
//! positions (Su et al. 2021), grouped keys and values, gated feed-forward layers; biases and norms of queries and keys where the file has them.

use std::f64::consts::PI;

use candle_core::{D, Device, Tensor};
use serde_json::Value;

use super::act::{Act, softmax};
use super::computed;
use super::config::{Config, Family};
use super::encoder::in_vocabulary;
use super::layers::{Embedding, Linear, Names, Norm, join_heads, split_heads};
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::rules;

/// A decoder that runs.
pub struct Decoder {
    words: Embedding,
    layers: Vec<Layer>,
    norm: Norm,
    head: Linear,
    /// Of each pair of dimensions: 1 / θ^(2i/d), as the scaling of positions makes it.
    frequencies: Vec<f64>,
    longest: usize,
    window: Option<usize>,
    vocabulary: usize,
}

struct Layer {
    before: Norm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    query_norm: Option<Norm>,
    key_norm: Option<Norm>,
    between: Norm,
    gate: Linear,
    up: Linear,
    down: Linear,
    act: Act,
    heads: usize,
    groups: usize,
}

impl Decoder {
    /// # Errors
    /// `U-010` if the checkpoint is no decoder of this kind.
    pub fn new(weights: &Weights<'_>) -> Result<Self> {
        let config = weights.config()?;
        if config.family != Family::Llama {
            return Err(config.refuse(format!("a model of type {:?} is no decoder", config.model_type)));
        }
        let hidden = config.size("hidden_size")?;
        let eps = config.number("rms_norm_eps", 1e-6)?;
        let vocabulary = config.size("vocab_size")?;
        let names = Names::new(weights, &["model.", ""], "embed_tokens.weight");
        let words = names.at("embed_tokens").embedding(vocabulary, hidden)?;
        let head = match config.flag("tie_word_embeddings", false)? && !names.root().has("lm_head.weight") {
            true if words.is_updated() => {
                let message = "the head is tied to an embedding that the adapter updates, and whether it is meant is not said";
                return Err(config.refuse(message.to_owned()).help("merge with --untie, and run what comes out"));
            }
            true => Linear::tied(&words),
            false => names.root().at("lm_head").linear(hidden, names.root().rows("lm_head.weight")?)?,
        };
        let layers = (0..config.size("num_hidden_layers")?).map(|i| Layer::new(&names.at("layers").at(i), &config, hidden, eps));
        let sliding = config.flag("use_sliding_window", config.model_type == "mistral")?;
        Ok(Decoder {
            layers: layers.collect::<Result<_>>()?,
            norm: names.at("norm").rms_norm(hidden, eps)?,
            head,
            words,
            frequencies: frequencies(&config, width(&config, hidden)?)?,
            longest: config.size_or("max_position_embeddings", Some(2048))?,
            window: if sliding { config.get("sliding_window").and_then(Value::as_u64).map(|n| n as usize) } else { None },
            vocabulary,
        })
    }

    /// The longest sequence.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Logits `(batch, time, vocabulary)` of ids u32 `(batch, time)`. Padding goes behind the tokens, which do not see it.
    ///
    /// # Errors
    /// `U-010` for an id beyond the vocabulary or a sequence that is too long; `E-013`.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let time = ids.dim(D::Minus1).map_err(computed)?;
        if time > self.longest {
            let message = format!("a sequence of {time} tokens, and the model takes {}", self.longest);
            return Err(Error::new(rules::RUNNABLE, message));
        }
        in_vocabulary(ids, self.vocabulary)?;
        self.run(ids, time).map_err(computed)
    }

    fn run(&self, ids: &Tensor, time: usize) -> candle_core::Result<Tensor> {
        let mut x = self.words.forward(ids)?;
        let rotation = rotation(&self.frequencies, time)?;
        let mask = causal(time, self.window)?;
        for layer in &self.layers {
            x = layer.forward(&x, &rotation, &mask)?;
        }
        self.head.forward(&self.norm.forward(&x)?)
    }
}

impl Layer {
    fn new(names: &Names<'_, '_>, config: &Config<'_>, hidden: usize, eps: f64) -> Result<Self> {
        let (own, feed) = (names.at("self_attn"), names.at("mlp"));
        let heads = config.size("num_attention_heads")?;
        let groups = config.size_or("num_key_value_heads", Some(heads))?;
        let (width, inner) = (width(config, hidden)?, config.size("intermediate_size")?);
        if !heads.is_multiple_of(groups) {
            return Err(config.refuse(format!("{heads} heads do not share {groups} keys")));
        }
        let norm = |name: &str| own.has(&format!("{name}.weight")).then(|| own.at(name).rms_norm(width, eps)).transpose();
        Ok(Layer {
            before: names.at("input_layernorm").rms_norm(hidden, eps)?,
            query: own.at("q_proj").linear(hidden, heads * width)?,
            key: own.at("k_proj").linear(hidden, groups * width)?,
            value: own.at("v_proj").linear(hidden, groups * width)?,
            out: own.at("o_proj").linear(heads * width, hidden)?,
            query_norm: norm("q_norm")?,
            key_norm: norm("k_norm")?,
            between: names.at("post_attention_layernorm").rms_norm(hidden, eps)?,
            gate: feed.at("gate_proj").linear(hidden, inner)?,
            up: feed.at("up_proj").linear(hidden, inner)?,
            down: feed.at("down_proj").linear(inner, hidden)?,
            act: config.act("hidden_act", "silu")?,
            heads,
            groups,
        })
    }

    fn forward(&self, x: &Tensor, rotation: &(Tensor, Tensor), mask: &Tensor) -> candle_core::Result<Tensor> {
        let seen = self.before.forward(x)?;
        let query = normed(split_heads(&self.query.forward(&seen)?, self.heads)?, &self.query_norm)?;
        let key = normed(split_heads(&self.key.forward(&seen)?, self.groups)?, &self.key_norm)?;
        let value = split_heads(&self.value.forward(&seen)?, self.groups)?;
        let query = rotated(&query, rotation)?;
        let (key, value) = (self.repeated(&rotated(&key, rotation)?)?, self.repeated(&value)?);
        let scale = 1.0 / (query.dim(D::Minus1)? as f64).sqrt();
        let scores = (query.matmul(&key.transpose(2, 3)?.contiguous()?)? * scale)?.broadcast_add(mask)?;
        let x = (self.out.forward(&join_heads(&softmax(&scores)?.matmul(&value)?)?)? + x)?;
        let seen = self.between.forward(&x)?;
        let inner = (self.act.forward(&self.gate.forward(&seen)?)? * self.up.forward(&seen)?)?;
        self.down.forward(&inner)? + x
    }

    /// Each key, or value, once for every query that shares it.
    fn repeated(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let times = self.heads / self.groups;
        let (batch, groups, time, width) = x.dims4()?;
        x.unsqueeze(2)?.expand((batch, groups, times, time, width))?.contiguous()?.reshape((batch, groups * times, time, width))
    }
}

fn width(config: &Config<'_>, hidden: usize) -> Result<usize> {
    match config.get("head_dim") {
        Some(_) => config.size("head_dim"),
        None => Ok(config.heads(hidden)?.1),
    }
}

fn normed(x: Tensor, norm: &Option<Norm>) -> candle_core::Result<Tensor> {
    norm.as_ref().map_or(Ok(x.clone()), |norm| norm.forward(&x))
}

/// The frequencies of rotary positions (Su et al. 2021, equation 15), scaled as `rope_parameters` says: not, linearly, or by wavelength as
/// Llama 3.1 (transformers 5.23, `modeling_rope_utils.py`).
fn frequencies(config: &Config<'_>, width: usize) -> Result<Vec<f64>> {
    let rope = config.get("rope_parameters").or_else(|| config.get("rope_scaling"));
    let of = |key: &str| rope.and_then(|rope| rope.get(key)).filter(|value| !value.is_null());
    let number = |key: &str| of(key).and_then(Value::as_f64);
    let needed = |key: &str| number(key).ok_or_else(|| config.refuse(format!("rope_parameters has no number {key:?}")));
    let theta = number("rope_theta").map_or_else(|| config.number("rope_theta", 10_000.0), Ok)?;
    let plain = (0..width / 2).map(|i| theta.powf(-2.0 * i as f64 / width as f64));
    let kind = of("rope_type").or_else(|| of("type")).and_then(Value::as_str).unwrap_or("default");
    match kind {
        "default" => Ok(plain.collect()),
        "linear" => {
            let factor = needed("factor")?;
            Ok(plain.map(|frequency| frequency / factor).collect())
        }
        "llama3" => {
            let (factor, low, high) = (needed("factor")?, needed("low_freq_factor")?, needed("high_freq_factor")?);
            let context = needed("original_max_position_embeddings")?;
            let scaled = |frequency: f64| {
                let length = 2.0 * PI / frequency;
                let smooth = ((context / length - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            };
            Ok(plain.map(scaled).collect())
        }
        other => Err(config.refuse(format!("rotary positions of type {other:?} are not known"))),
    }
}

/// Cosines and sines, `(time, width / 2)`.
fn rotation(frequencies: &[f64], time: usize) -> candle_core::Result<(Tensor, Tensor)> {
    let angles = || (0..time).flat_map(|t| frequencies.iter().map(move |f| t as f64 * f));
    let table = |of: fn(f64) -> f64| {
        let values: Vec<f32> = angles().map(|angle| of(angle) as f32).collect();
        Tensor::from_vec(values, (time, frequencies.len()), &Device::Cpu)
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

/// Pairs (i, i + width/2) turned by the angle of their position.
fn rotated(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> candle_core::Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (one, other) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let first = (one.broadcast_mul(cos)? - other.broadcast_mul(sin)?)?;
    let second = (other.broadcast_mul(cos)? + one.broadcast_mul(sin)?)?;
    Tensor::cat(&[first, second], D::Minus1)
}

/// What is added to scores so that no token sees a later one, or one that is further back than the window. `(1, 1, time, time)`.
pub(super) fn causal(time: usize, window: Option<usize>) -> candle_core::Result<Tensor> {
    let hidden = |t: usize, s: usize| s > t || window.is_some_and(|window| t - s >= window);
    let values: Vec<f32> = (0..time * time).map(|i| if hidden(i / time, i % time) { f32::MIN } else { 0.0 }).collect();
    Tensor::from_vec(values, (1, 1, time, time), &Device::Cpu)
}
