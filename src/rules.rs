//! The rules that loratool enforces, one constant each. The same ids stand in `spec/` (what the rule says), in the code (where
//! it is enforced), in error messages and in `spec/vectors/manifest.json` (a file that breaks it); `tests/spec.rs` holds the
//! three lists equal.
//!
//! `C` rules are of the file and the container (`spec/container.md`), `K` of checkpoints (`spec/checkpoint.md`), `A` of the
//! meaning of an adapter and of its binding to a base (`spec/adapter-model.md`), `P` of PEFT's format (`spec/mapping/peft.md`).
//! `E` (environment) and `U` (usage) rules are of this tool alone and are listed in `docs/errors.md`.

use crate::error::Class;

/// One rule: its id, the class of outcome when it is broken, and what it demands, in a few words.
#[derive(Debug, PartialEq, Eq)]
pub struct Rule {
    /// Stable id, such as `C-008`. Never renumbered.
    pub id: &'static str,
    /// Class of outcome when the rule is broken, unless the error says otherwise.
    pub class: Class,
    /// The demand in a few words, as in the heading of the rule's paragraph in `spec/`.
    pub title: &'static str,
}

macro_rules! rules {
    ($($name:ident = $id:literal, $class:ident, $title:literal;)*) => {
        $(#[doc = concat!("`", $id, "`: ", $title, ".")] pub const $name: &Rule = &Rule { id: $id, class: Class::$class, title: $title };)*
        /// Every rule, in the order of this file.
        pub const ALL: &[&Rule] = &[$($name),*];
    };
}

rules! {
    // --- C: the file ---------------------------------------------------------------------------------------------
    LENGTH_FIELD      = "C-001", Format, "the file begins with an 8-byte header length";
    HEADER_NOT_EMPTY  = "C-002", Format, "the header is not empty";
    HEADER_LIMIT      = "C-003", Limit,  "the header is no longer than 100,000,000 bytes";
    HEADER_IN_FILE    = "C-004", Format, "the header lies within the file";
    HEADER_UTF8       = "C-005", Format, "the header is UTF-8 without a byte order mark";
    HEADER_START      = "C-006", Format, "the header starts with a left brace";
    HEADER_OBJECT     = "C-007", Format, "the header is one JSON object, followed by spaces only";
    UNIQUE_NAMES      = "C-008", Format, "no name occurs twice";
    METADATA_STRINGS  = "C-009", Format, "metadata is one object of strings without repeated keys";
    ENTRY_FIELDS      = "C-010", Format, "an entry has dtype, shape and data_offsets, each once, and nothing else";
    DTYPE_KNOWN       = "C-011", Format, "the dtype is a known one";
    SHAPE_INTEGERS    = "C-012", Format, "each dimension is an integer from 0 to 2^63-1";
    SIZE_AGREES       = "C-013", Format, "dtype, shape and length of the data agree";
    OFFSETS_ORDERED   = "C-014", Format, "data_offsets are two integers, begin no greater than end";
    DATA_IN_FILE      = "C-015", Format, "the data lies within the file";
    NO_HOLES          = "C-016", Format, "the data has no holes";
    NO_OVERLAP        = "C-017", Format, "no two tensors overlap";
    NO_TRAILING       = "C-018", Format, "nothing follows the last tensor";
    NAME_SANE         = "C-019", Format, "a name is 1 to 1024 bytes without control characters";
    IS_SAFETENSORS    = "C-020", Format, "the file is a safetensors file and not something else under its name";
    TENSOR_LIMIT      = "C-021", Limit,  "the file has no more than 1,000,000 tensors";
    METADATA_LIMIT    = "C-022", Limit,  "a metadata value is no longer than 32 MiB";
    REFERENCE_ACCEPTS = "C-023", Format, "the safetensors reference reader accepts the header";
    // --- C: the manifest -----------------------------------------------------------------------------------------
    MANIFEST_JSON     = "C-030", Format, "the manifest is one JSON object without repeated keys";
    MANIFEST_VERSION  = "C-031", Format, "the container version is one the reader knows";
    FEATURES_KNOWN    = "C-032", Mismatch, "every required feature is known to the reader";
    MANIFEST_FIELDS   = "C-033", Format, "the manifest has the listed members with the listed types, and no others";
    MANIFEST_BALANCE  = "C-034", Format, "each tensor of the file is named exactly once by the manifest, and each named tensor exists";
    MANIFEST_SHAPES   = "C-035", Format, "ranks and shapes in the manifest agree with the tensors";
    MANIFEST_SCALE    = "C-036", Format, "the effective scale agrees with rank, alpha and scaling rule";
    TENSOR_DIGEST     = "C-037", Integrity, "each tensor has the digest that the manifest states";
    CONTENT_ROOT      = "C-038", Integrity, "the content root follows from the tensor digests";
    IDENTITY_FORM     = "C-039", Format, "digests and the base's identity are 64 lower-case hexadecimal digits";
    CANONICAL         = "C-040", Format, "a writer emits the canonical bytes";
    FORMAT_PT         = "C-041", Format, "metadata carries format = pt";
    LINEAGE_FORM      = "C-042", Format, "lineage is a list of records of the stated form";
    // --- K: the checkpoint ---------------------------------------------------------------------------------------
    IS_CHECKPOINT     = "K-001", Io,     "the path is a safetensors file, or a folder with one or with an index";
    INDEX_JSON        = "K-002", Format, "the index is a JSON object with a weight_map of strings";
    INDEX_PATHS       = "K-003", Format, "a shard is named by a plain file name inside the folder";
    SHARD_PRESENT     = "K-004", Io,     "every shard that the index names is there";
    INDEX_UNIQUE      = "K-005", Format, "no name occurs twice in the index";
    INDEX_HOLDS       = "K-006", Format, "the shard that the index names holds the tensor";
    INDEX_COMPLETE    = "K-007", Format, "every tensor of every shard is in the index, and in one shard only";
    LINKS_CONTAINED   = "K-008", Format, "a link leads only into the blob store of a model cache";
    REGULAR_FILE      = "K-009", Io,     "only regular files are read";
    TOTAL_SIZE        = "K-010", Format, "total_size is the sum of the tensors' bytes";
    LEFTOVERS         = "K-011", Format, "no second set of weights lies beside the one that is used";
    BLOB_DIGEST       = "K-012", Integrity, "a file named by a digest has that digest";
    INDEX_LIMIT       = "K-013", Limit,  "the index is within its limits of size and of entries";
    CASE_DISTINCT     = "K-014", Format, "shard names differ by more than case";
    CONFIG_READABLE   = "K-015", Format, "config.json, if present, is a JSON object";
    // --- A: the adapter ------------------------------------------------------------------------------------------
    FACTORS_PAIRED    = "A-001", Mismatch, "factors come in pairs";
    RANK_AGREES       = "A-002", Mismatch, "both factors have one rank, and it is at least 1";
    RANK_LIMIT        = "A-003", Limit,    "the rank is within its limit";
    FACTOR_SHAPES     = "A-004", Mismatch, "factors have the shape that their kind demands";
    FACTOR_DTYPE      = "A-005", Mismatch, "factors are F64, F32, F16 or BF16";
    ALPHA_SANE        = "A-006", Mismatch, "alpha is finite and not zero";
    SCALE_SANE        = "A-007", Mismatch, "a negative or huge scale is asked for by name";
    FACTORS_FINITE    = "A-008", Numeric,  "factors and replacements are finite";
    TARGETS_UNIQUE    = "A-009", Mismatch, "a base tensor is changed by one target of an adapter only";
    METHOD_SUPPORTED  = "A-010", Mismatch, "the method is one that is applied exactly";
    REPLACEMENT_SHAPE = "A-011", Mismatch, "a replacement has the shape of what it replaces";
    ADAPTER_NOT_EMPTY = "A-012", Mismatch, "the adapter changes something";
    // --- A: binding to a base ------------------------------------------------------------------------------------
    SOME_TARGET       = "A-020", Mismatch, "the base has the adapter's targets";
    EVERY_TARGET      = "A-021", Mismatch, "every target of the adapter is in the base";
    ONE_RENAMING      = "A-022", Mismatch, "one renaming maps every target, and only one does";
    SHAPE_FITS        = "A-023", Mismatch, "the update has exactly the shape of the base tensor";
    ORIENTATION       = "A-024", Mismatch, "the orientation of a square weight is declared";
    BASE_DTYPE        = "A-025", Mismatch, "a target is an unpacked float tensor";
    TIED_WEIGHTS      = "A-026", Mismatch, "a tied weight is not changed by one of its names alone";
    BASE_IDENTITY     = "A-027", Mismatch, "the base is the one that the adapter names";
    BIAS_PRESENT      = "A-028", Mismatch, "a bias that is changed exists in the base";
    ROLES             = "A-029", Mismatch, "the base is a model and the adapter an adapter";
    BASE_FINITE       = "A-030", Numeric,  "the base tensors that are changed are finite";
    RESULT_FINITE     = "A-031", Numeric,  "the result is finite in the output dtype";
    ADAPTER_ONCE      = "A-032", Usage,    "an adapter is given once";
    NEW_TENSOR        = "A-033", Mismatch, "a tensor that the base lacks is added only on request";
    ONE_ROUNDING      = "A-034", Numeric,  "the result is rounded once";
    UPDATE_SURVIVES   = "A-035", Numeric,  "the update survives rounding to the output dtype";
    // --- P: PEFT -------------------------------------------------------------------------------------------------
    CONFIG_ENCODING   = "P-001", Format,   "adapter_config.json is UTF-8 JSON without a byte order mark";
    CONFIG_UNIQUE     = "P-002", Format,   "no key occurs twice in adapter_config.json";
    PEFT_TYPE         = "P-003", Mismatch, "peft_type is LORA";
    CONFIG_TYPES      = "P-004", Format,   "a field has the type that PEFT gives it";
    CONFIG_LIMIT      = "P-005", Limit,    "the config is within its limits";
    CONFIG_METHOD     = "P-006", Mismatch, "a field that changes the meaning of the weights is honoured or refused";
    INIT_CHANGES_BASE = "P-007", Mismatch, "an initialisation that changes the base is refused on the published base";
    PATTERN_REGEX     = "P-008", Mismatch, "patterns are regular expressions that end within the step limit";
    PATTERN_USED      = "P-009", Mismatch, "every rank and alpha pattern matches a target";
    RANK_RESOLVED     = "P-010", Mismatch, "the rank of the tensors is the rank that the config resolves to";
    KEY_GRAMMAR       = "P-011", Mismatch, "every tensor name is one that PEFT writes";
    ONE_ADAPTER       = "P-012", Mismatch, "the file holds one adapter";
    FULL_TENSOR_NAMED = "P-013", Mismatch, "a full tensor is announced by modules_to_save or bias";
    CONFIG_AGREES     = "P-014", Mismatch, "adapter_config.json and the container's manifest agree";
    CONFIG_UNKNOWN    = "P-015", Mismatch, "fields are known ones";
    TARGETS_COVERED   = "P-016", Mismatch, "target_modules covers the tensors";
    CONFIG_PRESENT    = "P-017", Mismatch, "scaling is stated: adapter_config.json is present";
    FOREIGN_DIALECT   = "P-018", Mismatch, "the names are PEFT's and not another tool's";
    WEIGHTS_PRESENT   = "P-019", Io,       "adapter_model.safetensors is present";
    // --- E: environment, U: usage --------------------------------------------------------------------------------
    READ              = "E-001", Io,    "input can be read";
    WRITE             = "E-002", Io,    "output can be written";
    SPACE             = "E-003", Io,    "there is space for the output";
    CHANGED           = "E-004", Io,    "input does not change while it is read";
    REREAD            = "E-005", Integrity, "what was written reads back as planned";
    INTERRUPTED       = "E-006", Interrupted, "the run is not interrupted";
    NOT_REGULAR       = "E-007", Io,    "input is a regular file";
    MEMORY            = "E-008", Limit, "memory can be had, and is allowed";
    BALANCE           = "E-009", Integrity, "the counts of tensors balance";
    JOURNAL           = "E-010", Integrity, "a journal is whole, and is that of the file";
    PENDING           = "E-011", Busy,  "no merge into the file is going on or interrupted";
    DECOMPOSED        = "E-012", Numeric, "a decomposition converges";
    COMPUTED          = "E-013", Numeric, "a forward pass can be computed";
    ARGUMENT          = "U-001", Usage, "an argument has a value of its kind";
    OUTPUT_EXISTS     = "U-002", Usage, "output is not overwritten unasked";
    OUTPUT_IS_INPUT   = "U-003", Usage, "output is not an input, and is not written through a link";
    IS_MERGE          = "U-004", Negative, "a checkpoint that is verified is the merge that it is said to be";
    IN_PLACE          = "U-005", Usage, "the checkpoint can be changed in place";
    LOADER_READS      = "U-006", Negative, "a loader that is asked about reads the adapter as it is";
    PORTABLE          = "U-007", Mismatch, "what is baked can be said by a plain adapter";
    SOME_CHANGE       = "U-008", Negative, "the tuned checkpoint holds a change that an adapter can hold";
    LITTLE_LEFT_OUT   = "U-009", Mismatch, "what an extraction leaves out is little, or is asked to be left out";
    RUNNABLE          = "U-010", Mismatch, "the model is one that can be run, and its input one that it takes";
    TOKENIZER         = "U-011", Format, "the model has a tokenizer that can be read";
    DATA              = "U-012", Format, "a row of data has what the task needs";
}
