//! What an adapter knows of its base and of its own history.

/// What an adapter says of the base that it belongs to. Everything is optional: PEFT records a name at most.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BaseIdentity {
    /// The name that the trainer wrote, for people; never opened, fetched or compared.
    pub name: Option<String>,
    /// Structure root of the base: names, dtypes and shapes of all its tensors (`spec/container.md`, base identity). Hexadecimal.
    pub structure: Option<String>,
    /// Content root of the base tensors that the adapter changes. Hexadecimal.
    pub targets: Option<String>,
}

/// One step of an adapter's history.
#[derive(Debug, Clone, PartialEq)]
pub struct Lineage {
    /// The verb: `convert`, `extract`, …
    pub op: String,
    /// Tool and version.
    pub tool: String,
    /// What went in.
    pub inputs: Vec<LineageInput>,
    /// Parameters as a JSON object, in canonical text.
    pub parameters: String,
}

/// One input of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LineageInput {
    /// `adapter`, `base`, …
    pub role: String,
    /// The dialect that it was read from.
    pub dialect: String,
    /// Its content root. Hexadecimal.
    pub content: String,
}
