//! What a pass needs of a packed batch besides its numbers: which rows go where, on the device.

use super::sent;
use crate::Result;
use crate::model::config::ModelConfig;
use crate::model::packed::{NeededRows, Packed};
use uft_kernels::attention::cuda::Schedule;
use uft_kernels::cuda::{Arena, DeviceBuffer, DeviceSlice, Gpu};
use uft_kernels::embedding::cuda::Readers;
use uft_kernels::layout::Layout;

/// T rows, N of which go on after the last block's attention, M targets.
pub struct Batch {
    /// T.
    pub rows: usize,
    /// N.
    pub needed: usize,
    /// `[T]`.
    pub tokens: DeviceBuffer<u32>,
    pub layout: DeviceLayout,
    /// Which rows go on, if not all do.
    pub pruned: Option<Rows>,
    /// M targets among the N rows.
    pub of_target: Rows,
    /// `[M]`.
    pub targets: DeviceBuffer<u32>,
}

/// Positions, and who attends to whom.
pub struct DeviceLayout {
    /// `[T]`.
    pub positions: DeviceBuffer<u32>,
    /// By window; models have one or two.
    schedules: Vec<(Option<usize>, Schedule, DeviceBuffer<i32>)>,
}

/// Some rows of a matrix, there and back.
pub struct Rows {
    /// For a gather.
    pub ids: DeviceBuffer<u32>,
    /// For the scatter that is its way back.
    pub readers: Readers,
}

impl Rows {
    /// `ids` among `total` rows.
    fn new(gpu: &Gpu, arena: &Arena, ids: &[u32], total: usize) -> Result<Self> {
        Ok(Self { ids: sent(gpu, arena, ids)?, readers: Readers::new(gpu, arena, ids, total)? })
    }
}

impl Batch {
    /// # Errors
    /// The kernels do not take the model's heads, or the device has no memory left.
    pub fn new(
        packed: &Packed,
        needed: &NeededRows,
        config: &ModelConfig,
        gpu: &Gpu,
        arena: &Arena,
    ) -> Result<Self> {
        let (rows, going_on) = (packed.rows(), needed.rows.len());
        let tables = packed.tables(&config.heads);
        Ok(Self {
            rows,
            needed: going_on,
            tokens: sent(gpu, arena, &packed.tokens)?,
            layout: DeviceLayout::new(&packed.layout, tables, config, gpu, arena)?,
            pruned: match going_on < rows {
                true => Some(Rows::new(gpu, arena, &needed.rows, rows)?),
                false => None,
            },
            of_target: Rows::new(gpu, arena, &needed.of_target, going_on)?,
            targets: sent(gpu, arena, &packed.targets.tokens)?,
        })
    }

    /// The rows that go on after a block's attention, where that are not all.
    pub fn needed_after(&self, layer: usize, config: &ModelConfig) -> Option<&Rows> {
        self.pruned.as_ref().filter(|_| layer + 1 == config.layers)
    }
}

impl DeviceLayout {
    /// With room for `tables` numbers of each schedule, so that a batch's memory is known from its size.
    fn new(
        layout: &Layout,
        tables: usize,
        config: &ModelConfig,
        gpu: &Gpu,
        arena: &Arena,
    ) -> Result<Self> {
        let mut schedules: Vec<(Option<usize>, Schedule, DeviceBuffer<i32>)> = Vec::new();
        for window in &config.windows {
            if !schedules.iter().any(|(known, ..)| known == window) {
                let schedule = Schedule::new(gpu, layout, &config.heads, *window)?;
                let numbers = schedule.numbers();
                let mut room = arena.take(tables.max(numbers.len()))?;
                gpu.upload(numbers, &mut room[..numbers.len()])?;
                schedules.push((*window, schedule, room));
            }
        }
        Ok(Self { positions: sent(gpu, arena, &layout.positions)?, schedules })
    }

    /// Of the layers with this window.
    pub fn schedule(&self, window: Option<usize>) -> (&Schedule, &DeviceSlice<i32>) {
        let found = self.schedules.iter().find(|(known, ..)| *known == window);
        let (_, schedule, tables) = found.expect("every layer's window has a schedule");
        (schedule, &tables[..schedule.numbers().len()])
    }
}
