//! The decoder of GPUs, on the emulated device: against the processor's, and what must hold of its bits.

use super::generation::log_softmax;
use super::gradients::{adapter, batch};
use super::identities::with_others;
use super::plain::Plain;
use super::*;
use crate::model::memory::Size;
use crate::model::packed::Targets;
use std::sync::OnceLock;
use uft_kernels::cuda::Gpu;

/// Numbers may be so many times as far off as a plain run in bf16.
const FACTOR: f64 = 2.0;

fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| Gpu::emulated_late(1).unwrap_or_else(|error| panic!("{error}")))
}

/// With Hopper's own kernels, for the layers that are wide enough.
pub(super) fn hopper() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| Gpu::emulated_hopper(1).unwrap_or_else(|error| panic!("{error}")))
}

fn load(name: &str) -> cuda::Decoder {
    cuda::Decoder::load(&model_dir(name), gpu()).unwrap()
}

/// Two short groups of a shared prompt each: a few dozen rows.
fn small(name: &str) -> Packed {
    let rows = expected(name, "responses.json")["pairs"].clone();
    let mut groups: Vec<Group> = rows.as_array().unwrap()[..2].iter().map(shared_group).collect();
    for group in &mut groups {
        group.prompt.truncate(9);
        for branch in &mut group.branches {
            branch.tokens.truncate(5);
            branch.segments[0].trained = vec![0..branch.tokens.len()];
        }
    }
    pack(&groups)
}

/// A model's adapters on the device, all with B unequal to 0.
fn placed(name: &str) -> cuda::Adapters {
    place(&adapter(&Decoder::load(&model_dir(name)).unwrap(), ".*proj|lm_head"))
}

fn place(lora: &Lora) -> cuda::Adapters {
    place_on(gpu(), lora)
}

pub(super) fn place_on(gpu: &Gpu, lora: &Lora) -> cuda::Adapters {
    cuda::Adapters::new(lora, gpu).unwrap()
}

pub(super) fn results(
    model: &cuda::Decoder,
    packed: &Packed,
    lora: &cuda::Adapters,
    dlogp: &[f32],
) -> (Vec<f32>, LoraGrads) {
    let tape = model.forward(packed, lora).unwrap();
    let logps = tape.logps().to_vec();
    (logps, way_back(model, tape, lora, dlogp))
}

fn way_back(
    model: &cuda::Decoder,
    tape: cuda::Tape,
    lora: &cuda::Adapters,
    dlogp: &[f32],
) -> LoraGrads {
    let mut grads = cuda::Gradients::zeros(lora).unwrap();
    model.backward(tape, dlogp, lora, &mut grads).unwrap();
    grads.read().unwrap()
}

#[test]
fn numbers_are_as_good_as_those_of_a_plain_run_in_bf16() {
    check_numbers(gpu());
}

#[test]
fn numbers_of_hoppers_kernels_are_as_good() {
    check_numbers(hopper());
}

fn check_numbers(gpu: &Gpu) {
    for name in MODELS {
        let exact = Decoder::load(&model_dir(name)).unwrap();
        let model = cuda::Decoder::load(&model_dir(name), gpu).unwrap();
        let lora = adapter(&exact, ".*proj|lm_head");
        // Longer than Mistral's window.
        let packed = batch(name);
        let dlogp = uneven(packed.targets.rows.len());
        let (logps, grads) = results(&model, &packed, &place_on(gpu, &lora), &dlogp);
        let yardstick = Yardstick::new(&exact, &lora, &packed, &dlogp);
        yardstick.expect(name, &logps);
        yardstick.expect_gradients(name, &grads);
    }
}

/// What a device's numbers are held against: those of the processor, and how far off a plain run in bf16 is.
pub(super) struct Yardstick<'a> {
    lora: &'a Lora,
    exact: (Vec<f32>, LoraGrads),
    plain: (Vec<f32>, LoraGrads),
}

impl<'a> Yardstick<'a> {
    pub fn new(model: &Decoder, lora: &'a Lora, packed: &Packed, dlogp: &[f32]) -> Self {
        let logps = model.logps(packed, Some(lora)).unwrap();
        let exact = (logps, gradient(model, packed, lora, dlogp));
        Self { lora, exact, plain: Plain::new(model, lora, packed).run(dlogp) }
    }

    /// Whether log-probs are as good as a plain run's.
    pub fn expect(&self, what: &str, logps: &[f32]) {
        let [exact, plain] = [&self.exact, &self.plain].map(|(logps, _)| logps);
        expect_as_good(&format!("{what}: log-probs"), logps, plain, exact);
    }

    /// Whether every gradient is.
    pub fn expect_gradients(&self, what: &str, grads: &LoraGrads) {
        let of = |grads| self.lora.grad_tensors(grads);
        for ((got, plain), exact) in of(grads).zip(of(&self.plain.1)).zip(of(&self.exact.1)) {
            expect_as_good(&format!("{what}: {}", got.name), got.data, plain.data, exact.data);
        }
    }
}

