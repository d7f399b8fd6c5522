//! From the text of a manifest to its value. The order of checks is that of section 8 of the specification, so that two readers name
//! the same rule for the same file: JSON, version, features, members, lineage, digests.

use std::collections::{BTreeSet, HashSet};
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::fields::Object;
use super::manifest::{
    Axes, Base, BiasEntry, EntryKind, FEATURES, Input, Manifest, Origin, REMOVED, Record, ReplacementEntry, RescalingEntry,
    ResidualEntry, RowsEntry, TargetEntry,
};
use crate::adapter::{Axis, ScalingRule};
use crate::error::{Diagnostic, Error, Result};
use crate::rules;

const MEMBERS: [&str; 14] = [
    "container",
    "required",
    "optional",
    "base",
    "targets",
    "replacements",
    "rows",
    "rescalings",
    "replication",
    "residual",
    "digests",
    "content",
    "lineage",
    "origin",
];

/// Refuses text that is not one JSON object in which no key occurs twice, at any level (`C-030`).
pub(super) fn check_json(text: &str) -> Result<()> {
    let mut parser = serde_json::Deserializer::from_str(text);
    let checked = parser.deserialize_map(Unrepeated).and_then(|()| parser.end());
    checked.map_err(|e| Error::new(rules::MANIFEST_JSON, format!("the manifest is not a JSON object without repeated keys: {e}")))
}

impl Manifest {
    /// Reads a manifest that [`check_json`] let pass.
    ///
    /// # Errors
    /// The first broken rule of `C-031`, `C-032`, `C-033` and `C-042`; every broken `C-039`.
    pub(super) fn parse(text: &str) -> Result<Manifest> {
        let top = Object::new(rules::MANIFEST_FIELDS, "the manifest", text)?;
        let container = top.string("container")?;
        check_version(&container)?;
        let required: BTreeSet<String> = top.strings("required")?.into_iter().collect();
        check_features(&required)?;

        let top = top.only(&MEMBERS)?;
        let base = top.object("base")?.only(&["name", "structure", "targets"])?;
        let manifest = Manifest {
            container,
            required,
            optional: top.strings("optional")?.into_iter().collect(),
            base: Base {
                name: base.string_or_null("name")?,
                structure: base.string_or_null("structure")?,
                targets: base.string_or_null("targets")?,
            },
            targets: top.objects("targets")?.into_iter().map(target).collect::<Result<_>>()?,
            replacements: top.objects("replacements")?.into_iter().map(replacement).collect::<Result<_>>()?,
            rows: optional(&top, "rows")?.into_iter().map(rows).collect::<Result<_>>()?,
            rescalings: optional(&top, "rescalings")?.into_iter().map(rescaling).collect::<Result<_>>()?,
            replication: top.get("replication").map(|_| top.pairs("replication")).transpose()?.unwrap_or_default(),
            residual: top.get("residual").map(|_| residual(top.object("residual")?)).transpose()?,
            digests: top.object("digests")?.string_members()?.into_iter().collect(),
            content: top.string("content")?,
            origin: top.get("origin").map(|_| origin(top.object("origin")?)).transpose()?,
            lineage: Vec::new(),
        };
        check_listed(&manifest)?;
        let lineage = lineage(top.raw("lineage")?)?;
        check_hex(&manifest)?;
        Ok(Manifest { lineage, ..manifest })
    }
}

/// `MAJOR.MINOR` in decimal without leading zeros; any minor version of major version 1 is known, its features permitting.
fn check_version(version: &str) -> Result<()> {
    let decimal = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit()) && (s == "0" || !s.starts_with('0'));
    let error = |message: String| Error::new(rules::MANIFEST_VERSION, message);
    match version.split_once('.') {
        Some(("1", minor)) if decimal(minor) => Ok(()),
        Some((major, minor)) if decimal(major) && decimal(minor) => {
            Err(error(format!("the container has version {version}; this version reads 1.x")).help("use a newer loratool"))
        }
        _ => Err(error(format!("the container version is {version:?}; expected MAJOR.MINOR"))),
    }
}

