//! Families of models by the names that their modules really have: tiny random models by `transformers`, adapters on all their linear
//! layers by `peft` (`fixtures/generate/families.py`).

mod common;

use common::{fixture, read_file, read_folder, ulp};
use loratool::{MergeOptions, Weighted, merge, open_adapter, open_checkpoint};
use serde_json::Value;

#[test]
fn every_family_is_merged_as_peft_and_the_reference_say() {
    let all: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(fixture("families/families.json")).unwrap()).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let (mut values, mut right) = (0u64, 0u64);
    for entry in &all {
        let family = entry["family"].as_str().unwrap();
        let folder = fixture(&format!("families/{family}"));
        let base = open_checkpoint(folder.join("base")).unwrap();
        let adapter = open_adapter(folder.join("adapter")).unwrap_or_else(|e| panic!("{family}: {e}"));
        let out = scratch.path().join(family);
        let report = merge(&base, &[Weighted::full(&adapter)], &out, &MergeOptions::default(), &());
        let report = report.unwrap_or_else(|e| panic!("{family}: {e}"));
        assert_eq!(report.adapters[0].renaming.is_some(), entry["renamed"].as_bool().unwrap(), "{family}");
        let (before, after) = (read_folder(&folder.join("base")), read_folder(&out));
        let (peft, exact) = (read_file(&folder.join("peft.safetensors")), read_file(&folder.join("f64.safetensors")));
        assert_eq!(report.balance.modified, exact.len() as u64, "{family}");
        for (name, ours) in &after {
            let Some(exact) = exact.get(name) else {
                assert_eq!(ours, &before[name], "{family}: {name} is no target and changed");
                continue;
            };
            for (i, (m, x)) in ours.data.iter().zip(&exact.data).enumerate() {
                values += 1;
                right += u64::from((m - x).abs() <= 0.5 * ulp(ours.dtype, *x) * (1.0 + 1e-6));
                let p = peft[name].data[i];
                assert!((m - x).abs() <= (p - x).abs() + 1e-15 * x.abs().max(1e-3), "{family}: {name}[{i}]: {m:e}, {p:e}, {x:e}");
            }
        }
    }
    assert!(all.len() >= 18, "{}", all.len());
    assert!(right as f64 >= 0.9999 * values as f64, "{right} of {values}");
}
