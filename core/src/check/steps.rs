//! Optimizer steps at random, at the edges of what training meets, and degenerate ones.

use super::case::Case;
use crate::needs::{Kinds, Needs};
use crate::sample::{Feedback, Kind};
use abi_stable::std_types::ROption;

/// Makes cases that an objective declares to understand.
pub(super) struct Maker {
    needs: Needs,
    /// The kinds of a group's responses, one entry per sort of group that is accepted.
    families: Vec<Vec<Kind>>,
    /// Fewest responses of a group.
    at_least: u64,
}

/// A response of an extreme case: which of the step's responses it is → tokens, log-prob of the
/// policy and of the reference per token.
type Shape = fn(usize) -> (usize, f32, f32);

/// Cases that real training meets at its edges. The log-probs are exact in f32, and stay so when
/// they are moved by a difference quotient's step.
const EXTREMES: [(&str, Shape); 7] = [
    ("policy = reference", |i| (i + 1, -1.5, -1.5)),
    ("log-ratio +1e4", |_| (8, -1.0, -1251.0)),
    ("log-ratio -1e4", |_| (8, -1251.0, -1.0)),
    ("log-ratios of +1e4 and -1e4", |i| {
        if i.is_multiple_of(2) { (8, -1251.0, -1.0) } else { (8, -1.0, -1251.0) }
    }),
    ("one token each", |i| (1, -2.0 - i as f32, -3.0)),
    ("32,768 tokens", |i| if i == 0 { (32_768, -0.5, -0.75) } else { (3, -0.5, -0.75) }),
    ("a certain policy", |_| (4, 0.0, -0.25)),
];

/// Groups of a random step, so that it can be split as 1 x 8, 8 x 1 and over four ranks.
const GROUPS: usize = 8;

impl Maker {
    pub(super) fn new(needs: Needs, accepts: Kinds) -> Self {
        let kinds = Kind::ALL.into_iter().filter(|k| accepts.contains(Kinds::of(*k)));
        let mut families: Vec<Vec<Kind>> = kinds.map(|k| vec![k]).collect();
        if needs.contains(Needs::PAIRS) {
            families.clear();
        }
        if accepts.contains(Kinds::PAIR) {
            families.push(vec![Kind::Chosen, Kind::Rejected]);
        }
        Self { needs, families, at_least: if needs.contains(Needs::GROUPS) { 2 } else { 1 } }
    }

    /// Steps with log-probs close to the reference and far from it, in turn.
    pub(super) fn random_steps(&self) -> Vec<Case> {
        (1..=6).map(|seed| self.random(seed, [0.25, 4.0][seed as usize % 2])).collect()
    }

    /// Every one of [`EXTREMES`] with feedback of both sorts, with good alone and with bad alone.
    pub(super) fn extreme_steps(&self) -> Vec<Case> {
        let sorts = [(None, ""), (Some(true), ", all good"), (Some(false), ", all bad")];
        let steps = EXTREMES.into_iter().flat_map(|(name, shape)| {
            sorts.map(|(good, words)| self.extreme(&format!("{name}{words}"), shape, good))
        });
        steps.collect()
    }

    /// Steps that lack what others have: a kind, a difference between responses, a second prompt.
    pub(super) fn degenerate_steps(&self) -> Vec<Case> {
        let equal = |families: &[Vec<Kind>], name: String, prompts, of_each| {
            let mut case = Case { name, ..Case::new() };
            for family in std::iter::repeat_n(families, prompts).flatten() {
                let kinds = family.iter().flat_map(|kind| std::iter::repeat_n(*kind, of_each));
                let response = |kind| (feedback(kind, 0.5), vec![-1.5; 3], vec![-1.75; 3]);
                case = case.group(&borrowed(&kinds.map(response).collect::<Vec<_>>()));
            }
            case.mismatched = case.log_ratios.clone();
            case
        };
        let fewest = self.at_least as usize;
        let mut steps = vec![
            equal(&self.families, "all responses equal".into(), 2, fewest),
            equal(&self.families, "eight equal responses of each kind".into(), 2, 8),
        ];
        let alone = self.families.iter().filter(|_| self.families.len() > 1);
        steps.extend(alone.map(|family| {
            let names: Vec<&str> = family.iter().map(|kind| kind.name()).collect();
            let name = format!("{} responses alone", names.join(" and "));
            equal(std::slice::from_ref(family), name, 2, fewest)
        }));
        // Without a second prompt there is no mismatched completion.
        if !self.needs.contains(Needs::MISMATCHED) {
            steps.push(equal(&self.families[..1], "a single prompt".into(), 1, fewest));
        }
        steps
    }

