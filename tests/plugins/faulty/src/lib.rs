//! One objective and one adapter with a fault to choose. Without one the objective's gradient is
//! wrong, which only `uft plugin check` can see.

use uft_core::prelude::*;

struct Faulty {
    fault: &'static str,
}

impl Objective for Faulty {
    const NAME: &'static str = "faulty";
    const ABOUT: &'static str = "-log pi(y|x), with a fault";

    fn new(params: &mut Params) -> Self {
        let faults = [
            "wrong gradient",
            "panic in new",
            "panic in needs",
            "panic in begin_step",
            "panic in evaluate",
            "panic in save_state",
            "panic in load_state",
            "refuses the step",
            "refuses the batch",
            "unwritten gradient",
            "NaN gradient",
            "infinite loss",
            "unknown need",
            "accepts nothing",
            "needs pairs",
        ];
        let fault = params.choice("fault", "wrong gradient", &faults, "what goes wrong");
        params.number("beta", 0.1, Bound::Positive, "not used");
        assert!(fault != "panic in new", "on purpose");
        Self { fault }
    }

    fn needs(&self) -> Needs {
        assert!(self.fault != "panic in needs", "on purpose");
        match self.fault {
            "unknown need" => Needs(1 << 40),
            "needs pairs" => Needs::PAIRS,
            _ => Needs::NOTHING,
        }
    }

    fn accepts(&self) -> Kinds {
        match self.fault {
            "accepts nothing" => Kinds(0),
            "needs pairs" => Kinds::DEMONSTRATION | Kinds::PAIR,
            _ => Kinds::DEMONSTRATION | Kinds::SCORE,
        }
    }

    fn begin_step(&mut self, _: &Step) -> Result<(), Fault> {
        // A message of several lines, as assertions write them.
        assert_ne!(self.fault, "panic in begin_step");
        match self.fault {
            "refuses the step" => Err(Fault::evaluation("the step is\ntoo small")),
            _ => Ok(()),
        }
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        match self.fault {
            "panic in evaluate" => panic!("on purpose"),
            "refuses the batch" => return Err(Fault::evaluation("no token is long enough")),
            "infinite loss" => out.loss(f64::INFINITY),
            _ => {}
        }
        let n = batch.step.segments as f64;
        for segment in batch.segments() {
            out.loss(-batch.logp(segment) / n);
            match self.fault {
                "unwritten gradient" => {}
                "NaN gradient" => out.gradient(segment, f64::NAN),
                "wrong gradient" => out.gradient(segment, 1.0 / n),
                _ => out.gradient(segment, -1.0 / n),
            }
        }
        Ok(())
    }

    fn save_state(&self) -> Vec<u8> {
        assert!(self.fault != "panic in save_state", "on purpose");
        Vec::new()
    }

    fn load_state(&mut self, _: &[u8]) -> Result<(), Fault> {
        assert!(self.fault != "panic in load_state", "on purpose");
        Ok(())
    }
}

struct FaultyAdapter {
    fault: &'static str,
}

impl FeedbackAdapter for FaultyAdapter {
    const NAME: &'static str = "faulty";
    const ABOUT: &'static str = "prompt, completion; with a fault";

    fn new(params: &mut Params) -> Self {
        let faults = [
            "panic in adapt",
            "panic in new",
            "panic in offers",
            "no response",
            "score of 7",
            "another kind",
        ];
        let fault = params.choice("fault", "panic in adapt", &faults, "what goes wrong");
        assert!(fault != "panic in new", "on purpose");
        Self { fault }
    }

    fn offers(&self) -> Kinds {
        assert!(self.fault != "panic in offers", "on purpose");
        Kinds::SCORE
    }

    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        let sample = Sample::new(record.content("prompt")?);
        let feedback = match self.fault {
            "no response" => return Ok(vec![sample]),
            "score of 7" => Feedback::Score(7.0),
            "another kind" => Feedback::Demonstration,
            _ => panic!("on purpose"),
        };
        Ok(vec![sample.response(record.content("completion")?, feedback)])
    }
}

uft_core::plugin! { objectives: [Faulty], adapters: [FaultyAdapter] }
