//! `eval` and `predict` on the fixture of each use, against what `transformers` and `peft` make of the same files; and what a person sees when
//! something is wrong.

#![cfg(feature = "cli")]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::fixture;
use serde_json::Value;

fn loratool(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_loratool")).args(args).current_dir(fixture("uses")).output().unwrap()
}

fn json(args: &[&str]) -> Value {
    let out = loratool(&[args, &["--json"]].concat());
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
    serde_json::from_slice(&out.stdout).unwrap()
}

fn golden(used: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture(&format!("uses/{used}/golden.json"))).unwrap()).unwrap()
}

fn refused(args: &[&str], code: i32, parts: &[&str]) {
    let out = loratool(args);
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{text}");
    assert!(out.stdout.is_empty());
    for part in parts {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

const CLASSIFY: [&str; 4] = ["--model", "classify/model", "--task", "classify"];
const ADAPTER: [&str; 2] = ["--adapter", "classify/adapter"];
const DATA: [&str; 2] = ["--data", "classify/eval.jsonl"];

#[test]
fn a_classifier_is_as_good_as_peft_says() {
    let golden = golden("classify");
    let report = &json(&[&["eval"], &CLASSIFY[..], &ADAPTER, &DATA, &["--against", "base"]].concat())["report"];
    for (found, wanted) in [(&report["scores"], &golden["adapted"]), (&report["compared"]["scores"], &golden["base"])] {
        let accuracy = found["accuracy"]["value"].as_f64().unwrap();
        assert!((accuracy - wanted["accuracy"].as_f64().unwrap()).abs() < 1e-6, "{accuracy}");
        assert_eq!(found["confusion"]["counts"], wanted["confusion"]);
    }
    let compared = &report["compared"];
    assert!(compared["kl_mean"].as_f64().unwrap() > 1.0 && compared["mcnemar"].as_f64().unwrap() < 0.01);
}

#[test]
fn each_row_is_given_the_label_and_the_logits_of_peft() {
    let golden = golden("classify");
    for (which, adapter) in
        [("base", &[][..]), ("adapted", &ADAPTER[..]), ("adapted", &["--adapter", "classify/adapter", "--merged"])]
    {
        let report = &json(&[&["predict"], &CLASSIFY[..], adapter, &DATA].concat())["report"];
        let predictions = report["predictions"].as_array().unwrap();
        let wanted = golden["rows"].as_array().unwrap();
        assert_eq!(predictions.len(), wanted.len());
        for (one, wanted) in predictions.iter().zip(wanted) {
            assert_eq!(one["text"], wanted[which]["label"]);
            for (index, label) in golden["labels"].as_array().unwrap().iter().enumerate() {
                let classes = one["classes"].as_array().unwrap();
                let found = classes.iter().find(|class| class["label"] == *label).unwrap()["logit"].as_f64().unwrap();
                let logit = wanted[which]["logits"][index].as_f64().unwrap();
                assert!((found - logit).abs() < 1e-4, "line {}: {found} for {logit}", one["line"]);
            }
        }
    }
}

#[test]
fn merging_an_f32_model_loses_next_to_nothing() {
    let report = &json(&[&["eval"], &CLASSIFY[..], &ADAPTER, &DATA, &["--against", "merged"]].concat())["report"];
    let compared = &report["compared"];
    assert_eq!(compared["agreement"]["value"], 1.0);
    assert!(compared["kl_max"].as_f64().unwrap() < 1e-9);
    assert_eq!((&compared["only_first_right"], &compared["mcnemar"]), (&0.into(), &1.0.into()));
}

#[test]
fn threads_and_order_change_no_prediction() {
    let one = json(&[&["predict"], &CLASSIFY[..], &ADAPTER, &DATA, &["--threads", "1"]].concat());
    let many = json(&[&["predict"], &CLASSIFY[..], &ADAPTER, &DATA, &["--threads", "7"]].concat());
    assert_eq!(one, many);
}

#[test]
fn one_text_has_one_answer() {
    let out = loratool(&[&["predict"], &CLASSIFY[..], &ADAPTER, &["--text", "What a pleasant food."]].concat());
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.starts_with("positive\n") && text.lines().count() == 4, "{text}");
}

#[test]
fn what_is_wrong_is_named_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).unwrap();
        folder.path().join(name).display().to_string()
    };
    let eval = |data: &str, code, parts: &[&str]| refused(&[&["eval"], &CLASSIFY[..], &["--data", data]].concat(), code, parts);
    let label = file("label.jsonl", "{\"text\": \"good\", \"label\": \"positive\"}\n{\"text\": \"good\", \"label\": 3}\n");
    eval(&label, 3, &["U-012", "line 2", "the label 3", "2 positive"]);
    eval(&file("named.csv", "text,label\ngood,great\n"), 3, &["line 2", "the label \"great\""]);
    eval(&file("none.jsonl", "{\"text\": \"good\"}\n"), 3, &["no \"label\"", "0 negative"]);
    eval(&file("other.jsonl", "{\"sentence\": \"good\", \"label\": 0}\n"), 3, &["no \"text\"", "\"sentence\"", "help: "]);
    eval(&file("bad.jsonl", "{\"text\": \n"), 3, &["line 1 is no JSON object"]);
    eval(&file("empty.jsonl", "\n"), 3, &["there is no row"]);
    eval("nowhere.jsonl", 6, &["nowhere.jsonl"]);

    let long = "good ".repeat(100);
    let ask = |more: &[&str], code, parts: &[&str]| refused(&[&["predict"], more].concat(), code, parts);
    ask(&[&CLASSIFY[..], &["--text", &long]].concat(), 4, &["U-010", "102 tokens", "room for 64", "--truncate"]);
    ask(&["--model", "../models/bert-cls", "--task", "classify", "--text", "x"], 3, &["U-011", "--tokenizer"]);
    ask(&["--model", "classify/model", "--task", "reply", "--text", "x"], 4, &["U-010", "\"bert\" is no decoder"]);
    ask(&["--model", "classify/model", "--task", "qa", "--text", "x"], 2, &["--question"]);
    let question = ["--model", "classify/model", "--task", "qa", "--question", "x", "--text", "y"];
    ask(&question, 4, &["no head for answers", "help: "]);
    ask(&[&CLASSIFY[..], &["--adapter", "../adapters/llama-r1", "--text", "x"]].concat(), 4, &["A-020"]);
    let cut = loratool(&[&["predict"], &CLASSIFY[..], &["--text", &long, "--truncate"]].concat());
    assert!(cut.status.success());
}

