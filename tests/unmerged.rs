//! The unmerged operator does to the output of a layer what merging does to its weight: for every kind of adapter, against the float64
//! reference that other code computed from the files.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Values, fixture, read_file};
use loratool::{
    BindOptions, Checkpoint, Limits, Plan, TensorSource, Unmerged, Weighted, linear_by_row, open_adapter, open_checkpoint,
};
use serde_json::Value;

/// Values that look random and are the same everywhere.
fn inputs(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 2_654_435_761_usize % 1_000) as f32 / 500.0) - 1.0).collect()
}

/// x·Wᵀ for W `(out, in)`, row-major, in f64.
fn product(x: &[f32], w: &[f64], (out, inner): (usize, usize)) -> Vec<f64> {
    let rows = x.chunks_exact(inner);
    rows.flat_map(|x| (0..out).map(move |o| (0..inner).map(|i| f64::from(x[i]) * w[o * inner + i]).sum())).collect()
}

fn transposed(w: &[f64], (rows, cols): (usize, usize)) -> Vec<f64> {
    (0..cols).flat_map(|c| (0..rows).map(move |r| w[r * cols + c])).collect()
}

fn narrowed(wide: &[f64]) -> Vec<f32> {
    wide.iter().map(|value| *value as f32).collect()
}

/// The largest difference beside the largest value.
fn off(found: &[f32], wanted: &[f64]) -> f64 {
    let largest = wanted.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    found.iter().zip(wanted).fold(0.0_f64, |m, (f, w)| m.max((f64::from(*f) - w).abs())) / largest
}

/// The rows of one matrix, as its layer has them, of base and golden.
fn matrices(values: &Values, operator: &Unmerged, is_transposed: bool) -> Vec<Vec<f64>> {
    let (out, inner) = operator.out_in();
    let matrix = |part: &[f64]| if is_transposed { transposed(part, (inner, out)) } else { part.to_vec() };
    values.data.chunks_exact(out * inner).map(matrix).collect()
}

fn check(kind: &str, tensor: &str, operator: &Unmerged, base: &Values, golden: &Values, is_transposed: bool) {
    let (out, inner) = operator.out_in();
    let (before, after) = (matrices(base, operator, is_transposed), matrices(golden, operator, is_transposed));
    // More rows than one thread takes at a time.
    let x = inputs(130 * inner);
    for (expert, (before, after)) in before.iter().zip(&after).enumerate() {
        let mut y = narrowed(&product(&operator.inputs(&x), before, (out, inner)));
        operator.expert(expert, &x, &mut y).unwrap();
        let error = off(&y, &product(&x, after, (out, inner)));
        assert!(error < 1e-5, "{kind}: {tensor} is off by {error:e}");
        if expert == 0 {
            let mut untouched = narrowed(&product(&x, before, (out, inner)));
            let largest = untouched.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            untouched.iter_mut().for_each(|v| *v += largest * 1e-3);
            assert!(off(&untouched, &product(&x, after, (out, inner))) > 1e-5, "{kind}: the test would pass without an adapter");
        }
    }
}

#[test]
fn every_kind_of_layer_has_the_output_of_its_merged_weight() {
    let all: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(fixture("kinds/kinds.json")).unwrap()).unwrap();
    let (mut seen, mut without) = (BTreeMap::<String, usize>::new(), BTreeSet::new());
    for entry in &all {
        let kind = entry["kind"].as_str().unwrap();
        let folder = fixture(&format!("kinds/{kind}"));
        let has = |combo: &&Value| combo.as_str() == Some("f32-f32");
        if entry["combos"].as_array().unwrap().iter().find(has).is_none() {
            continue;
        }
        let base = open_checkpoint(folder.join("base-f32")).unwrap();
        let names = entry["adapters"].as_array().unwrap().iter().map(|name| format!("{}-f32", name.as_str().unwrap()));
        let Ok(adapters) = names.map(|name| open_adapter(folder.join(name))).collect::<Result<Vec<_>, _>>() else { continue };
        let weighted: Vec<_> = adapters.iter().map(Weighted::full).collect();
        let Ok(plan) = Plan::new(&base, &weighted, &BindOptions::default(), &Limits::default()) else { continue };
        let golden = read_file(&folder.join("golden/f32-f32/f64.safetensors"));
        let bases = read_base(&base);
        for (tensor, golden) in &golden {
            let operator = match Unmerged::new(&plan, tensor) {
                Ok(operator) => operator,
                Err(error) => {
                    assert_eq!(error.diagnostics()[0].rule().id, "U-001", "{kind}: {tensor}: {error}");
                    without.insert(kind.to_owned());
                    continue;
                }
            };
            let Some(before) = bases.get(tensor) else { continue };
            let dims = &golden.shape;
            // What GPT-2 calls Conv1D, embeddings, and stacks of models that store them so.
            let conv1d = base.config().model_type.as_deref() == Some("gpt2") && dims.len() == 2;
            let is_transposed = conv1d || tensor.contains("embed") || kind == "experts-transposed" && dims.len() == 3;
            check(kind, tensor, &operator, before, golden, is_transposed);
            *seen.entry(kind.to_owned()).or_default() += 1;
        }
    }
    println!("{seen:?} without {without:?}");
    for wanted in ["dora-linear", "ia3", "dora-embedding", "conv2d", "experts", "vera", "loha", "adalora"] {
        assert!(seen.keys().any(|kind| kind.starts_with(wanted)), "no {wanted} among {:?}", seen.keys());
    }
}

