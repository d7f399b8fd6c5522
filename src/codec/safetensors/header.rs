//! The strict reader of safetensors headers. The reference crate parses every header too and its verdict is final (`C-023`); what
//! stands here in addition is what it lets pass (repeated names, unknown fields, odd names) and the places that it does not tell.

use std::collections::HashMap;
use std::path::Path;

use serde_json::value::RawValue;

use super::Strictness;
use super::json::{Member, members};
use super::sniff::foreign_kind;
use crate::error::{Class, Diagnostic, Error, Result};
use crate::io::ByteSource;
use crate::limits::Limits;
use crate::rules::{self, Rule};
use crate::tensor::{Dtype, Shape, TensorInfo};

/// Length of the field before the header.
const LENGTH_FIELD: u64 = 8;

/// What is held of a tensor while a header is read, bytes: by this reader, by the reference, and by the maps that find it. Measured on a
/// million of them.
const PER_TENSOR: usize = 1280;

/// One tensor of a file.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) info: TensorInfo,
    /// Offset of the first byte from the start of the file.
    pub(crate) begin: u64,
    /// Offset behind the last byte.
    pub(crate) end: u64,
}

/// Keys and values of `__metadata__`, in order.
pub(crate) type Metadata = Vec<(String, String)>;

/// A checked header: every tensor lies in the file, and together they tile it.
#[derive(Debug)]
pub(crate) struct Header {
    /// Tensors in the order of the header's text.
    pub(crate) entries: Vec<Entry>,
    /// `__metadata__` in the order of the text.
    pub(crate) metadata: Metadata,
    /// Offset of the first data byte: length field and header.
    pub(crate) data_start: u64,
    /// What a lenient reader let pass.
    pub(crate) warnings: Vec<Diagnostic>,
}

/// Reads and checks the header of an open file.
///
/// # Errors
/// The first broken rule of `C-001` to `C-023`, with the byte offset.
pub(crate) fn read(source: &ByteSource, path: &Path, strictness: Strictness, limits: &Limits) -> Result<Header> {
    let text = read_text(source, path, limits)?;
    let mut reader = Reader {
        path,
        strictness,
        limits,
        file_len: source.len(),
        data_start: LENGTH_FIELD + text.len() as u64,
        warnings: Vec::new(),
    };
    let text = reader.check_text(&text)?;
    reader.check_memory(text)?;
    let (entries, metadata) = reader.parse(text)?;
    reader.check_tiling(&entries)?;
    reader.ask_reference(text)?;
    Ok(Header { entries, metadata, data_start: reader.data_start, warnings: reader.warnings })
}

/// The bytes of the header, after the checks of the length field.
fn read_text(source: &ByteSource, path: &Path, limits: &Limits) -> Result<Vec<u8>> {
    let fail = |rule, message: String| Error::new(rule, message).file(path).offset(0);
    let again = "the file is incomplete: download or copy it again";
    let file_len = source.len();
    if file_len == 0 {
        return Err(fail(rules::LENGTH_FIELD, "the file is empty".into()).help(again));
    }
    let mut head = vec![0; usize::try_from(file_len.min(64)).unwrap_or_default()];
    source.read_at(path, 0, &mut head)?;
    let foreign = |error: Error| match foreign_kind(&head) {
        Some((kind, help)) => fail(rules::IS_SAFETENSORS, format!("this is {kind}")).help(help),
        None => error,
    };
    let Some(field) = head.first_chunk::<8>() else {
        let message = format!("the file has {file_len} bytes, shorter than the 8-byte length field");
        return Err(foreign(fail(rules::LENGTH_FIELD, message).help(again)));
    };
    let len = u64::from_le_bytes(*field);
    if len == 0 {
        return Err(fail(rules::HEADER_NOT_EMPTY, "the header is empty".into()).help(again));
    }
    if len == u64::MAX {
        return Err(foreign(
            fail(rules::HEADER_LIMIT, format!("the header length is {len}, the mark of an interrupted in-place merge"))
                .class_of(Class::Busy)
                .help("complete the merge with loratool recover"),
        ));
    }
    if len > limits.header_bytes {
        let message = format!("the header length is {len} bytes, over the limit of {}", limits.header_bytes);
        return Err(foreign(fail(rules::HEADER_LIMIT, message).help("this is not a safetensors file, or a damaged one")));
    }
    let available = file_len - LENGTH_FIELD;
    if len > available {
        let message = format!(
            "the header is {len} bytes but only {available} follow: the file is truncated by at least {} bytes",
            len - available
        );
        return Err(foreign(fail(rules::HEADER_IN_FILE, message).help(again)));
    }
    let mut text = Vec::new();
    let size = usize::try_from(len).unwrap_or(usize::MAX);
    text.try_reserve_exact(size).map_err(|_| {
        fail(rules::MEMORY, format!("no memory for a header of {len} bytes"))
            .help("raise the limits on memory (ulimit -d, ulimit -v)")
    })?;
    text.resize(size, 0);
    source.read_at(path, LENGTH_FIELD, &mut text)?;
    Ok(text)
}

