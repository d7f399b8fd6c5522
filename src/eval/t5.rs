//! T5 (Raffel et al. 2020; transformers 5.23, `modeling_t5.py`): encoder and decoder with relative positions that are added to the scores, which are
//! not divided by the root of the width.

use candle_core::{Device, Tensor};

use super::act::{Act, softmax};
use super::computed;
use super::config::{Config, Family};
use super::decoder::causal;
use super::encoder::{additive, in_vocabulary};
use super::layers::{Embedding, Linear, Names, Norm, join_heads, split_heads};
use super::weights::Weights;
use crate::error::Result;

/// A T5 that runs.
pub struct T5 {
    words: Embedding,
    encoder: Stack,
    decoder: Stack,
    head: Linear,
    /// What the decoder's output is multiplied by before a tied head.
    scale: Option<f64>,
    vocabulary: usize,
}

struct Stack {
    blocks: Vec<Block>,
    norm: Norm,
    positions: Positions,
}

struct Block {
    own: (Norm, Attention),
    cross: Option<(Norm, Attention)>,
    before_feed: Norm,
    /// The gate, where there is one.
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
    act: Act,
}

struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    heads: usize,
}

/// Relative positions: a bias for each bucket of distances and each head (Raffel et al. 2020, section 2.1).
struct Positions {
    table: Embedding,
    buckets: usize,
    farthest: usize,
    both_ways: bool,
}

impl T5 {
    /// # Errors
    /// `U-010` if the checkpoint is no T5.
    pub fn new(weights: &Weights<'_>) -> Result<Self> {
        let config = weights.config()?;
        if config.family != Family::T5 {
            return Err(config.refuse(format!("a model of type {:?} has no encoder and decoder", config.model_type)));
        }
        let (dim, vocabulary) = (config.size("d_model")?, config.size("vocab_size")?);
        let names = Names::new(weights, &[""], "");
        let shared = if names.has("shared.weight") { "shared" } else { "encoder.embed_tokens" };
        let words = names.at(shared).embedding(vocabulary, dim)?;
        let tied = config.flag("tie_word_embeddings", true)? && !names.has("lm_head.weight");
        if tied && words.is_updated() {
            let message = "the head is tied to an embedding that the adapter updates, and whether it is meant is not said";
            return Err(config.refuse(message.to_owned()).help("untie the model first, then train the adapter on it"));
        }
        let head = if tied { Linear::tied(&words) } else { names.at("lm_head").linear(dim, names.rows("lm_head.weight")?)? };
        let scaled = config.flag("scale_decoder_outputs", config.flag("tie_word_embeddings", true)?)?;
        let layers = config.size("num_layers")?;
        Ok(T5 {
            encoder: Stack::new(&names.at("encoder"), &config, dim, layers)?,
            decoder: Stack::new(&names.at("decoder"), &config, dim, config.size_or("num_decoder_layers", Some(layers))?)?,
            head,
            words,
            scale: scaled.then(|| 1.0 / (dim as f64).sqrt()),
            vocabulary,
        })
    }

    /// What the encoder makes of ids u32 and mask, both `(batch, time)`: `(batch, time, dim)`.
    ///
    /// # Errors
    /// `U-010` for an id beyond the vocabulary; `E-013`.
    pub fn encode(&self, ids: &Tensor, mask: &Tensor) -> Result<Tensor> {
        in_vocabulary(ids, self.vocabulary)?;
        let run = || {
            let seen = additive(mask)?;
            self.encoder.forward(self.words.forward(ids)?, &seen, None)
        };
        run().map_err(computed)
    }

    /// Logits `(batch, time, vocabulary)` of the decoder's ids u32 `(batch, time)`, over what the encoder made of inputs with `mask`.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn decode(&self, ids: &Tensor, encoded: &Tensor, mask: &Tensor) -> Result<Tensor> {
        in_vocabulary(ids, self.vocabulary)?;
        let run = || {
            let seen = causal(ids.dim(1)?, None)?;
            let mask = additive(mask)?;
            let x = self.decoder.forward(self.words.forward(ids)?, &seen, Some((encoded, &mask)))?;
            let x = self.scale.map_or(Ok(x.clone()), |scale| x * scale)?;
            self.head.forward(&x)
        };
        run().map_err(computed)
    }
}

impl Stack {
    fn new(names: &Names<'_, '_>, config: &Config<'_>, dim: usize, layers: usize) -> Result<Self> {
        let decodes = names.at("block").at(0).at("layer").at(2).has("layer_norm.weight");
        let heads = config.size("num_heads")?;
        let buckets = config.size_or("relative_attention_num_buckets", Some(32))?;
        let bias = names.at("block").at(0).at("layer").at(0).at("SelfAttention").at("relative_attention_bias");
        let blocks = (0..layers).map(|i| Block::new(&names.at("block").at(i).at("layer"), config, dim, decodes));
        Ok(Stack {
            blocks: blocks.collect::<Result<_>>()?,
            norm: names.at("final_layer_norm").rms_norm(dim, config.number("layer_norm_epsilon", 1e-6)?)?,
            positions: Positions {
                table: bias.embedding(buckets, heads)?,
                buckets,
                farthest: config.size_or("relative_attention_max_distance", Some(128))?,
                both_ways: !decodes,
            },
        })
    }

