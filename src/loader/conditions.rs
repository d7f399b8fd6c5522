//! The conditions of the rows: questions about an adapter that several loaders fail on in their own ways. Each gives what it is
//! true of, or `None`. Model first, config second: what an adapter means is asked of its targets, and the config is asked only
//! where a loader looks at nothing else.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::Found;
use super::subject::{Subject, layer, leaf, module};
use crate::adapter::{Adapter, Kind, Orientation, Replacement, ScalingRule, Target};
use crate::tensor::Dtype;

/// Targets that are so.
pub(super) fn targets(subject: &Subject<'_>, is_so: impl Fn(&Target) -> bool) -> Option<Found> {
    names(subject.targets().iter().filter(|target| is_so(target)).map(|target| target.tensor.as_str()))
}

/// Full tensors.
fn replacements<'a>(found: impl Iterator<Item = &'a Replacement>) -> Option<Found> {
    names(found.map(|replacement| replacement.tensor.as_str()))
}

fn names<'a>(mut found: impl Iterator<Item = &'a str>) -> Option<Found> {
    let first = found.next()?.to_owned();
    Some(Found { targets: 1 + found.count() as u64, first: Some(first), figure: None })
}

/// The adapter as a whole.
pub(super) fn whole(is_so: bool) -> Option<Found> {
    is_so.then_some(Found { targets: 0, first: None, figure: None })
}

fn with_figure(found: Option<Found>, figure: impl Into<String>) -> Option<Found> {
    found.map(|found| Found { figure: Some(figure.into()), ..found })
}

// --- files -----------------------------------------------------------------------------------------------------------

/// A container file on its own, or weights without a config.
pub(super) fn no_config(subject: &Subject<'_>) -> Option<Found> {
    whole(subject.files.config.is_none())
}

/// More than one safetensors file in the folder.
pub(super) fn other_files(subject: &Subject<'_>) -> Option<Found> {
    let first = subject.files.others.first()?;
    Some(Found { targets: 0, first: Some(first.clone()), figure: Some(first.clone()) })
}

/// Always: what holds for every adapter in PEFT's format.
pub(super) fn always(_: &Subject<'_>) -> Option<Found> {
    whole(true)
}

// --- config ----------------------------------------------------------------------------------------------------------

/// A field that vLLM has no default for.
pub(super) fn field_missing(subject: &Subject<'_>) -> Option<Found> {
    let missing = ["r", "lora_alpha", "target_modules"].into_iter().find(|field| !subject.has(field));
    subject.files.config.as_ref()?;
    with_figure(whole(missing.is_some()), missing?)
}

/// `target_modules` is a regular expression, or nothing.
pub(super) fn modules_not_listed(subject: &Subject<'_>) -> Option<Found> {
    subject.files.config.as_ref()?;
    whole(match subject.field("target_modules") {
        Some(Value::Array(_)) => false,
        Some(Value::String(text)) => !matches!(text.as_str(), "all-linear" | "all"),
        _ => true,
    })
}

/// Targets that `target_modules` does not name.
pub(super) fn not_covered(subject: &Subject<'_>) -> Option<Found> {
    let listed = subject.names("target_modules");
    let covers = |path: &str| listed.iter().any(|name| path == *name || path.ends_with(&format!(".{name}")));
    let is_list = !listed.is_empty();
    targets(subject, |target| is_list && !covers(module(&target.tensor)))
}

/// The base is named by a path on the disk of whoever trained.
pub(super) fn base_is_a_path(subject: &Subject<'_>) -> Option<Found> {
    let name = subject.field("base_model_name_or_path").and_then(Value::as_str)?;
    let is_path = ["/", "./", "../", "~"].iter().any(|start| name.starts_with(start));
    with_figure(whole(is_path), name)
}

pub(super) fn activated(subject: &Subject<'_>) -> Option<Found> {
    whole(subject.is_set("alora_invocation_tokens"))
}

pub(super) fn layers_replicated(subject: &Subject<'_>) -> Option<Found> {
    whole(subject.is_set("layer_replication"))
}

pub(super) fn block_diagonal(subject: &Subject<'_>) -> Option<Found> {
    whole(subject.is_set("use_bdlora"))
}

pub(super) fn grouped_inputs(subject: &Subject<'_>) -> Option<Found> {
    whole(subject.is_set("use_qalora"))
}

/// PiSSA, OLoRA, CorDA, LoftQ.
pub(super) fn base_changing_init(subject: &Subject<'_>) -> Option<Found> {
    whole(initialised(subject, &["pissa", "olora", "corda", "loftq"]))
}

/// The same and LoRA-GA.
pub(super) fn base_changing_init_or_ga(subject: &Subject<'_>) -> Option<Found> {
    whole(initialised(subject, &["pissa", "olora", "corda", "loftq", "lora_ga"]))
}

