//! Everything that crosses the border, in one library: every need and kind of feedback of the first uft-core,
//! state, both roles, faults, the generic door. Builds of this source against earlier cores are kept in
//! tests/abi and have to train to the bits of today's, so it takes from the Rust side what the first core had, no arithmetic
//! and no names of metrics, and it stays as it is: what is new in the interface gets a library of its own.

use uft_core::export::abi_stable::std_types::{RStr, Tuple2};
use uft_core::extension::Extension;
use uft_core::prelude::*;

/// `L = mean of (sigmoid(beta * (D / n - c)) - v)^2` over responses of `n` tokens. `D` is the log-ratio
/// in which every token but the first counts half, `v` the feedback as a number, and `c` a running mean over
/// training steps of the log-ratios of responses and of mismatched completions, a constant to the gradient.
struct Pointwise {
    beta: f64,
    momentum: f64,
    center: f64,
}

impl Objective for Pointwise {
    const NAME: &'static str = "archived-pointwise";
    const ABOUT: &'static str = "(sigmoid(beta*(D/n - c)) - v)^2, c a running mean";

    fn new(params: &mut Params) -> Self {
        let share = Bound::Within(0.0, 1.0);
        Self {
            beta: params.number("beta", 0.5, Bound::Positive, "scale of the reward"),
            momentum: params.number("momentum", 0.5, share, "share of the running mean"),
            center: 0.0,
        }
    }

    fn needs(&self) -> Needs {
        let logps = Needs::REFERENCE | Needs::TOKEN_COUNTS | Needs::TOKEN_LOGPS;
        logps | Needs::MISMATCHED | Needs::STEP_LOG_RATIOS | Needs::STATE
    }

    fn accepts(&self) -> Kinds {
        Kinds::DEMONSTRATION | Kinds::SCORE | Kinds::BINARY | Kinds::PAIR
    }

    fn begin_step(&mut self, step: &Step) -> Result<(), Fault> {
        if step.training {
            let all = step.log_ratios.iter().chain(step.mismatched.iter());
            let mean = all.sum::<f64>() / (2 * step.segments) as f64;
            self.center = self.momentum * self.center + (1.0 - self.momentum) * mean;
        }
        Ok(())
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let all = batch.step.segments as f64;
        for segment in batch.segments() {
            let (pi, reference) =
                (&batch.logps[segment.range()], &batch.ref_logps[segment.range()]);
            let ratios = pi
                .iter()
                .zip(reference)
                .map(|(pi, reference)| f64::from(*pi) - f64::from(*reference));
            let weighted = ratios.enumerate().map(|(t, ratio)| weight(t) * ratio).sum::<f64>();
            let n = f64::from(segment.tokens);
            let p = sigmoid(self.beta * (weighted / n - self.center));
            let apart = p - f64::from(segment.value) * f64::from(segment.kind != Kind::Rejected);
            out.loss(apart * apart / all);
            let slope = 2.0 * apart * p * (1.0 - p) * self.beta / n / all;
            for (t, gradient) in out.token_gradients(segment).iter_mut().enumerate() {
                *gradient = (slope * weight(t)) as f32;
            }
            let told = batch.step.log_ratios[segment.in_step as usize];
            out.metric("told_apart", (told - batch.log_ratio(segment)).abs());
            out.metric("center", self.center);
        }
        Ok(())
    }

    fn save_state(&self) -> Vec<u8> {
        self.center.to_le_bytes().to_vec()
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), Fault> {
        let wrong = || Fault::evaluation("the state of `archived-pointwise` is 8 bytes long");
        self.center = f64::from_le_bytes(state.try_into().map_err(|_| wrong())?);
        Ok(())
    }
}

