//! An objective and an adapter whose numbers are right and whose manners are not. tests/c/nuisance.c is
//! the same in C.

use std::thread;
use std::time::Duration;
use uft_core::prelude::*;

const HABITS: [&str; 7] =
    ["none", "prints", "allocates", "sleeps", "starts threads", "panics in a thread", "exits"];

fn habit(params: &mut Params) -> &'static str {
    params.choice("habit", "none", &HABITS, "what it does beside its work")
}

fn indulge(habit: &str) {
    match habit {
        "prints" => {
            print!("{{\"loss\": 0}}");
            println!("\n{{\"step\": 1}}");
        }
        "allocates" => {
            let mut much = vec![1u8; 64 << 20];
            much.iter_mut().step_by(4096).for_each(|byte| *byte += 1);
            assert!(much[0] == 2);
        }
        "sleeps" => thread::sleep(Duration::from_millis(20)),
        "starts threads" => {
            // One goes on after the call.
            thread::spawn(|| {
                thread::sleep(Duration::from_millis(5));
                println!("later");
            });
            let sum = thread::spawn(|| (0..1000u64).sum::<u64>()).join();
            assert!(sum.is_ok_and(|sum| sum == 499_500));
        }
        "exits" => std::process::exit(0),
        "panics in a thread" => {
            let panicked = thread::spawn(|| panic!("in a thread of its own")).join();
            assert!(panicked.is_err());
        }
        _ => {}
    }
}

struct Nuisance {
    habit: &'static str,
}

impl Objective for Nuisance {
    const NAME: &'static str = "nuisance";
    const ABOUT: &'static str = "-log pi(y|x), the mean over responses";

    fn new(params: &mut Params) -> Self {
        let habit = habit(params);
        indulge(habit);
        Self { habit }
    }

    fn accepts(&self) -> Kinds {
        Kinds::DEMONSTRATION
    }

    fn begin_step(&mut self, _: &Step) -> Result<(), Fault> {
        indulge(self.habit);
        Ok(())
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        indulge(self.habit);
        out.mean_over_responses(batch, |response| response.logp, |response| -response.logp);
        Ok(())
    }
}

struct NuisanceAdapter {
    habit: &'static str,
}

impl FeedbackAdapter for NuisanceAdapter {
    const NAME: &'static str = "nuisance";
    const ABOUT: &'static str = "prompt, completion";

    fn new(params: &mut Params) -> Self {
        Self { habit: habit(params) }
    }

    fn offers(&self) -> Kinds {
        Kinds::DEMONSTRATION
    }

    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        indulge(self.habit);
        let sample = Sample::new(record.content("prompt")?);
        Ok(vec![sample.response(record.content("completion")?, Feedback::Demonstration)])
    }
}

uft_core::plugin! { objectives: [Nuisance], adapters: [NuisanceAdapter] }
