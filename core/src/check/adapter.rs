//! What holds for every feedback adapter, whatever its records are.

use super::{Outcome, Report};
use crate::abi::AdapterObject;
use crate::fault::{Fault, FaultKind};
use crate::needs::Kinds;
use crate::sample::{Kind, Sample};

/// Makes the adapter anew.
pub type MakeAdapter<'a> = &'a mut dyn FnMut() -> Result<AdapterObject, Fault>;

/// Records that no adapter's author thought of. Those that are JSON objects may be refused or
/// understood, but not end in a panic.
const ODD: [&str; 12] = [
    "{}",
    r#"{"prompt": null, "response": null, "messages": null}"#,
    r#"{"prompt": "", "response": "", "chosen": "", "rejected": "", "completion": ""}"#,
    r#"{"prompt": 1, "response": true, "score": "high", "label": "no", "chosen": 2, "rejected": 3}"#,
    r#"{"messages": [], "responses": [], "scores": [], "prompt": [], "chosen": [], "rejected": []}"#,
    r#"{"messages": [{}], "prompt": [{}], "chosen": [{}], "rejected": [{}], "completion": [{}]}"#,
    r#"{"messages": [[]], "prompt": {"role": []}, "chosen": {"content": 0}, "scores": {"a": []}}"#,
    r#"{"prompt": "a", "response": "b", "completion": "b", "score": 1e308, "label": -1e308}"#,
    r#"{"prompt": "a", "responses": ["b", "c"], "scores": [1], "chosen": "b", "rejected": "b"}"#,
    r#"{"prompt": "\u0000", "response": "\ud83d\ude00", "chosen": "\u202e", "rejected": " "}"#,
    r#"{"messages": [{"role": "assistant", "content": "first"}], "score": -0.0, "label": 0}"#,
    "not JSON",
];

/// Checks the adapter that `make` gives, on odd records and on some that it is meant for (lines of
/// JSON, which it has to understand).
pub fn check_adapter(name: &str, make: MakeAdapter, records: &[&str]) -> Report {
    let mut report = Report { name: name.to_owned(), checks: Vec::new() };
    let offers = match make() {
        Ok(adapter) => adapter.offers(),
        Err(fault) => {
            report.add("declarations", Err(fault.to_string()));
            return report;
        }
    };
    if !report.add("declarations", declarations(offers)) {
        return report;
    }
    report.add("odd records", odd(make, offers));
    if !records.is_empty() {
        report.add("its records", own(make, offers, records));
    }
    report
}

fn declarations(offers: Kinds) -> Outcome {
    let known = Kind::ALL.iter().fold(0, |bits, kind| bits | Kinds::of(*kind).0);
    match offers.0 {
        0 => Err("it offers no feedback".into()),
        bits if bits & !known != 0 => Err(format!("unknown bits in offers {bits:#x}")),
        _ => Ok(format!("offers {}", offers.names().join(", "))),
    }
}

/// A record in, the samples or the fault out, with everything of it checked.
fn adapt(
    make: MakeAdapter,
    offers: Kinds,
    record: &str,
) -> Result<Result<Vec<Sample>, Fault>, String> {
    let mut run = || make()?.adapt(record.into()).into_result().map(Vec::from);
    let (first, second) = (run(), run());
    if first != second {
        return Err(format!("{record}: a second adapter understands it differently"));
    }
    match &first {
        Err(fault) if fault.kind == FaultKind::Panic => return Err(format!("{record}: {fault}")),
        Err(_) => {}
        Ok(samples) => {
            for sample in samples {
                sample.check(offers).map_err(|what| format!("{record}: it gives {what}"))?;
            }
        }
    }
    Ok(first)
}

fn odd(make: MakeAdapter, offers: Kinds) -> Outcome {
    let mut refused = 0;
    for record in ODD {
        refused += usize::from(adapt(make, offers, record)?.is_err());
    }
    Ok(format!("{} of them, {refused} refused, no panic", ODD.len()))
}

fn own(make: MakeAdapter, offers: Kinds, records: &[&str]) -> Outcome {
    let mut samples = 0;
    for record in records {
        samples +=
            adapt(make, offers, record)?.map_err(|fault| format!("{record}: {fault}"))?.len();
    }
    Ok(format!("{} of them, {samples} samples", records.len()))
}