fn weight(token: usize) -> f64 {
    if token == 0 { 1.0 } else { 0.5 }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `L = mean over pairs of log(1 + e^-z)`, `z = beta * (d_w - d_l) - margin`, or `max(0, 1 - z)`.
struct Pairwise {
    beta: f64,
    hinge: bool,
    margins: bool,
}

impl Objective for Pairwise {
    const NAME: &'static str = "archived-pairwise";
    const ABOUT: &'static str = "log(1 + e^-z) or max(0, 1 - z), z = beta*(d_w - d_l) - margin";

    fn new(params: &mut Params) -> Self {
        Self {
            beta: params.number("beta", 0.1, Bound::Positive, "scale of the reward"),
            hinge: params.choice("loss", "logistic", &["logistic", "hinge"], "the pair's loss")
                == "hinge",
            margins: params.flag("margins", true, "whether the pairs' margins count"),
        }
    }

    fn needs(&self) -> Needs {
        Needs::REFERENCE | Needs::PAIRS | Needs::GROUPS
    }

    fn accepts(&self) -> Kinds {
        Kinds::PAIR
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let all = batch.step.pairs as f64;
        for segment in batch.segments() {
            out.gradient(segment, 0.0);
        }
        for (chosen, rejected) in batch.pairs() {
            let rewards = [chosen, rejected].map(|s| self.beta * batch.log_ratio(s));
            let margin = f64::from(chosen.value) * f64::from(self.margins);
            let z = rewards[0] - rewards[1] - margin;
            let (loss, slope) = match self.hinge {
                true => ((1.0 - z).max(0.0), -f64::from(z < 1.0)),
                false => ((-z).max(0.0) + (-z.abs()).exp().ln_1p(), -sigmoid(-z)),
            };
            out.loss(loss / all);
            out.add_gradient(chosen, slope * self.beta / all);
            out.add_gradient(rejected, -slope * self.beta / all);
            out.metric("margin", rewards[0] - rewards[1]);
        }
        Ok(())
    }
}

/// `{"prompt": …, "response": …, "other": …, "feedback": NAME, "value": …}`: contents are texts or messages, the
/// other response is the worse of a pair or one of the opposite value.
struct Records;

impl FeedbackAdapter for Records {
    const NAME: &'static str = "archived-records";
    const ABOUT: &'static str = "prompt, response, other, feedback, value";

    fn new(_: &mut Params) -> Self {
        Self
    }

    fn offers(&self) -> Kinds {
        Kinds::DEMONSTRATION | Kinds::SCORE | Kinds::BINARY | Kinds::PAIR
    }

    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        let (name, value) = (record.text("feedback")?, record.number("value")?);
        if !(0.0..=1.0).contains(&value) {
            return Err(Fault::record("`value` must be a number from 0 to 1"));
        }
        let value = value as f32;
        let feedback = match name {
            "demonstration" => (Feedback::Demonstration, Feedback::Demonstration),
            "score" => (Feedback::Score(value), Feedback::Score(1.0 - value)),
            "thumb" => (Feedback::Binary(value > 0.5), Feedback::Binary(value <= 0.5)),
            "pair" => {
                (Feedback::Chosen(Some(value).into()), Feedback::Rejected(Some(value).into()))
            }
            "panic" => panic!("on purpose"),
            _ => return Err(Fault::record("`feedback` must be a kind of feedback")),
        };
        let sample = Sample::new(record.content("prompt")?);
        let mut sample = sample.response(record.content("response")?, feedback.0);
        if record.has("other") {
            sample = sample.response(record.content("other")?, feedback.1);
        }
        sample.template_args = record.template_args()?.into();
        let turns = if record.has("turns") { Turns::Each } else { Turns::Together };
        Ok(vec![sample.turns(turns)])
    }
}

static DOOR: Tuple2<RStr<'static>, u64> = Tuple2(RStr::from_str("archived"), 1);

// Not `query`: the first core's macro has a function of that name.
fn door(name: &str, revision: u32) -> Option<Extension> {
    match (name, revision) {
        ("archived", 1) => Some(Extension::of(&DOOR)),
        _ => None,
    }
}

uft_core::plugin! {
    objectives: [Pointwise, Pairwise],
    adapters: [Records],
    query: door,
}
