use super::*;
use crate::testing::{Real, assert_accurate, assert_is_slope, cast, error, poison, random};

/// Which rows row `row` may see, straight from the layout's definition.
pub(super) fn visible_rows(layout: &Layout, row: usize, window: Option<usize>) -> Vec<usize> {
    let group = layout.groups.iter().find(|group| group.rows().contains(&row)).unwrap();
    let prompt = group.start..group.start + group.prompt_len;
    let own = group
        .branches
        .iter()
        .map(|branch| branch.start..branch.start + branch.len)
        .find(|rows| rows.contains(&row))
        .unwrap_or(0..0);
    let near = |key: &usize| {
        let distance = layout.positions[row] as i64 - layout.positions[*key] as i64;
        *key <= row && window.is_none_or(|window| distance < window as i64)
    };
    prompt.chain(own).filter(near).collect()
}

pub(super) struct Reference<R> {
    pub(super) out: Vec<R>,
    pub(super) lse: Vec<R>,
    pub(super) dq: Vec<R>,
    pub(super) dk: Vec<R>,
    pub(super) dv: Vec<R>,
}

/// Attention and its gradients, one score at a time.
fn reference<R: Real>(
    inputs: [&[R]; 4],
    layout: &Layout,
    heads: &Heads,
    window: Option<usize>,
) -> Reference<R> {
    rounded_reference(inputs, layout, heads, window, |x| x)
}

/// [`reference`] with p, ds and out rounded before they are multiplied.
pub(super) fn rounded_reference<R: Real>(
    [q, k, v, dout]: [&[R]; 4],
    layout: &Layout,
    heads: &Heads,
    window: Option<usize>,
    round: fn(R) -> R,
) -> Reference<R> {
    let dim = heads.head_dim;
    let zero = R::of(0.0);
    let scale = R::of(1.0) / R::of(dim as f64).sqrt();
    let mut result = Reference {
        out: vec![zero; q.len()],
        lse: Vec::new(),
        dq: vec![zero; q.len()],
        dk: vec![zero; k.len()],
        dv: vec![zero; k.len()],
    };
    let inner = |a: &[R], b: &[R]| {
        let mut sum = zero;
        a.iter().zip(b).for_each(|(a, b)| sum += *a * *b);
        sum
    };
    for row in 0..layout.rows() {
        let keys = visible_rows(layout, row, window);
        for head in 0..heads.heads {
            let kv = head / heads.sharing();
            let at = (row * heads.heads + head) * dim;
            let q = &q[at..at + dim];
            let dout = &dout[at..at + dim];
            let key = |key: usize| heads.key_of(key, kv);
            let scores: Vec<R> = keys.iter().map(|j| scale * inner(q, &k[key(*j)])).collect();
            let top = scores.iter().fold(scores[0], |a, b| if *b > a { *b } else { a });
            let mut sum = zero;
            scores.iter().for_each(|s| sum += (*s - top).exp());
            let lse = top + sum.ln();
            result.lse.push(lse);
            let p: Vec<R> = scores.iter().map(|s| (*s - lse).exp()).collect();
            for (j, p) in keys.iter().zip(&p) {
                for i in 0..dim {
                    result.out[at + i] += round(*p) * v[key(*j)][i];
                }
            }
            result.out[at..at + dim].iter_mut().for_each(|out| *out = round(*out));
            let delta = inner(dout, &result.out[at..at + dim]);
            for (j, p) in keys.iter().zip(&p) {
                let ds = round(*p * (inner(dout, &v[key(*j)]) - delta) * scale);
                for i in 0..dim {
                    result.dq[at + i] += ds * k[key(*j)][i];
                    result.dk[key(*j).start + i] += ds * q[i];
                    result.dv[key(*j).start + i] += round(*p) * dout[i];
                }
            }
        }
    }
    result
}

struct Case {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dout: Vec<f32>,
}

