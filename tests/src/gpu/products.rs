//! Matrix products: the layers' own, and what adapters add.

use crate::{Bench, Cost};
use half::bf16;
use uft_kernels::cuda::{Arena, DeviceBuffer, DeviceSlice, Result};
use uft_kernels::matmul::cuda::adapter::{
    Gradient, GradientOfA, GradientOfB, Input, Norm, Projected, Pulled, SHARING,
    add_to_gradient_of_b, add_to_gradients_of_a, padded, project, workspace_of_a, workspace_of_b,
};
use uft_kernels::matmul::cuda::fused::{
    Activating, Projections, Weight, begin_added, begin_rope, begin_swiglu, nn_swiglu_backward,
    nt_added, nt_rope, nt_swiglu,
};
use uft_kernels::matmul::cuda::{Adapter, Begun, Layer, begin_together, few, nn, nn_together, nt};
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
    // Products with what stands next to them, which on Hopper is one kernel, and with u or du where they begin with that.
    let queries = sizes.heads.query_width();
    rotated(bench, "q", queries)?;
    rotated(bench, "k", keys)?;
    with_residual(bench, "o", queries)?;
    with_residual(bench, "down", inner)?;
    with_activation(bench)?;
    back_together(bench, "gate and up", hidden, &[inner, inner], Some(inner))?;
    back_together(bench, "o", queries, &[hidden], None)?;
    back_together(bench, "q, k and v", hidden, &[queries, keys, keys], None)?;
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
        project(gpu, &x, &mut [Projected { a: &a, u: &mut u, rank: r, b: None }], m, k)
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
        let mut each = u.each_mut().map(|u| Projected { a: &a, u, rank: r, b: None });
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

/// Layers with one input on the way back, which on Hopper are one product: without gradients, and as in a step: du first, unless it was
/// made with dy, and with the gradients that wait for it, of these layers' adapters and dA of one `below` with that many inputs. Peers
/// make one after the other.
fn back_together(
    bench: &Bench,
    name: &str,
    k: usize,
    widths: &[usize],
    below: Option<usize>,
) -> Result<()> {
    let (alone, all) = (format!("nn together, {name}"), format!("nn with gradients, {name}"));
    if !bench.wants(&alone) && !bench.wants(&all) {
        return Ok(());
    }
    let (gpu, m, r) = (&bench.gpu, bench.sizes.tokens, bench.sizes.rank);
    let pitch = padded(r);
    let matrices = |n: usize| Ok((bench.random(m * n)?, bench.random(n * k)?));
    let each = widths.iter().map(|&n| matrices(n)).collect::<Result<Vec<_>>>()?;
    let (u, du, a) = (bench.random(m * pitch)?, bench.random(m * pitch)?, bench.random(pitch * k)?);
    let longest = widths.iter().copied().max().unwrap_or(0);
    let b = bench.random(longest * pitch)?;
    let made = widths.iter().map(|_| bench.empty(m * pitch)).collect::<Result<Vec<_>>>();
    let mut made: Vec<DeviceBuffer<bf16>> = made?;
    // Room for du beside each other, or for parts of gradients elsewhere.
    let (mut dx, arena) = (bench.empty(m * k)?, Arena::new(gpu, 1 << 28)?);
    let (depth, ranks) = (widths.iter().sum::<usize>(), r * widths.len());
    let flops = 2 * m * k * (depth + ranks);
    let bytes = 2 * (m * depth + depth * k + m * k + (m + k) * ranks);
    let parts = widths.iter().map(|n| n.to_string()).collect::<Vec<_>>().join(",");
    let peer = format!(r#"{{"op":"mm_added","m":{m},"depths":[{parts}],"n":{k}}}"#);
    let adapter = Some(Adapter { left: &du, right: &a, rank: r });
    let layers = each.iter().zip(widths).map(|((dy, w), &n)| Layer { dy, w, n, adapter });
    let layers: Vec<Layer> = layers.collect();
    bench.case(&alone, &peer, Cost { flops, bytes }, || {
        nn_together(gpu, &arena, &layers, &mut dx, Vec::new(), m, k, Begun::default())
    });

    let (x, weight, inv_rms) = (bench.random(m * k)?, bench.random(k)?, bench.random_f32(m)?);
    let act = bench.random(m * below.unwrap_or(8))?;
    let gradient = |n: usize| bench.random_f32(n * r);
    let mut da = widths.iter().map(|_| gradient(k)).collect::<Result<Vec<_>>>()?;
    let mut db = widths.iter().map(|&n| gradient(n)).collect::<Result<Vec<_>>>()?;
    let mut da_below = gradient(below.unwrap_or(8))?;
    // What the gradients read: all dy, x, and the input of the layer below.
    let read = depth + k + below.unwrap_or(0);
    let added = Cost {
        flops: flops + 2 * m * r * (depth + k * widths.len() + below.unwrap_or(0)),
        bytes: bytes + 2 * m * read + 8 * r * (depth + k * widths.len() + below.unwrap_or(0)),
    };
    let peer = format!(
        r#"{{"op":"mm_with_gradients","m":{m},"depths":[{parts}],"n":{k},"r":{r},"below":{}}}"#,
        below.unwrap_or(0)
    );
    bench.case(&all, &peer, added, || {
        let of_b = layers.iter().zip(&mut db);
        let of_b =
            of_b.map(|(layer, db)| GradientOfB { dy: layer.dy, u: &u, db, rank: r, scale: 2.0 });
        let mut of_b: Vec<GradientOfB> = of_b.collect();
        let mut begun = Begun::default();
        // What is below made dy, and du with it.
        if below.is_none() {
            let mut each = made.iter_mut().zip(&layers);
            let pulled = [(); SHARING].map(|()| {
                let (du, layer) = each.next()?;
                Some(Pulled { b: &b[..layer.n * pitch], du, rank: r, a: Some(&a) })
            });
            let plain: Vec<Layer> =
                layers.iter().map(|layer| Layer { adapter: None, ..*layer }).collect();
            begun = begin_together(gpu, &plain, pulled, &mut of_b, &mut dx, m, k)?;
        }
        let mut gradients: Vec<Gradient> = of_b.into_iter().map(Gradient::B).collect();
        let adapters = da.iter_mut().map(|da| GradientOfA { du: &du, da, rank: r }).collect();
        // What layers with one input read, a norm made.
        let norm = (widths.len() > 1).then_some(Norm { weight: &weight, inv_rms: &inv_rms });
        gradients.push(Gradient::A { input: Input { x: &x, norm }, k, adapters });
        if let Some(k) = below {
            let adapters = vec![GradientOfA { du: &du, da: &mut da_below, rank: r }];
            gradients.push(Gradient::A { input: Input { x: &act, norm: None }, k, adapters });
        }
        nn_together(gpu, &arena, &layers, &mut dx, gradients, m, k, begun)
    });
    Ok(())
}

/// u of so many layers that read x, the first of which the product at hand belongs to.
fn projected<'a, const N: usize>(
    a: &'a DeviceSlice<bf16>,
    u: &'a mut [DeviceBuffer<bf16>; N],
    b: &'a DeviceSlice<bf16>,
    own: usize,
    rank: usize,
) -> Projections<'a> {
    let mut each = u.iter_mut().enumerate();
    [(); SHARING].map(|()| {
        let (i, u) = each.next()?;
        Some(Projected { a, u, rank, b: (i < own).then_some(b) })
    })
}