/// Whether numbers are at most [`FACTOR`] times as far off as those of a plain run.
fn expect_as_good(what: &str, got: &[f32], plain: &[f32], exact: &[f32]) {
    let (got, plain) = (relative(got, exact), relative(plain, exact));
    println!("{what}: {got:.2e}, plain {plain:.2e}");
    assert!(got <= FACTOR * plain, "{what}: off by {got:e}, a plain run by {plain:e}");
    assert!(plain < 0.3, "{what}: the yardstick itself is off by {plain:e}");
}

#[test]
fn how_a_batch_is_packed_changes_no_bit() {
    for name in MODELS {
        let model = load(name);
        let lora = placed(name);
        let rows = expected(name, "responses.json")["pairs"].clone();
        let groups: Vec<Group> = rows.as_array().unwrap()[..3].iter().map(shared_group).collect();
        let together = model.logps(&pack(&groups), Some(&lora)).unwrap();
        let alone: Vec<f32> = groups
            .iter()
            .flat_map(|group| model.logps(&pack(std::slice::from_ref(group)), Some(&lora)).unwrap())
            .collect();
        assert!(together == alone, "{name}: a group's log-probs depend on its company");
        let copies: Vec<&Group> = groups.iter().collect();
        let copies = model.logps(&Packed::with_prompt_copies(&copies), Some(&lora)).unwrap();
        assert!(together == copies, "{name}: a response's log-probs depend on the prompt's others");
    }
}

#[test]
fn an_adapter_that_adds_nothing_changes_no_bit() {
    for name in MODELS {
        let model = load(name);
        let packed = small(name);
        for targets in ["all-linear", ".*proj|lm_head"] {
            let targets = targets::Targets::from_text(targets);
            let config = LoraConfig { rank: 4, targets, ..LoraConfig::default() };
            let lora = place(&Lora::init(&config, &model.config, 1).unwrap());
            let base = model.logps(&packed, None).unwrap();
            assert_eq!(base, model.logps(&packed, Some(&lora)).unwrap(), "{name}");
            assert_eq!(base, model.forward(&packed, &lora).unwrap().logps(), "{name}, with a tape");
        }
    }
}

#[test]
fn choices_of_how_to_compute_change_no_bit_of_log_probs_and_layers_again_none_at_all() {
    for name in ["llama", "mistral", "qwen3"] {
        let (exact, mut model) = (Decoder::load(&model_dir(name)).unwrap(), load(name));
        let packed = small(name);
        let adapters = adapter(&exact, ".*proj|lm_head");
        let lora = place(&adapters);
        let dlogp = uneven(packed.targets.rows.len());
        let (logps, grads) = results(&model, &packed, &lora, &dlogp);
        assert_eq!(
            (logps.clone(), grads.clone()),
            results(&model, &packed, &lora, &dlogp),
            "{name}"
        );
        let layers = model.config.layers;
        for (recomputed_layers, recomputed_gates) in [(1, 0), (layers, 0), (0, layers), (1, 1)] {
            model.options = Options { recomputed_layers, recomputed_gates, ..Options::default() };
            let again = results(&model, &packed, &lora, &dlogp);
            let what = format!("{recomputed_layers} layers, {recomputed_gates} gates");
            assert!((&logps, &grads) == (&again.0, &again.1), "{name}: {what}");
        }
        model.options = Options { fused_log_probs: false, ..Options::default() };
        assert_eq!(logps, model.logps(&packed, Some(&lora)).unwrap(), "{name}: all logits");
        model.options = Options { skipped_gradients: false, ..Options::default() };
        let (all_rows, all_grads) = results(&model, &packed, &lora, &dlogp);
        assert_eq!(logps, all_rows, "{name}: no row left out");
        Yardstick::new(&exact, &adapters, &packed, &dlogp).expect_gradients(name, &all_grads);
    }
}

#[test]
fn others_beside_a_batch_change_no_bit() {
    for name in ["llama", "mistral", "qwen3"] {
        let mut model = load(name);
        let lora = placed(name);
        for (recomputed_layers, recomputed_gates) in [(0, 0), (1, 1)] {
            model.options = Options { recomputed_layers, recomputed_gates, ..Options::default() };
            let batch = with_others(name);
            let (own, of_others) = (batch.own.clone(), batch.of_others.clone());
            let all = model.logps(&batch.all, Some(&lora)).unwrap();
            let (tape, others) = model.forward_with_others(batch, &lora).unwrap();
            let dlogp = uneven(own.targets.rows.len());
            let expected: Vec<f32> =
                of_others.into_iter().flat_map(|range| all[range].to_vec()).collect();
            assert_eq!(others, expected, "{name}");
            let (own_logps, own_grads) = results(&model, &own, &lora, &dlogp);
            assert_eq!(tape.logps(), own_logps, "{name}");
            assert!(way_back(&model, tape, &lora, &dlogp) == own_grads, "{name}");
        }
    }
}

