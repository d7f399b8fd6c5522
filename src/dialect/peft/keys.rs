//! The grammar of tensor names in PEFT's files: `base_model.model.`, the path of a module, and what the tensor is to that module.
//!
//! PEFT removes the adapter's own name (`default`) when it saves; other savers leave it in (`lora_A.default.weight`). Names are
//! read from their end, so that a module may itself be called `lora_A` or `alpha_proj`.

/// What a tensor is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// `lora_A.weight`.
    A,
    /// `lora_B.weight`.
    B,
    /// `lora_embedding_A`.
    EmbeddingA,
    /// `lora_embedding_B`.
    EmbeddingB,
    /// `lora_B.bias`.
    BiasDelta,
    /// `base_layer.weight`: the module's own weight, which PEFT saves beside the LoRA of an embedding or an output layer
    /// (`save_embedding_layers`). It takes the base tensor's place before the update is added.
    BaseWeight,
    /// `base_layer.bias`: the module's own bias, trained.
    BaseBias,
    /// `lora_magnitude_vector`: DoRA's magnitudes.
    Magnitude,
    /// `lora_diag`: KaSA's diagonal between B and A.
    Diagonal,
    /// `trainable_tokens_delta`: rows that replace those of an embedding. They are no differences, whatever the name says.
    Rows,
    /// What PEFT itself does not merge: a record of training, or a copy.
    Training(&'static str),
    /// Any other parameter: a full tensor.
    Full,
    /// A part of a method that is not `s·B·A`: what it is, and the way out.
    Refused(&'static str, &'static str),
    /// Not a name that PEFT writes.
    Unknown,
}

/// A tensor name, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key<'a> {
    /// The name in the file.
    pub(super) name: &'a str,
    /// The path of the module in the base model. For [`Role::Full`] the path of the parameter.
    pub(super) path: String,
    pub(super) role: Role,
    /// The adapter's name, if the file has it in the tensor's.
    pub(super) adapter: Option<&'a str>,
    /// Whether the name began with `base_model.model.`.
    pub(super) prefixed: bool,
}

/// What PEFT puts before the path of a module.
pub(super) const PREFIX: &str = "base_model.model.";

pub(super) const MERGE_IN_PEFT: &str = "merge it with PEFT (merge_and_unload) and use the merged model";

/// Parts of other methods, by the start of the segment that names the parameter.
const OTHER_METHODS: &[(&str, &str)] = &[
    ("lora_E", "the diagonal of AdaLoRA, which stands between B and A"),
    ("ranknum", "the rank of AdaLoRA, by which its update is divided"),
    ("trainable_tokens_original", "original rows of an embedding with replaced rows"),
    ("hada_w1", "a factor of LoHa, an element-wise product"),
    ("hada_w2", "a factor of LoHa, an element-wise product"),
    ("hada_t", "a core of LoHa, an element-wise product"),
    ("lokr_w1", "a factor of LoKr, a Kronecker product"),
    ("lokr_w2", "a factor of LoKr, a Kronecker product"),
    ("lokr_t2", "a core of LoKr, a Kronecker product"),
    ("oft_R", "a rotation of OFT"),
    ("oft_r", "a rotation of OFT"),
    ("oft_s", "a scaling of OFT"),
    ("boft_R", "a rotation of BOFT"),
    ("boft_s", "a scaling of BOFT"),
    ("ia3_l", "a scaling of IA3"),
    ("vera_lambda_", "a scaling of VeRA"),
    ("vera_A", "the shared matrix of VeRA"),
    ("vera_B", "the shared matrix of VeRA"),
    ("pvera_lambda_", "a scaling of PVeRA"),
    ("randlora_", "a part of RandLoRA"),
    ("vblora_", "a part of VB-LoRA"),
    ("fourierft_spectrum", "the spectrum of FourierFT"),
    ("prompt_embeddings", "the vectors of a prompt method, which change no weight"),
    ("prompt_encoder", "the encoder of a prompt method, which changes no weight"),
];

