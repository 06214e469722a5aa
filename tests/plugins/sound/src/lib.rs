//! Plugins that use what the bundled ones do not: statistics of the whole step, state, groups of any
//! size, several entries in one library, the generic door.

use uft_core::export::abi_stable::std_types::{RStr, Tuple2};
use uft_core::extension::Extension;
use uft_core::prelude::*;

/// `L = mean of (d - m)^2 / 2`, `d = log pi - log pi_ref`: log-ratios that stay together. `m` is a
/// running mean over training steps of the steps' mean log-ratios, and a constant to the gradient.
struct Settle {
    momentum: f64,
    center: f64,
}

impl Objective for Settle {
    const NAME: &'static str = "settle";
    const ABOUT: &'static str = "(d - m)^2 / 2, m the running mean of log-ratios d";

    fn new(params: &mut Params) -> Self {
        let momentum = Bound::Within(0.0, 1.0);
        Self {
            momentum: params.number("momentum", 0.5, momentum, "share of the running mean"),
            center: 0.0,
        }
    }

    fn needs(&self) -> Needs {
        Needs::STEP_LOG_RATIOS | Needs::STATE
    }

    fn accepts(&self) -> Kinds {
        Kinds::DEMONSTRATION | Kinds::SCORE | Kinds::BINARY
    }

    fn begin_step(&mut self, step: &Step) -> Result<(), Fault> {
        if step.training {
            let mean = step.log_ratios.iter().sum::<f64>() / step.segments as f64;
            self.center = self.momentum * self.center + (1.0 - self.momentum) * mean;
        }
        Ok(())
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let n = batch.step.segments as f64;
        for segment in batch.segments() {
            let ratio = batch.log_ratio(segment);
            let told = batch.step.log_ratios[segment.in_step as usize];
            out.loss((ratio - self.center).powi(2) / 2.0 / n);
            out.gradient(segment, (ratio - self.center) / n);
            out.metric("center", self.center);
            out.metric("told_apart", (told - ratio).abs());
        }
        Ok(())
    }

    fn save_state(&self) -> Vec<u8> {
        self.center.to_le_bytes().to_vec()
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), Fault> {
        let wrong = || Fault::evaluation("the state of `settle` is 8 bytes long");
        self.center = f64::from_le_bytes(state.try_into().map_err(|_| wrong())?);
        Ok(())
    }
}

/// `L = mean over groups of -sum over responses of q log p`, `p` the softmax of a group's log-ratios
/// and `q` its scores, normalised: the list-wise form of a preference.
struct Listwise;

impl Objective for Listwise {
    const NAME: &'static str = "listwise";
    const ABOUT: &'static str = "cross-entropy of a group's scores and the softmax of log-ratios";

    fn new(_: &mut Params) -> Self {
        Self
    }

    fn needs(&self) -> Needs {
        Needs::REFERENCE | Needs::GROUPS
    }

    fn accepts(&self) -> Kinds {
        Kinds::SCORE
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let groups = batch.step.groups as f64;
        for group in batch.segments().chunk_by(|a, b| a.group == b.group) {
            let ratios: Vec<f64> = group.iter().map(|s| batch.log_ratio(s)).collect();
            let most = ratios.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let log_sum = most + ratios.iter().map(|d| (d - most).exp()).sum::<f64>().ln();
            let total: f64 = group.iter().map(|s| f64::from(s.value)).sum();
            for (segment, ratio) in group.iter().zip(ratios) {
                let share = if total > 0.0 { f64::from(segment.value) / total } else { 0.0 };
                let target = if total > 0.0 { 1.0 } else { 0.0 };
                out.loss(share * (log_sum - ratio) / groups);
                out.gradient(segment, (target * (ratio - log_sum).exp() - share) / groups);
            }
        }
        Ok(())
    }
}

/// `{"text": …}`: a text to imitate, without a prompt.
struct Lines;

impl FeedbackAdapter for Lines {
    const NAME: &'static str = "lines";
    const ABOUT: &'static str = "text";

    fn new(_: &mut Params) -> Self {
        Self
    }

    fn offers(&self) -> Kinds {
        Kinds::DEMONSTRATION
    }

    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        let text = Content::text(record.text("text")?);
        Ok(vec![Sample::new(Content::text("")).response(text, Feedback::Demonstration)])
    }
}

/// `{"prompt": …, "answers": [[text, stars], …]}`: answers with one to five stars.
struct Stars;

impl FeedbackAdapter for Stars {
    const NAME: &'static str = "stars";
    const ABOUT: &'static str = "prompt, answers, stars from 1 to 5";

    fn new(_: &mut Params) -> Self {
        Self
    }

    fn offers(&self) -> Kinds {
        Kinds::SCORE
    }

    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        let (answers, stars) = (record.contents("answers")?, record.numbers("stars")?);
        if answers.len() != stars.len() || stars.iter().any(|s| !(1.0..=5.0).contains(s)) {
            return Err(Fault::record("`stars` must hold a number from 1 to 5 for every answer"));
        }
        let sample = Sample::new(record.content("prompt")?);
        let rated = answers.into_iter().zip(stars);
        Ok(vec![rated.fold(sample, |sample, (answer, stars)| {
            sample.response(answer, Feedback::Score(((stars - 1.0) / 4.0) as f32))
        })])
    }
}

static SECRET: Tuple2<RStr<'static>, u64> = Tuple2(RStr::from_str("behind the door"), 42);

fn query(name: &str, revision: u32) -> Option<Extension> {
    match (name, revision) {
        ("secret", 1) => Some(Extension::of(&SECRET)),
        ("panic", _) => panic!("on purpose"),
        _ => None,
    }
}

uft_core::plugin! {
    objectives: [Settle, Listwise],
    adapters: [Lines, Stars],
    query: query,
}