/// Where only some layers have adapters the way back stops early, and where it does depends on which.
#[test]
fn fewer_adapters_have_the_same_gradients() {
    let name = "qwen3";
    let (exact_model, model) = (Decoder::load(&model_dir(name)).unwrap(), load(name));
    let packed = small(name);
    let dlogp = uneven(packed.targets.rows.len());
    for targets in [
        "lm_head",
        r".*1\.mlp\.down_proj",
        r".*1\.mlp\.up_proj",
        r".*1\.self_attn\.o_proj",
        r".*1\.self_attn\.v_proj",
        r".*0\.mlp\.gate_proj|.*1\.self_attn\.k_proj",
    ] {
        let lora = adapter(&exact_model, targets);
        let (_, got) = results(&model, &packed, &place(&lora), &dlogp);
        Yardstick::new(&exact_model, &lora, &packed, &dlogp).expect_gradients(targets, &got);
    }
}

/// Token by token over a cache, with a window and kernels for single tokens: all that may come next at every place.
#[test]
fn generation_goes_on_as_one_pass_would() {
    for name in ["llama", "llama-bias", "mistral", "qwen3"] {
        let exact = Decoder::load(&model_dir(name)).unwrap();
        let model = Model::load(&model_dir(name), &Device::Gpu(gpu().clone())).unwrap();
        let lora = adapter(&exact, ".*proj|lm_head");
        let response = &expected(name, "responses.json")["demos"][0][0];
        let (prompt, tokens) = (ids(&response["prompt_ids"]), ids(&response["ids"]));
        let tokens = &tokens[..tokens.len().min(6)];

        let vocabulary = 0..model.config().vocab as u32;
        let places = (0..tokens.len()).map(|place| (prompt.len() - 1 + place) as u32);
        let (rows, targets) =
            places.flat_map(|row| vocabulary.clone().map(move |token| (row, token))).unzip();
        let packed = Packed {
            targets: Targets { rows, tokens: targets },
            ..Packed::prompt(&[&prompt[..], &tokens[..tokens.len() - 1]].concat())
        };
        let nothing = vec![0.0; packed.targets.rows.len()];
        let (plain, _) = Plain::new(&exact, &lora, &packed).run(&nothing);
        let exact = exact.logps(&packed, Some(&lora)).unwrap();

        let lora = model.place(lora).unwrap();
        let mut generator = Generator::new(&model, Some(&lora), &prompt, tokens.len()).unwrap();
        let mut stepwise = Vec::new();
        for token in tokens {
            let logits = generator.logits();
            stepwise.extend(vocabulary.clone().map(|next| log_softmax(logits, next) as f32));
            generator.push(*token).unwrap();
        }
        let size = vocabulary.len();
        let of_places = stepwise.chunks(size).zip(plain.chunks(size)).zip(exact.chunks(size));
        for (place, ((got, plain), exact)) in of_places.enumerate() {
            expect_as_good(&format!("{name}, token {place}"), got, plain, exact);
        }
    }
}

/// The plan of memory goes through the same code, so it knows what a pass takes.
#[test]
fn a_pass_takes_what_was_counted() {
    for name in ["llama", "mistral", "qwen3"] {
        let mut model = load(name);
        let lora = adapter(&Decoder::load(&model_dir(name)).unwrap(), ".*proj|lm_head");
        let placed = place(&lora);
        let batch = with_others(name);
        let heads = &model.config.heads;
        let (own, all) = (Size::of(&batch.own, heads), Size::of(&batch.all, heads));
        let dlogp = uneven(batch.own.targets.rows.len());
        for (recomputed_layers, recomputed_gates) in [(0, 0), (0, 2), (1, 1)] {
            let options = Options { recomputed_layers, recomputed_gates, ..Options::default() };
            let properties = gpu().properties();
            let count = || {
                let counted = cuda::Counted::new(&model.config, options, properties, 128).unwrap();
                counted.with_adapters(&lora).unwrap().with_training(false).unwrap()
            };
            let (alone, beside) = (count(), count());
            alone.step(own).unwrap();
            beside.step_with_others(own, all).unwrap();
            model.options = options;
            model.reserve(0, 0, 128, &[]).unwrap();
            results(&model, &batch.own, &placed, &dlogp);
            assert_eq!(model.activations(), alone.peak(), "{name}");
            model.reserve(0, 0, 128, &[]).unwrap();
            let batch = with_others(name);
            let (tape, _) = model.forward_with_others(batch, &placed).unwrap();
            way_back(&model, tape, &placed, &dlogp);
            assert_eq!(model.activations(), beside.peak(), "{name}");
        }
    }
}

#[test]
fn what_a_gpu_cannot_do_is_refused() {
    let scratch = Scratch::copy_of(&model_dir("llama"), "gpu-width");
    scratch.edit("config.json", |config| config["intermediate_size"] = 60.into());
    let refused = cuda::Decoder::load(&scratch.0, gpu()).err().unwrap().message;
    assert!(
        refused.contains("intermediate_size is 60: on a GPU it must be a multiple of 8"),
        "{refused}"
    );
    let model = load("llama");
    let config = LoraConfig { rank: 257, ..LoraConfig::default() };
    let lora = Lora::init(&config, &model.config, 1).unwrap();
    let refused = cuda::Adapters::new(&lora, gpu()).err().unwrap().message;
    assert!(refused.contains("rank 257 of model.layers.0.self_attn.q_proj"), "{refused}");
}
