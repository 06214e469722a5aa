//! The way back of layers that have one input, and what their adapters want of it.

use super::adapter::{Gradient, GradientOfB, Pulled, SHARING, add_to_gradients, padded};
use super::hopper::{self, Begun, Columns, Product, Tasks, WIDE, clusters, groups_of, slices};
use super::{Adapter, Way, assert_multiples_of_8, assert_shapes, nn};
use crate::cuda::{Arena, DeviceSlice, Gpu, Result};
use half::bf16;

#[cfg(test)]
mod tests;

/// What one of several layers has in [`nn_together`].
#[derive(Clone, Copy)]
pub struct Layer<'a> {
    /// `[m, n]`.
    pub dy: &'a DeviceSlice<bf16>,
    /// `[n, k]`.
    pub w: &'a DeviceSlice<bf16>,
    pub n: usize,
    pub adapter: Option<Adapter<'a>>,
}

/// Of one to three layers; none where one kernel does not make all.
fn tile_of(gpu: &Gpu, layers: &[Layer], m: usize, k: usize) -> Option<hopper::Tile> {
    let ways = layers.iter().map(|layer| Way::of(gpu, m, layer.n, k));
    let tile = ways.map(|way| if let Way::Hopper(tile) = way { Some(tile) } else { None });
    // The columns are the same, and so are the tiles.
    tile.reduce(|first, other| first.and(other)).flatten()
}

fn assert_fit(op: &str, layers: &[Layer], dx: &DeviceSlice<bf16>, m: usize, k: usize) {
    assert!((1..=SHARING).contains(&layers.len()), "{op}: {} layers", layers.len());
    for Layer { dy, w, n, adapter } in layers {
        assert_shapes(op, [("dy", dy.len(), m, *n), ("w", w.len(), *n, k), ("dx", dx.len(), m, k)]);
        assert_multiples_of_8(op, [("n", *n), ("k", k)]);
        Adapter::assert_fits(op, *adapter, m, k);
    }
}

/// The beginning of [`nn_together`]: du of what is `pulled` of the layers, overwritten. The layers have no adapters yet. On compute
/// capability 9.0 `dx`'s first columns may be made beside it, and a part of the `gradients`.
///
/// # Errors
/// A launch fails.
///
/// # Panics
/// Shapes that do not fit.
pub fn begin_together(
    gpu: &Gpu,
    layers: &[Layer],
    pulled: [Option<Pulled>; SHARING],
    gradients: &mut [GradientOfB],
    dx: &mut DeviceSlice<bf16>,
    m: usize,
    k: usize,
) -> Result<Begun> {
    let op = "begin_together";
    assert_fit(op, layers, dx, m, k);
    assert!(layers.iter().all(|layer| layer.adapter.is_none()), "{op}: a layer has its adapter");
    let whole = pulled.iter().flatten().all(|it| it.a.is_some());
    assert!(whole, "{op}: the product goes on with all that is pulled");
    let fit = groups_of(pulled.iter().flatten().map(|it| it.rank)).is_some();
    let tile = tile_of(gpu, layers, m, k).filter(|tile| fit && *tile == WIDE);
    if tile.is_none() {
        for (Layer { dy, n, .. }, pulled) in layers.iter().zip(pulled) {
            let Some(Pulled { b, du, rank, .. }) = pulled else { continue };
            nn(gpu, dy, b, du, m, *n, padded(rank), 0.0, None)?;
        }
        return Ok(Begun::default());
    }
    begin_by(gpu, (clusters(gpu), usize::MAX), layers, pulled, gradients, dx, m, k)
}

/// On so many clusters and with so many tasks at most.
fn begin_by(
    gpu: &Gpu,
    (clusters, tasks): (u32, usize),
    layers: &[Layer],
    pulled: [Option<Pulled>; SHARING],
    gradients: &mut [GradientOfB],
    dx: &mut DeviceSlice<bf16>,
    m: usize,
    k: usize,
) -> Result<Begun> {
    let slices = layers.iter().map(|layer| slices(layer.n, 0)).sum();
    let shorts = pulled.map(|it| it.map(Into::into));
    let columns = Columns::begin(clusters, WIDE, WIDE.n as usize, [m, k, slices], shorts);
    let depths = std::array::from_fn(|i| layers.get(i).map_or(0, |layer| layer.n));
    columns.assert_shorts("begin_together", m, depths, k);
    let (begun, adapters) = (columns.begun(k), std::array::from_fn(|i| columns.factors(i)));
    if m == 0 {
        return Ok(begun);
    }
    let product = Product { layers, adapters, dx, columns, m, k, add: false };
    let mut gradients: Vec<_> =
        gradients.iter_mut().map(|it| hopper::Gradient::of_b(it.reborrowed(), m)).collect();
    let tasks =
        hopper::launch(gpu, WIDE, clusters, Some(product), &mut gradients, Tasks::Idle(tasks))?;
    Ok(Begun { tasks, ..begun })
}

/// `dx`: `[m, k]` becomes the sum of the [`nn`] of one to three layers that have one input, and `gradients` that have waited for it,
/// of as many rows, are added to. On compute capability 9.0 that is one product, rounded once; elsewhere one after the other is added.
/// From where it has begun, with the same gradients first.
///
/// # Errors
/// A launch fails, or the arena is too small.
///
/// # Panics
/// Shapes that do not fit.
pub fn nn_together(
    gpu: &Gpu,
    arena: &Arena,
    layers: &[Layer],
    dx: &mut DeviceSlice<bf16>,
    gradients: Vec<Gradient>,
    m: usize,
    k: usize,
    begun: Begun,
) -> Result<()> {
    assert_fit("nn_together", layers, dx, m, k);
    let Some(tile) = tile_of(gpu, layers, m, k) else {
        begun.assert_nothing("nn_together");
        for (i, &Layer { dy, w, n, adapter }) in layers.iter().enumerate() {
            nn(gpu, dy, w, dx, m, n, k, if i == 0 { 0.0 } else { 1.0 }, adapter)?;
        }
        return add_to_gradients(gpu, arena, gradients, m);
    };
    if m == 0 {
        return Ok(());
    }
    let columns = Columns::rest(tile, tile.n as usize, k, begun);
    let whole = Product::whole(tile, layers, dx, (m, k), false);
    let rest = (!columns.none()).then_some(Product { columns, ..whole });
    hopper::nn_with_gradients(gpu, arena, tile, rest, gradients, m, begun.tasks)
}