#[test]
fn a_table_reads_like_lines() {
    let lines = std::fs::read_to_string(fixture("uses/classify/eval.jsonl")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("eval.csv");
    let mut writer = csv::Writer::from_path(&path).unwrap();
    writer.write_record(["label", "text"]).unwrap();
    for line in lines.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        writer.write_record([row["label"].as_str().unwrap(), row["text"].as_str().unwrap()]).unwrap();
    }
    writer.flush().unwrap();
    let scores = |data: &Path| {
        json(&[&["eval"], &CLASSIFY[..], &ADAPTER, &["--data", data.to_str().unwrap()]].concat())["report"]["scores"].clone()
    };
    assert_eq!(scores(&path), scores(&fixture("uses/classify/eval.jsonl")));
}

/// Texts, and what transformers 5.23 with peft 0.21.2 makes of them: perplexity over all, and the greedy replies to two of them.
#[test]
fn a_decoder_finds_texts_as_likely_and_replies_as_with_peft() {
    let folder = tempfile::tempdir().unwrap();
    let file = |member: &str| {
        let texts = ["the cat sat on the mat", "hello there", "a b c d e f g"];
        let lines: Vec<String> = texts.iter().map(|text| serde_json::json!({member: text}).to_string()).collect();
        let path = folder.path().join(member);
        std::fs::write(&path, lines.join("\n")).unwrap();
        path.display().to_string()
    };
    let (texts, prompts) = (file("text"), file("prompt"));
    let model = ["--model", "../models/llama-tiny-f32"];
    let adapted = ["--adapter", "../adapters/llama-qv-r8"];
    for (adapter, perplexity, replies) in [
        (&[][..], 427.579_505_9, ["+p\\p\\p\\p", "\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}S\u{10}"]),
        (&adapted[..], 436.944_096_8, ["+p\\\u{fffd}p\\p\\", "\u{fffd}\u{fffd}\u{fffd}\u{fffd}$\u{fffd}`S"]),
    ] {
        let eval = json(&[&["eval"], &model[..], adapter, &["--task", "perplexity", "--data", &texts]].concat());
        let scores = &eval["report"]["scores"];
        let found = scores["perplexity"]["value"].as_f64().unwrap();
        assert!((found / perplexity - 1.0).abs() < 1e-5, "{found}");
        assert_eq!(scores["predicted_tokens"], 34);
        let asked = [&["predict"], &model[..], adapter, &["--task", "reply", "--data", &prompts, "--max-new-tokens", "8"]];
        let said = json(&asked.concat());
        assert_eq!(
            (&said["report"]["predictions"][0]["text"], &said["report"]["predictions"][2]["text"]),
            (&replies[0].into(), &replies[1].into())
        );
    }
}