fn initialised(subject: &Subject<'_>, methods: &[&str]) -> bool {
    let name = subject.field("init_lora_weights").and_then(Value::as_str).map(str::to_lowercase);
    name.is_some_and(|name| methods.iter().any(|method| name.starts_with(method)))
}

// --- scale and rank --------------------------------------------------------------------------------------------------

/// rsLoRA, where it makes a difference.
pub(super) fn stabilized(subject: &Subject<'_>) -> Option<Found> {
    targets(subject, |target| target.scaling.rule == ScalingRule::RankStabilized && target.scaling.rank > 1)
}

/// `rank_pattern`: ranks other than `r`.
pub(super) fn own_rank(subject: &Subject<'_>) -> Option<Found> {
    let rank = subject.rank()?;
    targets(subject, |target| target.scaling.rank != rank)
}

/// Ranks that differ between layers of one kind.
pub(super) fn rank_varies_by_layer(subject: &Subject<'_>) -> Option<Found> {
    let mut ranks: BTreeMap<(&str, &str), BTreeSet<u64>> = BTreeMap::new();
    for target in subject.targets() {
        if let Some((before, _, after)) = layer(module(&target.tensor)) {
            ranks.entry((before, after)).or_default().insert(target.scaling.rank);
        }
    }
    targets(subject, |target| {
        let kind = layer(module(&target.tensor)).map(|(before, _, after)| (before, after));
        kind.and_then(|kind| ranks.get(&kind)).is_some_and(|ranks| ranks.len() > 1)
    })
}

/// `alpha_pattern`: alphas other than `lora_alpha`.
pub(super) fn own_alpha(subject: &Subject<'_>) -> Option<Found> {
    let alpha = subject.alpha()?;
    targets(subject, |target| target.scaling.alpha != alpha)
}

/// A scale that is no power of two, by which a product in 16 bits is rounded.
pub(super) fn odd_scale(subject: &Subject<'_>) -> Option<Found> {
    targets(subject, |target| !is_power_of_two(target.scaling.effective()))
}

fn is_power_of_two(scale: f64) -> bool {
    scale.is_normal() && scale.to_bits() & ((1 << 52) - 1) == 0
}

fn over(subject: &Subject<'_>, limit: u64) -> Option<Found> {
    let highest = subject.targets().iter().map(|target| target.scaling.rank).max()?;
    with_figure(targets(subject, |target| target.scaling.rank > limit), highest.to_string())
}

pub(super) fn rank_over_64(subject: &Subject<'_>) -> Option<Found> {
    over(subject, 64)
}

pub(super) fn rank_over_256(subject: &Subject<'_>) -> Option<Found> {
    over(subject, 256)
}

pub(super) fn rank_over_512(subject: &Subject<'_>) -> Option<Found> {
    over(subject, 512)
}

/// The values that vLLM's `--max-lora-rank` may have: an adapter takes the room of the next one (`MaxLoRARanks`, `vllm/config/lora.py`, 0.11).
pub(crate) const VLLM_RANKS: [u64; 9] = [1, 8, 16, 32, 64, 128, 256, 320, 512];

/// Over vLLM's default, and within what it can be told.
pub(super) fn rank_over_16_to_512(subject: &Subject<'_>) -> Option<Found> {
    let highest = subject.targets().iter().map(|target| target.scaling.rank).max()?;
    let flag = VLLM_RANKS.into_iter().find(|allowed| *allowed >= highest)?;
    with_figure(targets(subject, |target| target.scaling.rank > 16), flag.to_string())
}

/// More bytes than mistral.rs takes unasked.
pub(super) fn over_8_gib(subject: &Subject<'_>) -> Option<Found> {
    let bytes = subject.adapter.factors().map(|factor| factor.info().bytes()).fold(0, u64::saturating_add);
    with_figure(whole(bytes > 8 << 30), bytes.to_string())
}

// --- more than B·A ---------------------------------------------------------------------------------------------------

/// Magnitudes: by the config, or by the tensors that hold them.
pub(super) fn dora(subject: &Subject<'_>) -> Option<Found> {
    if subject.is_set("use_dora") {
        return targets(subject, |_| true);
    }
    names(tensors(subject.adapter).filter(|name| name.contains("lora_magnitude_vector")))
}

fn tensors(adapter: &Adapter) -> impl Iterator<Item = &str> {
    adapter.factors().map(|factor| factor.name())
}

/// `lora_bias`.
pub(super) fn bias_update(subject: &Subject<'_>) -> Option<Found> {
    targets(subject, |target| target.bias.is_some())
}

