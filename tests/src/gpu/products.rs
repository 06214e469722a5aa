//! Matrix products: the layers' own, and what adapters add.

use crate::{Bench, Cost};
use uft_kernels::cuda::Result;
use uft_kernels::matmul::cuda::adapter::{
    add_to_gradient_of_a, add_to_gradient_of_b, padded, workspace_of_a, workspace_of_b,
};
use uft_kernels::matmul::cuda::{Adapter, few, nn, nt};

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
    let [forward, backward, project, of_b, of_a] = cases;
    let (gpu, m, r) = (&bench.gpu, bench.sizes.tokens, bench.sizes.rank);
    let pitch = padded(r);
    let (x, w, dy) = (bench.random(m * k)?, bench.random(n * k)?, bench.random(m * n)?);
    let (a, b) = (bench.random(pitch * k)?, bench.random(n * pitch)?);
    let (mut y, mut dx) = (bench.empty(m * n)?, bench.empty(m * k)?);
    let (mut u, mut du) = (bench.random(m * pitch)?, bench.random(m * pitch)?);
    let (mut da, mut db) = (bench.random_f32(r * k)?, bench.random_f32(n * r)?);
    let mut room_a = bench.empty::<f32>(workspace_of_a(m, k, r))?;
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
    bench.case(&project, &mm("nt", m, k, r), cost, || {
        nt(gpu, &x, &a, &mut u, m, k, pitch, 0.0, None, None)
    });
    let peer = format!(r#"{{"op":"gradient_of_b","m":{m},"n":{n},"r":{r}}}"#);
    let cost = Cost { flops: 4 * m * n * r, bytes: 2 * (m * n + 2 * m * r + n * r) + 8 * n * r };
    bench.case(&of_b, &peer, cost, || {
        let db = &mut db;
        add_to_gradient_of_b(gpu, &dy, &u, &b, db, &mut du, m, n, r, 2.0, &mut room_b)
    });
    let cost = Cost { flops: 2 * m * k * r, bytes: 2 * (m * k + m * r) + 8 * k * r };
    bench.case(&of_a, &mm("tn", r, m, k), cost, || {
        add_to_gradient_of_a(gpu, &du, &x, &mut da, m, r, k, &mut room_a)
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
