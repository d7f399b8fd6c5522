//! Table T: what the tensors hold.

use std::fs;
use std::path::Path;

use loratool::{
    Limits, ReadMode, Result, SafetensorsFile, Strictness, Values, open_adapter, open_checkpoint, validate_checkpoint,
};

use crate::bad::{Ask, Bad, rows};
use crate::bytes::{Tensor, data_start, floats, raw, safetensors, tensor};
use crate::scene::{A, B, FACTORS, MODEL, NORM, Scene, WEIGHT, factors, norm, weight};

/// A sound scene with one value of a factor set.
fn with_factor(name: &str, at: usize, value: f64) -> Scene {
    let (mut a, mut b) = (vec![0.5; 6], vec![0.25; 8]);
    (if name == A { &mut a } else { &mut b })[at] = value;
    Scene::sound().adapter(2, &[floats(A, "F32", &[2, 3], &a), floats(B, "F32", &[4, 2], &b)])
}

/// A sound scene with one value of the weight set.
fn with_weight(at: usize, value: f64) -> Scene {
    let mut values = vec![1.0; 12];
    values[at] = value;
    Scene::sound().base(&[floats(WEIGHT, "F32", &[4, 3], &values), norm()])
}

/// A `(2, 2)` weight of `dtype` whose values are all `value`, and a rank-1 adapter in `factor_dtype` that adds `a·b` to them.
fn uniform(dtype: &'static str, value: f64, factor_dtype: &'static str, (a, b): (f64, f64)) -> Scene {
    let base = floats(WEIGHT, dtype, &[2, 2], &[value; 4]);
    Scene::sound()
        .base(&[base])
        .adapter(1, &[floats(A, factor_dtype, &[1, 2], &[a; 2]), floats(B, factor_dtype, &[2, 1], &[b; 2])])
}

/// The tensor that replaces [`NORM`].
const NEW_NORM: &str = "base_model.model.norm.weight";
/// The update of the bias beside [`WEIGHT`].
const BIAS_UPDATE: &str = "base_model.model.layers.0.q_proj.lora_B.bias";