fn check_features(required: &BTreeSet<String>) -> Result<()> {
    let unknown = required.iter().filter(|feature| !FEATURES.contains(&feature.as_str()));
    let problem = |feature: &String| {
        let message = format!("the container requires the feature {feature:?}, which this version does not implement");
        Diagnostic::new(rules::FEATURES_KNOWN, message).help("use a newer loratool, or ask for an adapter without it")
    };
    Error::check(unknown.map(problem).collect())
}

/// A feature that is used without being listed would be misread by a reader that does not know it.
fn check_listed(manifest: &Manifest) -> Result<()> {
    let used = manifest.used_features();
    match used.difference(&manifest.required).next() {
        None => Ok(()),
        Some(feature) => Err(Error::new(
            rules::MANIFEST_FIELDS,
            format!("the manifest uses the feature {feature:?} but required does not list it"),
        )),
    }
}

fn target(entry: Object<'_>) -> Result<TargetEntry> {
    let entry = entry.only(&[
        "tensor",
        "kind",
        "axes",
        "shape",
        "a",
        "b",
        "rank",
        "alpha",
        "scaling",
        "scale",
        "bias",
        "magnitude",
        "singular_values",
    ])?;
    let kind = entry.string("kind")?;
    let kind = EntryKind::from_name(&kind)
        .ok_or_else(|| entry.wrong("kind", "linear, linear_transposed, embedding, conv1d, conv2d, conv3d, experts or flat"))?;
    let axes = match (kind, entry.get("axes")) {
        (EntryKind::Experts, _) => {
            let axes = entry.string("axes")?;
            Some(Axes::from_name(&axes).ok_or_else(|| entry.wrong("axes", "in_out or out_in"))?)
        }
        (_, None) => None,
        (_, Some(_)) => return Err(entry.wrong("axes", "no such member, which only experts have")),
    };
    let scaling = entry.string("scaling")?;
    Ok(TargetEntry {
        tensor: entry.string("tensor")?,
        kind,
        axes,
        shape: entry.integers("shape")?,
        a: entry.string("a")?,
        b: entry.string("b")?,
        rank: entry.integer("rank")?,
        alpha: entry.number("alpha")?,
        scaling: ScalingRule::from_name(&scaling).ok_or_else(|| entry.wrong("scaling", "alpha/rank or alpha/sqrt(rank)"))?,
        scale: entry.number("scale")?,
        bias: entry.get("bias").map(|_| bias(entry.object("bias")?)).transpose()?,
        magnitude: entry.get("magnitude").map(|_| entry.string("magnitude")).transpose()?,
        singular_values: entry
            .get("singular_values")
            .map(|_| entry.numbers("singular_values"))
            .transpose()?
            .filter(|values| !values.is_empty()),
    })
}

/// A list that is left out where it is empty.
fn optional<'a>(top: &Object<'a>, name: &'static str) -> Result<Vec<Object<'a>>> {
    if top.get(name).is_some() { top.objects(name) } else { Ok(Vec::new()) }
}

fn rows(entry: Object<'_>) -> Result<RowsEntry> {
    let entry = entry.only(&["tensor", "rows", "with"])?;
    Ok(RowsEntry { tensor: entry.string("tensor")?, rows: entry.integers("rows")?, with: entry.string("with")? })
}

fn residual(entry: Object<'_>) -> Result<ResidualEntry> {
    let entry = entry.only(&["why", "removed"])?;
    let name = entry.string("removed")?;
    let removed = REMOVED.iter().find(|(known, _)| *known == name).map(|(_, removed)| *removed);
    let removed = removed.ok_or_else(|| entry.wrong("removed", "a known name of what was taken out, or unknown"))?;
    Ok(ResidualEntry { why: entry.string("why")?, removed })
}

