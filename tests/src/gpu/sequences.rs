//! Attention and the head.

use crate::{Bench, Cost};
use uft_kernels::attention::cuda::{Schedule, backward, decode, decode_room, forward};
use uft_kernels::cuda::{Arena, DeviceSlice, Result};
use uft_kernels::layout::Layout;
use uft_kernels::logprob::cuda::{self as logprob, Head, padded};

pub fn attention(bench: &Bench) -> Result<()> {
    let (tokens, text) = (bench.sizes.tokens, bench.sizes.text);
    let packed = Layout::new(&vec![(0, vec![text]); tokens / text]);
    texts(bench, &format!("{} x {text}", tokens / text), &packed, Some(text), None)?;
    texts(bench, &format!("1 x {tokens}"), &Layout::new(&[(0, vec![tokens])]), Some(tokens), None)?;
    let window = format!("1 x {tokens}, window {text}");
    texts(bench, &window, &Layout::new(&[(0, vec![tokens])]), None, Some(text))?;
    // Two answers to a prompt that is half of a sequence.
    let (half, groups) = (text / 2, tokens / (text + text / 2));
    let pairs = Layout::new(&vec![(half, vec![half; 2]); groups]);
    texts(bench, &format!("{groups} x ({half} + 2 x {half})"), &pairs, None, None)?;
    one_token(bench, text)
}

/// A batch of texts, forward and backward. `alike`: the length of each where peers can do the same.
fn texts(
    bench: &Bench,
    name: &str,
    layout: &Layout,
    alike: Option<usize>,
    window: Option<usize>,
) -> Result<()> {
    let [ahead, back] =
        ["forward", "backward"].map(|direction| format!("attention {direction} {name}"));
    if !bench.wants(&ahead) && !bench.wants(&back) {
        return Ok(());
    }
    let (gpu, heads, rows) = (&bench.gpu, bench.sizes.heads, layout.rows());
    let seen = |position: &u32| (*position as usize + 1).min(window.unwrap_or(usize::MAX));
    let pairs: usize = layout.positions.iter().map(seen).sum();
    let product = 2 * pairs * heads.query_width();
    let (queries, keys) = (rows * heads.query_width(), rows * heads.key_width());
    let (q, k, v) = (bench.random(queries)?, bench.random(keys)?, bench.random(keys)?);
    let (dout, mut out) = (bench.random(queries)?, bench.empty(queries)?);
    let (mut dq, mut dk, mut dv) = (bench.empty(queries)?, bench.empty(keys)?, bench.empty(keys)?);
    let (mut lse, mut delta) = (bench.empty(rows * heads.heads)?, bench.empty(rows * heads.heads)?);
    let schedule = Schedule::new(gpu, layout, &heads, window)?;
    let mut room = bench.empty(schedule.backward_room())?;
    let tables = gpu.uploaded(schedule.numbers())?;
    let peer = |direction: &str| {
        let (count, shape) = (heads.heads, (heads.kv_heads, heads.head_dim));
        alike.map_or("null".into(), |text| {
            let batch = rows / text;
            format!(
                r#"{{"op":"sdpa","direction":"{direction}","batch":{batch},"tokens":{text},"heads":{count},"kv_heads":{},"head_dim":{}}}"#,
                shape.0, shape.1
            )
        })
    };
    let cost = Cost { flops: 2 * product, bytes: 4 * (queries + keys) + 4 * rows * heads.heads };
    bench.case(&ahead, &peer("forward"), cost, || {
        forward(gpu, &q, &k, &v, &schedule, &tables, &mut out, &mut lse)
    });
    // The way back needs the way forward's results, also where that one was left out.
    forward(gpu, &q, &k, &v, &schedule, &tables, &mut out, &mut lse)?;
    let cost = Cost { flops: 5 * product, bytes: 8 * (queries + keys) + 8 * rows * heads.heads };
    let mut case = |name: &str, peer: &str, room: &mut DeviceSlice<f32>| {
        bench.case(name, peer, cost, || {
            backward(
                gpu, &dout, &q, &k, &v, &out, &lse, &schedule, &tables, None, &mut delta, room,
                &mut dq, &mut dk, &mut dv,
            )
        });
    };
    case(&back, &peer("backward"), &mut room);
    if room.len() > 0 {
        case(&format!("{back}, in two kernels"), "null", &mut room[..0]);
    }
    Ok(())
}

/// One new token against a cache.
fn one_token(bench: &Bench, n: usize) -> Result<()> {
    let case = format!("attention decode {n}");
    if !bench.wants(&case) {
        return Ok(());
    }
    let (gpu, heads) = (&bench.gpu, bench.sizes.heads);
    let (width, keys) = (heads.query_width(), n * heads.key_width());
    let (q, k, v) = (bench.random(width)?, bench.random(keys)?, bench.random(keys)?);
    let mut out = bench.empty(width)?;
    let mut partial = bench.empty(decode_room(n, &heads, None))?;
    let peer = format!(
        r#"{{"op":"decode","tokens":{n},"heads":{},"kv_heads":{},"head_dim":{}}}"#,
        heads.heads, heads.kv_heads, heads.head_dim
    );
    let cost = Cost { flops: 4 * n * width, bytes: 4 * (keys + width) };
    bench.case(&case, &peer, cost, || {
        decode(gpu, &q, &k, &v, n, &heads, None, &mut partial, &mut out)
    });
    Ok(())
}

pub fn head(bench: &Bench) -> Result<()> {
    let sizes = &bench.sizes;
    log_probs(bench, sizes.tokens, sizes.vocab)?;
    log_probs(bench, sizes.large_vocab_tokens, sizes.large_vocab)
}

/// Log-probs of n tokens in a vocabulary, and with their gradient.
fn log_probs(bench: &Bench, n: usize, vocab: usize) -> Result<()> {
    let [alone, with_gradient] =
        ["log-probs", "log-probs with gradient"].map(|what| format!("{what} {n} of {vocab}"));
    if !bench.wants(&alone) && !bench.wants(&with_gradient) {
        return Ok(());
    }
    let (gpu, width) = (&bench.gpu, bench.sizes.hidden);
    let (hidden, weight) = (bench.random(n * width)?, bench.random(padded(vocab) * width)?);
    let targets = gpu.uploaded(&bench.ids(n, vocab))?;
    let (mut logp, mut unit_grad) = (bench.empty(n)?, bench.empty(n * width)?);
    let tokens = bench.sizes.head_tokens;
    let head = Head { weight: &weight, vocab, hidden: width, adapter: None, tokens };
    let arena = Arena::new(gpu, 2 * tokens * padded(vocab) + (1 << 20))?;
    let product = 2 * n * vocab * width;
    let peer = |gradient: bool| {
        format!(
            r#"{{"op":"log_probs","tokens":{n},"vocab":{vocab},"hidden":{width},"gradient":{gradient}}}"#
        )
    };
    let cost = Cost { flops: product, bytes: 2 * (n * width + vocab * width) };
    bench.case(&alone, &peer(false), cost, || {
        logprob::forward(gpu, &arena, &hidden, &targets, &head, &mut logp)
    });
    let cost = Cost { flops: 2 * product, bytes: 2 * (2 * n * width + vocab * width) };
    bench.case(&with_gradient, &peer(true), cost, || {
        let (hidden, targets, logp, unit_grad) = (&hidden, &targets, &mut logp, &mut unit_grad);
        logprob::forward_with_gradient(gpu, &arena, hidden, targets, &head, logp, unit_grad)
    });
    Ok(())
}