#[test]
fn merging_into_bf16_has_a_loss_that_is_printed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text.jsonl");
    std::fs::write(&path, "{\"text\": \"the cat sat on the mat\"}\n").unwrap();
    let args =
        ["eval", "--model", "../models/llama-tiny", "--adapter", "../adapters/llama-qv-r8", "--task", "perplexity", "--data"];
    let args = [&args[..], &[path.to_str().unwrap(), "--against", "merged"]].concat();
    let loss = json(&args)["report"]["compared"]["kl_mean"].as_f64().unwrap();
    assert!(loss > 1e-8 && loss < 1e-3, "{loss}");
    let text = String::from_utf8(loratool(&args).stdout).unwrap();
    assert!(text.contains("merge loss") && text.lines().all(|line| line.chars().count() <= 80), "{text}");
}

fn near(found: &Value, wanted: &Value, within: f64) {
    let (found, wanted) = (found.as_f64().unwrap(), wanted.as_f64().unwrap());
    assert!((found - wanted).abs() <= within, "{found} for {wanted}");
}

/// The arguments for a use, with the adapter or without.
fn use_of<'a>(verb: &'a str, paths: &'a [String; 3], task: &'a str, which: &str) -> Vec<&'a str> {
    let [model, adapter, data] = paths;
    let mut args = vec![verb, "--model", model, "--task", task, "--data", data];
    if which == "adapted" {
        args.extend(["--adapter", adapter]);
    }
    args
}

fn paths(used: &str) -> [String; 3] {
    ["model", "adapter", "eval.jsonl"].map(|part| format!("{used}/{part}"))
}

#[test]
fn questions_are_answered_as_by_peft() {
    let (golden, paths) = (golden("qa"), paths("qa"));
    for which in ["base", "adapted"] {
        let scores = json(&use_of("eval", &paths, "qa", which))["report"]["scores"].clone();
        near(&scores["exact_match"]["value"], &golden[which]["exact"], 1e-6);
        near(&scores["f1"]["value"], &golden[which]["f1"], 1e-6);
        let said = json(&use_of("predict", &paths, "qa", which));
        for (row, wanted) in said["report"]["predictions"].as_array().unwrap().iter().zip(golden["rows"].as_array().unwrap()) {
            assert_eq!(row["text"], wanted[which]["text"], "line {}", row["line"]);
        }
    }
    let (question, text) = ("What did Zoë buy?", "Zoë bought an old ring in 1998. She lives in Málaga.");
    let one =
        ["predict", "--model", "qa/model", "--adapter", "qa/adapter", "--task", "qa", "--question", question, "--text", text];
    let said = String::from_utf8(loratool(&one).stdout).unwrap();
    assert!(text.contains(said.trim()) && !said.trim().is_empty(), "{said:?}");
}

#[test]
fn sentences_are_translated_as_by_peft() {
    let (golden, paths) = (golden("translate"), paths("translate"));
    for which in ["base", "adapted"] {
        let asked = [use_of("eval", &paths, "translate", which), vec!["--max-new-tokens", "24"]].concat();
        let scores = json(&asked)["report"]["scores"].clone();
        near(&scores["bleu"], &golden[which]["bleu"], 1e-5);
        near(&scores["chrf"], &golden[which]["chrf"], 1e-5);
        let nll = scores["perplexity"]["value"].as_f64().unwrap().ln();
        near(&nll.into(), &golden[which]["nll_per_token"], 1e-4);
        let asked = [use_of("predict", &paths, "translate", which), vec!["--max-new-tokens", "24"]].concat();
        let said = json(&asked);
        for (row, wanted) in said["report"]["predictions"].as_array().unwrap().iter().zip(golden["rows"].as_array().unwrap()) {
            assert_eq!(row["text"], wanted[which]["text"], "line {}", row["line"]);
        }
    }
}

#[test]
fn a_dialogue_goes_on_as_with_peft() {
    let (golden, paths) = (golden("dialogue"), paths("dialogue"));
    for which in ["base", "adapted"] {
        let scores = json(&use_of("eval", &paths, "perplexity", which))["report"]["scores"].clone();
        near(&scores["perplexity"]["value"], &golden[which]["perplexity"], 1e-5);
        assert_eq!(scores["predicted_tokens"], golden[which]["predicted"]);
        let said = json(&[use_of("predict", &paths, "reply", which), vec!["--max-new-tokens", "12"]].concat());
        for (row, wanted) in said["report"]["predictions"].as_array().unwrap().iter().zip(golden["rows"].as_array().unwrap()) {
            assert_eq!(row["text"], wanted[which]["reply"], "line {}", row["line"]);
        }
    }
}