/// Queries, which begin with u of queries, keys and values, or keys; both are rotated as they are made. Peers multiply alone, here and
/// below.
fn rotated(bench: &Bench, name: &str, n: usize) -> Result<()> {
    let case = format!("nt with rotation, {name}");
    if !bench.wants(&case) {
        return Ok(());
    }
    let (gpu, sizes, m, k) = (&bench.gpu, &bench.sizes, bench.sizes.tokens, bench.sizes.hidden);
    let (r, pitch) = (sizes.rank, padded(sizes.rank));
    let begins = name == "q";
    let (x, a, b) = (bench.random(m * k)?, bench.random(pitch * k)?, bench.random(n * pitch)?);
    let [first, second, third] = [(); 3].map(|()| bench.random(m * pitch));
    let mut u = [first?, second?, third?];
    let (w, mut y) = (bench.random(n * k)?, bench.empty(m * n)?);
    let half = sizes.heads.head_dim / 2;
    let inv_freq = (0..half).map(|i| 1e4f64.powf(-(i as f64) / half as f64)).collect();
    let table = Table::new(gpu, &Rope::new(inv_freq, 1.0), sizes.text)?;
    let positions = gpu.uploaded(&bench.ids(m, sizes.text))?;
    let of_u = if begins { 3 * r } else { 0 };
    let flops = 2 * m * (n * (k + r) + k * of_u) + 3 * m * n;
    let bytes = 2 * (m * k + n * k + m * n + (m + n) * r + (m + k) * of_u);
    bench.case(&case, &mm("nt", m, k, n), Cost { flops, bytes }, || {
        let (mut begun, plain) = (Begun::default(), Weight { w: &w, bias: None, adapter: None });
        if begins {
            let all = projected(&a, &mut u, &b, 1, r);
            begun = begin_rope(gpu, &x, plain, all, &mut y, m, k, n, &table, &positions)?;
        }
        let weight = Weight { adapter: Some(Adapter { left: &u[0], right: &b, rank: r }), ..plain };
        nt_rope(gpu, &x, weight, &mut y, m, k, n, &table, &positions, begun)
    });
    Ok(())
}

