//! Generation against the packed forward pass.

use super::*;

/// A prompt longer than Mistral's window, and a continuation.
fn text(name: &str) -> (Vec<u32>, Vec<u32>) {
    let responses = expected(name, "responses.json");
    let response = &responses["demos"][0][0];
    (ids(&response["prompt_ids"]), ids(&response["ids"]))
}

pub(super) fn log_softmax(logits: &[f32], token: u32) -> f64 {
    let top = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - top).exp()).sum();
    f64::from(logits[token as usize] - top) - sum.ln()
}

#[test]
fn with_a_cache_the_log_probs_are_those_of_one_pass() {
    for name in MODELS {
        let model = Model::load(&model_dir(name), &Device::Cpu).unwrap();
        let lora = peft::load(&model_dir(name).join("adapter"), model.config()).unwrap();
        let lora = model.place(lora).unwrap();
        let (prompt, tokens) = text(name);
        for lora in [None, Some(&lora)] {
            let mut generator = Generator::new(&model, lora, &prompt, tokens.len()).unwrap();
            let mut stepwise = Vec::new();
            for token in &tokens {
                stepwise.push(log_softmax(generator.logits(), *token));
                generator.push(*token).unwrap();
            }
            let response = serde_json::json!({"prompt_ids": prompt, "ids": tokens});
            let at_once = model.logps(&pack(&[group(&response)]), lora).unwrap();
            assert_close(name, &at_once, &stepwise, 2e-5);
        }
    }
}

#[test]
fn greedy_takes_the_most_probable_token_until_an_end() {
    let model = Model::load(&model_dir("mistral"), &Device::Cpu).unwrap();
    let (prompt, _) = text("mistral");
    let options = SampleOptions { max_tokens: 12, ..SampleOptions::greedy() };
    let tokens = model.generate(&prompt, &options, None).unwrap();
    assert_eq!(tokens.len(), 12);
    let mut generator = Generator::new(&model, None, &prompt, tokens.len()).unwrap();
    for token in &tokens {
        let logits = generator.logits();
        assert!(logits.iter().all(|logit| *logit <= logits[*token as usize]));
        generator.push(*token).unwrap();
    }
    let first = tokens.iter().position(|token| *token == tokens[5]).unwrap();
    let options = SampleOptions { eos: vec![tokens[5]], ..options };
    assert_eq!(model.generate(&prompt, &options, None).unwrap(), tokens[..=first]);
}

#[test]
fn sampling_follows_the_distribution() {
    let probabilities = [0.5f32, 0.05, 0.3, 0.15];
    let logits = probabilities.map(f32::ln);
    let frequencies = |options: &SampleOptions| {
        let mut counts = [0; 4];
        for step in 0..20_000 {
            counts[options.choose(&logits, step).unwrap() as usize] += 1;
        }
        counts.map(|count| f64::from(count) / 20_000.0)
    };
    let close = |a: [f64; 4], b: [f64; 4]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 0.02);
    let plain = SampleOptions { temperature: 1.0, seed: 1, ..SampleOptions::greedy() };
    assert!(close(frequencies(&plain), [0.5, 0.05, 0.3, 0.15]));
    let cold = SampleOptions { temperature: 0.5, ..plain.clone() };
    let squares = [0.25, 0.0025, 0.09, 0.0225].map(|p| p / 0.365);
    assert!(close(frequencies(&cold), squares));
    let top_p = SampleOptions { top_p: 0.7, ..plain.clone() };
    assert!(close(frequencies(&top_p), [0.625, 0.0, 0.375, 0.0]));
    let top_k = SampleOptions { top_k: Some(3), ..plain.clone() };
    assert!(close(frequencies(&top_k), [0.5 / 0.95, 0.0, 0.3 / 0.95, 0.15 / 0.95]));
    let only_one = SampleOptions { top_p: 0.0, ..plain.clone() };
    assert_eq!(frequencies(&only_one), [1.0, 0.0, 0.0, 0.0]);
    assert_eq!(plain.choose(&logits, 7).unwrap(), plain.choose(&logits, 7).unwrap());
    let other = SampleOptions { seed: 2, ..plain.clone() };
    assert!(
        (0..50).any(|t| plain.choose(&logits, t).unwrap() != other.choose(&logits, t).unwrap())
    );
}

#[test]
fn what_cannot_be_continued_is_an_error() {
    let model = Model::load(&model_dir("llama"), &Device::Cpu).unwrap();
    let options = SampleOptions::greedy();
    let refused = |prompt: &[u32]| model.generate(prompt, &options, None).unwrap_err().message;
    assert!(refused(&[]).contains("a prompt of a token or more"));
    assert!(refused(&[1, 512]).contains("token 512 in a vocabulary of 512"));
    let message = options.choose(&[0.0, f32::NAN], 0).unwrap_err().message;
    assert!(message.contains("a logit is NaN"), "{message}");
}