impl Case {
    fn new(rows: usize, heads: &Heads) -> Self {
        let (queries, keys) = (rows * heads.query_width(), rows * heads.key_width());
        Self {
            // Scores with a spread of a few units, as after training.
            q: random(queries, 1).iter().map(|x| 2.0 * x).collect(),
            k: random(keys, 2),
            v: random(keys, 3),
            dout: random(queries, 4),
        }
    }

    fn run(&self, layout: &Layout, heads: &Heads, window: Option<usize>) -> Reference<f32> {
        let (queries, keys) = (self.q.len(), self.k.len());
        let (mut out, mut lse) = (poison(queries), poison(layout.rows() * heads.heads));
        forward(&self.q, &self.k, &self.v, layout, heads, window, &mut out, &mut lse);
        let (mut dq, mut dk, mut dv) = (poison(queries), poison(keys), poison(keys));
        let Self { q, k, v, dout } = self;
        backward(dout, q, k, v, &out, &lse, layout, heads, window, &mut dq, &mut dk, &mut dv);
        Reference { out, lse, dq, dk, dv }
    }

    fn reference<R: Real>(
        &self,
        layout: &Layout,
        heads: &Heads,
        window: Option<usize>,
    ) -> Reference<R> {
        let wide = [&self.q, &self.k, &self.v, &self.dout].map(|x| cast::<R>(x));
        let [q, k, v, dout] = &wide;
        reference([q, k, v, dout], layout, heads, window)
    }
}

#[track_caller]
fn check(layout: &Layout, heads: &Heads, window: Option<usize>) {
    let case = Case::new(layout.rows(), heads);
    let found = case.run(layout, heads, window);
    let plain = case.reference::<f32>(layout, heads, window);
    let exact = case.reference::<f64>(layout, heads, window);
    let name = |what: &str| format!("{what} {heads:?} window {window:?}");
    assert_accurate(&name("out"), &found.out, &plain.out, &exact.out);
    assert_accurate(&name("lse"), &found.lse, &plain.lse, &exact.lse);
    assert_accurate(&name("dq"), &found.dq, &plain.dq, &exact.dq);
    assert_accurate(&name("dk"), &found.dk, &plain.dk, &exact.dk);
    assert_accurate(&name("dv"), &found.dv, &plain.dv, &exact.dv);
}

pub(super) fn ragged() -> Layout {
    Layout::new(&[
        (37, vec![5, 0, 61, 1]),
        (0, vec![70, 3]),
        (9, vec![]),
        (0, vec![]),
        (1, vec![1]),
    ])
}

#[test]
fn agrees_with_f64_for_every_shape_of_heads() {
    let shapes = [(1, 1, 16), (4, 2, 64), (6, 2, 80), (3, 1, 128), (2, 2, 5)];
    for (heads, kv_heads, head_dim) in shapes {
        let heads = Heads { heads, kv_heads, head_dim };
        for window in [None, Some(2), Some(8), Some(40), Some(1000)] {
            check(&ragged(), &heads, window);
        }
    }
}

#[test]
fn agrees_with_f64_over_many_blocks_and_tiles() {
    let heads = Heads { heads: 2, kv_heads: 1, head_dim: 8 };
    let layout = Layout::new(&[(TILE_KEYS + 70, vec![BLOCK_ROWS + 9, 2 * TILE_KEYS + 3])]);
    for window in [None, Some(50), Some(TILE_KEYS + 20)] {
        check(&layout, &heads, window);
    }
}