/// A sound scene whose adapter replaces [`NORM`], which is of `dtype` in the base, by these F32 values.
fn with_replacement(dtype: &'static str, values: [f64; 3]) -> Scene {
    let tensors = [factors(), vec![floats(NEW_NORM, "F32", &[3], &values)]].concat();
    let scene = Scene::sound().base(&[weight(), floats(NORM, dtype, &[3], &[1.0; 3])]);
    scene.adapter_with(2, &tensors, r#""modules_to_save": ["norm"]"#)
}

/// A sound scene whose adapter adds these values to the bias of the layer.
fn with_bias_update(values: [f64; 4]) -> Scene {
    let tensors = [factors(), vec![floats(BIAS_UPDATE, "F32", &[4], &values)]].concat();
    let scene = Scene::sound().base(&[weight(), floats("layers.0.q_proj.bias", "F32", &[4], &[1.0; 4])]);
    scene.adapter_with(2, &tensors, r#""lora_bias": true"#)
}

/// Dtypes that are copied but never merged into, with the bytes of 16 values.
const PACKED: [(&str, usize); 18] = [
    ("BOOL", 16),
    ("U8", 16),
    ("I8", 16),
    ("U16", 32),
    ("I16", 32),
    ("U32", 64),
    ("I32", 64),
    ("U64", 128),
    ("I64", 128),
    ("C64", 128),
    ("F8_E4M3", 16),
    ("F8_E5M2", 16),
    ("F8_E8M0", 16),
    ("F8_E4M3FNUZ", 16),
    ("F8_E5M2FNUZ", 16),
    ("F6_E2M3", 12),
    ("F6_E3M2", 12),
    ("F4", 8),
];

fn packed(name: &str, (dtype, len): (&'static str, usize)) -> Tensor {
    tensor(
        name,
        dtype,
        &[4, 4],
        (0..len).map(|i| if dtype == "BOOL" { (i % 2) as u8 } else { 255 - i as u8 }).collect::<Vec<_>>(),
    )
}

rows! {
    t01_file_that_was_cut => {
        let cut = |sound: &[u8], by: usize| sound[..sound.len() - by].to_vec();
        let (base, adapter) = (safetensors(&[weight(), norm()]), safetensors(&factors()));
        vec![
            Bad::base(3, "C-015", cut(&base, 1)).says("truncated by 1 bytes").tensor(NORM).file_named("model.safetensors"),
            Bad::adapter(3, "C-015", cut(&adapter, 1))
                .says("truncated by 1 bytes")
                .tensor(B)
                .file_named("adapter_model.safetensors"),
            Bad::base(3, "C-004", &base[..40]).says("truncated"),
            Bad::adapter(3, "C-004", &adapter[..40]).says("truncated"),
            Bad::scene(3, "C-015", Scene::container(|bytes| cut(&bytes, 1))).says("truncated by 1 bytes"),
        ]
    };
    t02_mapped_file_that_was_cut_within_its_last_page => {
        let large = safetensors(&[weight(), floats(NORM, "F32", &[4096], &[1.0; 4096])]);
        let cut = |by: usize| {
            Bad::base(3, "C-015", &large[..large.len() - by])
                .ask(Ask::MergeMapped)
                .says(format!("truncated by {by} bytes"))
                .tensor(NORM)
        };
        vec![cut(1), cut(100), cut(4095)]
    };
    t03_nan_in_a_factor => {
        vec![
            Bad::scene(5, "A-008", with_factor(A, 4, f64::NAN))
                .tensor(A)
                .says("NaN")
                .says("[1, 1]")
                .file_named("adapter_model.safetensors"),
            Bad::scene(5, "A-008", with_factor(B, 5, f64::NAN))
                .tensor(B)
                .says("NaN")
                .says("[2, 1]")
                .file_named("adapter_model.safetensors"),
            Bad::scene(5, "A-008", with_factor(B, 0, f64::NAN)).ask(Ask::ValidateAdapter).tensor(B).says("[0, 0]"),
        ]
    };
    t03_nan_in_the_weight_that_is_updated => {
        vec![
            Bad::scene(5, "A-030", with_weight(7, f64::NAN))
                .tensor(WEIGHT)
                .says("NaN")
                .says("[2, 1]")
                .says("--allow-nonfinite-base"),
        ]
    };
    t03_nan_in_a_replacement => {
        vec![Bad::scene(5, "A-008", with_replacement("F32", [1.0, f64::NAN, 1.0])).tensor(NEW_NORM).says("NaN").says("[1]")]
    };
    t03_nan_in_a_bias_update => {
        vec![Bad::scene(5, "A-008", with_bias_update([0.0, 0.0, 0.0, f64::NAN])).tensor(BIAS_UPDATE).says("NaN").says("[3]")]
    };
    t04_infinity_in_a_factor => {
        vec![
            Bad::scene(5, "A-008", with_factor(A, 2, f64::INFINITY)).tensor(A).says("inf").says("[0, 2]"),
            Bad::scene(5, "A-008", with_factor(B, 7, f64::NEG_INFINITY)).tensor(B).says("-inf").says("[3, 1]"),
        ]
    };
    t04_infinity_in_the_weight_that_is_updated => {
        vec![
            Bad::scene(5, "A-030", with_weight(0, f64::INFINITY)).tensor(WEIGHT).says("inf").says("[0, 0]"),
            Bad::scene(5, "A-030", with_weight(11, f64::NEG_INFINITY)).tensor(WEIGHT).says("-inf").says("[3, 2]"),
        ]
    };
    t07_result_that_overflows_its_dtype => {
        let overflow = |dtype, value, delta| {
            Bad::scene(5, "A-031", uniform(dtype, value, "F32", (1.0, delta)))
                .tensor(WEIGHT)
                .says("overflows")
                .says(dtype)
                .says("[0, 0]")
        };
        vec![
            overflow("F16", 65504.0, 32.0).says("6.5504e4"),
            overflow("BF16", 3.38e38, 1e37),
            overflow("F32", 3.4e38, 3e38),
            overflow("F16", -65504.0, -16.0),
        ]
    };
    t07_replacement_that_overflows_the_dtype_of_the_base => {
        vec![Bad::scene(5, "A-031", with_replacement("F16", [1.0, 1.0, 1e6])).tensor(NORM).says("overflows F16").says("[2]")]
    };
    t07_sum_that_overflows_the_widest_dtype => {
        // inf - inf: the update itself is no number.
        let factors = [floats(A, "F64", &[2, 3], &[1e200; 6]), floats(B, "F64", &[4, 2], &[1e200, -1e200].repeat(4))];
        let scene = Scene::sound().adapter(2, &factors);
        vec![
            Bad::scene(5, "A-031", uniform("F64", 1.7e308, "F64", (1.0, 1e308))).tensor(WEIGHT),
            Bad::scene(5, "A-031", scene).tensor(WEIGHT),
        ]
    };
    t10_product_of_the_factors_that_overflows => {
        vec![Bad::scene(5, "A-031", uniform("F32", 1.0, "F32", (3e38, 3e38))).tensor(WEIGHT).says("overflows")]
    };
    t12_weight_of_a_packed_dtype_as_target => {
        let target = |kind: (&'static str, usize)| {
            let factors = [floats(A, "F32", &[1, 4], &[1.0; 4]), floats(B, "F32", &[4, 1], &[1.0; 4])];
            let scene = Scene::sound().base(&[packed(WEIGHT, kind)]).adapter(1, &factors);
            Bad::scene(4, "A-025", scene)
                .tensor(WEIGHT)
                .says(kind.0)
                .says("cannot merge into a packed or quantised dtype")
                .says("unquantised")
        };
        PACKED.map(target).into()
    };
    t14_complex_and_integer_factors => {
        let of = |dtype, len: usize| {
            let factors = [tensor(A, dtype, &[1, 3], vec![0; 3 * len]), tensor(B, dtype, &[4, 1], vec![0; 4 * len])];
            Bad::scene(4, "A-005", Scene::sound().adapter(1, &factors)).tensor(A).says(dtype)
        };
        vec![of("C64", 8), of("I8", 1), of("F8_E4M3", 1), of("I64", 8)]
    };
    t16_bit_flipped_under_a_digest => {
        let flipped = |offset: usize| {
            move |mut bytes: Vec<u8>| {
                let at = data_start(&bytes) + offset;
                bytes[at] ^= 1;
                bytes
            }
        };
        let flip = |offset, tensor| Bad::scene(9, "C-037", Scene::container(flipped(offset))).says(tensor).says("damaged");
        vec![
            flip(0, "lora_A"),
            flip(24, "lora_B"),
            flip(5, "lora_A").ask(Ask::ValidateAdapter),
            flip(55, "lora_B").ask(Ask::ValidateAdapter),
        ]
    };
}

/// Cuts a file at every byte, from its end on; whatever is left, `open` refuses it as a file that breaks its own rules.
fn cut_everywhere<T>(path: &Path, open: impl Fn() -> Result<T>) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    assert!(open().is_ok());
    for len in (0..file.metadata().unwrap().len()).rev() {
        file.set_len(len).unwrap();
        let error = open().err().unwrap_or_else(|| panic!("the file cut at {len} is accepted"));
        assert_eq!(error.class().exit_code(), 3, "{error}");
    }
}

#[test]
fn t01_files_cut_at_every_byte() {
    let (scene, container) = (Scene::sound(), Scene::container(|bytes| bytes));
    cut_everywhere(&container.at("adapter"), || open_adapter(container.at("adapter")));
    cut_everywhere(&scene.at(FACTORS), || open_adapter(scene.at("adapter")));
    cut_everywhere(&scene.at(MODEL), || open_checkpoint(scene.at("base")));
}

/// A map of a file that was cut must not read as zeros.
#[test]
fn t02_a_map_reads_the_same_as_reads_do() {
    let scene = Scene::sound().base(&[weight(), floats(NORM, "F32", &[4096], &[1.5; 4096])]);
    for mode in [ReadMode::Read, ReadMode::Map] {
        let file = SafetensorsFile::open(&scene.at(MODEL), mode, Strictness::Lenient, &Limits::default()).unwrap();
        let mut bytes = vec![0; 4 * 4096];
        loratool::TensorSource::read(&file, NORM, 0, &mut bytes).unwrap();
        assert_eq!(bytes, raw("F32", &[1.5; 4096]));
    }
}

/// The bits of two NaN with payloads, one of them signalling and negative.
const NANS: [u32; 3] = [0x7fc1_2345, 0xffa0_0001, 0x3f80_0000];

fn payloads() -> Vec<u8> {
    NANS.iter().flat_map(|bits| bits.to_le_bytes()).collect()
}

/// What is not updated is copied, whatever it holds, and `validate` says that it holds it.
#[test]
fn t03_t04_nan_in_an_untouched_tensor_is_copied_bit_for_bit() {
    let scene = Scene::sound().base(&[weight(), tensor(NORM, "F32", &[3], payloads())]);
    let merged = scene.merged();
    assert_eq!(merged.tensor(NORM), payloads());
    assert_eq!(merged.tensor(WEIGHT), Scene::sound().merged().tensor(WEIGHT));
    let report = validate_checkpoint(&open_checkpoint(scene.at("base")).unwrap(), Values::Read).unwrap();
    let note = &report.warnings[0];
    assert_eq!((note.rule, note.tensor.as_deref()), ("A-030", Some(NORM)));
    assert!(note.message.contains("2 values") && note.message.contains("[0]"), "{}", note.message);
}

/// On request, values of the updated weight that are not finite stay as they are, and all others are updated.
#[test]
fn t03_t04_nan_in_the_updated_weight_may_be_left_on_request() {
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let merged = with_weight(7, value).merged_with(|o| o.bind.allow_nonfinite_base = true).tensor(WEIGHT);
        let finite = with_weight(7, 1.0).merged().tensor(WEIGHT);
        assert_eq!(merged[28..32], raw("F32", &[value]), "{value}");
        assert_eq!((&merged[..28], &merged[32..]), (&finite[..28], &finite[32..]), "{value}");
    }
}

/// The least number of each dtype, twice: nothing on the way takes it for zero.
#[test]
fn t05_subnormal_numbers_are_exact() {
    let least = [("F64", f64::from_bits(1)), ("F32", 2f64.powi(-149)), ("F16", 2f64.powi(-24)), ("BF16", 2f64.powi(-133))];
    for (dtype, least) in least {
        for portable in [false, true] {
            let scene = uniform(dtype, least, dtype, (1.0, least));
            let merged = scene.merged_with(|o| o.exec.portable = portable).tensor(WEIGHT);
            assert_eq!(merged, raw(dtype, &[2.0 * least; 4]), "{dtype}, portable: {portable}");
            let scene = uniform(dtype, 3.0 * least, dtype, (-2.0, least));
            let merged = scene.merged_with(|o| o.exec.portable = portable).tensor(WEIGHT);
            assert_eq!(merged, raw(dtype, &[least; 4]), "{dtype}, portable: {portable}");
        }
    }
}

/// Adding nothing changes nothing: -0 stays -0, on every path.
#[test]
fn t06_negative_zero_keeps_its_sign_under_a_zero_update() {
    for dtype in ["F64", "F32", "F16", "BF16"] {
        for portable in [false, true] {
            for (a, b) in [(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, 0.0)] {
                let scene = uniform(dtype, -0.0, "F32", (a, b));
                let merged = scene.merged_with(|o| o.exec.portable = portable);
                assert_eq!(merged.files["model.safetensors"], fs::read(scene.at(MODEL)).unwrap(), "{dtype} {a} {b}");
            }
        }
    }
}

/// The largest number is no overflow, and what rounds down to it is none either.
#[test]
fn t07_the_largest_finite_result_is_written() {
    let merged = uniform("F16", 65504.0, "F32", (1.0, 15.0)).merged().tensor(WEIGHT);
    assert_eq!(merged, raw("F16", &[65504.0; 4]));
}

/// An update under half a step of the base everywhere is erased by rounding. That is said, with how much survived.
#[test]
fn t09_an_update_that_rounding_erases_is_a_warning() {
    let scene = uniform("BF16", 1.0, "F32", (1.0, 2f64.powi(-10)));
    let merged = scene.merged();
    assert_eq!(merged.files["model.safetensors"], fs::read(scene.at(MODEL)).unwrap());
    assert_eq!(merged.warned(), ["A-035"]);
    assert_eq!((merged.report.tensors[0].changed, merged.report.tensors[0].gain), (Some(0), Some(0.0)));
    assert!(merged.report.warnings[0].message.contains("0.0 %"), "{}", merged.report.warnings[0].message);
}

/// Factors of extreme size whose product is of ordinary size.
#[test]
fn t10_a_huge_factor_times_a_tiny_one_is_right() {
    for (a, b) in [(1e30, 1e-30), (1e-38, 1e38), (3e38, 2f64.powi(-149))] {
        let product = f64::from(a as f32) * f64::from(b as f32);
        let merged = uniform("F32", 1.0, "F32", (a, b)).merged().tensor(WEIGHT);
        assert_eq!(merged, raw("F32", &[1.0 + product; 4]), "{a} {b}");
    }
}

/// An adapter that was never trained has B = 0: the output is the base, and that is said.
#[test]
fn t11_a_zero_b_has_no_effect_and_says_so() {
    let scene = Scene::sound().adapter(2, &[factors().remove(0), floats(B, "F32", &[4, 2], &[0.0; 8])]);
    let merged = scene.merged();
    assert_eq!(merged.files["model.safetensors"], fs::read(scene.at(MODEL)).unwrap());
    assert_eq!(merged.warned(), ["A-035"]);
    let note = &merged.report.warnings[0];
    assert!(note.message.contains("no effect") && note.message.contains(WEIGHT), "{}", note.message);
}

#[test]
fn t12_untouched_tensors_of_every_dtype_are_copied_bit_for_bit() {
    let untouched: Vec<Tensor> = PACKED.iter().map(|kind| packed(kind.0, *kind)).collect();
    let scene = Scene::sound().base(&[vec![weight()], untouched].concat());
    let merged = scene.merged();
    let before = fs::read(scene.at(MODEL)).unwrap();
    for (dtype, _) in PACKED {
        assert_eq!(merged.tensor(dtype), crate::bytes::stored(&before, dtype), "{dtype}");
    }
    assert_eq!(merged.report.balance.copied, PACKED.len() as u64);
}

/// F64 factors keep all their digits: an update that F32 factors could not express arrives in an F64 base.
#[test]
fn t14_factors_of_64_bits_are_applied_exactly() {
    let delta = 1.0 + 2f64.powi(-50);
    let merged = uniform("F64", 1.0, "F64", (1.0, delta)).merged().tensor(WEIGHT);
    assert_eq!(merged, raw("F64", &[1.0 + delta; 4]));
    assert_ne!(1.0 + delta, 2.0);
    let merged = uniform("BF16", 1.0, "F64", (1.0, 2f64.powi(-8) + 2f64.powi(-40))).merged().tensor(WEIGHT);
    assert_eq!(merged, raw("BF16", &[1.0078125; 4]));
}
