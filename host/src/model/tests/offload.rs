//! Inputs of layers in the host's memory between the way forward and the way back, on the emulated device with copies
//! beside launches as late and as early as they may come.

use super::gradients::adapter;
use super::identities::with_others;
use super::*;
use crate::model::memory::Size;
use half::bf16;
use uft_kernels::cuda::Gpu;

const MODELS: [&str; 2] = ["llama", "qwen3"];

/// Log-probs and gradients of a batch alone and of the same with others beside it.
fn results(
    model: &mut cuda::Decoder,
    lora: &cuda::Adapters,
    name: &str,
    offloaded_layers: usize,
) -> [(Vec<f32>, LoraGrads); 2] {
    let recomputed_layers = model.config.layers;
    model.options = Options { recomputed_layers, offloaded_layers, ..Options::default() };
    let way_back = |model: &cuda::Decoder, tape: cuda::Tape| {
        let logps = tape.logps().to_vec();
        let mut grads = cuda::Gradients::zeros(lora).unwrap();
        model.backward(tape, &uneven(logps.len()), lora, &mut grads).unwrap();
        (logps, grads.read().unwrap())
    };
    let batch = with_others(name);
    let alone = way_back(model, model.forward(&batch.own, lora).unwrap());
    let (beside, _) = model.forward_with_others(batch, lora).unwrap();
    [alone, way_back(model, beside)]
}

#[test]
fn offloaded_inputs_change_no_bit() {
    for gpu in [Gpu::emulated_late(1).unwrap(), Gpu::emulated_with_early_copies(1).unwrap()] {
        for name in MODELS {
            let mut model = cuda::Decoder::load(&model_dir(name), &gpu).unwrap();
            let lora = adapter(&Decoder::load(&model_dir(name)).unwrap(), ".*proj|lm_head");
            let lora = cuda::Adapters::new(&lora, &gpu).unwrap();
            let expected = results(&mut model, &lora, name, 0);
            assert_eq!(model.offloaded(), 0);
            for offloaded in 1..=model.config.layers {
                let found = results(&mut model, &lora, name, offloaded);
                assert!(found == expected, "{name}: {offloaded} inputs offloaded");
                assert!(model.offloaded() > 0);
            }
        }
    }
}

/// One tape after the other takes the same memory, on the device and of the host, and it is what the plan counts.
#[test]
fn a_pass_offloads_what_was_counted() {
    let gpu = Gpu::emulated_late(1).unwrap();
    for name in MODELS {
        let mut model = cuda::Decoder::load(&model_dir(name), &gpu).unwrap();
        let lora = adapter(&Decoder::load(&model_dir(name)).unwrap(), ".*proj|lm_head");
        let placed = cuda::Adapters::new(&lora, &gpu).unwrap();
        let batch = with_others(name);
        let heads = &model.config.heads;
        let (own, all) = (Size::of(&batch.own, heads), Size::of(&batch.all, heads));
        let recomputed_layers = model.config.layers;
        for offloaded_layers in 1..=recomputed_layers {
            let options = Options { recomputed_layers, offloaded_layers, ..Options::default() };
            let counted =
                cuda::Counted::new(&model.config, options, gpu.properties(), 128).unwrap();
            let counted = counted.with_adapters(&lora).unwrap().with_training(false).unwrap();
            counted.step(own).unwrap();
            counted.step_with_others(own, all).unwrap();
            let input = own.rows * model.config.hidden * size_of::<bf16>();
            let inputs = offloaded_layers * input.next_multiple_of(256);
            assert_eq!(counted.offloaded(), inputs, "{name}: one tape's at a time");
            model.reserve(counted.peak(), counted.offloaded(), 128, &[]).unwrap();
            results(&mut model, &placed, name, offloaded_layers);
            assert_eq!(model.offloaded(), counted.offloaded(), "{name}");
            assert_eq!(model.activations(), counted.peak(), "{name}");
        }
    }
}

/// Of a model with many layers, what is kept for the way back is most of what a pass takes.
#[test]
fn what_is_offloaded_is_not_on_the_device() {
    let scratch = Scratch::copy_of(&model_dir("llama"), "many-layers");
    const LAYERS: usize = 24;
    scratch.edit("config.json", |config| config["num_hidden_layers"] = LAYERS.into());
    let config = ModelConfig::load(&scratch.0).unwrap();
    let lora = Lora::init(&LoraConfig { rank: 4, ..LoraConfig::default() }, &config, 1).unwrap();
    let size = Size { rows: 512, needed: 64, targets: 64, longest: 64, tables: 4096 };
    let input = size.rows * config.hidden * size_of::<bf16>();
    let took = |offloaded_layers| {
        let options = Options { recomputed_layers: LAYERS, offloaded_layers, ..Options::default() };
        let gpu = Gpu::emulated(0).unwrap();
        let counted = cuda::Counted::new(&config, options, gpu.properties(), 128).unwrap();
        let counted = counted.with_adapters(&lora).unwrap().with_training(false).unwrap();
        counted.step(size).unwrap();
        assert_eq!(counted.offloaded(), offloaded_layers * input);
        counted.peak()
    };
    let all: Vec<usize> = (0..LAYERS).map(took).collect();
    assert!(all.is_sorted_by(|more, less| more >= less), "{all:?}");
    // But for the one that leaves or comes while another layer is computed.
    let saved = all[0] - all[LAYERS - 1];
    assert!(saved >= (LAYERS - 3) * input, "{saved} of {} bytes", LAYERS * input);
}