    fn forward(&self, mut x: Tensor, mask: &Tensor, over: Option<(&Tensor, &Tensor)>) -> candle_core::Result<Tensor> {
        let bias = self.positions.bias(x.dim(1)?)?.broadcast_add(mask)?;
        for block in &self.blocks {
            x = block.forward(x, &bias, over)?;
        }
        self.norm.forward(&x)
    }
}

impl Block {
    fn new(names: &Names<'_, '_>, config: &Config<'_>, dim: usize, decodes: bool) -> Result<Self> {
        let eps = config.number("layer_norm_epsilon", 1e-6)?;
        let part = |i: usize, name: &str| -> Result<_> {
            Ok((names.at(i).at("layer_norm").rms_norm(dim, eps)?, Attention::new(&names.at(i).at(name), config, dim)?))
        };
        let feed = names.at(if decodes { 2 } else { 1 });
        let inner = config.size("d_ff")?;
        let dense = feed.at("DenseReluDense");
        let gated = dense.has("wi_0.weight");
        let name = config.text("feed_forward_proj").unwrap_or("relu");
        let name = name.strip_prefix("gated-").unwrap_or(name);
        // "gated-gelu" means the approximation by tanh (transformers 5.23, `T5Config`).
        let act = Act::from_name(if gated && name == "gelu" { "gelu_new" } else { name });
        Ok(Block {
            own: part(0, "SelfAttention")?,
            cross: decodes.then(|| part(1, "EncDecAttention")).transpose()?,
            before_feed: feed.at("layer_norm").rms_norm(dim, eps)?,
            gate: gated.then(|| dense.at("wi_0").linear(dim, inner)).transpose()?,
            up: dense.at(if gated { "wi_1" } else { "wi" }).linear(dim, inner)?,
            down: dense.at("wo").linear(inner, dim)?,
            act: act
                .ok_or_else(|| config.refuse(format!("\"feed_forward_proj\" is {name:?}, an activation that is not known")))?,
        })
    }

    fn forward(&self, x: Tensor, bias: &Tensor, over: Option<(&Tensor, &Tensor)>) -> candle_core::Result<Tensor> {
        let (norm, own) = &self.own;
        let seen = norm.forward(&x)?;
        let mut x = (own.forward(&seen, &seen, bias)? + x)?;
        if let (Some((norm, cross)), Some((encoded, mask))) = (&self.cross, over) {
            x = (cross.forward(&norm.forward(&x)?, encoded, mask)? + x)?;
        }
        let seen = self.before_feed.forward(&x)?;
        let up = self.up.forward(&seen)?;
        let inner = match &self.gate {
            None => self.act.forward(&up)?,
            Some(gate) => (self.act.forward(&gate.forward(&seen)?)? * up)?,
        };
        self.down.forward(&inner)? + x
    }
}

impl Attention {
    fn new(names: &Names<'_, '_>, config: &Config<'_>, dim: usize) -> Result<Self> {
        let heads = config.size("num_heads")?;
        let all = heads * config.size_or("d_kv", Some(64))?;
        let linear = |name: &str| names.at(name).linear(dim, all);
        let (query, key, value) = (linear("q")?, linear("k")?, linear("v")?);
        Ok(Attention { query, key, value, out: names.at("o").linear(all, dim)?, heads })
    }

    fn forward(&self, x: &Tensor, over: &Tensor, bias: &Tensor) -> candle_core::Result<Tensor> {
        let query = split_heads(&self.query.forward(x)?, self.heads)?;
        let key = split_heads(&self.key.forward(over)?, self.heads)?;
        let value = split_heads(&self.value.forward(over)?, self.heads)?;
        let scores = query.matmul(&key.transpose(2, 3)?.contiguous()?)?.broadcast_add(bias)?;
        self.out.forward(&join_heads(&softmax(&scores)?.matmul(&value)?)?)
    }
}

impl Positions {
    /// `(1, heads, time, time)`.
    fn bias(&self, time: usize) -> candle_core::Result<Tensor> {
        let bucket = |i: usize| self.bucket(i / time, i % time) as u32;
        let buckets = Tensor::from_vec((0..time * time).map(bucket).collect::<Vec<_>>(), (time, time), &Device::Cpu)?;
        self.table.forward(&buckets)?.permute((2, 0, 1))?.unsqueeze(0)?.contiguous()
    }

    /// The bucket of a key's distance from a query (`_relative_position_bucket`): near ones have one each, far ones share by the logarithm.
    fn bucket(&self, query: usize, key: usize) -> usize {
        let (mut buckets, mut first) = (self.buckets, 0);
        let distance = match self.both_ways {
            true => {
                buckets /= 2;
                first = if key > query { buckets } else { 0 };
                key.abs_diff(query)
            }
            false => query.saturating_sub(key),
        };
        let exact = buckets / 2;
        if distance < exact {
            return first + distance;
        }
        // In f32, as it is computed there.
        let share = (distance as f32 / exact as f32).ln() / (self.farthest as f32 / exact as f32).ln();
        first + (exact + (share * (buckets - exact) as f32) as usize).min(buckets - 1)
    }
}
