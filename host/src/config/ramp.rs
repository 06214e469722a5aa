//! A number that changes from step to step, and an objective's place in the configuration, whose
//! parameters may be such numbers.

use super::values::PluginRef;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Shape of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shape {
    Linear,
    Cosine,
}

/// A number that goes from one value to another and stays there:
/// `{ schedule = "linear", from = 0.01, to = 0.1, over = 0.5 }`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Ramp {
    pub schedule: Shape,
    pub from: f64,
    pub to: f64,
    /// As `[train] warmup`: a share of the steps if below 1, otherwise a number of steps. Unset: all
    /// of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub over: Option<f64>,
}

impl Ramp {
    /// The ramp that a parameter's value says, if it says one.
    ///
    /// # Errors
    /// If it has a `schedule` but is not a ramp.
    pub fn of(value: &toml::Value) -> Result<Option<Self>, String> {
        match value.as_table() {
            Some(table) if table.contains_key("schedule") => {
                let ramp: Self = value.clone().try_into().map_err(|e: toml::de::Error| {
                    let why = e.message().trim().replace('\n', " ");
                    format!("{why}; a schedule is {EXAMPLE}")
                })?;
                ramp.check().map(Some)
            }
            _ => Ok(None),
        }
    }

    fn check(self) -> Result<Self, String> {
        if !(self.from.is_finite() && self.to.is_finite()) {
            return Err("`from` and `to` must be finite numbers".into());
        }
        if self.over.is_some_and(|over| !(over.is_finite() && over > 0.0)) {
            return Err("`over` must be above 0: a share of the steps, or their number".into());
        }
        Ok(self)
    }

    /// The value at optimizer step `step` (from 0) of `steps`. Before and after a run, where there are
    /// no steps, it is the last.
    pub fn at(&self, step: u64, steps: u64) -> f64 {
        let over = match self.over {
            Some(share) if share < 1.0 => (share * steps as f64).ceil(),
            Some(number) => number.round(),
            None => steps as f64,
        };
        let progress = if steps == 0 { 1.0 } else { (step as f64 / over).min(1.0) };
        let share = match self.schedule {
            Shape::Linear => progress,
            Shape::Cosine => 0.5 * (1.0 - (std::f64::consts::PI * progress).cos()),
        };
        // Exact at both ends.
        self.from * (1.0 - share) + self.to * share
    }
}

const EXAMPLE: &str = r#"{ schedule = "linear" or "cosine", from = 0.01, to = 0.1, over = 0.5 }"#;

/// A number as it is, or one that changes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    Fixed(f64),
    Ramp(Ramp),
}

impl Number {
    /// See [`Ramp::at`].
    pub fn at(&self, step: u64, steps: u64) -> f64 {
        match self {
            Number::Fixed(number) => *number,
            Number::Ramp(ramp) => ramp.at(step, steps),
        }
    }

    fn of(value: &toml::Value) -> Result<Self, String> {
        let number = value.as_float().or_else(|| value.as_integer().map(|n| n as f64));
        match (number, Ramp::of(value)?) {
            (Some(number), _) => Ok(Number::Fixed(number)),
            (None, Some(ramp)) => Ok(Number::Ramp(ramp)),
            (None, None) => Err(format!("expected a number or {EXAMPLE}")),
        }
    }

    /// Whether it is never negative and always finite.
    pub fn is_weight(&self) -> bool {
        let ends = match self {
            Number::Fixed(number) => [*number; 2],
            Number::Ramp(ramp) => [ramp.from, ramp.to],
        };
        ends.iter().all(|end| end.is_finite() && *end >= 0.0)
    }
}

/// An objective of a sum.
#[derive(Clone, Debug, PartialEq)]
pub struct Term {
    pub weight: Number,
    pub plugin: PluginRef,
}

/// A source's objective: `"name"`, `{ plugin = "name", … }`, or a list of such tables, each with a
/// `weight`, whose losses are added.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ObjectiveRef {
    pub terms: Vec<Term>,
}