/// `bias`: trained biases of the base.
pub(super) fn trained_bias(subject: &Subject<'_>) -> Option<Found> {
    replacements(subject.biases())
}

/// The same, and a config that says so.
pub(super) fn trained_bias_or_field(subject: &Subject<'_>) -> Option<Found> {
    let stated = subject.field("bias").and_then(Value::as_str).is_some_and(|bias| bias != "none");
    trained_bias(subject).or(whole(stated))
}

/// `modules_to_save`: modules that were trained whole.
pub(super) fn saved(subject: &Subject<'_>) -> Option<Found> {
    replacements(subject.saved())
}

/// Those that are neither the head of a classifier...
pub(super) fn saved_but_classifier(subject: &Subject<'_>) -> Option<Found> {
    replacements(subject.saved().filter(|saved| !has_leaf(saved, &["classifier", "score"])))
}

/// ... nor those of the vocabulary.
pub(super) fn saved_but_vocabulary(subject: &Subject<'_>) -> Option<Found> {
    replacements(subject.saved().filter(|saved| !has_leaf(saved, &["embed_tokens", "lm_head"])))
}

/// The own weight of a layer that has a LoRA too.
pub(super) fn own_weight(subject: &Subject<'_>) -> Option<Found> {
    replacements(subject.saved().filter(|saved| is_base_layer(saved)))
}

pub(super) fn saved_but_own_weight(subject: &Subject<'_>) -> Option<Found> {
    replacements(subject.saved().filter(|saved| !is_base_layer(saved)))
}

fn is_base_layer(replacement: &Replacement) -> bool {
    replacement.with.name().ends_with(".base_layer.weight")
}

fn has_leaf(replacement: &Replacement, leaves: &[&str]) -> bool {
    module(&replacement.tensor).split('.').any(|part| leaves.contains(&part))
}

// --- layers ----------------------------------------------------------------------------------------------------------

fn is_embedding(target: &Target) -> bool {
    target.kind == Kind::Embedding
}

fn is_head(target: &Target) -> bool {
    leaf(module(&target.tensor)) == "lm_head"
}

pub(super) fn embedding(subject: &Subject<'_>) -> Option<Found> {
    targets(subject, is_embedding)
}

pub(super) fn embedding_or_head(subject: &Subject<'_>) -> Option<Found> {
    targets(subject, |target| is_embedding(target) || is_head(target))
}

/// An embedding that `target_modules` does not name.
pub(super) fn embedding_not_listed(subject: &Subject<'_>) -> Option<Found> {
    let listed = subject.names("target_modules");
    targets(subject, |target| {
        let path = module(&target.tensor);
        is_embedding(target) && !listed.iter().any(|name| path == *name || path.ends_with(&format!(".{name}")))
    })
}

/// Names without a layer's number that are not of the vocabulary.
pub(super) fn no_layer(subject: &Subject<'_>) -> Option<Found> {
    targets(subject, |target| {
        let path = module(&target.tensor);
        layer(path).is_none() && !path.contains("embed_tokens") && !path.contains("lm_head")
    })
}

/// Names that are not `<path>.<number>.<module>.<name>`.
pub(super) fn not_number_module_name(subject: &Subject<'_>) -> Option<Found> {
    targets(subject, |target| {
        let path = module(&target.tensor);
        let number = path.rsplit('.').nth(2);
        let fits = number.is_some_and(|part| part.parse::<u64>().is_ok());
        !fits && !matches!(leaf(path), "embed_tokens" | "lm_head")
    })
}

/// Names without PEFT's prefix.
pub(super) fn no_prefix(subject: &Subject<'_>) -> Option<Found> {
    targets(subject, |target| !target.a.name().starts_with("base_model.model."))
}

/// Names that still hold the name of the adapter: `lora_A.default.weight`.
pub(super) fn adapter_name(subject: &Subject<'_>) -> Option<Found> {
    targets(subject, |target| {
        let rest = target.a.name().rsplit_once(".lora_A.").map(|(_, rest)| rest);
        rest.is_some_and(|rest| rest != "weight")
    })
}

/// The members of the attention that a layer's targets have, by what is before `q_proj` and the others.
fn attention<'a>(subject: &Subject<'a>) -> BTreeMap<&'a str, Vec<(&'a str, &'a Target)>> {
    let mut layers: BTreeMap<&str, Vec<(&str, &Target)>> = BTreeMap::new();
    for target in subject.targets() {
        if let Some((before, name)) = module(&target.tensor).rsplit_once('.')
            && matches!(name, "q_proj" | "k_proj" | "v_proj")
        {
            layers.entry(before).or_default().push((name, target));
        }
    }
    layers
}