/// Records of training, by the start of the segment that names the parameter. PEFT merges without them.
const TRAINING: &[(&str, &str)] =
    &[("lora_velora_", "a training record of VeLoRA"), ("lora_monteclora_", "the sampler of MonteCLoRA")];

/// Reads one tensor name. `exists` says whether the file has a tensor of a name; it decides what `x.lora_A.lora_A.weight` is.
pub(super) fn parse<'a>(name: &'a str, exists: &dyn Fn(&str) -> bool) -> Key<'a> {
    let mut rest = name;
    while let Some(inner) = rest.strip_prefix(PREFIX) {
        rest = inner;
    }
    let prefixed = rest.len() < name.len();
    let segments: Vec<&str> = rest.split('.').collect();
    if let Some(key) = copy(name, rest, prefixed, exists) {
        return key;
    }
    let (module, role, adapter) = read(name, &segments, exists);
    let (path, role, adapter) = if role == Role::Full { full(rest, &segments) } else { (module.join("."), role, adapter) };
    let role = match role {
        Role::Full | Role::Unknown | Role::Refused(..) | Role::Training(_) => role,
        _ if path.is_empty() => Role::Unknown,
        _ => role,
    };
    Key { name, path, role, adapter, prefixed }
}

/// A second copy of an embedding that is in `modules_to_save`: PEFT saves it once as what was trained, and once more, with what was there
/// before, because the vocabulary was resized (`save_embedding_layers`).
fn copy<'a>(name: &'a str, rest: &str, prefixed: bool, exists: &dyn Fn(&str) -> bool) -> Option<Key<'a>> {
    let copies = [
        (".modules_to_save.weight", "a second copy of an embedding that was trained whole"),
        (".original_module.weight", "an embedding as it was before it was trained whole"),
    ];
    copies.iter().find_map(|(end, what)| {
        let saved = format!("{}.weight", name.strip_suffix(end)?);
        let path = rest.strip_suffix(end)?.to_owned();
        exists(&saved).then_some(Key { name, path, role: Role::Training(what), adapter: None, prefixed })
    })
}

type Read<'s, 'a> = (&'s [&'a str], Role, Option<&'a str>);

fn read<'s, 'a>(name: &str, segments: &'s [&'a str], exists: &dyn Fn(&str) -> bool) -> Read<'s, 'a> {
    match segments {
        [module @ .., first @ ("lora_A" | "lora_B"), second @ ("lora_A" | "lora_B"), "weight"] => {
            twice(name, segments, module, first, second, exists)
        }
        [module @ .., "lora_A", "weight"] => (module, Role::A, None),
        [module @ .., "lora_B", "weight"] => (module, Role::B, None),
        [module @ .., "lora_B", "bias"] => (module, Role::BiasDelta, None),
        [module @ .., "lora_embedding_A"] => (module, Role::EmbeddingA, None),
        [module @ .., "lora_embedding_B"] => (module, Role::EmbeddingB, None),
        [module @ .., "lora_A", adapter, "weight"] => (module, Role::A, Some(adapter)),
        [module @ .., "lora_B", adapter, "weight"] => (module, Role::B, Some(adapter)),
        [module @ .., "lora_B", adapter, "bias"] => (module, Role::BiasDelta, Some(adapter)),
        [module @ .., "lora_embedding_A", adapter] => (module, Role::EmbeddingA, Some(adapter)),
        [module @ .., "lora_embedding_B", adapter] => (module, Role::EmbeddingB, Some(adapter)),
        [module @ .., "lora_magnitude_vector"] => (module, Role::Magnitude, None),
        [module @ .., "lora_magnitude_vector", "weight"] => (module, Role::Magnitude, None),
        [module @ .., "lora_magnitude_vector", adapter, "weight"] => (module, Role::Magnitude, Some(adapter)),
        [module @ .., "lora_magnitude_vector", adapter] => (module, Role::Magnitude, Some(adapter)),
        [module @ .., "lora_diag"] => (module, Role::Diagonal, None),
        [module @ .., "lora_diag", adapter] => (module, Role::Diagonal, Some(adapter)),
        [module @ .., "token_adapter", "trainable_tokens_delta"] => (module, Role::Rows, None),
        [module @ .., "token_adapter", "trainable_tokens_delta", adapter] => (module, Role::Rows, Some(adapter)),
        [module @ .., "trainable_tokens_delta"] => (module, Role::Rows, None),
        [module @ .., "trainable_tokens_delta", adapter] => (module, Role::Rows, Some(adapter)),
        [module @ .., "base_layer", "bias"] => (module, Role::BaseBias, None),
        [module @ .., "token_adapter", "base_layer", "weight"] => (module, Role::BaseWeight, None),
        [module @ .., "base_layer", "weight"] => (module, Role::BaseWeight, None),
        [module @ .., "lora_A" | "lora_B"] => {
            (module, Role::Refused("a factor without .weight, as AdaLoRA and Microsoft's loralib store it", MERGE_IN_PEFT), None)
        }
        _ => (segments, other(segments), None),
    }
}