impl ObjectiveRef {
    /// What must hold beyond the types of its keys.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self) -> Result<(), String> {
        for (index, Term { weight, plugin }) in self.terms.iter().enumerate() {
            let name = &plugin.plugin;
            if name.is_empty() {
                return Err("a plugin without a name".into());
            }
            if self.terms[..index].iter().any(|term| term.plugin.plugin == *name) {
                return Err(format!("`{name}` is named twice; add its losses in one plugin"));
            }
            if !weight.is_weight() {
                return Err(format!("the weight of `{name}` must not be negative"));
            }
            for (key, value) in &plugin.params {
                Ramp::of(value).map_err(|why| format!("`{name}`, parameter `{key}`: {why}"))?;
            }
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for ObjectiveRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = toml::Value::deserialize(deserializer)?;
        let plugin = |value: toml::Value| {
            PluginRef::deserialize(value).map_err(|e| D::Error::custom(e.message()))
        };
        let toml::Value::Array(terms) = value else {
            return Ok(Self {
                terms: vec![Term { weight: Number::Fixed(1.0), plugin: plugin(value)? }],
            });
        };
        if terms.is_empty() {
            return Err(D::Error::custom("an empty list: at least one objective is needed"));
        }
        let term = |value| {
            let mut plugin = plugin(value)?;
            let weight = match plugin.params.remove("weight") {
                Some(weight) => Number::of(&weight).map_err(|why| {
                    D::Error::custom(format!("the weight of `{}`: {why}", plugin.plugin))
                })?,
                None => Number::Fixed(1.0),
            };
            Ok(Term { weight, plugin })
        };
        Ok(Self { terms: terms.into_iter().map(term).collect::<Result<_, _>>()? })
    }
}

impl Serialize for ObjectiveRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.terms.as_slice() {
            [] => "".serialize(serializer),
            [Term { weight: Number::Fixed(1.0), plugin }] => plugin.serialize(serializer),
            terms => serializer.collect_seq(terms.iter().map(|Term { weight, plugin }| {
                let mut table = toml::Table::new();
                table.insert("plugin".into(), plugin.plugin.clone().into());
                let weight = match weight {
                    Number::Fixed(number) => (*number).into(),
                    Number::Ramp(ramp) => toml::Value::try_from(ramp).expect("a ramp is TOML"),
                };
                table.insert("weight".into(), weight);
                table.extend(plugin.params.clone());
                table
            })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(text: &str) -> Result<Option<Ramp>, String> {
        let table: toml::Table = toml::from_str(&format!("v = {text}")).unwrap();
        Ramp::of(&table["v"])
    }

    #[test]
    fn goes_from_one_end_to_the_other_and_stays() {
        let linear =
            ramp(r#"{ schedule = "linear", from = 1, to = 3, over = 0.5 }"#).unwrap().unwrap();
        let seen = [0, 1, 2, 4, 5, 8].map(|step| linear.at(step, 8));
        assert_eq!(seen, [1.0, 1.5, 2.0, 3.0, 3.0, 3.0]);
        let cosine =
            ramp(r#"{ schedule = "cosine", from = 1.0, to = 0.0, over = 4 }"#).unwrap().unwrap();
        assert!((cosine.at(2, 100) - 0.5).abs() < 1e-15 && cosine.at(4, 100) == 0.0);
        let whole = ramp(r#"{ schedule = "linear", from = 0.1, to = 0.3 }"#).unwrap().unwrap();
        assert_eq!([0, 10].map(|step| whole.at(step, 10)), [0.1, 0.3]);
        assert_eq!(whole.at(0, 0), 0.3);
    }

    #[test]
    fn what_is_not_a_schedule_says_so() {
        assert_eq!(ramp("0.5"), Ok(None));
        assert_eq!(ramp("{ from = 1, to = 2 }"), Ok(None));
        for (text, says) in [
            (r#"{ schedule = "step", from = 1, to = 2 }"#, "unknown variant `step`"),
            (r#"{ schedule = "linear", from = 1 }"#, "missing field `to`"),
            (r#"{ schedule = "linear", from = 1, to = 2, steps = 3 }"#, "unknown field `steps`"),
            (r#"{ schedule = "linear", from = 1, to = inf }"#, "must be finite numbers"),
            (r#"{ schedule = "linear", from = 1, to = 2, over = 0 }"#, "`over` must be above 0"),
        ] {
            let why = ramp(text).unwrap_err();
            assert!(why.contains(says), "{text}: {why}");
        }
    }

    #[test]
    fn an_objective_is_written_as_it_is_read() {
        for text in [
            r#"o = "kto""#,
            r#"o = { plugin = "kto", beta = 0.5 }"#,
            r#"o = [{ plugin = "dpo", weight = 0.8, beta = { schedule = "linear", from = 0.1, to = 0.2 } }, { plugin = "sft", weight = 1.0 }]"#,
        ] {
            #[derive(Debug, PartialEq, Deserialize, Serialize)]
            struct Line {
                o: ObjectiveRef,
            }
            let read: Line = toml::from_str(text).unwrap();
            read.o.check().unwrap();
            let written = toml::to_string(&read).unwrap();
            assert_eq!(toml::from_str::<Line>(&written).unwrap(), read, "{written}");
        }
    }
}