struct Reader<'a> {
    path: &'a Path,
    strictness: Strictness,
    limits: &'a Limits,
    file_len: u64,
    data_start: u64,
    warnings: Vec<Diagnostic>,
}

impl Reader<'_> {
    /// An error at `at` bytes into the header's text.
    #[cold]
    fn fail(&self, rule: &'static Rule, at: usize, message: impl Into<String>) -> Error {
        Error::new(rule, message).file(self.path).offset(LENGTH_FIELD + at as u64)
    }

    /// An error for strict readers, a warning for lenient ones.
    fn strict(&mut self, rule: &'static Rule, at: usize, message: String) -> Result<()> {
        let error = self.fail(rule, at, message);
        match self.strictness {
            Strictness::Strict => Err(error),
            Strictness::Lenient => {
                self.warnings.extend(error.into_diagnostics());
                Ok(())
            }
        }
    }

    /// Encoding, first and last byte. Returns the text without trailing spaces.
    fn check_text<'t>(&mut self, bytes: &'t [u8]) -> Result<&'t str> {
        if bytes.starts_with(b"\xef\xbb\xbf") {
            return Err(self
                .fail(rules::HEADER_UTF8, 0, "the header starts with a byte order mark (BOM)")
                .help("write the header without a BOM"));
        }
        let text = std::str::from_utf8(bytes)
            .map_err(|e| self.fail(rules::HEADER_UTF8, e.valid_up_to(), "the header is not UTF-8 from here on"))?;
        let trimmed = text.trim_start_matches(' ');
        let spaces = text.len() - trimmed.len();
        if spaces > 0 && trimmed.starts_with('{') {
            self.strict(rules::HEADER_START, 0, format!("the header starts with {spaces} spaces"))?;
        } else if !trimmed.starts_with('{') {
            let found = trimmed.chars().next().map_or(String::from("nothing"), |c| format!("{c:?}"));
            let rule = if matches!(trimmed.as_bytes().first(), Some(b'[' | b'"' | b'0'..=b'9' | b'-' | b'n' | b't' | b'f')) {
                rules::HEADER_OBJECT
            } else {
                rules::HEADER_START
            };
            return Err(self.fail(rule, spaces, format!("the header starts with {found}; expected object")));
        }
        let end = text.trim_end_matches(' ');
        if end.ends_with('\0') {
            let at = end.trim_end_matches('\0').len();
            return Err(self
                .fail(rules::HEADER_OBJECT, at, "NUL padding after the header")
                .help("headers are padded with spaces"));
        }
        let object = end.trim_end();
        if object.len() < end.len() {
            return Err(self.fail(rules::HEADER_OBJECT, object.len(), "white space other than spaces follows the header"));
        }
        Ok(end)
    }

    /// A small piece of memory that cannot be had ends the process, so all of them are asked for at once.
    fn check_memory(&self, text: &str) -> Result<()> {
        let needed = text.bytes().filter(|&byte| byte == b'{').count().saturating_mul(PER_TENSOR);
        Vec::<u8>::new().try_reserve_exact(needed).map_err(|_| {
            self.fail(rules::MEMORY, 0, format!("no memory to read a header of {} bytes", text.len()))
                .help("raise the limits on memory (ulimit -d, ulimit -v)")
        })
    }

    fn object<'t>(&self, rule: &'static Rule, at: usize, text: &'t str, what: &str) -> Result<Vec<Member<'t>>> {
        members(text).map_err(|e| {
            let before: usize = text.split_inclusive('\n').take(e.line().saturating_sub(1)).map(str::len).sum();
            let within = before + e.column().saturating_sub(1);
            self.fail(rule, at + within.min(text.len()), format!("{what} is not a JSON object: {e}"))
        })
    }

    fn parse(&mut self, text: &str) -> Result<(Vec<Entry>, Metadata)> {
        let found = self.object(rules::HEADER_OBJECT, 0, text, "the header")?;
        let tensors = found.iter().filter(|member| member.key != "__metadata__").count();
        if tensors > self.limits.tensors {
            return Err(self.fail(
                rules::TENSOR_LIMIT,
                0,
                format!("{tensors} tensors, over the limit of {}", self.limits.tensors),
            ));
        }
        let mut entries = Vec::with_capacity(found.len());
        let mut metadata = None;
        let mut seen: HashMap<&str, usize> = HashMap::with_capacity(found.len());
        for member in &found {
            if let Some(first) = seen.insert(&member.key, member.offset) {
                let rule = if member.key == "__metadata__" { rules::METADATA_STRINGS } else { rules::UNIQUE_NAMES };
                let message = format!(
                    "{:?} occurs twice, at bytes {} and {}",
                    member.key,
                    LENGTH_FIELD + first as u64,
                    LENGTH_FIELD + member.offset as u64
                );
                let help = "two readers would see two different files; write it again";
                return Err(self.fail(rule, member.offset, message).tensor(member.key.as_ref()).help(help));
            }
            if member.key == "__metadata__" {
                metadata = Some(self.metadata(member)?);
            } else {
                entries.push(self.entry(member)?);
            }
        }
        Ok((entries, metadata.unwrap_or_default()))
    }

    fn metadata(&mut self, member: &Member<'_>) -> Result<Metadata> {
        if member.value.get() == "null" {
            // MLX writes it; there is one meaning that it can have.
            self.warnings.extend(self.fail(rules::METADATA_STRINGS, member.offset, "__metadata__ is null").into_diagnostics());
            return Ok(Vec::new());
        }
        let mut found: Vec<(String, String)> = Vec::new();
        let mut seen = HashMap::new();
        for m in self.object(rules::METADATA_STRINGS, member.offset, member.value.get(), "__metadata__")? {
            let at = member.offset + m.offset;
            if seen.insert(m.key.to_string(), at).is_some() {
                return Err(self
                    .fail(rules::METADATA_STRINGS, at, format!("metadata key {:?} occurs twice", m.key))
                    .tensor(m.key));
            }
            let value: String = serde_json::from_str(m.value.get()).map_err(|_| {
                self.fail(rules::METADATA_STRINGS, at, format!("metadata values must be strings, {:?} is not", m.key))
            })?;
            if value.len() > self.limits.metadata_bytes {
                let message = format!(
                    "metadata value {:?} has {} bytes, over the limit of {}",
                    m.key,
                    value.len(),
                    self.limits.metadata_bytes
                );
                return Err(self.fail(rules::METADATA_LIMIT, at, message));
            }
            found.push((m.key.into_owned(), value));
        }
        Ok(found)
    }

    fn entry(&mut self, member: &Member<'_>) -> Result<Entry> {
        let name = member.key.as_ref();
        self.check_name(name, member.offset)?;
        self.entry_fields(member).map_err(|e| e.tensor(name))
    }

    fn check_name(&self, name: &str, at: usize) -> Result<()> {
        let message = if name.is_empty() {
            "a tensor has an empty name".to_owned()
        } else if name.len() > self.limits.name_bytes {
            format!("a tensor name has {} bytes, over the limit of {}", name.len(), self.limits.name_bytes)
        } else if name.chars().any(char::is_control) {
            format!("the tensor name {} has control characters", name.escape_debug())
        } else {
            return Ok(());
        };
        Err(self.fail(rules::NAME_SANE, at, message))
    }

    fn entry_fields(&mut self, member: &Member<'_>) -> Result<Entry> {
        let name = member.key.as_ref();
        let at = member.offset;
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        for m in self.object(rules::ENTRY_FIELDS, at, member.value.get(), &format!("the entry of {name:?}"))? {
            let here = at + m.offset;
            let repeated = match m.key.as_ref() {
                "dtype" => dtype.replace(self.dtype(name, here, m.value)?).is_some(),
                "shape" => shape.replace(self.shape(name, here, m.value)?).is_some(),
                "data_offsets" => offsets.replace(self.offsets(name, here, m.value)?).is_some(),
                other => {
                    self.strict(rules::ENTRY_FIELDS, here, format!("tensor {name:?} has an unknown field {other:?}"))?;
                    false
                }
            };
            if repeated {
                return Err(self.fail(rules::ENTRY_FIELDS, here, format!("tensor {name:?} has {:?} twice", m.key)));
            }
        }
        let missing = |field: &str| self.fail(rules::ENTRY_FIELDS, at, format!("tensor {name:?} has no {field}"));
        let dtype = dtype.ok_or_else(|| missing("dtype"))?;
        let shape = shape.ok_or_else(|| missing("shape"))?;
        let (begin, end) = offsets.ok_or_else(|| missing("data_offsets"))?;
        let found = end - begin;
        if shape.bytes(dtype) != Some(found) {
            let wanted = shape.bytes(dtype).map_or_else(|| "no whole number of bytes".to_owned(), |n| format!("{n} bytes"));
            return Err(self.fail(
                rules::SIZE_AGREES,
                at,
                format!("tensor {name:?} is {dtype} {shape}, {wanted}, but has {found}"),
            ));
        }
        let in_file = |offset: u64| self.data_start.checked_add(offset);
        match (in_file(begin), in_file(end)) {
            (Some(begin), Some(end)) if end <= self.file_len => {
                Ok(Entry { name: name.to_owned(), info: TensorInfo { dtype, shape }, begin, end })
            }
            _ => {
                let has = self.file_len - self.data_start;
                Err(self
                    .fail(
                        rules::DATA_IN_FILE,
                        at,
                        format!(
                            "tensor {name:?} needs {end} bytes of data, file has {has}: truncated by {} bytes",
                            end.saturating_sub(has)
                        ),
                    )
                    .help("the file is incomplete: download or copy it again"))
            }
        }
    }

    fn dtype(&self, name: &str, at: usize, value: &RawValue) -> Result<Dtype> {
        serde_json::from_str(value.get()).map_err(|_| {
            let known = "BOOL U8 I8 U16 I16 F16 BF16 U32 I32 F32 U64 I64 F64 C64 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ F6_E2M3 F6_E3M2 F4";
            self.fail(rules::DTYPE_KNOWN, at, format!("tensor {name:?} has the unknown dtype {}; known are {known}", clip(value.get())))
        })
    }

    fn shape(&self, name: &str, at: usize, value: &RawValue) -> Result<Shape> {
        let wrong = |message: String| self.fail(rules::SHAPE_INTEGERS, at, message);
        let items: Vec<&RawValue> = serde_json::from_str(value.get())
            .map_err(|_| wrong(format!("the shape of {name:?} is not a list: {}", clip(value.get()))))?;
        let mut dims = Vec::with_capacity(items.len().min(16));
        for (i, item) in items.iter().enumerate() {
            let dim = item.get().parse::<u64>().ok().filter(|&d| d <= i64::MAX as u64 && !item.get().starts_with('+'));
            match dim {
                Some(dim) => dims.push(dim),
                None if item.get().bytes().all(|b| b.is_ascii_digit()) => {
                    return Err(wrong(format!("dimension {i} of {name:?}, {}, does not fit 63 bits", clip(item.get()))));
                }
                None => {
                    return Err(wrong(format!(
                        "dimension {i} of {name:?} is {}; expected an integer of at least 0",
                        clip(item.get())
                    )));
                }
            }
        }
        let text = clip(value.get());
        Shape::new(dims).ok_or_else(|| self.fail(rules::SIZE_AGREES, at, format!("the shape {text} of {name:?} overflows")))
    }

    fn offsets(&self, name: &str, at: usize, value: &RawValue) -> Result<(u64, u64)> {
        let pair = serde_json::from_str::<Vec<u64>>(value.get()).ok();
        match pair.as_deref() {
            Some(&[begin, end]) if begin <= end => Ok((begin, end)),
            _ => Err(self.fail(
                rules::OFFSETS_ORDERED,
                at,
                format!("data_offsets of {name:?} are {}; expected [begin, end]", clip(value.get())),
            )),
        }
    }

    /// The tensors, sorted by offset, follow each other without holes and end where the file ends.
    fn check_tiling(&self, entries: &[Entry]) -> Result<()> {
        let mut sorted: Vec<&Entry> = entries.iter().collect();
        sorted.sort_unstable_by_key(|e| (e.begin, e.end));
        let mut position = self.data_start;
        let mut previous = "the header";
        for entry in sorted {
            let place = |rule, message| Error::new(rule, message).file(self.path).tensor(&entry.name).offset(entry.begin);
            if entry.begin > position {
                return Err(place(
                    rules::NO_HOLES,
                    format!("a hole of {} bytes lies between {previous:?} and {:?}", entry.begin - position, entry.name),
                ));
            }
            if entry.begin < position {
                return Err(place(
                    rules::NO_OVERLAP,
                    format!("{previous:?} and {:?} overlap by {} bytes", entry.name, position - entry.begin),
                ));
            }
            position = entry.end;
            previous = &entry.name;
        }
        match self.file_len - position {
            0 => Ok(()),
            extra => Err(Error::new(rules::NO_TRAILING, format!("{extra} bytes follow the last tensor, {previous:?}"))
                .file(self.path)
                .offset(position)
                .help("cut the file at that offset if you know why they are there, or download it again")),
        }
    }

    /// The reference reader's own verdict, on the same text.
    fn ask_reference(&self, text: &str) -> Result<()> {
        match serde_json::from_str::<::safetensors::tensor::Metadata>(text) {
            Ok(_) => Ok(()),
            Err(e) => {
                Err(self.fail(rules::REFERENCE_ACCEPTS, 0, format!("the safetensors reference reader refuses this header: {e}")))
            }
        }
    }
}

/// A value from a file as a message may show it: escaped and short.
fn clip(text: &str) -> String {
    let mut shown: String = text.chars().take(60).collect::<String>().escape_debug().to_string();
    if text.chars().nth(60).is_some() {
        shown.push('…');
    }
    shown
}
