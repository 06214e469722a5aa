//! Rows by number on a device: see `embedding.cu`.

use crate::args;
use crate::cuda::{
    Arena, DeviceBuffer, DeviceSlice, Gpu, Kernel, Result, Source, TILE, assert_aligned, blocks,
};
use half::bf16;

static SOURCE: Source =
    Source { name: "embedding.cu", text: include_str!("../embedding.cu"), headers: &[TILE] };
const GATHER: Kernel = Kernel::new(&SOURCE, "embedding_gather", 128);
const SCATTER: Kernel = Kernel::new(&SOURCE, "embedding_scatter", 128);

/// Every kernel of this file.
pub const KERNELS: &[Kernel] = &[GATHER, SCATTER];

/// [`super::gather`] in bf16: `out`: `[T, H]` = the rows `ids`: `[T]` of `table`: `[V, H]`. Overwrites
/// `out`. An id that is not in the table makes its row NaN; ids are best checked where they come from.
///
/// # Errors
/// The launch fails.
pub fn gather(
    gpu: &Gpu,
    table: &DeviceSlice<bf16>,
    ids: &DeviceSlice<u32>,
    out: &mut DeviceSlice<bf16>,
) -> Result<()> {
    let rows = ids.len();
    if rows == 0 {
        assert_eq!(out.len(), 0, "embedding: out has rows but ids has none");
        return Ok(());
    }
    let width = out.len() / rows;
    assert!(
        width > 0 && out.len() == rows * width && table.len().is_multiple_of(width),
        "embedding: out [{} elements] is not [{rows}, H] for a table of {} elements",
        out.len(),
        table.len()
    );
    assert_aligned("embedding", [table, out]);
    let args = args![table, ids, out, width as u32, (table.len() / width) as u32];
    gpu.launch(&GATHER, [blocks(rows, 1), 1, 1], 0, args)
}

/// Who reads which row in a [`gather`], by row: what [`scatter`] adds up. Made once for a batch.
pub struct Readers {
    /// V.
    rows: usize,
    /// T.
    count: usize,
    /// `[V + 1]`, then `[T]`: where each row's readers begin among all, and the readers, by row.
    starts_and_readers: DeviceBuffer<u32>,
}

impl Readers {
    /// Of `ids`: `[T]` in a table of `rows` rows.
    ///
    /// # Errors
    /// The device has no memory left.
    ///
    /// # Panics
    /// An id is not in the table.
    pub fn new(gpu: &Gpu, arena: &Arena, ids: &[u32], rows: usize) -> Result<Self> {
        let numbers = Self::sorted(ids, rows);
        let mut starts_and_readers = arena.take(numbers.len())?;
        gpu.upload(&numbers, &mut starts_and_readers)?;
        Ok(Self { rows, count: ids.len(), starts_and_readers })
    }

    /// Counting sort, which keeps the order among the readers of one row.
    fn sorted(ids: &[u32], rows: usize) -> Vec<u32> {
        let mut numbers = vec![0; rows + 1 + ids.len()];
        let (starts, readers) = numbers.split_at_mut(rows + 1);
        for &id in ids {
            assert!((id as usize) < rows, "embedding: reader of row {id} of {rows}");
            starts[id as usize + 1] += 1;
        }
        for row in 0..rows {
            starts[row + 1] += starts[row];
        }
        let mut next = starts.to_vec();
        for (t, &id) in ids.iter().enumerate() {
            readers[next[id as usize] as usize] = t as u32;
            next[id as usize] += 1;
        }
        numbers
    }
}

/// The way back of a [`gather`]: `out`: `[V, H]`, each row the sum of `factors[t] * x[t]` over those t
/// that read it, zeros where there is none; `x`: `[T, H]`, `factors`: `[T]`, or 1. Overwrites `out`.
///
/// # Errors
/// The launch fails.
pub fn scatter(
    gpu: &Gpu,
    x: &DeviceSlice<bf16>,
    readers: &Readers,
    factors: Option<&DeviceSlice<f32>>,
    out: &mut DeviceSlice<bf16>,
) -> Result<()> {
    let Readers { rows, count, starts_and_readers } = readers;
    if *rows == 0 {
        assert_eq!(out.len(), 0, "embedding: out has elements but the table no rows");
        return Ok(());
    }
    let width = out.len() / rows;
    assert_eq!(out.len(), rows * width, "embedding: out must be [{rows}, H]");
    assert_eq!(x.len(), count * width, "embedding: x must be [{count}, {width}]");
    if let Some(factors) = factors {
        assert_eq!(factors.len(), *count, "embedding: factors must be [{count}]");
    }
    assert_aligned("embedding", [x, out]);
    let (starts, readers) = (&starts_and_readers[..rows + 1], &starts_and_readers[rows + 1..]);
    let args = args![x, starts, readers, factors, out, width as u32];
    gpu.launch(&SCATTER, [blocks(*rows, 1), 1, 1], 0, args)
}

#[cfg(test)]
mod tests;