    /// A step of `tokens` tokens in responses of 256, of every sort in turn.
    pub(super) fn large_step(&self, tokens: usize) -> Case {
        let mut rng = Rng(7);
        let mut case = Case { name: format!("{tokens} tokens"), ..Case::new() };
        for family in self.families.iter().cycle() {
            if case.logps.len() >= tokens {
                break;
            }
            let mut responses = Vec::new();
            for kind in family {
                for _ in 0..self.at_least.div_ceil(family.len() as u64) {
                    let value = rng.below(17) as f32 / 16.0;
                    let ref_logps: Vec<f32> = (0..256).map(|_| rng.exact(-4.0, -0.5)).collect();
                    let logps = ref_logps.iter().map(|r| r + rng.exact(-0.125, 0.125)).collect();
                    responses.push((feedback(*kind, value), logps, ref_logps));
                }
            }
            case = case.group(&borrowed(&responses));
        }
        case.mismatched = case.log_ratios.clone();
        case
    }

    /// Groups of every sort, at least eight in all; log-ratios of a token within `spread`.
    fn random(&self, seed: u64, spread: f64) -> Case {
        let mut rng = Rng(seed);
        let mut case = Case { name: format!("random step {seed}"), ..Case::new() };
        for family in
            std::iter::repeat_n(&self.families, GROUPS.div_ceil(self.families.len())).flatten()
        {
            let mut responses = Vec::new();
            for kind in family {
                let fewest = self.at_least.div_ceil(family.len() as u64);
                for _ in 0..fewest + rng.below(3) {
                    let value = rng.below(17) as f32 / 16.0;
                    let tokens = 1 + rng.below(6);
                    let ref_logps: Vec<f32> = (0..tokens).map(|_| rng.exact(-8.0, -4.0)).collect();
                    let logps = ref_logps.iter().map(|r| r + rng.exact(-spread, spread)).collect();
                    responses.push((feedback(*kind, value), logps, ref_logps));
                }
            }
            case = case.group(&borrowed(&responses));
        }
        // Both signs of their mean have to occur.
        let mean = if seed.is_multiple_of(2) { 2.0 } else { -2.0 };
        let mismatched = (0..case.segments.len()).map(|_| mean + f64::from(rng.exact(-4.0, 4.0)));
        case.mismatched = mismatched.collect();
        case
    }

    /// All feedback as good or as bad as it can be, or both in turn.
    fn extreme(&self, name: &str, shape: Shape, good: Option<bool>) -> Case {
        let mut case = Case { name: name.to_owned(), ..Case::new() };
        for family in std::iter::repeat_n(&self.families, 2).flatten() {
            let mut responses = Vec::new();
            for kind in family {
                for _ in 0..self.at_least.div_ceil(family.len() as u64) {
                    let i = case.segments.len() + responses.len();
                    let (tokens, logp, ref_logp) = shape(i);
                    let value = f32::from(good.unwrap_or(i.is_multiple_of(2)));
                    let feedback = feedback(*kind, value);
                    responses.push((feedback, vec![logp; tokens], vec![ref_logp; tokens]));
                }
            }
            case = case.group(&borrowed(&responses));
        }
        case.mismatched = case.log_ratios.iter().rev().copied().collect();
        case
    }
}

type OwnedResponse = (Feedback, Vec<f32>, Vec<f32>);

fn borrowed(responses: &[OwnedResponse]) -> Vec<(Feedback, &[f32], &[f32])> {
    responses.iter().map(|(f, l, r)| (*f, l.as_slice(), r.as_slice())).collect()
}

fn feedback(kind: Kind, value: f32) -> Feedback {
    match kind {
        Kind::Demonstration => Feedback::Demonstration,
        Kind::Score => Feedback::Score(value),
        Kind::Binary => Feedback::Binary(value > 0.5),
        Kind::Chosen => Feedback::Chosen(ROption::RSome(value)),
        Kind::Rejected => Feedback::Rejected(ROption::RSome(value)),
    }
}

/// `splitmix64`: the same numbers on every machine.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// `0..n`.
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A multiple of 2^-10 in `low..high`.
    fn exact(&mut self, low: f64, high: f64) -> f32 {
        let (low, high) = ((low * 1024.0) as i64, (high * 1024.0) as i64);
        (low + self.below((high - low) as u64) as i64) as f32 / 1024.0
    }
}
