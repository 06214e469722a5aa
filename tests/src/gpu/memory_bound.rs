//! What moves more than it computes.

use crate::{Bench, Cost};
use uft_kernels::cuda::{Arena, Offload, Result};
use uft_kernels::embedding::cuda::{Readers, gather, scatter};
use uft_kernels::matmul::cuda::adapter::{pack_b, padded};
use uft_kernels::rope::{Rope, cuda as rope};
use uft_kernels::{adamw, elementwise, rmsnorm, swiglu};

const EPS: f32 = 1e-5;

pub fn measure(bench: &Bench) -> Result<()> {
    copy(bench)?;
    out_and_back(bench)?;
    norms(bench)?;
    rotation(bench)?;
    activation(bench)?;
    sums(bench)?;
    rows_by_number(bench)?;
    packed_adapter(bench)?;
    optimizer(bench)
}

/// The ceiling: bytes read and bytes written.
fn copy(bench: &Bench) -> Result<()> {
    let (gpu, bytes) = (&bench.gpu, bench.sizes.copied);
    if !bench.wants("copy") {
        return Ok(());
    }
    let (from, mut to) = (bench.random(bytes / 2)?, bench.empty(bytes / 2)?);
    let peer = format!(r#"{{"op":"copy","bytes":{bytes}}}"#);
    let cost = Cost { flops: 0, bytes: 2 * bytes };
    bench.case("copy", &peer, cost, || gpu.copy(&from, &mut to));
    Ok(())
}

/// A layer's input to the machine's memory and back, with nothing beside it: what of a step's copies shows is compared with that.
fn out_and_back(bench: &Bench) -> Result<()> {
    let (gpu, n) = (&bench.gpu, bench.sizes.tokens * bench.sizes.hidden);
    if !bench.wants("copy out and back") {
        return Ok(());
    }
    let offload = Offload::new(gpu, 2 * n)?;
    let mut held = Some(bench.random(n)?);
    let cost = Cost { flops: 0, bytes: 4 * n };
    bench.case("copy out and back", "null", cost, || {
        let (there, leaving) = offload.send(held.take().expect("it is back"))?;
        held = Some(offload.fetch(there, leaving.wait()?)?.wait()?);
        Ok(())
    });
    Ok(())
}

fn norms(bench: &Bench) -> Result<()> {
    let (gpu, rows, width) = (&bench.gpu, bench.sizes.tokens, bench.sizes.hidden);
    let n = rows * width;
    let (x, residual, w, dy) =
        (bench.random(n)?, bench.random(n)?, bench.random(width)?, bench.random(n)?);
    let (mut y, mut sum, mut dx) = (bench.empty(n)?, bench.empty(n)?, bench.random(n)?);
    let mut inv_rms = bench.empty(rows)?;
    let peer = |op: &str| format!(r#"{{"op":"{op}","rows":{rows},"width":{width}}}"#);
    let cost = |numbers: usize, flops: usize| Cost { flops, bytes: 2 * numbers * n + 4 * rows };
    bench.case("rmsnorm forward", &peer("rmsnorm"), cost(2, 4 * n), || {
        rmsnorm::cuda::forward(gpu, &x, &w, EPS, &mut y, &mut inv_rms)
    });
    bench.case("rmsnorm forward residual", &peer("rmsnorm_residual"), cost(4, 5 * n), || {
        let (sum, y, inv_rms) = (&mut sum, &mut y, &mut inv_rms);
        rmsnorm::cuda::forward_residual(gpu, &x, &residual, &w, EPS, sum, y, inv_rms)
    });
    rmsnorm::cuda::forward(gpu, &x, &w, EPS, &mut y, &mut inv_rms)?;
    bench.case("rmsnorm backward", &peer("rmsnorm_backward"), cost(4, 8 * n), || {
        rmsnorm::cuda::backward(gpu, &dy, &x, &w, &inv_rms, &mut dx)
    });
    Ok(())
}

fn rotation(bench: &Bench) -> Result<()> {
    let (gpu, rows, heads) = (&bench.gpu, bench.sizes.tokens, bench.sizes.heads);
    let half = heads.head_dim / 2;
    let inv_freq = (0..half).map(|i| 1e4f64.powf(-(i as f64) / half as f64)).collect();
    let table = rope::Table::new(gpu, &Rope::new(inv_freq, 1.0), bench.sizes.text)?;
    let mut x = bench.random(rows * heads.query_width())?;
    let positions = gpu.uploaded(&bench.ids(rows, bench.sizes.text))?;
    let peer = format!(
        r#"{{"op":"rope","rows":{rows},"heads":{},"head_dim":{}}}"#,
        heads.heads, heads.head_dim
    );
    let n = rows * heads.query_width();
    let cost = Cost { flops: 3 * n, bytes: 4 * n + 4 * rows };
    bench.case("rope forward", &peer, cost, || {
        rope::forward(gpu, &table, &mut x, heads.heads, &positions)
    });
    Ok(())
}

fn activation(bench: &Bench) -> Result<()> {
    let (gpu, n) = (&bench.gpu, bench.sizes.tokens * bench.sizes.intermediate);
    let (mut gate, mut up, dout) = (bench.random(n)?, bench.random(n)?, bench.random(n)?);
    let mut out = bench.empty(n)?;
    let peer = |op: &str| format!(r#"{{"op":"{op}","numbers":{n}}}"#);
    let cost = Cost { flops: 5 * n, bytes: 6 * n };
    bench.case("swiglu forward", &peer("swiglu"), cost, || {
        swiglu::cuda::forward(gpu, &gate, &up, &mut out)
    });
    let cost = Cost { flops: 10 * n, bytes: 10 * n };
    bench.case("swiglu backward", &peer("swiglu_backward"), cost, || {
        swiglu::cuda::backward(gpu, &dout, &mut gate, &mut up, None)
    });
    Ok(())
}

fn sums(bench: &Bench) -> Result<()> {
    let (gpu, rows, width) = (&bench.gpu, bench.sizes.tokens, bench.sizes.hidden);
    let n = rows * width;
    let (mut x, y, mut scaled) = (bench.random(n)?, bench.random(n)?, bench.empty(n)?);
    let factors = bench.random_f32(rows)?;
    let peer = |op: &str| format!(r#"{{"op":"{op}","rows":{rows},"width":{width}}}"#);
    bench.case("add", &peer("add"), Cost { flops: n, bytes: 6 * n }, || {
        elementwise::cuda::add(gpu, &mut x, &y)
    });
    let cost = Cost { flops: n, bytes: 4 * n + 4 * rows };
    bench.case("scale rows", &peer("scale_rows"), cost, || {
        elementwise::cuda::scale_rows(gpu, &y, &factors, &mut scaled)
    });
    Ok(())
}

fn rows_by_number(bench: &Bench) -> Result<()> {
    let (gpu, sizes) = (&bench.gpu, &bench.sizes);
    let (rows, width, vocab) = (sizes.tokens, sizes.hidden, sizes.vocab);
    let peer =
        |op: &str| format!(r#"{{"op":"{op}","rows":{rows},"width":{width},"vocab":{vocab}}}"#);
    let (table, ids) = (bench.random(vocab * width)?, bench.ids(rows, vocab));
    let (on_device, mut out) = (gpu.uploaded(&ids)?, bench.empty(rows * width)?);
    let cost = Cost { flops: 0, bytes: 4 * rows * width + 4 * rows };
    bench.case("embedding gather", &peer("gather"), cost, || {
        gather(gpu, &table, &on_device, &mut out)
    });
    // As the way back of a gather uses it: from the rows that go on to all rows.
    let (some, factors) = (rows / 2, bench.random_f32(rows / 2)?);
    let ids: Vec<u32> = (0..some as u32).map(|i| 2 * i).collect();
    let arena = Arena::new(gpu, 8 * (2 * rows + 1))?;
    let readers = Readers::new(gpu, &arena, &ids, rows)?;
    let (x, mut all) = (bench.random(some * width)?, bench.empty(rows * width)?);
    let cost = Cost { flops: some * width, bytes: 2 * (some + rows) * width };
    bench.case("embedding scatter", &peer("scatter"), cost, || {
        scatter(gpu, &x, &readers, Some(&factors), &mut all)
    });
    Ok(())
}

/// B of gate, as the products take it.
fn packed_adapter(bench: &Bench) -> Result<()> {
    let (gpu, n, r) = (&bench.gpu, bench.sizes.intermediate, bench.sizes.rank);
    if !bench.wants("pack B") {
        return Ok(());
    }
    let (b, mut packed) = (bench.random_f32(n * r)?, bench.empty(n * padded(r))?);
    let cost = Cost { flops: n * r, bytes: 4 * n * r + 2 * n * padded(r) };
    bench.case("pack B", "null", cost, || pack_b(gpu, &b, &mut packed, n, r, 2.0));
    Ok(())
}

fn optimizer(bench: &Bench) -> Result<()> {
    use adamw::cuda::{Norm, Table, Tensor, step};
    let (gpu, sizes) = (&bench.gpu, &bench.sizes);
    if !["adamw step", "adamw norm"].iter().any(|case| bench.wants(case)) {
        return Ok(());
    }
    // As many matrices as all linear layers of 32 blocks have, alike.
    const MATRICES: usize = 2 * 7 * 32;
    let width = sizes.rank;
    let rows = sizes.trained / MATRICES / width;
    let matrix = |i: usize| {
        let start = i * rows * width;
        Tensor { start, rows, width, copy_start: start, pitch: width, copy_scale: 2.0 }
    };
    let tensors: Vec<Tensor> = (0..MATRICES).map(matrix).collect();
    let n = MATRICES * rows * width;
    let table = Table::new(gpu, &tensors)?;
    let (mut params, grads) = (bench.random_f32(n)?, bench.random_f32(n)?);
    let (mut m, mut v, mut copies) = (bench.empty(n)?, bench.empty(n)?, bench.empty(n)?);
    gpu.zero(&mut m)?;
    gpu.zero(&mut v)?;
    let settings = adamw::AdamW {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        step: 1,
        grad_scale: 1.0,
    };
    let peer = |op: &str| format!(r#"{{"op":"{op}","numbers":{n}}}"#);
    bench.case("adamw step", &peer("adamw"), Cost { flops: 12 * n, bytes: 30 * n }, || {
        let (m, v, copies) = (&mut m, &mut v, &mut copies);
        step(gpu, &table, &mut params, &grads, m, v, copies, &settings)
    });
    let mut norm = Norm::new(gpu, &table)?;
    bench.case("adamw norm", &peer("norm"), Cost { flops: 2 * n, bytes: 4 * n }, || {
        norm.take(gpu, &table, &grads, 1)
    });
    Ok(())
}