/// `x.P.Q.weight` where P and Q are both `lora_A` or `lora_B`: factor Q of a module called P, or factor P of an adapter called Q.
/// The partner of the factor decides; without one it is the module.
fn twice<'s, 'a>(
    name: &str,
    segments: &'s [&'a str],
    module: &'s [&'a str],
    first: &str,
    second: &'a str,
    exists: &dyn Fn(&str) -> bool,
) -> Read<'s, 'a> {
    let role = |segment: &str| if segment == "lora_A" { Role::A } else { Role::B };
    let other = |segment: &str| if segment == "lora_A" { "lora_B" } else { "lora_A" };
    let stem = name.strip_suffix(&format!("{first}.{second}.weight")).unwrap_or_default();
    let as_module = exists(&format!("{stem}{first}.{}.weight", other(second)));
    let as_adapter = exists(&format!("{stem}{}.{second}.weight", other(first)));
    if as_adapter && !as_module {
        (module, role(first), Some(second))
    } else {
        let inner = segments.get(..module.len() + 1).unwrap_or(module);
        (inner, role(second), None)
    }
}

/// Names that are not a LoRA factor: a part of another method, a stray, or a full tensor.
fn other(segments: &[&str]) -> Role {
    if segments.contains(&"original_module") {
        return Role::Refused("the base's own copy of a module that was trained whole", "save the adapter with save_pretrained");
    }
    let parameter = segments.iter().rev().take(3);
    for segment in parameter {
        if let Some((_, what)) = TRAINING.iter().find(|(start, _)| segment.starts_with(start)) {
            return Role::Training(what);
        }
        if let Some((_, what)) = OTHER_METHODS.iter().find(|(start, _)| segment.starts_with(start)) {
            return Role::Refused(what, MERGE_IN_PEFT);
        }
    }
    match segments {
        _ if segments.contains(&"base_layer") => {
            Role::Refused("a parameter of the base's own layer, and neither its weight nor its bias", MERGE_IN_PEFT)
        }
        [_] => Role::Unknown,
        _ => Role::Full,
    }
}

/// A full tensor; `modules_to_save.<adapter>` is taken out of its path.
fn full<'a>(rest: &str, segments: &[&'a str]) -> (String, Role, Option<&'a str>) {
    let at = segments.iter().position(|&segment| segment == "modules_to_save");
    match at.map(|at| segments.split_at(at)) {
        Some((module, [_, adapter, parameter @ ..])) if !parameter.is_empty() => {
            let path: Vec<&str> = module.iter().chain(parameter).copied().collect();
            (path.join("."), Role::Full, Some(*adapter))
        }
        Some(_) => (rest.to_owned(), Role::Unknown, None),
        None => (rest.to_owned(), Role::Full, None),
    }
}