fn rescaling(entry: Object<'_>) -> Result<RescalingEntry> {
    let entry = entry.only(&["tensor", "axis", "transposed", "if_there", "by"])?;
    let axis = match entry.string("axis")?.as_str() {
        "output" => Axis::Output,
        "input" => Axis::Input,
        _ => return Err(entry.wrong("axis", "output or input")),
    };
    let (transposed, if_there) = (entry.flag("transposed")?, entry.flag("if_there")?);
    Ok(RescalingEntry { tensor: entry.string("tensor")?, axis, transposed, if_there, by: entry.string("by")? })
}

fn bias(entry: Object<'_>) -> Result<BiasEntry> {
    let entry = entry.only(&["tensor", "delta"])?;
    Ok(BiasEntry { tensor: entry.string("tensor")?, delta: entry.string("delta")? })
}

fn replacement(entry: Object<'_>) -> Result<ReplacementEntry> {
    let entry = entry.only(&["tensor", "with", "shared"])?;
    let shared = entry.get("shared").map(|_| entry.flag("shared")).transpose()?.unwrap_or(false);
    Ok(ReplacementEntry { tensor: entry.string("tensor")?, with: entry.string("with")?, shared })
}

fn origin(entry: Object<'_>) -> Result<Origin> {
    let entry = entry.only(&["dialect", "config"])?;
    Ok(Origin { dialect: entry.string("dialect")?, config: entry.any_object("config")? })
}

fn lineage(raw: &str) -> Result<Vec<Record>> {
    let whole = format!("{{\"lineage\":{raw}}}");
    let records = Object::new(rules::LINEAGE_FORM, "the manifest", &whole)?.objects("lineage")?;
    records.into_iter().map(record).collect()
}

fn record(entry: Object<'_>) -> Result<Record> {
    let entry = entry.only(&["op", "tool", "inputs", "parameters"])?;
    Ok(Record {
        op: entry.string("op")?,
        tool: entry.string("tool")?,
        inputs: entry.objects("inputs")?.into_iter().map(input).collect::<Result<_>>()?,
        parameters: entry.any_object("parameters")?,
    })
}

fn input(entry: Object<'_>) -> Result<Input> {
    let entry = entry.only(&["role", "dialect", "content"])?;
    let content = entry.string("content")?;
    if !is_digest(&content) {
        return Err(entry.wrong("content", "64 lower-case hexadecimal digits"));
    }
    Ok(Input { role: entry.string("role")?, dialect: entry.string("dialect")?, content })
}

fn check_hex(manifest: &Manifest) -> Result<()> {
    let base = [("base.structure", &manifest.base.structure), ("base.targets", &manifest.base.targets)];
    let base = base.into_iter().filter_map(|(place, digest)| Some((place.to_owned(), digest.as_ref()?)));
    let tensors = manifest.digests.iter().map(|(name, digest)| (format!("the digest of {name:?}"), digest));
    let all = base.chain(tensors).chain([("content".to_owned(), &manifest.content)]);
    let problem = |(place, digest): (String, &String)| {
        let message = format!("{place} is {digest:?}; expected 64 lower-case hexadecimal digits");
        Diagnostic::new(rules::IDENTITY_FORM, message)
    };
    Error::check(all.filter(|(_, digest)| !is_digest(digest)).map(problem).collect())
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Walks through a whole JSON value and refuses repeated keys. `serde_json` bounds the depth, the numbers and the escapes.
struct Unrepeated;

impl<'de> DeserializeSeed<'de> for Unrepeated {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Unrepeated {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<(), M::Error> {
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            map.next_value_seed(Unrepeated)?;
            if let Some(twice) = seen.replace(key) {
                return Err(M::Error::custom(format_args!("{twice:?} occurs twice")));
            }
        }
        Ok(())
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut items: S) -> Result<(), S::Error> {
        while items.next_element_seed(Unrepeated)?.is_some() {}
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }
}