#[test]
fn the_reference_gradient_is_the_slope() {
    let heads = Heads { heads: 2, kv_heads: 1, head_dim: 2 };
    let layout = Layout::new(&[(2, vec![2, 1])]);
    let case = Case::new(layout.rows(), &heads);
    let [q, k, v, dout] = [&case.q, &case.k, &case.v, &case.dout].map(|x| cast::<f64>(x));
    for window in [None, Some(2)] {
        let loss = |q: &[f64], k: &[f64], v: &[f64]| -> f64 {
            let out = reference([q, k, v, &dout], &layout, &heads, window).out;
            out.iter().zip(&dout).map(|(out, dout)| out * dout).sum()
        };
        let gradients = reference([&q, &k, &v, &dout], &layout, &heads, window);
        assert_is_slope(|q| loss(q, &k, &v), &q, &gradients.dq);
        assert_is_slope(|k| loss(&q, k, &v), &k, &gradients.dk);
        assert_is_slope(|v| loss(&q, &k, v), &v, &gradients.dv);
    }
}

/// A row that sees only itself copies its value, and no score matters.
#[test]
fn a_window_of_one_sees_the_token_itself() {
    let heads = Heads { heads: 2, kv_heads: 2, head_dim: 16 };
    let case = Case::new(ragged().rows(), &heads);
    let found = case.run(&ragged(), &heads, Some(1));
    assert!(error(&found.out, &cast::<f64>(&case.v)) < 1e-6);
    assert!(error(&found.dv, &cast::<f64>(&case.dout)) < 1e-6);
    assert!(error(&found.dq, &vec![0.0; case.q.len()]) < 1e-5);
    assert!(error(&found.dk, &vec![0.0; case.k.len()]) < 1e-5);
}

/// A packed group must be what its texts are alone, and its prompt gradients their sum.
#[test]
fn a_shared_prompt_equals_separate_texts() {
    let heads = Heads { heads: 4, kv_heads: 2, head_dim: 16 };
    let (prompt, branches) = (23, vec![7, 40, 1]);
    let packed = Layout::new(&[(prompt, branches.clone())]);
    for window in [None, Some(10)] {
        let mut case = Case::new(packed.rows(), &heads);
        // Each separate text below repeats the prompt; only branch rows carry a gradient.
        case.dout[..prompt * heads.query_width()].fill(0.0);
        let together = case.run(&packed, &heads, window);
        let mut prompt_dk = vec![0.0f64; prompt * heads.key_width()];
        for branch in &packed.groups[0].branches {
            let rows: Vec<usize> =
                (0..prompt).chain(branch.start..branch.start + branch.len).collect();
            let pick = |x: &[f32], width: usize| -> Vec<f32> {
                rows.iter().flat_map(|row| x[row * width..(row + 1) * width].to_vec()).collect()
            };
            let alone = Case {
                q: pick(&case.q, heads.query_width()),
                k: pick(&case.k, heads.key_width()),
                v: pick(&case.v, heads.key_width()),
                dout: pick(&case.dout, heads.query_width()),
            };
            let alone = alone.run(&Layout::new(&[(0, vec![rows.len()])]), &heads, window);
            let own = prompt * heads.query_width();
            let wide = |x: &[f32]| cast::<f64>(x);
            let expected = pick(&together.out, heads.query_width());
            assert!(error(&alone.out[own..], &wide(&expected[own..])) < 2e-6);
            let expected = pick(&together.dq, heads.query_width());
            assert!(error(&alone.dq[own..], &wide(&expected[own..])) < 1e-5);
            for (sum, dk) in prompt_dk.iter_mut().zip(&alone.dk) {
                *sum += f64::from(*dk);
            }
        }
        assert!(error(&together.dk[..prompt_dk.len()], &prompt_dk) < 2e-5);
    }
}