/// Layers with a LoRA on `q_proj` and none on `v_proj`.
pub(super) fn query_without_value(subject: &Subject<'_>) -> Option<Found> {
    let layers = attention(subject);
    let has = |members: &[(&str, &Target)], wanted: &str| members.iter().any(|(name, _)| *name == wanted);
    let lacking = layers.values().filter(|members| has(members, "q_proj") && !has(members, "v_proj"));
    names(lacking.filter_map(|members| members.iter().find(|(name, _)| *name == "q_proj")).map(|(_, t)| t.tensor.as_str()))
}

/// Layers with a LoRA on some of q, k and v, of which q is seen not to be square.
pub(super) fn part_of_wide_attention(subject: &Subject<'_>) -> Option<Found> {
    part_of_attention(subject, |name, target| name == "q_proj" && !is_square(target))
}

/// The same of k or v, while q is square or not seen.
pub(super) fn part_of_grouped_attention(subject: &Subject<'_>) -> Option<Found> {
    let wide = part_of_wide_attention(subject).is_some();
    part_of_attention(subject, |name, target| name != "q_proj" && !is_square(target)).filter(|_| !wide)
}

fn part_of_attention(subject: &Subject<'_>, is_so: impl Fn(&str, &Target) -> bool) -> Option<Found> {
    let layers = attention(subject);
    let part = layers.values().filter(|members| members.len() < 3);
    let found = part.filter_map(|members| members.iter().find(|(name, target)| is_so(name, target)));
    names(found.map(|(_, target)| target.tensor.as_str()))
}

fn is_square(target: &Target) -> bool {
    target.out_in().0 == target.out_in().1
}

/// Kinds of layer that some layer lacks, by the numbers that the adapter has and from 0 on.
pub(super) fn layers_missing(subject: &Subject<'_>) -> Option<Found> {
    let mut kinds: BTreeMap<(&str, &str), BTreeSet<u64>> = BTreeMap::new();
    let mut last: BTreeMap<&str, u64> = BTreeMap::new();
    for target in subject.targets() {
        if let Some((before, number, after)) = layer(module(&target.tensor)) {
            kinds.entry((before, after)).or_default().insert(number);
            let last = last.entry(before).or_default();
            *last = number.max(*last);
        }
    }
    targets(subject, |target| {
        let Some((before, _, after)) = layer(module(&target.tensor)) else { return false };
        let (Some(numbers), Some(last)) = (kinds.get(&(before, after)), last.get(before)) else { return false };
        // As many distinct numbers as there are from 0 to the last.
        numbers.len() as u64 <= *last
    })
}

/// GPT-2's `Conv1D`, not square.
pub(super) fn transposed(subject: &Subject<'_>) -> Option<Found> {
    targets(subject, |target| is_conv1d(target) && !is_square(target))
}

/// GPT-2's `Conv1D`, square.
pub(super) fn transposed_square(subject: &Subject<'_>) -> Option<Found> {
    targets(subject, |target| is_conv1d(target) && is_square(target))
}

fn is_conv1d(target: &Target) -> bool {
    let named = matches!(leaf(module(&target.tensor)), "c_attn" | "c_proj" | "c_fc");
    named && matches!(target.kind, Kind::Linear(Orientation::InOut))
}

fn is_matrix(target: &Target) -> bool {
    [&target.a, &target.b].iter().all(|factor| factor.info().shape.dims().len() == 2)
}

/// What follows `experts` in a path: the number of one expert, or nothing of the kind.
fn expert(target: &Target) -> Option<bool> {
    let mut parts = module(&target.tensor).split('.').skip_while(|part| *part != "experts");
    parts.next()?;
    Some(parts.next().is_some_and(|part| part.parse::<u64>().is_ok()))
}

/// One pair of factors for each expert.
pub(super) fn experts(subject: &Subject<'_>) -> Option<Found> {
    targets(subject, |target| expert(target).is_some())
}

/// One pair of factors for all experts of a layer.
pub(super) fn stacked_experts(subject: &Subject<'_>) -> Option<Found> {
    targets(subject, |target| expert(target) == Some(false))
}

/// Both in one adapter.
pub(super) fn mixed_experts(subject: &Subject<'_>) -> Option<Found> {
    let single = subject.targets().iter().any(|target| expert(target) == Some(true));
    stacked_experts(subject).filter(|_| single)
}

/// Factors that are no matrices, and not those of experts.
pub(super) fn convolution(subject: &Subject<'_>) -> Option<Found> {
    targets(subject, |target| !is_matrix(target) && expert(target).is_none())
}

/// Factors in F64, or A and B in different dtypes.
pub(super) fn uncommon_dtype(subject: &Subject<'_>) -> Option<Found> {
    targets(subject, |target| {
        let (a, b) = (target.a.info().dtype, target.b.info().dtype);
        a != b || a == Dtype::F64
    })
}
