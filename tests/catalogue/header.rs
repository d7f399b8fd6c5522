//! Table H: headers.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use loratool::{Limits, ReadMode, Result, SafetensorsFile, Strictness, TensorSource};
use loratool::{inspect_checkpoint, open_adapter, open_checkpoint, validate_checkpoint};
use safetensors::SafeTensors;

use crate::bad::{Bad, rows};
use crate::bytes::{data_start, edit_header, file, floats, raw, safetensors, stored, tensor};
use crate::scene::{FACTORS, MODEL, NORM, Scene, WEIGHT, factors, norm, weight};

/// One F32 value.
const ONE_F32: &str = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;

fn entry(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}"#)
}

/// A file of one tensor `a` with this entry and four bytes of data.
fn of_entry(entry: &str) -> Vec<u8> {
    file(format!(r#"{{"a":{entry}}}"#), &[0; 4])
}

fn of_shape(shape: &str) -> Vec<u8> {
    of_entry(&entry(r#""F32""#, shape, "[0,4]"))
}

/// A sound file of one F32 tensor of this name, the name being written as JSON.
fn named(json: &str) -> Vec<u8> {
    file(format!(r#"{{{json}:{ONE_F32}}}"#), &[0; 4])
}

/// A sound tensor and another member before it.
fn with_member(member: &str) -> Vec<u8> {
    file(format!(r#"{{{member},"a":{ONE_F32}}}"#), &[0; 4])
}

/// A file that begins with this length and is otherwise empty but for `{}` and padding.
fn of_length(len: u64) -> Vec<u8> {
    [&len.to_le_bytes()[..], b"{}", &[b' '; 90]].concat()
}

/// Two tensors, `a` and `b`, at these places of `len` bytes of data.
fn two(a: (u64, u64), b: (u64, u64), len: usize) -> Vec<u8> {
    let entry = |(begin, end): (u64, u64)| entry(r#""U8""#, &format!("[{}]", end - begin), &format!("[{begin},{end}]"));
    file(format!(r#"{{"a":{},"b":{}}}"#, entry(a), entry(b)), &vec![0; len])
}

/// The same text twice over, as deep as `depth`.
fn deep(depth: usize) -> String {
    "[".repeat(depth) + &"]".repeat(depth)
}

/// Refused under `rule` for naming a tensor twice, with the places of both.
fn twice(rule: &'static str, header: &str, data: &[u8]) -> Bad {
    let first = 8 + header.find("{\"").unwrap() + header[1..].find('{').unwrap() + 1;
    let second = 8 + header.rfind('{').unwrap();
    Bad::file(3, rule, file(header, data)).tensor("a").at(second).says(format!("{first} and {second}")).says("\"a\"")
}

rows! {
    h01_files_shorter_than_the_length_field => {
        let short =
            |n: usize| Bad::file(3, "C-001", vec![1; n]).says("shorter than the 8-byte length field").says(format!("{n} bytes"));
        let empty = Bad::file(3, "C-001", b"").says("empty");
        std::iter::once(empty).chain((1..8).map(short)).map(|bad| bad.says("download").at(0)).collect()
    };
    h03_header_of_length_zero => {
        vec![Bad::file(3, "C-002", file("", b"")).says("header is empty"), Bad::file(3, "C-002", file("", &[0; 64]))]
    };
    h04_length_that_does_not_fit_an_address => {
        let poison = Bad::file(8, "C-003", of_length(u64::MAX))
            .says("interrupted in-place merge")
            .says("recover")
            .says(u64::MAX.to_string());
        let huge = |len: u64| Bad::file(7, "C-003", of_length(len)).says(len.to_string()).at(0);
        vec![poison, huge(u64::MAX - 1), huge(u64::MAX - 7), huge(u64::MAX - 8), huge(1 << 63), huge((1 << 32) + 2)]
    };
    h05_length_over_the_limit => {
        vec![
            Bad::file(7, "C-003", of_length(100_000_001)).says("100000001").says("100000000"),
            Bad::file(3, "C-004", of_length(100_000_000)).says("100000000"),
        ]
    };
    h06_header_that_ends_behind_the_file => {
        vec![
            Bad::file(3, "C-004", of_length(1000))
                .says("1000 bytes")
                .says("92")
                .says("truncated")
                .says("by at least 908 bytes")
                .says("download"),
            Bad::file(3, "C-004", of_length(93)).says("93 bytes").says("by at least 1 bytes"),
        ]
    };
    h06_length_that_begins_like_another_format => {
        // Its first bytes are a brace, a space and a brace, or the mark of gzip; the file is a truncated one all the same.
        [0x7b, 0x017b, 0x7b20, 0x7b0a, 0x8b1f].map(|len| Bad::file(3, "C-004", of_length(len)).says("truncated")).into()
    };
    h08_header_that_is_not_utf8 => {
        let bad = |wrong: &[u8]| Bad::file(3, "C-005", file([b"{\"a", wrong, b"\":0}"].concat(), b"")).says("UTF-8").at(8 + 3);
        vec![bad(b"\xff"), bad(b"\xc0\xaf"), bad(b"\xed\xa0\x80"), bad(b"\xe9")]
    };
    h09_byte_order_mark => {
        vec![Bad::file(3, "C-005", file(format!("\u{feff}{{\"a\":{ONE_F32}}}"), &[0; 4])).says("BOM").says("without a BOM").at(8)]
    };
    h10_spaces_before_an_adapters_header => {
        vec![Bad::adapter(3, "C-006", edit_header(&safetensors(&factors()), |h| format!("  {h}"))).says("2 spaces").at(8)]
    };
    h10_header_padded_with_nul => {
        let header = format!(r#"{{"a":{ONE_F32}}}"#);
        vec![
            Bad::file(3, "C-007", file(format!("{header}\0\0\0"), &[0; 4]))
                .says("NUL padding")
                .says("spaces")
                .at(8 + header.len()),
        ]
    };
    h12_junk_behind_the_closing_brace => {
        let header = format!(r#"{{"a":{ONE_F32}}}"#);
        let junk = |junk: &str| Bad::file(3, "C-007", file(format!("{header}{junk}"), &[0; 4])).at(8 + header.len());
        let later = Bad::file(3, "C-007", file(format!("{header}  x"), &[0; 4])).at(8 + header.len() + 2);
        vec![junk("x"), junk("{}"), junk(","), junk("}"), junk("\n"), later]
    };
    h13_header_that_is_no_object => {
        ["[]", "[{}]", "\"a\"", "3", "-1.5", "null", "true", "false"]
            .map(|json| Bad::file(3, "C-007", file(json, b"")).says("expected object").at(8))
            .into()
    };
    h14_json_that_ends_early => {
        let header = format!(r#"{{"a":{ONE_F32},"b":{ONE_F32}}}"#);
        let cut = |len: usize| Bad::file(3, "C-007", file(&header[..len], b"")).says("line 1 column").at(8 + len - 1);
        vec![cut(1), cut(3), cut(20), cut(60), cut(header.len() - 1)]
    };
    h15_nesting_of_a_hundred_thousand => {
        let nested = deep(100_000);
        let unknown = |nested: &str| of_entry(&format!("{{\"x\":{nested},{}", &ONE_F32[1..]));
        vec![
            Bad::file(3, "C-007", file(&nested, b"")),
            Bad::file(3, "C-007", file("[".repeat(100_000), b"")),
            Bad::file(3, "C-007", file(r#"{"a":"#.repeat(100_000), b"")),
            Bad::file(3, "C-010", of_entry(&nested)).tensor("a"),
            Bad::file(3, "C-012", of_shape(&nested)).tensor("a"),
            Bad::file(3, "C-009", with_member(&format!(r#""__metadata__":{{"k":{nested}}}"#))),
            Bad::adapter(3, "C-010", unknown(&nested)).tensor("a"),
            Bad::base(3, "C-023", unknown(&nested)),
        ]
    };
    h16_metadata_that_is_nested => {
        let value = |json: &str| {
            Bad::file(3, "C-009", with_member(&format!(r#""__metadata__":{{"k":{json}}}"#)))
                .says("metadata values must be strings")
                .says("\"k\"")
        };
        vec![value(r#"{"x":"y"}"#), value(r#"["y"]"#), value("[[[[]]]]")]
    };
    h17_duplicate_tensor_name_identical_entries => {
        vec![twice("C-008", &format!(r#"{{"a":{ONE_F32},"a":{ONE_F32}}}"#), &[0; 4])]
    };
    h18_duplicate_tensor_name_with_another_dtype => {
        let int = ONE_F32.replace("F32", "I32");
        vec![
            twice("C-008", &format!(r#"{{"a":{ONE_F32},"a":{int}}}"#), &[0; 4]),
            twice("C-008", &format!(r#"{{"a":{int},"a":{ONE_F32}}}"#), &[0; 4]),
        ]
    };
    h19_duplicate_tensor_name_behind_an_escape => {
        vec![
            twice("C-008", &format!(r#"{{"a":{ONE_F32},"\u0061":{ONE_F32}}}"#), &[0; 4]),
            twice("C-008", &format!(r#"{{"\u0061":{ONE_F32},"a":{ONE_F32}}}"#), &[0; 4]),
        ]
    };
    h20_duplicate_metadata => {
        vec![
            Bad::file(3, "C-009", with_member(r#""__metadata__":{"k":"1"},"__metadata__":{"k":"1"}"#))
                .says("__metadata__")
                .says("twice"),
            Bad::file(3, "C-009", with_member(r#""__metadata__":{"k":"1"},"\u005f_metadata__":{}"#)).says("twice"),
            Bad::file(3, "C-009", with_member(r#""__metadata__":{"k":"1","k":"1"}"#)).says("\"k\"").says("twice"),
            Bad::file(3, "C-009", with_member(r#""__metadata__":{"k":"1","\u006b":"2"}"#)).says("\"k\"").says("twice"),
        ]
    };
    h21_duplicate_field_of_an_entry => {
        let again =
            |field: &str| Bad::file(3, "C-010", of_entry(&format!("{{{field},{}", &ONE_F32[1..]))).tensor("a").says("twice");
        vec![again(r#""dtype":"F32""#), again(r#""shape":[1]"#), again(r#""data_offsets":[0,4]"#), again(r#""\u0064type":"F32""#)]
    };
    h21_unknown_field_in_an_adapter => {
        let bytes = edit_header(&safetensors(&factors()), |h| h.replacen("{\"dtype\"", "{\"note\":\"x\",\"dtype\"", 1));
        vec![Bad::adapter(3, "C-010", bytes).says("unknown field \"note\"")]
    };
    h22_entry_without_one_of_its_fields => {
        let without = |field: &str, entry: &str| Bad::file(3, "C-010", of_entry(entry)).tensor("a").says(format!("no {field}"));
        vec![
            without("dtype", r#"{"shape":[1],"data_offsets":[0,4]}"#),
            without("shape", r#"{"dtype":"F32","data_offsets":[0,4]}"#),
            without("data_offsets", r#"{"dtype":"F32","shape":[1]}"#),
            without("dtype", "{}"),
            Bad::file(3, "C-010", of_entry("3")).tensor("a"),
            Bad::file(3, "C-010", of_entry("null")).tensor("a"),
        ]
    };
    h23_unknown_dtype => {
        let dtype = |json: &str| {
            Bad::file(3, "C-011", of_entry(&entry(json, "[1]", "[0,4]"))).tensor("a").says("F32").says("BF16").says("F8_E4M3")
        };
        vec![
            dtype(r#""F99""#).says("F99"),
            dtype(r#""f32""#).says("f32"),
            dtype(r#""float32""#),
            dtype(r#""""#),
            dtype("3"),
            dtype("null"),
            dtype(r#""F32 ""#),
        ]
    };
    h24_dimension_that_is_no_integer => {
        let dim = |json: &str| Bad::file(3, "C-012", of_shape(&format!("[1,{json}]"))).tensor("a").says("dimension 1");
        let mut row: Vec<Bad> = ["-1", "1.0", "1e3", "\"4\"", "true", "null", "-0", "[1]"].map(dim).into();
        row.extend(["4", "null", "\"[1]\"", "{}"].map(|json| Bad::file(3, "C-012", of_shape(json)).tensor("a")));
        row
    };
    h25_dimension_beyond_63_bits => {
        let dim = |json: &str| Bad::file(3, "C-012", of_shape(&format!("[{json}]"))).tensor("a").says("does not fit").says(json);
        vec![
            dim("9223372036854775808"),
            dim("18446744073709551615"),
            dim("18446744073709551616"),
            dim("99999999999999999999999999"),
        ]
    };
    h26_product_of_dimensions_overflows => {
        ["[4294967296,4294967296]", "[9223372036854775807,2]", "[3037000500,3037000500]"]
            .map(|shape| Bad::file(3, "C-013", of_shape(shape)).tensor("a").says("overflow"))
            .into()
    };
    h26_bytes_of_a_tensor_overflow => {
        vec![
            Bad::file(3, "C-013", of_shape("[9223372036854775807]")).tensor("a"),
            Bad::file(3, "C-013", of_shape("[4611686018427387904]")).tensor("a"),
        ]
    };
    h27_overflow_beside_a_zero => {
        let shape = |rule, shape: &str| {
            Bad::file(3, rule, file(format!(r#"{{"a":{}}}"#, entry(r#""F32""#, shape, "[0,0]")), b"")).tensor("a")
        };
        vec![
            shape("C-013", "[4294967296,4294967296,0]"),
            shape("C-013", "[0,4294967296,4294967296]"),
            shape("C-013", "[4294967296,0,4294967296]"),
            shape("C-012", "[0,18446744073709551615]"),
            shape("C-012", "[18446744073709551615,0]"),
        ]
    };
    h28_length_that_is_not_that_of_the_shape => {
        let wrong =
            |dtype: &str, shape: &str| Bad::file(3, "C-013", of_entry(&entry(dtype, shape, "[0,4]"))).tensor("a").says("has 4");
        vec![
            wrong(r#""F32""#, "[2]").says("8 bytes"),
            wrong(r#""F16""#, "[1]").says("2 bytes"),
            wrong(r#""F32""#, "[0]").says("0 bytes"),
            wrong(r#""F4""#, "[7]").says("no whole number of bytes"),
            wrong(r#""F6_E2M3""#, "[5]").says("no whole number of bytes"),
        ]
    };
    h29_offsets_that_are_no_range => {
        let offsets =
            |json: &str| Bad::file(3, "C-014", of_entry(&entry(r#""F32""#, "[1]", json))).tensor("a").says("[begin, end]");
        ["[4,0]", "[0]", "[0,2,4]", "[]", "[0,-4]", "[0,4.0]", "[\"0\",\"4\"]", "4", "null", "{}", "[0,18446744073709551616]"]
            .map(offsets)
            .into()
    };
    h30_offsets_behind_the_end_of_the_file => {
        vec![
            Bad::file(3, "C-015", of_entry(&entry(r#""F32""#, "[4]", "[0,16]")))
                .tensor("a")
                .says("needs 16 bytes")
                .says("file has 4")
                .says("truncated by 12 bytes"),
            Bad::file(3, "C-015", of_entry(&entry(r#""U8""#, "[1152921504606846976]", "[0,1152921504606846976]"))).tensor("a"),
            Bad::file(3, "C-015", of_entry(&entry(r#""U8""#, "[4]", "[18446744073709551611,18446744073709551615]"))).tensor("a"),
            Bad::file(3, "C-015", of_entry(&entry(r#""U8""#, "[0]", "[18446744073709551615,18446744073709551615]"))).tensor("a"),
        ]
    };
    h31_hole_between_tensors => {
        let bytes = two((0, 4), (6, 8), 8);
        let start = data_start(&bytes);
        let swapped = two((6, 8), (0, 4), 8);
        let first = two((1, 4), (4, 8), 8);
        vec![
            Bad::file(3, "C-016", bytes).says("hole of 2 bytes").says("\"a\"").says("\"b\"").at(start + 6),
            Bad::file(3, "C-016", swapped).says("\"a\"").says("\"b\""),
            Bad::file(3, "C-016", first).says("hole of 1 bytes").tensor("a"),
        ]
    };
    h32_tensors_that_overlap => {
        let same: Vec<String> = (0..20_000).map(|i| format!(r#""t{i}":{ONE_F32}"#)).collect();
        let overlap = |bytes: Vec<u8>| Bad::file(3, "C-017", bytes).says("\"a\"").says("\"b\"").says("overlap");
        vec![
            overlap(two((0, 4), (2, 8), 8)).says("2 bytes"),
            overlap(two((0, 8), (0, 8), 8)).says("8 bytes"),
            overlap(two((0, 8), (2, 4), 8)),
            overlap(two((2, 8), (0, 4), 8)),
            Bad::file(3, "C-017", file(format!("{{{}}}", same.join(",")), &[0; 4])).says("overlap"),
        ]
    };
    h33_bytes_behind_the_last_tensor => {
        let sound = named("\"a\"");
        let end = sound.len();
        let trailing = |n: usize| {
            Bad::file(3, "C-018", [&sound[..], &vec![0; n]].concat())
                .says(format!("{n} bytes follow"))
                .says("cut the file")
                .at(end)
        };
        vec![trailing(1), trailing(5000), Bad::file(3, "C-018", file("{}", &[0; 9])).says("9 bytes follow")]
    };
    h34_polyglot_with_zip => {
        let directory = [b"PK\x05\x06".as_slice(), &[0; 18]].concat();
        let inside = file(format!("PK\u{3}\u{4}{{\"a\":{ONE_F32}}}"), &[0; 4]);
        vec![
            Bad::file(3, "C-018", [named("\"a\""), directory].concat()).says("22 bytes follow"),
            Bad::file(3, "C-006", inside),
            Bad::file(3, "C-019", named("\"PK\\u0003\\u0004\"")),
        ]
    };
    h35_names_that_no_writer_means => {
        let name = |json: &str| Bad::file(3, "C-019", named(json));
        vec![
            name("\"\"").says("empty name"),
            name(&format!("\"{}\"", "n".repeat(1_000_000))).says("1000000 bytes"),
            name(&format!("\"{}\"", "n".repeat(1025))).says("1025 bytes"),
            name("\"a\\u0000b\"").says("\\0"),
            name("\"\\u001b[31m\"").says("\\u{1b}"),
            name("\"a\\nb\"").says("\\n"),
            name("\"a\\u007f\""),
            name("\"\\u009b31m\"").says("\\u{9b}"),
            Bad::file(3, "C-007", named("\"\\ud800\"")),
            Bad::file(3, "C-007", named("\"\\udc00\\ud800\"")),
            Bad::file(3, "C-007", named("\"a\nb\"")),
        ]
    };
    h39_metadata_of_other_types => {
        let metadata = |json: &str| Bad::file(3, "C-009", with_member(&format!(r#""__metadata__":{json}"#)));
        [r#"{"k":1}"#, r#"{"k":null}"#, r#"{"k":true}"#, r#"{"k":[]}"#, "3", "false", "[]", "\"x\""].map(metadata).into()
    };
    h39_metadata_value_over_the_limit => {
        let value = "x".repeat((32 << 20) + 1);
        vec![
            Bad::base(7, "C-022", with_member(&format!(r#""__metadata__":{{"k":"{value}"}}"#)))
                .says("\"k\"")
                .says((32 << 20).to_string()),
        ]
    };
    h40_more_tensors_than_the_limit => {
        let members: Vec<String> = (0..=1_000_000).map(|i| format!("\"{i}\":0")).collect();
        vec![Bad::base(7, "C-021", file(format!("{{{}}}", members.join(",")), b"")).says("1000001").says("1000000")]
    };
    h41_no_tensors => {
        vec![
            Bad::adapter(4, "A-012", file("{}", b"")).says("no LoRA pairs"),
            Bad::adapter(4, "A-012", file(r#"{"__metadata__":{"format":"pt"}}"#, b"")).says("no LoRA pairs"),
            Bad::base(4, "A-020", file("{}", b"")),
        ]
    };
    h43_something_else_under_the_name => {
        let kind =
            |bytes: &[u8], kind: &str, help: &str| Bad::file(3, "C-020", [bytes, &[0; 200]].concat()).says(kind).says(help).at(0);
        vec![
            Bad::file(3, "C-020", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
                .says("Git LFS pointer")
                .says("git lfs pull"),
            kind(b"<!DOCTYPE html><html><body>Log in</body></html>", "HTML page", "download"),
            kind(b"\n<html lang=\"en\">", "HTML page", "download"),
            kind(br#"{"error":"Repository not found"}"#, "JSON", "download it again"),
            Bad::file(3, "C-020", "Entry not found").says("text").says("download it again"),
            Bad::file(3, "C-020", "Not found: \u{2192} https://example.org").says("text").says("download it again"),
            kind(b"PK\x03\x04\x14\0\0\0", "ZIP", "pickles are never read"),
            kind(b"\x80\x02}q\0(X\x05", "pickle", "pickles are never read"),
            kind(b"\x80\x04\x95\x1f\0\0\0\0", "pickle", "pickles are never read"),
            kind(b"GGUF\x03\0\0\0", "GGUF", "safetensors checkpoint"),
            kind(b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "gzip", "unpack"),
            kind(b"\x93NUMPY\x01\0", "NumPy", "convert"),
            kind(b"\x89HDF\r\n\x1a\n", "HDF5", "convert"),
        ]
    };
    h44_container_of_another_version => {
        let version = |to: &str| {
            let edited = |bytes: Vec<u8>| {
                edit_header(&bytes, |h| replaced(h, r#"\"container\":\"1.0\""#, &format!(r#"\"container\":\"{to}\""#)))
            };
            Bad::scene(3, "C-031", Scene::container(edited)).says(to)
        };
        vec![
            version("2.0").says("1.x").says("newer"),
            version("0.9").says("1.x"),
            version("1"),
            version("01.0"),
            version("1.0.0"),
        ]
    };
    h44_container_that_requires_an_unknown_feature => {
        let edited =
            |bytes: Vec<u8>| edit_header(&bytes, |h| replaced(h, r#"\"required\":[]"#, r#"\"required\":[\"sparse_deltas\"]"#));
        vec![Bad::scene(4, "C-032", Scene::container(edited)).says("sparse_deltas").says("newer")]
    };
}

/// The text with one thing replaced, which must be there.
fn replaced(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from} is not in {text}");
    text.replacen(from, to, 1)
}

/// Opens bytes as a file of their own.
fn opened(bytes: &[u8], strictness: Strictness, limits: &Limits) -> Result<SafetensorsFile> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    fs::write(&path, bytes).unwrap();
    SafetensorsFile::open(&path, ReadMode::Read, strictness, limits)
}

/// The rules of the warnings of a base with these bytes. The base is read as the reference reader reads it.
fn warned_base(bytes: &[u8]) -> Vec<&'static str> {
    assert!(SafeTensors::deserialize(bytes).is_ok());
    let file = opened(bytes, Strictness::Lenient, &Limits::default()).unwrap_or_else(|e| panic!("{e}"));
    file.warnings().iter().map(|w| w.rule().id).collect()
}

/// The rule that opening breaks, or `accepted`.
fn verdict(bytes: &[u8], limits: &Limits) -> &'static str {
    opened(bytes, Strictness::Strict, limits).map_or_else(|e| e.diagnostics()[0].rule().id, |_| "accepted")
}

/// What old writers did and the reference reader accepts is a warning in a base, and the base merges all the same.
#[test]
fn h10_h21_h39_what_a_base_may_have_is_a_warning() {
    let sound = safetensors(&[weight(), norm()]);
    for (rule, bytes) in [
        ("C-006", edit_header(&sound, |h| format!("   {h}"))),
        ("C-010", edit_header(&sound, |h| h.replacen("{\"dtype\"", "{\"note\":[1],\"dtype\"", 1))),
        ("C-009", edit_header(&sound, |h| h.replacen('{', "{\"__metadata__\":null,", 1))),
    ] {
        assert_eq!(warned_base(&bytes), [rule]);
        let merged = Scene::sound().with(MODEL, &bytes).merged();
        assert_eq!(merged.warned(), [rule]);
        assert_eq!(merged.tensor(WEIGHT), Scene::sound().merged().tensor(WEIGHT));
    }
}

#[test]
fn h35_names_are_limited_in_length_on_both_sides() {
    let mut limits = Limits::default();
    limits.name_bytes = 4;
    let verdicts = ["\"nnnn\"", "\"nnnnn\"", "\"\u{e9}\u{e9}\"", "\"\u{e9}\u{e9}n\""].map(|json| verdict(&named(json), &limits));
    assert_eq!(verdicts, ["accepted", "C-019", "accepted", "C-019"]);
    assert_eq!(verdict(&named(&format!("\"{}\"", "n".repeat(1024))), &Limits::default()), "accepted");
}

/// Odd but sound names are data: they are kept as they are, and shown escaped.
#[test]
fn h35_names_with_bidirectional_marks_are_kept_and_shown_escaped() {
    for name in ["abc\u{202e}fed", "zero\u{200b}width", "重み", "a\u{301}", "\u{feff}"] {
        let file = opened(&safetensors(&[floats(name, "F32", &[1], &[1.0])]), Strictness::Strict, &Limits::default()).unwrap();
        assert_eq!(file.names().collect::<Vec<_>>(), [name]);
    }
    let error = opened(&two_named("abc\u{202e}fed"), Strictness::Strict, &Limits::default()).unwrap_err();
    assert!(!error.to_string().contains('\u{202e}') && error.to_string().contains("\\u{202e}"), "{error}");
}

/// The same name twice.
fn two_named(name: &str) -> Vec<u8> {
    file(format!(r#"{{"{name}":{ONE_F32},"{name}":{ONE_F32}}}"#), &[0; 4])
}

/// A name is never a path: tensors of such names are copied like any other, and no file appears anywhere.
#[test]
fn h36_names_that_look_like_paths_are_data() {
    let names = ["../../x", "con", "/tmp/loratool-h36", "..", "a/b", "C:\\x", "base/model.safetensors"];
    let odd = names.map(|name| floats(name, "F32", &[1], &[7.0]));
    let merged = Scene::sound().base(&[vec![weight(), norm()], odd.to_vec()].concat()).merged();
    assert_eq!(merged.files.keys().collect::<Vec<_>>(), ["loratool.merge.json", "model.safetensors"]);
    assert!(names.iter().all(|name| merged.tensor(name) == raw("F32", &[7.0])));
    assert!(!Path::new("/tmp/loratool-h36").exists());
}

/// Names are compared byte by byte: what looks alike is not the same tensor.
#[test]
fn h37_names_that_look_alike_are_different_tensors() {
    let alike = ["caf\u{e9}", "cafe\u{301}", "NORM.weight", "__METADATA__", "__metadata", "Layers.0.q_proj.weight"];
    let tensors: Vec<_> = alike.iter().zip(1..).map(|(name, i)| floats(name, "F32", &[1], &[f64::from(i)])).collect();
    let scene = Scene::sound().base(&[vec![weight(), norm()], tensors].concat());
    let merged = scene.merged();
    assert_eq!((merged.report.balance.base_tensors, merged.report.balance.modified), (8, 1));
    for (name, i) in alike.iter().zip(1..) {
        assert_eq!(merged.tensor(name), raw("F32", &[f64::from(i)]), "{name}");
    }
}

/// Some writers mean "none" by `null`. It is read so, and said, whatever the file is for.
#[test]
fn h39_metadata_that_is_null_is_a_warning_in_an_adapter_too() {
    let null = |bytes: &[u8]| edit_header(bytes, |h| h.replacen('{', "{\"__metadata__\":null,", 1));
    let scene = Scene::sound().with(FACTORS, null(&safetensors(&factors())));
    let merged = scene.merged();
    assert_eq!(merged.tensor(WEIGHT), Scene::sound().merged().tensor(WEIGHT));
    assert_eq!(merged.warned(), ["C-009"]);
}

#[test]
fn h39_metadata_values_are_limited_on_both_sides() {
    let of = |len: usize| with_member(&format!(r#""__metadata__":{{"k":"{}"}}"#, "x".repeat(len)));
    let mut limits = Limits::default();
    limits.metadata_bytes = 1000;
    assert_eq!([990, 1001, 1100].map(|len| verdict(&of(len), &limits)), ["accepted", "C-022", "C-022"]);
}

/// The metadata is no tensor and does not count as one.
#[test]
fn h40_tensors_are_limited_on_both_sides() {
    let of = |count: u64| safetensors(&(0..count).map(|i| floats(&i.to_string(), "F32", &[1], &[0.0])).collect::<Vec<_>>());
    let with_metadata = |count| edit_header(&of(count), |h| h.replacen('{', r#"{"__metadata__":{"format":"pt"},"#, 1));
    let mut limits = Limits::default();
    limits.tensors = 3;
    assert_eq!([2, 3, 4].map(|count| verdict(&of(count), &limits)), ["accepted", "accepted", "C-021"]);
    assert_eq!([2, 3, 4].map(|count| verdict(&with_metadata(count), &limits)), ["accepted", "accepted", "C-021"]);
}

/// A header of 10 MB, with the names and places of 150,000 tensors, is read: work that grows with the square would not end.
#[test]
fn h40_a_large_header_is_read_in_linear_time() {
    let tensors: Vec<_> = (0..150_000).map(|i| tensor(&format!("layer.{i}"), "U8", &[1], [0])).collect();
    let bytes = safetensors(&tensors);
    let names = crate::scene::within(move || opened(&bytes, Strictness::Strict, &Limits::default()).unwrap().names().count());
    assert_eq!(names, 150_000);
}

#[test]
fn h41_a_file_of_no_tensors_is_a_file() {
    for header in ["{}", "{}      ", r#"{"__metadata__":{"format":"pt"}}"#] {
        let scene = Scene::sound().with(MODEL, file(header, b""));
        let base = open_checkpoint(scene.at("base")).unwrap();
        assert_eq!(inspect_checkpoint(&base, &Default::default()).tensors, 0);
        assert!(validate_checkpoint(&base, loratool::Values::Read).is_ok());
    }
}

/// Values are read at any address, never through a cast pointer.
#[test]
fn h42_misaligned_values_are_read_right() {
    let expected = Scene::sound().merged().tensor(WEIGHT);
    for odd in 1..8 {
        let shift = tensor("shift", "U8", &[odd], vec![0xab; odd as usize]);
        for mode in [ReadMode::Read, ReadMode::Map] {
            let scene = Scene::sound().base(&[shift.clone(), weight(), norm()]);
            scene.merge(mode, |_| {}).unwrap();
            let out = fs::read(scene.at("out/model.safetensors")).unwrap();
            assert_eq!(
                (stored(&out, WEIGHT), stored(&out, "shift")),
                (expected.clone(), vec![0xab; odd as usize]),
                "{odd}, {mode:?}"
            );
        }
    }
    let merged = Scene::sound().base(&[tensor("shift", "U8", &[1], [1]), weight(), norm()]).merged();
    assert!(merged.tensor(NORM) == raw("F32", &[1.0, 0.5, 0.25]));
}

/// Forward compatibility: any minor version of the known major one, optional features, and members that begin with `x-`.
#[test]
fn h44_a_newer_container_is_read_as_far_as_it_allows() {
    let expected = Scene::sound().merged().tensor(WEIGHT);
    for (from, to) in [
        (r#"\"container\":\"1.0\""#, r#"\"container\":\"1.7\""#),
        (r#"\"optional\":[]"#, r#"\"optional\":[\"colours\"]"#),
        (r#"\"container\":\"1.0\""#, r#"\"x-note\":{\"deep\":[1]},\"container\":\"1.12\""#),
    ] {
        let scene = Scene::container(|bytes| edit_header(&bytes, |h| replaced(h, from, to)));
        assert_eq!(scene.merged().tensor(WEIGHT), expected, "{to}");
    }
}

/// Flips bits of each byte of a file's header in turn, and calls `look` with the damaged bytes, which then lie at `path`.
fn flip_everywhere(path: &Path, sound: &[u8], masks: &[u8], mut look: impl FnMut(&[u8])) {
    fs::write(path, sound).unwrap();
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    let mut bytes = sound.to_vec();
    for at in 0..data_start(sound) {
        for mask in masks {
            bytes[at] ^= mask;
            file.write_all_at(&bytes[at..=at], at as u64).unwrap();
            look(&bytes);
            bytes[at] ^= mask;
        }
        file.write_all_at(&bytes[at..=at], at as u64).unwrap();
    }
}

/// Whatever becomes of one byte of the header, there is no panic, and what is accepted means what the reference reader says.
#[test]
fn h45_every_byte_of_a_header_flipped_in_turn() {
    let metadata = edit_header(&safetensors(&[weight(), norm()]), |h| h.replacen('{', r#"{"__metadata__":{"format":"pt"},"#, 1));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let mut accepted = 0;
    for sound in [safetensors(&factors()), metadata] {
        flip_everywhere(&path, &sound, &[1, 2, 4, 8, 16, 32, 64, 128, 255], |bytes| {
            for strictness in [Strictness::Strict, Strictness::Lenient] {
                if let Ok(ours) = SafetensorsFile::open(&path, ReadMode::Read, strictness, &Limits::default()) {
                    means_what_the_reference_says(&ours, bytes);
                    accepted += 1;
                }
            }
        });
    }
    assert!(accepted > 0, "a flipped letter of a name is still a name");
}

fn means_what_the_reference_says(ours: &SafetensorsFile, bytes: &[u8]) {
    let reference = SafeTensors::deserialize(bytes).unwrap_or_else(|e| panic!("the reference reader refuses it: {e}"));
    assert_eq!(ours.names().count(), reference.len());
    for (name, view) in reference.tensors() {
        let info = ours.info(&name).unwrap();
        let shape: Vec<u64> = view.shape().iter().map(|&d| d as u64).collect();
        let mut data = vec![0; view.data().len()];
        ours.read(&name, 0, &mut data).unwrap();
        assert_eq!((info.dtype, info.shape.dims(), &data[..]), (view.dtype(), &shape[..], view.data()));
    }
}

/// The same for the whole way to an adapter: the manifest of a container, byte by byte.
#[test]
fn h45_every_byte_of_a_manifest_flipped_in_turn() {
    let scene = Scene::container(|bytes| bytes);
    let path = scene.at("adapter");
    flip_everywhere(&path, &fs::read(&path).unwrap(), &[1, 2, 4, 8, 16, 32, 64, 128, 255], |bytes| {
        if let Ok(adapter) = open_adapter(&path) {
            assert_eq!((adapter.targets().len(), adapter.factors().count()), (1, 2));
            assert!(SafeTensors::deserialize(bytes).is_ok());
        }
    });
}
