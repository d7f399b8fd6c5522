//! Every merge is held against two outside judges: what PEFT's `merge_and_unload` gives, and a float64 reference that was computed
//! without rounding. Both were made by the scripts in `fixtures/generate`, never by loratool.

mod common;

use common::{Values, fixture, read_file, read_folder, ulp};
use loratool::{MergeOptions, Weighted, merge, open_adapter, open_checkpoint};
use safetensors::Dtype;
use serde_json::Value;

struct Case {
    name: String,
    base: String,
    adapters: Vec<(String, f64)>,
}

fn cases() -> Vec<Case> {
    let text = std::fs::read_to_string(fixture("goldens/cases.json")).unwrap();
    let all: Vec<Value> = serde_json::from_str(&text).unwrap();
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    let adapters = |v: &Value| v.as_array().unwrap().iter().map(|a| (text(&a["path"]), a["weight"].as_f64().unwrap())).collect();
    all.iter().map(|c| Case { name: text(&c["name"]), base: text(&c["base"]), adapters: adapters(&c["adapters"]) }).collect()
}

/// Merges a case and gives the figures of every tensor to `judge`: name, base, ours, PEFT's, reference.
fn each_tensor(mut judge: impl FnMut(&Case, &str, &Values, &Values, &Values, &Values)) {
    let scratch = tempfile::tempdir().unwrap();
    for case in cases() {
        let base_path = fixture(&format!("models/{}", case.base));
        let base = open_checkpoint(&base_path).unwrap();
        let adapters: Vec<_> =
            case.adapters.iter().map(|(path, _)| open_adapter(fixture(&format!("adapters/{path}"))).unwrap()).collect();
        let weighted: Vec<_> =
            adapters.iter().zip(&case.adapters).map(|(adapter, (_, weight))| Weighted { adapter, weight: *weight }).collect();
        let output = scratch.path().join(&case.name);
        let report =
            merge(&base, &weighted, &output, &MergeOptions::default(), &()).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let (before, after) = (read_folder(&base_path), read_folder(&output));
        let golden = fixture(&format!("goldens/{}", case.name));
        let (peft, reference) = (read_file(&golden.join("peft.safetensors")), read_file(&golden.join("f64.safetensors")));
        assert_eq!(peft.keys().collect::<Vec<_>>(), reference.keys().collect::<Vec<_>>());
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>(), "{}", case.name);
        for (name, ours) in &after {
            match reference.get(name) {
                Some(exact) => judge(&case, name, &before[name], ours, &peft[name], exact),
                None => assert_eq!(ours, &before[name], "{}: {name} is no target and changed", case.name),
            }
        }
        let balance = report.balance;
        assert_eq!(balance.modified as usize, reference.len(), "{}", case.name);
        assert_eq!(balance.applied, balance.adapter_tensors, "{}", case.name);
        assert_eq!(balance.copied + balance.modified, balance.base_tensors, "{}", case.name);
    }
}

/// PEFT sums over the rank in f32, so where W and the products cancel its own result is many ulp from the truth; there the judge is the
/// float64 reference, which ours must be within half an ulp of.
#[test]
fn f32_merges_are_within_two_ulp_of_peft_wherever_peft_is_right() {
    let (mut all, mut near) = (0u64, 0u64);
    each_tensor(|case, name, base, ours, peft, exact| {
        if ours.dtype != Dtype::F32 {
            return;
        }
        for (i, ((m, p), (w, x))) in ours.data.iter().zip(&peft.data).zip(base.data.iter().zip(&exact.data)).enumerate() {
            let unit = ulp(Dtype::F32, w.abs().max((x - w).abs()));
            all += 1;
            if (m - p).abs() <= 2.0 * unit {
                near += 1;
                continue;
            }
            let (our_error, their_error) = ((m - x).abs(), (p - x).abs());
            let fair = our_error <= 0.5000001 * ulp(Dtype::F32, *x) && their_error > 1.4 * unit;
            assert!(fair, "{}: {name}[{i}]: ours {m:e}, PEFT's {p:e}, exact {x:e}", case.name);
        }
    });
    println!("{near} of {all} f32 weights are within 2 ulp of PEFT's");
    assert!(all > 100_000 && near as f64 >= 0.999 * all as f64, "{near} of {all}");
}

#[test]
fn every_merge_is_the_reference_rounded_once_and_never_further_from_it_than_peft() {
    let (mut all, mut equal) = (0u64, 0u64);
    each_tensor(|case, name, _, ours, peft, exact| {
        assert_eq!((&ours.shape, ours.dtype), (&peft.shape, peft.dtype), "{}: {name}", case.name);
        for (i, ((m, p), x)) in ours.data.iter().zip(&peft.data).zip(&exact.data).enumerate() {
            all += 1;
            equal += u64::from(rounded(ours.dtype, *x) == *m);
            // The reference has itself an error of some 1e-16 of its largest term.
            let slack = 1e-15 * x.abs().max(1e-3);
            assert!(
                (m - x).abs() <= (p - x).abs() + slack,
                "{}: {name}[{i}]: {m:e} is further from {x:e} than PEFT's {p:e}",
                case.name
            );
        }
    });
    assert!(all > 100_000, "{all}");
    println!("{equal} of {all} weights are the reference rounded once");
    assert!(equal as f64 >= 0.9999 * all as f64, "{equal} of {all}");
}

/// Rounded once, by trying both neighbours of a first guess.
fn rounded(dtype: Dtype, x: f64) -> f64 {
    let neighbours = |guess: f64| [guess - ulp(dtype, guess), guess, guess + ulp(dtype, guess)];
    let guess = match dtype {
        Dtype::F64 => return x,
        Dtype::F32 => return f64::from(x as f32),
        Dtype::F16 => half::f16::from_f32(x as f32).to_f64(),
        Dtype::BF16 => half::bf16::from_f32(x as f32).to_f64(),
        other => panic!("no rounding to {other}"),
    };
    neighbours(guess).into_iter().min_by(|a, b| (a - x).abs().total_cmp(&(b - x).abs())).unwrap()
}
