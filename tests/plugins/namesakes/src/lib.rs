//! Two objectives called `sft`, which is also the name of a bundled plugin.

use uft_core::prelude::*;

struct Namesake<const NUMBER: u8>;

impl<const NUMBER: u8> Objective for Namesake<NUMBER> {
    const NAME: &'static str = "sft";
    const ABOUT: &'static str = "has a name that is taken";

    fn new(_: &mut Params) -> Self {
        Self
    }

    fn accepts(&self) -> Kinds {
        Kinds::DEMONSTRATION
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        for segment in batch.segments() {
            out.gradient(segment, 0.0);
        }
        Ok(())
    }
}

uft_core::plugin! { objectives: [Namesake<1>, Namesake<2>] }