fn read_base(base: &Checkpoint) -> BTreeMap<String, Values> {
    base.shards().iter().flat_map(|shard| read_file(shard.file.label())).collect()
}

#[test]
fn tokens_are_looked_up_as_in_the_merged_table() {
    let base = open_checkpoint(fixture("models/llama-tiny-f32")).unwrap();
    let adapter = open_adapter(fixture("adapters/llama-embed-unsaved")).unwrap();
    let plan = Plan::new(&base, &[Weighted::full(&adapter)], &BindOptions::default(), &Limits::default()).unwrap();
    let golden = read_file(&fixture("goldens/llama-embed-unsaved--llama-tiny-f32/f64.safetensors"));
    let tensor = "model.embed_tokens.weight";
    let operator = Unmerged::new(&plan, tensor).unwrap();
    let (dim, vocab) = operator.out_in();
    let table = &read_base(&base)[tensor];
    let ids = [0, 7, 7, vocab as u32 - 1];
    let rows = |table: &Values| ids.iter().flat_map(|id| table.data[*id as usize * dim..][..dim].to_vec()).collect::<Vec<_>>();
    let mut y = narrowed(&rows(table));
    assert!(off(&y, &rows(&golden[tensor])) > 1e-4);
    operator.embed(&ids, &mut y).unwrap();
    assert!(off(&y, &rows(&golden[tensor])) < 1e-6);

    let beyond = operator.embed(&[vocab as u32], &mut vec![0.0; dim]).unwrap_err();
    assert!(beyond.to_string().contains("beyond the vocabulary"), "{beyond}");
}

#[test]
fn each_row_goes_to_its_own_adapter() {
    let base = open_checkpoint(fixture("models/llama-tiny-f32")).unwrap();
    let tensor = "model.layers.0.self_attn.q_proj.weight";
    let adapters = ["llama-qv-r8", "llama-all-r4"].map(|name| open_adapter(fixture(&format!("adapters/{name}"))).unwrap());
    let plans = adapters
        .each_ref()
        .map(|adapter| Plan::new(&base, &[Weighted::full(adapter)], &BindOptions::default(), &Limits::default()).unwrap());
    let operators = plans.each_ref().map(|plan| Unmerged::new(plan, tensor).unwrap());
    let (out, inner) = operators[0].out_in();
    let choice = [Some(1), None, Some(0), Some(0), Some(1)];
    let x = inputs(choice.len() * inner);
    let mut together = vec![0.0; choice.len() * out];
    linear_by_row(&operators.each_ref().map(|operator| operator), &choice, &x, &mut together).unwrap();
    for (row, choice) in choice.iter().enumerate() {
        let mut alone = vec![0.0; out];
        if let Some(index) = choice {
            operators[*index].linear(&x[row * inner..][..inner], &mut alone).unwrap();
        }
        let wide: Vec<f64> = alone.iter().map(|v| f64::from(*v)).collect();
        match choice {
            None => assert!(together[row * out..][..out].iter().all(|v| *v == 0.0)),
            Some(_) => assert!(off(&together[row * out..][..out], &wide) < 1e-6, "row {row}"),
        }
    }
    let wrong = linear_by_row(&[&operators[0]], &[Some(1)], &x[..inner], &mut vec![0.0; out]).unwrap_err();
    assert_eq!(wrong.diagnostics()[0].rule().id, "U-001");
}

#[test]
fn what_has_another_shape_is_refused() {
    let base = open_checkpoint(fixture("models/llama-tiny-f32")).unwrap();
    let adapter = open_adapter(fixture("adapters/llama-qv-r8")).unwrap();
    let plan = Plan::new(&base, &[Weighted::full(&adapter)], &BindOptions::default(), &Limits::default()).unwrap();
    assert!(Unmerged::new(&plan, "model.norm.weight").unwrap_err().to_string().contains("no adapter changes it"));
    let operator = Unmerged::new(&plan, "model.layers.0.self_attn.q_proj.weight").unwrap();
    let (out, inner) = operator.out_in();
    for (x, y) in [(inner + 1, out), (inner, out - 1), (2 * inner, out)] {
        assert!(operator.linear(&vec![0.0; x], &mut vec![0.0; y]).is_err(), "{x} {y}");
    }
    assert!(operator.expert(1, &vec![0.0; inner], &mut vec![0.0; out]).is_err());
}
