//! Metrics of a step: sums per source and name, turned into means at the end.

use serde_json::{Map, Number, Value};
use std::collections::BTreeMap;
use uft_core::batch::Metric;

/// Sum and count of every metric, per source.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// (source, name) → (sum, count).
    sums: BTreeMap<(String, String), (f64, f64)>,
    /// Source → its loss, normalised but not weighted.
    losses: BTreeMap<String, f64>,
}

impl Metrics {
    pub fn add(&mut self, source: &str, metric: &Metric) {
        let entry = self.sums.entry((source.to_owned(), metric.name.to_string())).or_default();
        entry.0 += metric.sum;
        entry.1 += metric.count;
    }

    pub fn add_loss(&mut self, source: &str, loss: f64) {
        *self.losses.entry(source.to_owned()).or_default() += loss;
    }

    /// The sources with a loss.
    pub fn sources(&self) -> impl Iterator<Item = &str> {
        self.losses.keys().map(String::as_str)
    }

    /// Mean of a metric over a source.
    pub fn of(&self, source: &str, name: &str) -> Option<f64> {
        if name == "loss" {
            return self.losses.get(source).copied();
        }
        let mean = |name: &str| {
            let (sum, count) = self.sums.get(&(source.to_owned(), name.to_owned()))?;
            (*count > 0.0).then(|| sum / count)
        };
        // Where no pair gives a margin, it is the difference of the two sides' means.
        mean(name).or_else(|| match name {
            "rewards/margins" => Some(mean("rewards/chosen")? - mean("rewards/rejected")?),
            _ => None,
        })
    }

    /// Every metric as `source/name`, and over all sources as `name`.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut overall = Metrics::default();
        for ((_, name), (sum, count)) in &self.sums {
            overall.add("", &Metric { name: name.as_str().into(), sum: *sum, count: *count });
        }
        let mut out = overall.named("", "");
        for source in self.losses.keys() {
            out.insert(format!("{source}/loss"), number(self.losses[source]));
            out.extend(self.named(source, &format!("{source}/")));
        }
        out
    }

    fn named(&self, source: &str, prefix: &str) -> Map<String, Value> {
        let mut names: Vec<&str> =
            self.sums.keys().filter(|(s, _)| s == source).map(|(_, name)| name.as_str()).collect();
        if names.contains(&"rewards/chosen") && !names.contains(&"rewards/margins") {
            names.push("rewards/margins");
        }
        names.sort_unstable();
        let values = names
            .iter()
            .filter_map(|name| Some((format!("{prefix}{name}"), number(self.of(source, name)?))));
        values.collect()
    }
}

/// A JSON number; what is not finite becomes null.
pub fn number(x: f64) -> Value {
    Number::from_f64(x).map_or(Value::Null, Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metric(name: &str, sum: f64, count: f64) -> Metric {
        Metric { name: name.into(), sum, count }
    }

    #[test]
    fn means_are_over_items_not_over_batches() {
        let mut metrics = Metrics::default();
        metrics.add("a", &metric("rewards/accuracies", 3.0, 3.0));
        metrics.add("a", &metric("rewards/accuracies", 0.0, 1.0));
        metrics.add("b", &metric("rewards/accuracies", 0.0, 4.0));
        metrics.add_loss("a", 0.5);
        metrics.add_loss("b", 0.25);
        let json = metrics.to_json();
        assert_eq!(json["a/rewards/accuracies"], 0.75);
        assert_eq!(json["rewards/accuracies"], 0.375);
        assert_eq!(json["b/loss"], 0.25);
    }

    #[test]
    fn a_margin_is_derived_from_both_sides() {
        let mut metrics = Metrics::default();
        metrics.add_loss("a", 0.0);
        metrics.add("a", &metric("rewards/chosen", 3.0, 2.0));
        assert_eq!(metrics.of("a", "rewards/margins"), None);
        metrics.add("a", &metric("rewards/rejected", -1.0, 2.0));
        assert_eq!(metrics.of("a", "rewards/margins"), Some(2.0));
        assert_eq!(metrics.to_json()["a/rewards/margins"], 2.0);
    }
}
