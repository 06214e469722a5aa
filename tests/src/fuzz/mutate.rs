//! Mutations of inputs, the same for the same seed.

/// The largest input that is made.
const LONGEST: usize = 1 << 16;

/// xorshift64*: enough to choose mutations with, and the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`, or 0 if there is none.
    pub fn below(&mut self, end: usize) -> usize {
        ((self.next() >> 32) as usize).checked_rem(end).unwrap_or(0)
    }

    fn choose<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// One of the seeds after one to four mutations.
pub fn mutated(seeds: &[Vec<u8>], tokens: &[&str], random: &mut Random) -> Vec<u8> {
    let mut input = random.choose(seeds).clone();
    for _ in 0..=random.below(4) {
        mutate(&mut input, seeds, tokens, random);
        input.truncate(LONGEST);
    }
    input
}

fn mutate(input: &mut Vec<u8>, seeds: &[Vec<u8>], tokens: &[&str], random: &mut Random) {
    let at = random.below(input.len() + 1);
    let end = (at + 1 + random.below(64)).min(input.len());
    match random.below(11) {
        0 => flip(input, 1 << random.below(8), random),
        1 => flip(input, random.below(256) as u8, random),
        2 => input.truncate(at),
        3 => drop(input.drain(at.min(end)..end)),
        4 => insert(input, at, &input[at.min(end)..end].repeat(1 + random.below(8))),
        5 => {
            let other = random.choose(seeds);
            input.truncate(at);
            input.extend_from_slice(&other[random.below(other.len() + 1)..]);
        }
        6 | 7 => insert(input, at, random.choose(tokens).as_bytes()),
        8 => number(input, random),
        9 => nest(input, at, random),
        _ => insert(
            input,
            at,
            &random.choose(&[b"a", b"\0", b"\xff", b" "]).repeat(random.below(5000)),
        ),
    }
}

fn flip(input: &mut [u8], bits: u8, random: &mut Random) {
    let at = random.below(input.len());
    if let Some(byte) = input.get_mut(at) {
        *byte ^= bits;
    }
}

fn insert(input: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    input.splice(at..at, bytes.iter().copied());
}

/// Puts another number in the place of one that is there.
fn number(input: &mut Vec<u8>, random: &mut Random) {
    let from = random.below(input.len());
    let Some(start) = input[from..].iter().position(u8::is_ascii_digit).map(|p| from + p) else {
        return;
    };
    let digits = input[start..].iter().take_while(|b| b.is_ascii_digit()).count();
    let other = random.choose(&super::NUMBERS).as_bytes();
    input.splice(start..start + digits, other.iter().copied());
}

/// Puts something into very many brackets.
fn nest(input: &mut Vec<u8>, at: usize, random: &mut Random) {
    let (open, close) =
        *random.choose(&[("[", "]"), ("{\"a\":", "}"), ("(", ")"), ("{% if 1 %}", "{% endif %}")]);
    let depth = 1 + random.below(3000);
    insert(input, at, format!("{}1{}", open.repeat(depth), close.repeat(depth)).as_bytes());
}