/// A layer that makes what the residual is added to; o begins with its u.
fn with_residual(bench: &Bench, name: &str, k: usize) -> Result<()> {
    let case = format!("nt with residual, {name}");
    if !bench.wants(&case) {
        return Ok(());
    }
    let (gpu, m, n, r) = (&bench.gpu, bench.sizes.tokens, bench.sizes.hidden, bench.sizes.rank);
    let pitch = padded(r);
    let begins = name == "o";
    let (x, a, b) = (bench.random(m * k)?, bench.random(pitch * k)?, bench.random(n * pitch)?);
    let mut u = [bench.random(m * pitch)?];
    let (w, before, mut y) = (bench.random(n * k)?, bench.random(m * n)?, bench.empty(m * n)?);
    let of_u = if begins { r } else { 0 };
    let flops = 2 * m * (n * (k + r) + k * of_u) + m * n;
    let bytes = 2 * (m * k + n * k + 2 * m * n + (m + n) * r + (m + k) * of_u);
    bench.case(&case, &mm("nt", m, k, n), Cost { flops, bytes }, || {
        let (mut begun, plain) = (Begun::default(), Weight { w: &w, bias: None, adapter: None });
        let before = Some(&*before);
        if begins {
            let all = projected(&a, &mut u, &b, 1, r);
            begun = begin_added(gpu, &x, plain, all, before, &mut y, m, k, n)?;
        }
        let weight = Weight { adapter: Some(Adapter { left: &u[0], right: &b, rank: r }), ..plain };
        nt_added(gpu, &x, weight, before, &mut y, m, k, n, begun)
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
    let short = bench.random(pitch * hidden)?;
    let mut of_x = [bench.random(m * pitch)?, bench.random(m * pitch)?];
    let (gate_w, up_w) = (bench.random(inner * hidden)?, bench.random(inner * hidden)?);
    let (mut gate, mut up) = (bench.random(m * inner)?, bench.random(m * inner)?);
    let (mut out, mut of_out) = (bench.empty(m * inner)?, bench.empty(m * pitch)?);
    // Room for what is made on the way from one to the other, where that is more than one kernel, and for u's parts.
    let arena = Arena::new(gpu, (2 * m * inner).max(m * inner / 128 * pitch * 4) + (1 << 20))?;
    let flops = 4 * m * inner * (hidden + r) + 5 * m * inner + 2 * m * (inner + 2 * hidden) * r;
    let bytes = 2 * (m * hidden + 2 * inner * hidden + 3 * m * inner)
        + 2 * (5 * m + 3 * inner + 2 * hidden) * r;
    bench.case(ahead, &mm("nt", m, hidden, 2 * inner), Cost { flops, bytes }, || {
        let plain = [&gate_w, &up_w].map(|w| Weight { w, bias: None, adapter: None });
        let (gate, up, out, k, n) = (&mut gate, &mut up, &mut out, hidden, inner);
        let (all, next) = (projected(&short, &mut of_x, &b, 2, r), Some((&*a, r)));
        let begun: Activating =
            begin_swiglu(gpu, &arena, &x, plain, all, gate, up, out, next, m, k, n)?;
        let adapter = |i: usize| Some(Adapter { left: &of_x[i], right: &b, rank: r });
        let weights = [0, 1].map(|i| Weight { adapter: adapter(i), ..plain[i] });
        let next = Some(Projected { a: &a, u: &mut of_out, rank: r, b: None });
        nt_swiglu(gpu, &arena, &x, weights, gate, up, out, next, m, k, n, begun)
    });

    // The way back through down: w [hidden, inner], its input once more for an adapter, du of gate and up, and dB.
    let mut db = bench.random_f32(hidden * r)?;
    let mut du = [bench.empty(m * pitch)?, bench.empty(m * pitch)?];
    let flops = 2 * m * inner * (hidden + 3 * r) + 11 * m * inner + 2 * m * hidden * r;
    let bytes = 2 * (2 * m * hidden + inner * hidden + 5 * m * inner + (4 * m + 2 * inner) * r)
        + 8 * hidden * r;
    bench.case(back, &mm("nn", m, hidden, inner), Cost { flops, bytes }, || {
        let adapter = Some(Adapter { left: &u, right: &a, rank: r });
        let (gate, up, act) = (&mut gate, &mut up, Some(&mut *out));
        let b = &b[..inner * pitch];
        let pulled = du.each_mut().map(|du| Some(Pulled { b, du, rank: r, a: None }));
        let (m, n, i) = (m, hidden, inner);
        let of_b = GradientOfB { dy: &x, u: &u, db: &mut db, rank: r, scale: 2.0 };
        let (w, of_b) = (&gate_w, vec![Gradient::B(of_b)]);
        nn_swiglu_backward(gpu, &arena, &x, w, adapter, gate, up, act, pulled, of_b, m, n, i)
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