/// A response beside a batch gets the bits that it has as a further branch of its group.
#[test]
fn beside_a_batch_is_as_within_it() {
    let heads = Heads { heads: 4, kv_heads: 2, head_dim: 16 };
    let layout = Layout::new(&[(23, vec![7, 140, 1]), (0, vec![9, 30]), (60, vec![33, 0])]);
    let case = Case::new(layout.rows(), &heads);
    for window in [None, Some(10)] {
        let (mut beside, mut rows) = (Beside::default(), Vec::new());
        for group in &layout.groups {
            for branch in &group.branches[1..] {
                beside.push(group, branch.len);
                rows.extend(branch.start..branch.start + branch.len);
            }
        }
        let pick = |x: &[f32], width: usize| -> Vec<f32> {
            rows.iter().flat_map(|row| x[row * width..(row + 1) * width].to_vec()).collect()
        };
        let [q, k, v] = [
            (&case.q, heads.query_width()),
            (&case.k, heads.key_width()),
            (&case.v, heads.key_width()),
        ]
        .map(|(x, width)| pick(x, width));
        // Of the batch's own keys none but the prompts' may be read.
        let mut own = [case.k.clone(), case.v.clone()];
        for x in &mut own {
            for group in &layout.groups {
                let end = group.rows().end * heads.key_width();
                x[(group.start + group.prompt_len) * heads.key_width()..end].fill(f32::NAN);
            }
        }
        let mut out = poison(q.len());
        let [prompt_k, prompt_v] = &own;
        forward_beside(&q, &k, &v, [prompt_k, prompt_v], &beside, &heads, window, &mut out);
        assert!(out == pick(&case.run(&layout, &heads, window).out, heads.query_width()));
    }
}

#[test]
fn the_same_call_twice_gives_the_same_bits() {
    let heads = Heads { heads: 6, kv_heads: 3, head_dim: 16 };
    let layout = Layout::new(&[(100, vec![130, 90]), (0, vec![300])]);
    let case = Case::new(layout.rows(), &heads);
    let first = case.run(&layout, &heads, Some(90));
    for _ in 0..5 {
        let again = case.run(&layout, &heads, Some(90));
        assert!(first.out == again.out && first.lse == again.lse);
        assert!(first.dq == again.dq && first.dk == again.dk && first.dv == again.dv);
    }
}

/// With more threads than key heads, queries are split; the sums must still come out right.
#[test]
fn more_threads_than_key_heads() {
    let heads = Heads { heads: 2, kv_heads: 1, head_dim: 16 };
    let layout = Layout::new(&[(0, vec![700])]);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(5).build().unwrap();
    pool.install(|| check(&layout, &heads, None));
}

#[test]
fn decode_is_the_last_row_of_forward() {
    for (heads, kv_heads, head_dim, n) in [(4, 2, 16, 1), (6, 2, 80, 37), (4, 4, 64, 500)] {
        let heads = Heads { heads, kv_heads, head_dim };
        let layout = Layout::new(&[(0, vec![n])]);
        let case = Case::new(n, &heads);
        for window in [None, Some(5)] {
            let exact = case.reference::<f64>(&layout, &heads, window);
            let plain = case.reference::<f32>(&layout, &heads, window);
            let last = (n - 1) * heads.query_width()..n * heads.query_width();
            let mut out = poison(heads.query_width());
            decode(&case.q[last.clone()], &case.k, &case.v, n, &heads, window, &mut out);
            assert_accurate("decode", &out, &plain.out[last.clone()], &exact.out[last]);
        }
    }
}

#[test]
fn no_rows_is_fine() {
    let heads = Heads { heads: 2, kv_heads: 1, head_dim: 4 };
    check_empty(&Layout::new(&[]), &heads);
    check_empty(&Layout::new(&[(0, vec![0, 0])]), &heads);
}

fn check_empty(layout: &Layout, heads: &Heads) {
    let found = Case::new(0, heads).run(layout, heads, None);
    assert!(found.out.is_empty() && found.dk.is_empty());
}

#[test]
#[should_panic(expected = "attention: k must be [3, 4]")]
fn a_wrong_shape_is_named() {
    let heads = Heads { heads: 2, kv_heads: 1, head_dim: 4 };
    let layout = Layout::new(&[(3, vec![])]);
    forward(
        &[0.0; 24],
        &[0.0; 8],
        &[0.0; 12],
        &layout,
        &heads,
        None,
        &mut [0.0; 24],
        &mut [0.0; 6],
    );
}
