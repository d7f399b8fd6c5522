//! Table J: what is wrong with an `adapter_config.json`.

use loratool::{OpenOptions, open_adapter, open_adapter_with};

use crate::bad::{Ask, Bad, rows};
use crate::bytes::{floats, safetensors};
use crate::scene::{A, B, Scene, WEIGHT, factors, within};

const CONFIG: &str = "adapter/adapter_config.json";

/// The sound adapter with this config.
fn of(text: impl AsRef<[u8]>) -> Scene {
    Scene::sound().with(CONFIG, text)
}

/// A config with these members beside the sound ones.
fn with(members: &str) -> Scene {
    of(text(members))
}

fn text(members: &str) -> String {
    format!(r#"{{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "fan_in_fan_out": false, {members}}}"#)
}

fn bad(exit: u8, rule: &'static str, scene: Scene) -> Bad {
    Bad::scene(exit, rule, scene).ask(Ask::ValidateAdapter).file_named("adapter_config.json")
}

/// A config whose rank is this.
fn rank(value: &str) -> Scene {
    of(format!(r#"{{"peft_type": "LORA", "r": {value}, "lora_alpha": 2, "fan_in_fan_out": false}}"#))
}

rows! {
    j01_encodings_and_text_that_is_no_json => {
        let utf16: Vec<u8> = std::iter::once(0xfeff).chain(text("\"bias\": \"none\"").encode_utf16()).flat_map(u16::to_le_bytes).collect();
        vec![
            bad(3, "P-001", of("not json")),
            bad(3, "P-001", of("")).says("empty"),
            bad(3, "P-001", of(format!("\u{feff}{}", text("\"bias\": \"none\"")))).says("byte order mark"),
            bad(3, "P-001", of(utf16)).says("UTF-16"),
            bad(3, "P-001", of(b"{\"peft_type\": \"LORA\", \"r\": 2, \"revision\": \"caf\xe9\"}")).says("UTF-8"),
            bad(3, "P-001", of("[]")),
        ]
    };
    j02_a_key_twice => {
        vec![
            bad(3, "P-002", with(r#""r": 2"#)).tensor("r").says("twice"),
            bad(3, "P-002", with(r#""rank_pattern": {"q_proj": 2, "q_proj": 4}"#)),
        ]
    };
    j03_ranks_that_are_none => {
        let mut row: Vec<Bad> = ["0", "-1", "\"8\"", "8.0", "true", "null", "[2]"].iter().map(|value| bad(3, "P-004", rank(value)).tensor("r")).collect();
        row.push(bad(3, "P-004", of(r#"{"peft_type": "LORA", "lora_alpha": 2}"#)).tensor("r"));
        row.push(bad(7, "P-005", rank("1000000000")).tensor("r"));
        row
    };
    j04_alphas_that_are_none => {
        let alpha = |value: &str| of(format!(r#"{{"peft_type": "LORA", "r": 2, "lora_alpha": {value}}}"#));
        vec![
            bad(3, "P-004", alpha("\"16\"")).tensor("lora_alpha"),
            bad(3, "P-004", alpha("true")).tensor("lora_alpha"),
            bad(3, "P-001", alpha("NaN")),
            bad(3, "P-001", alpha("-Infinity")),
        ]
    };
    j05_target_modules_of_another_type => {
        let million = format!(r#""target_modules": [{}]"#, vec!["\"q\""; 1_000_000].join(","));
        vec![
            bad(3, "P-004", with(r#""target_modules": 3"#)).tensor("target_modules"),
            bad(3, "P-004", with(r#""target_modules": ["q", 3]"#)).tensor("target_modules"),
            bad(7, "P-005", with(&million)),
        ]
    };
    j06_patterns_that_are_not_matched_in_bounded_time => {
        // A look-ahead and a reference back keep it from the engine that takes linear time; the name is one long run of one letter.
        let module = "a".repeat(40);
        let rename = |name: &str| name.replace("layers.0.q_proj", &module);
        let factors = [floats(&rename(A), "F32", &[2, 3], &[1.0; 6]), floats(&rename(B), "F32", &[4, 2], &[1.0; 8])];
        let slow = Scene::sound().adapter_with(2, &factors, r#""alpha_pattern": {"(?=(a+)+$)(a|a)+\\1": 4}"#);
        vec![
            bad(4, "P-008", with(r#""target_modules": "(q_proj""#)),
            bad(4, "P-008", slow).says("list"),
        ]
    };
    j07_a_pattern_that_matches_nothing => {
        vec![
            bad(4, "P-009", with(r#""rank_pattern": {"v_proj": 2}"#)).says("v_proj"),
            bad(4, "P-009", with(r#""alpha_pattern": {"layers.7.q_proj": 2}"#)).says("layers.7.q_proj"),
        ]
    };
    j09_the_end_of_a_name_is_not_a_module => {
        vec![bad(4, "P-009", with(r#""rank_pattern": {"proj": 2}"#)), bad(4, "P-009", with(r#""rank_pattern": {"^q_proj": 2}"#))]
    };
    j10_flags_that_are_strings => {
        ["use_dora", "use_rslora", "fan_in_fan_out"]
            .iter()
            .map(|flag| bad(3, "P-004", of(format!(r#"{{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "{flag}": "false"}}"#))).tensor(flag))
            .collect()
    };
    j11_other_peft_types => {
        let of_type = |kind: &str| of(format!(r#"{{"peft_type": "{kind}", "r": 2}}"#));
        vec![
            bad(4, "P-003", of_type("BOFT")).says("BOFT"),
            bad(4, "P-003", of_type("PROMPT_TUNING")).says("PROMPT_TUNING"),
            bad(4, "P-003", of_type("SOMETHING_NEW")).says("SOMETHING_NEW"),
            bad(4, "P-003", of(r#"{"r": 2, "lora_alpha": 2}"#)).says("peft_type"),
        ]
    };
    j14_fields_that_change_the_meaning => {
        vec![
            Bad::scene(4, "P-006", with(r#""layer_replication": [[0, 2], [1, 3]]"#)).says("repeated"),
            Bad::scene(4, "A-001", with(r#""use_dora": true"#)).says("lora_magnitude_vector"),
            bad(4, "P-006", with(r#""alora_invocation_tokens": [7]"#)).says("activated"),
            Bad::scene(4, "P-007", with(r#""init_lora_weights": "pissa""#)).says("pissa"),
        ]
    };
    j15_a_config_that_is_no_small_file => {
        let huge = Scene::sound();
        std::fs::File::create(huge.at(CONFIG)).unwrap().set_len(1 << 30).unwrap();
        vec![
            Bad::scene(6, "E-007", Scene::sound().without(CONFIG).fifo(CONFIG)).says("FIFO"),
            bad(7, "P-005", huge),
            Bad::scene(4, "P-017", Scene::sound().without(CONFIG)).says("--alpha"),
        ]
    };
}

#[test]
fn j01_line_ends_of_windows_are_white_space() {
    of(text("\"bias\": \"none\"").replace(", ", ",\r\n")).merged();
}

#[test]
fn j06_look_around_works_and_plain_repetition_takes_linear_time() {
    let scene = with(r#""target_modules": "(?!.*visual)(a+)+$|.*q_proj", "alpha_pattern": {"(?:(?!visual).)*q_proj": 4}"#);
    assert_eq!(scene.merged().report.tensors[0].contributions[0].scale, 2.0);
}

#[test]
fn j08_the_first_pattern_of_the_file_wins_in_both_orders() {
    let scale = |patterns: &str| {
        let merged = with(&format!(r#""alpha_pattern": {{{patterns}}}"#)).merged();
        assert!(merged.warned().contains(&"P-009"), "the order decides, and nobody is told");
        merged.report.tensors[0].contributions[0].scale
    };
    assert_eq!(scale(r#""q_proj": 4, "layers.0.q_proj": 16"#), 2.0);
    assert_eq!(scale(r#""layers.0.q_proj": 16, "q_proj": 4"#), 8.0);
}

#[test]
fn j09_a_dot_matches_any_character_as_in_peft() {
    assert_eq!(with(r#""alpha_pattern": {"layers.0.q.proj": 4}"#).merged().report.tensors[0].contributions[0].scale, 2.0);
}

#[test]
fn j12_unknown_fields_are_a_warning() {
    assert!(with(r#""quantum_lora": 3"#).merged().warned().contains(&"P-015"));
}

#[test]
fn j13_a_base_name_is_shown_and_never_followed() {
    let long = "x".repeat(100_000);
    for name in ["/etc/passwd", "https://example.org/model", "\\u001b[31mred\\u202e", long.as_str()] {
        let scene = with(&format!(r#""base_model_name_or_path": "{name}""#));
        assert_eq!(scene.merged().tensor(WEIGHT), Scene::sound().merged().tensor(WEIGHT));
    }
}

#[test]
fn j14_fields_that_only_select_modules_do_not_matter() {
    let scene = with(r#""exclude_modules": ["k_proj"], "layers_to_transform": [0], "layers_pattern": "layers""#);
    assert_eq!(scene.merged().tensor(WEIGHT), Scene::sound().merged().tensor(WEIGHT));
}

#[test]
fn j15_alpha_in_place_of_a_config() {
    let scene = Scene::sound().without(CONFIG);
    let mut options = OpenOptions::default();
    options.alpha = Some(8.0);
    let path = scene.at("adapter");
    let adapter = within(move || open_adapter_with(path, &options)).unwrap();
    assert_eq!(adapter.targets()[0].scaling.effective(), 4.0);
}

#[test]
fn j16_a_config_that_contradicts_the_manifest() {
    let scene = Scene::container(|bytes| bytes);
    let bytes = std::fs::read(scene.at("adapter")).unwrap();
    let scene = scene.without("adapter").with("adapter/adapter_model.safetensors", bytes);
    let scene = scene.with(CONFIG, r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "fan_in_fan_out": false}"#);
    let error = open_adapter(scene.at("adapter")).unwrap_err();
    assert_eq!((error.class().exit_code(), error.diagnostics()[0].rule().id), (4, "P-014"));
    assert!(error.to_string().contains('2') && error.to_string().contains('1'), "{error}");
}

/// The sound adapter is what every row starts from.
#[test]
fn the_sound_adapter_is_sound() {
    let scene = with(r#""bias": "none""#);
    assert_eq!(safetensors(&factors()), std::fs::read(scene.at(crate::scene::FACTORS)).unwrap());
    let adapter = open_adapter(scene.at("adapter")).unwrap();
    assert_eq!((adapter.targets()[0].a.name(), adapter.targets()[0].b.name()), (A, B));
}
