//! Matrix products: the layers' own, and what adapters add.

use crate::{Bench, Cost};
use uft_kernels::cuda::{Arena, Result};
use uft_kernels::matmul::cuda::adapter::{
    GradientOfA, GradientOfB, Input, Norm, Projected, add_to_gradient_of_b, add_to_gradients_of_a,
    padded, project, workspace_of_a, workspace_of_b,
};
use uft_kernels::matmul::cuda::fused::{
    Pulled, Weight, nn_swiglu_backward, nt_added, nt_rope, nt_swiglu,
};
use uft_kernels::matmul::cuda::{Adapter, Layer, few, nn, nn_together, nt};
use uft_kernels::rope::{Rope, cuda::Table};

pub fn measure(bench: &Bench) -> Result<()> {
    let sizes = &bench.sizes;
    let (hidden, inner, keys) = (sizes.hidden, sizes.intermediate, sizes.heads.key_width());
    square(bench, sizes.square)?;
    // Inputs and outputs of the linear layers.
    for (name, k, n) in [
        ("q, o", hidden, hidden),
        ("k, v", hidden, keys),
        ("gate, up", hidden, inner),
        ("down", inner, hidden),
    ] {
        linear(bench, name, k, n)?;
    }
    // Products with what stands next to them, which on Hopper is one kernel.
    let queries = sizes.heads.query_width();
    rotated(bench, "q", queries)?;
    rotated(bench, "k", keys)?;
    with_residual(bench, "o", queries)?;
    with_residual(bench, "down", inner)?;
    with_activation(bench)?;
    back_together(bench, "gate and up", hidden, &[inner, inner])?;
    back_together(bench, "q, k and v", hidden, &[queries, keys, keys])?;
    together(bench, hidden)?;
    one_token(bench, hidden, inner)
}

