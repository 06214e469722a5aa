//! Tensor maps: what the copy engine of Hopper is told about a matrix. A CUDA device has them encoded by its driver; the
//! emulated one takes them as they are, in the layout of emulation/hopper_state.h.

use super::launch::{Arg, Argument, Type};
use super::{Device, DeviceSlice, Error, Gpu, Plain, Result};
use std::marker::PhantomData;

/// Bytes of a box's row, which the swizzle is made for.
const ROW: u32 = 128;
const MOST_BOX_ROWS: u32 = 256;
/// "TENSRMAP" in emulation/hopper_state.h.
const MAGIC: u64 = 0x7061_6d72_6f73_6e74;

/// A matrix on a device and the box that is copied of it at a time: an argument for a parameter `TENSOR_MAP`.
#[derive(Clone, Copy)]
pub struct TensorMap<'a> {
    encoded: Encoded,
    address: u64,
    writable: bool,
    borrowed: PhantomData<&'a ()>,
}

/// As the kernel reads it.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Encoded(pub [u64; 16]);

/// A row-major matrix of `rows` times `columns` elements and its box, of `box_rows` rows with 128 bytes each.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub address: u64,
    pub rows: u64,
    pub columns: u64,
    /// Bytes from row to row.
    pub pitch: u64,
    pub box_rows: u32,
    pub box_columns: u32,
    /// Where rows are heads side by side, `columns` each: how many, and how many of them a box has. Its rows are then the
    /// heads of a row and those of the next.
    pub heads: Option<(u64, u32)>,
    /// Bytes.
    pub element: u32,
    pub of: Type,
}

impl Layout {
    fn of<T: Plain>(
        slice: &DeviceSlice<T>,
        [rows, heads, columns]: [usize; 3],
        box_rows: u32,
    ) -> Self {
        let element = size_of::<T>() as u32;
        let width = heads * columns;
        assert_eq!(slice.len(), rows * width, "a tensor map of [{rows}, {width}]");
        Self {
            address: slice.address(),
            rows: rows as u64,
            columns: columns as u64,
            pitch: width as u64 * u64::from(element),
            box_rows,
            box_columns: ROW / element,
            heads: None,
            element,
            of: T::TYPE,
        }
    }

    /// Bytes from head to head.
    pub fn head_pitch(&self) -> u64 {
        self.columns * u64::from(self.element)
    }

    /// Refuses what the driver would.
    fn check(&self) -> Result<()> {
        let Self { address, rows, columns, pitch, box_rows, .. } = *self;
        let refuse = |what: String| {
            Err(Error::Failed(format!("a tensor map of [{rows}, {columns}]: {what}")))
        };
        if rows == 0 || columns == 0 || rows > 1 << 32 || columns > 1 << 32 {
            return refuse("sides are between 1 and 2^32".into());
        }
        let apart = self.heads.map_or(pitch, |_| self.head_pitch());
        if !address.is_multiple_of(16) || !pitch.is_multiple_of(16) || !apart.is_multiple_of(16) {
            return refuse(format!(
                "rows begin at {address:#x}, every {apart} bytes, which must be multiples of 16"
            ));
        }
        let (heads, box_heads) = self.heads.unwrap_or((1, 1));
        if heads == 0 || heads > 1 << 32 {
            return refuse(format!("{heads} heads"));
        }
        for side in [box_rows, box_heads] {
            if side == 0 || side > MOST_BOX_ROWS {
                return refuse(format!("a box of {side} rows, {MOST_BOX_ROWS} at most"));
            }
        }
        Ok(())
    }

    /// `emulation::TensorMap`.
    fn decoded(&self, writable: bool) -> Encoded {
        let pair = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        let (heads, box_heads) = self.heads.unwrap_or((0, 1));
        let mut words = [0; 16];
        words[..9].copy_from_slice(&[
            MAGIC,
            self.address,
            self.rows,
            self.columns,
            self.pitch,
            pair(self.box_rows, self.box_columns),
            pair(self.element, writable.into()),
            heads,
            pair(box_heads, 0),
        ]);
        Encoded(words)
    }
}

impl Gpu {
    /// Of a matrix that is read: `[rows, columns]`, in boxes of `box_rows` rows and as many columns as have 128 bytes.
    ///
    /// # Errors
    /// The matrix is empty, or its rows do not begin at multiples of 16 bytes.
    ///
    /// # Panics
    /// The slice has another length.
    pub fn tensor_map<'a, T: Plain>(
        &self,
        slice: &'a DeviceSlice<T>,
        [rows, columns]: [usize; 2],
        box_rows: u32,
    ) -> Result<TensorMap<'a>> {
        self.encode(Layout::of(slice, [rows, 1, columns], box_rows), false)
    }

    /// Of a matrix `[rows, heads, head_dim]` that is read, in boxes of `box_rows` rows with `box_heads` heads each, of which
    /// they have as many columns as have 128 bytes.
    ///
    /// # Errors
    /// As [`Gpu::tensor_map`], of heads.
    ///
    /// # Panics
    /// As [`Gpu::tensor_map`].
    pub fn tensor_map_of_heads<'a, T: Plain>(
        &self,
        slice: &'a DeviceSlice<T>,
        sides: [usize; 3],
        [box_rows, box_heads]: [u32; 2],
    ) -> Result<TensorMap<'a>> {
        let heads = Some((sides[1] as u64, box_heads));
        self.encode(Layout { heads, ..Layout::of(slice, sides, box_rows) }, false)
    }

    /// Of a matrix that is written.
    ///
    /// # Errors
    /// As [`Gpu::tensor_map`].
    ///
    /// # Panics
    /// As [`Gpu::tensor_map`].
    pub fn tensor_map_mut<'a, T: Plain>(
        &self,
        slice: &'a mut DeviceSlice<T>,
        [rows, columns]: [usize; 2],
        box_rows: u32,
    ) -> Result<TensorMap<'a>> {
        self.encode(Layout::of(slice, [rows, 1, columns], box_rows), true)
    }

    fn encode<'a>(&self, layout: Layout, writable: bool) -> Result<TensorMap<'a>> {
        layout.check()?;
        let encoded = match &*self.0 {
            Device::Driver(device) => device.encode(&layout)?,
            Device::Emulator(_) | Device::Counter(_) => layout.decoded(writable),
        };
        Ok(TensorMap { encoded, address: layout.address, writable, borrowed: PhantomData })
    }
}

impl<'a> Argument<'a> for TensorMap<'a> {
    fn arg(self) -> Arg {
        Arg::map(self.encoded, self.address, self.writable)
    }
}