fn mm(layout: &str, m: usize, k: usize, n: usize) -> String {
    format!(r#"{{"op":"mm","layout":"{layout}","m":{m},"k":{k},"n":{n}}}"#)
}

/// The same product as the ceiling's.
fn square(bench: &Bench, n: usize) -> Result<()> {
    let case = format!("nt {n}³");
    if !bench.wants(&case) {
        return Ok(());
    }
    let (x, w, mut y) = (bench.random(n * n)?, bench.random(n * n)?, bench.empty(n * n)?);
    let cost = Cost { flops: 2 * n * n * n, bytes: 6 * n * n };
    bench.case(&case, &mm("nt", n, n, n), cost, || {
        nt(&bench.gpu, &x, &w, &mut y, n, n, n, 0.0, None, None)
    });
    Ok(())
}

/// A linear layer with its adapter, in the order of a step. Peers multiply without an adapter.
fn linear(bench: &Bench, name: &str, k: usize, n: usize) -> Result<()> {
    let cases = ["nt", "nn", "u = x Aᵀ", "dB and du", "dA"].map(|op| format!("{op} {name}"));
    if !cases.iter().any(|case| bench.wants(case)) {
        return Ok(());
    }
    let [forward, backward, of_u, of_b, of_a] = cases;
    let (gpu, m, r) = (&bench.gpu, bench.sizes.tokens, bench.sizes.rank);
    let pitch = padded(r);
    let (x, w, dy) = (bench.random(m * k)?, bench.random(n * k)?, bench.random(m * n)?);
    let (a, b) = (bench.random(pitch * k)?, bench.random(n * pitch)?);
    let (mut y, mut dx) = (bench.empty(m * n)?, bench.empty(m * k)?);
    let (mut u, mut du) = (bench.random(m * pitch)?, bench.random(m * pitch)?);
    let (mut da, mut db) = (bench.random_f32(r * k)?, bench.random_f32(n * r)?);
    let mut room_a = bench.empty::<f32>(workspace_of_a(m, k, &[r]))?;
    let mut room_b = bench.empty::<f32>(workspace_of_b(m, n, r))?;

    let main = 2 * (m * k + n * k + m * n);
    let cost = Cost { flops: 2 * m * n * (k + r), bytes: main + 2 * (m + n) * r };
    bench.case(&forward, &mm("nt", m, k, n), cost, || {
        let part = Some(Adapter { left: &u, right: &b, rank: r });
        nt(gpu, &x, &w, &mut y, m, k, n, 0.0, None, part)
    });
    let cost = Cost { flops: 2 * m * k * (n + r), bytes: main + 2 * (m + k) * r };
    bench.case(&backward, &mm("nn", m, n, k), cost, || {
        let part = Some(Adapter { left: &u, right: &a, rank: r });
        nn(gpu, &dy, &w, &mut dx, m, n, k, 0.0, part)
    });
    let cost = Cost { flops: 2 * m * k * r, bytes: 2 * (m * k + r * k + m * r) };
    bench.case(&of_u, &mm("nt", m, k, r), cost, || {
        project(gpu, &x, &mut [Projected { a: &a, u: &mut u, rank: r }], m, k)
    });
    let peer = format!(r#"{{"op":"gradient_of_b","m":{m},"n":{n},"r":{r}}}"#);
    let cost = Cost { flops: 4 * m * n * r, bytes: 2 * (m * n + 2 * m * r + n * r) + 8 * n * r };
    bench.case(&of_b, &peer, cost, || {
        let of_b = GradientOfB { dy: &dy, u: &u, db: &mut db, rank: r, scale: 2.0 };
        add_to_gradient_of_b(gpu, of_b, Some((&b, &mut du)), m, n, &mut room_b)
    });
    let cost = Cost { flops: 2 * m * k * r, bytes: 2 * (m * k + m * r) + 8 * k * r };
    bench.case(&of_a, &mm("tn", r, m, k), cost, || {
        let of = &mut [GradientOfA { du: &du, da: &mut da, rank: r }];
        add_to_gradients_of_a(gpu, Input { x: &x, norm: None }, of, m, k, &mut room_a)
    });
    Ok(())
}

/// What the adapters of queries, keys and values do with their one input, which a norm made.
fn together(bench: &Bench, k: usize) -> Result<()> {
    let [of_u, of_a] = ["u = x Aᵀ", "dA"].map(|op| format!("{op} q, k and v"));
    if !bench.wants(&of_u) && !bench.wants(&of_a) {
        return Ok(());
    }
    let (gpu, m, r) = (&bench.gpu, bench.sizes.tokens, bench.sizes.rank);
    let pitch = padded(r);
    let (x, weight, inv_rms) = (bench.random(m * k)?, bench.random(k)?, bench.random_f32(m)?);
    let a = bench.random(pitch * k)?;
    let mut u = [bench.random(m * pitch)?, bench.random(m * pitch)?, bench.random(m * pitch)?];
    let cost = Cost { flops: 6 * m * k * r, bytes: 2 * (m * k + 3 * (r * k + m * r)) };
    bench.case(&of_u, &mm("nt", m, k, 3 * r), cost, || {
        let mut each = u.each_mut().map(|u| Projected { a: &a, u, rank: r });
        project(gpu, &x, &mut each, m, k)
    });
    let mut da = [bench.random_f32(r * k)?, bench.random_f32(r * k)?, bench.random_f32(r * k)?];
    let mut room = bench.empty::<f32>(workspace_of_a(m, k, &[r; 3]))?;
    let cost = Cost { flops: 6 * m * k * r, bytes: 2 * (m * k + 3 * m * r) + 24 * k * r };
    bench.case(&of_a, &mm("tn", 3 * r, m, k), cost, || {
        let mut each = da.each_mut().into_iter().zip(&u);
        let mut next = || each.next().expect("one of three");
        let mut of = [next(), next(), next()].map(|(da, du)| GradientOfA { du, da, rank: r });
        let norm = Some(Norm { weight: &weight, inv_rms: &inv_rms });
        add_to_gradients_of_a(gpu, Input { x: &x, norm }, &mut of, m, k, &mut room)
    });
    Ok(())
}

/// Layers with one input on the way back, which on Hopper are one product. Peers multiply one after the other.
fn back_together(bench: &Bench, name: &str, k: usize, widths: &[usize]) -> Result<()> {
    let case = format!("nn together, {name}");
    if !bench.wants(&case) {
        return Ok(());
    }
    let (gpu, m, r) = (&bench.gpu, bench.sizes.tokens, bench.sizes.rank);
    let pitch = padded(r);
    let matrices = |n: usize| Ok((bench.random(m * n)?, bench.random(n * k)?));
    let each = widths.iter().map(|&n| matrices(n)).collect::<Result<Vec<_>>>()?;
    let (du, a) = (bench.random(m * pitch)?, bench.random(pitch * k)?);
    // No gradients wait for it, so the arena lends nothing.
    let (mut dx, arena) = (bench.empty(m * k)?, Arena::new(gpu, 0)?);
    let (depth, ranks) = (widths.iter().sum::<usize>(), r * widths.len());
    let flops = 2 * m * k * (depth + ranks);
    let bytes = 2 * (m * depth + depth * k + m * k + (m + k) * ranks);
    let parts = widths.iter().map(|n| n.to_string()).collect::<Vec<_>>().join(",");
    let peer = format!(r#"{{"op":"mm_added","m":{m},"depths":[{parts}],"n":{k}}}"#);
    bench.case(&case, &peer, Cost { flops, bytes }, || {
        let adapter = Some(Adapter { left: &du, right: &a, rank: r });
        let each = each.iter().zip(widths);
        let layers: Vec<Layer> = each.map(|((dy, w), &n)| Layer { dy, w, n, adapter }).collect();
        nn_together(gpu, &arena, &layers, &mut dx, Vec::new(), m, k)
    });
    Ok(())
}

/// Queries or keys, which are rotated as they are made. Peers multiply alone, here and below.
fn rotated(bench: &Bench, name: &str, n: usize) -> Result<()> {
    let case = format!("nt with rotation, {name}");
    if !bench.wants(&case) {
        return Ok(());
    }
    let (gpu, sizes, m, k) = (&bench.gpu, &bench.sizes, bench.sizes.tokens, bench.sizes.hidden);
    let (r, pitch) = (sizes.rank, padded(sizes.rank));
    let (x, u, b) = (bench.random(m * k)?, bench.random(m * pitch)?, bench.random(n * pitch)?);
    let (w, mut y) = (bench.random(n * k)?, bench.empty(m * n)?);
    let half = sizes.heads.head_dim / 2;
    let inv_freq = (0..half).map(|i| 1e4f64.powf(-(i as f64) / half as f64)).collect();
    let table = Table::new(gpu, &Rope::new(inv_freq, 1.0), sizes.text)?;
    let positions = gpu.uploaded(&bench.ids(m, sizes.text))?;
    let flops = 2 * m * n * (k + r) + 3 * m * n;
    let bytes = 2 * (m * k + n * k + m * n + (m + n) * r);
    bench.case(&case, &mm("nt", m, k, n), Cost { flops, bytes }, || {
        let adapter = Some(Adapter { left: &u, right: &b, rank: r });
        nt_rope(gpu, &x, Weight { w: &w, bias: None, adapter }, &mut y, m, k, n, &table, &positions)
    });
    Ok(())
}

/// A layer that makes what the residual is added to.
fn with_residual(bench: &Bench, name: &str, k: usize) -> Result<()> {
    let case = format!("nt with residual, {name}");
    if !bench.wants(&case) {
        return Ok(());
    }
    let (gpu, m, n, r) = (&bench.gpu, bench.sizes.tokens, bench.sizes.hidden, bench.sizes.rank);
    let pitch = padded(r);
    let (x, u, b) = (bench.random(m * k)?, bench.random(m * pitch)?, bench.random(n * pitch)?);
    let (w, before, mut y) = (bench.random(n * k)?, bench.random(m * n)?, bench.empty(m * n)?);
    let flops = 2 * m * n * (k + r) + m * n;
    let bytes = 2 * (m * k + n * k + 2 * m * n + (m + n) * r);
    bench.case(&case, &mm("nt", m, k, n), Cost { flops, bytes }, || {
        let adapter = Some(Adapter { left: &u, right: &b, rank: r });
        nt_added(gpu, &x, Weight { w: &w, bias: None, adapter }, &before, &mut y, m, k, n)
    });
    Ok(())
}

/// The gated activation beside the products that it stands between.
fn with_activation(bench: &Bench) -> Result<()> {
    let [ahead, back] = ["nt with activation, gate and up", "nn with activation, down"];
    if !bench.wants(ahead) && !bench.wants(back) {
        return Ok(());
    }
    let (gpu, sizes, m, r) = (&bench.gpu, &bench.sizes, bench.sizes.tokens, bench.sizes.rank);
    let (hidden, inner, pitch) = (sizes.hidden, sizes.intermediate, padded(sizes.rank));
    let (x, u) = (bench.random(m * hidden)?, bench.random(m * pitch)?);
    let (a, b) = (bench.random(pitch * inner)?, bench.random(inner * pitch)?);
    let (gate_w, up_w) = (bench.random(inner * hidden)?, bench.random(inner * hidden)?);
    let (mut gate, mut up) = (bench.random(m * inner)?, bench.random(m * inner)?);
    let (mut out, mut of_out) = (bench.empty(m * inner)?, bench.empty(m * pitch)?);
    // Room for what is made on the way from one to the other, where that is more than one kernel, and for u's parts.
    let arena = Arena::new(gpu, (2 * m * inner).max(m * inner / 128 * pitch * 4) + (1 << 20))?;
    let flops = 4 * m * inner * (hidden + r) + 5 * m * inner + 2 * m * inner * r;
    let bytes = 2 * (m * hidden + 2 * inner * hidden + 3 * m * inner + (3 * m + 3 * inner) * r);
    bench.case(ahead, &mm("nt", m, hidden, 2 * inner), Cost { flops, bytes }, || {
        let adapter = Some(Adapter { left: &u, right: &b, rank: r });
        let weights = [&gate_w, &up_w].map(|w| Weight { w, bias: None, adapter });
        let next = Some(Projected { a: &a, u: &mut of_out, rank: r });
        let (gate, up, out) = (&mut gate, &mut up, &mut out);
        nt_swiglu(gpu, &arena, &x, weights, gate, up, out, next, m, hidden, inner)
    });

    // The way back through down: w [hidden, inner], and its input once more for an adapter, and du of gate and up.
    let mut du = [bench.empty(m * pitch)?, bench.empty(m * pitch)?];
    let flops = 2 * m * inner * (hidden + 3 * r) + 11 * m * inner;
    let bytes = 2 * (m * hidden + inner * hidden + 5 * m * inner + (3 * m + 2 * inner) * r);
    bench.case(back, &mm("nn", m, hidden, inner), Cost { flops, bytes }, || {
        let adapter = Some(Adapter { left: &u, right: &a, rank: r });
        let (gate, up, act) = (&mut gate, &mut up, Some(&mut *out));
        let b = &b[..inner * pitch];
        let pulled = du.each_mut().map(|du| Some(Pulled { b, du, rank: r }));
        let (m, n, i) = (m, hidden, inner);
        nn_swiglu_backward(gpu, &arena, &x, &gate_w, adapter, gate, up, act, pulled, m, n, i)
    });
    Ok(())
}

/// A linear layer as text is generated: W is read once.
fn one_token(bench: &Bench, k: usize, n: usize) -> Result<()> {
    for m in [1, 8] {
        let case = format!("few {m} x {k} x {n}");
        if !bench.wants(&case) {
            continue;
        }
        let (x, w, mut y) = (bench.random(m * k)?, bench.random(n * k)?, bench.empty(m * n)?);
        let cost = Cost { flops: 2 * m * n * k, bytes: 2 * (m * k + n * k + m * n) };
        bench.case(&case, &mm("nt", m, k, n), cost, || {
            few(&bench.gpu, &x, &w, &mut y, m, k, n, 0.0, None, None)
        });
    }
    Ok(())
}
