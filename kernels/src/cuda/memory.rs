//! Memory on a device, with Rust's rules: what is borrowed for a launch cannot be borrowed otherwise.

use super::{Gpu, Result, arena};
use half::bf16;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Index, IndexMut, Range, RangeFrom, RangeFull, RangeTo};

mod sealed {
    pub trait Sealed {}
}

/// A number that kernels know.
pub trait Plain: Copy + Send + Sync + sealed::Sealed + 'static {
    /// As [`super::launch::Type`] numbers it.
    #[doc(hidden)]
    const TYPE: super::launch::Type;
}

macro_rules! plain {
    ($($t:ty => $name:ident),*) => {$(
        impl sealed::Sealed for $t {}
        impl Plain for $t {
            const TYPE: super::launch::Type = super::launch::Type::$name;
        }
    )*};
}
plain!(bf16 => Bf16, f32 => F32, f64 => F64, i32 => I32, u32 => U32, i64 => I64, u64 => U64, u8 => U8);

/// Numbers on a device, as `[T]` is numbers in memory: `&buffer[..n]`, `&mut buffer[a..b]`.
///
/// It is a slice of elements without size at the device's address: nothing here can be read by mistake.
#[repr(transparent)]
pub struct DeviceSlice<T: Plain> {
    elements: [Element<T>],
}

struct Element<T>(PhantomData<T>);

impl<T: Plain> DeviceSlice<T> {
    /// Numbers, not bytes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a shape's product, never asked whether it is 0"
    )]
    pub fn len(&self) -> usize {
        self.elements.len()
    }

    /// Where it lies, for the device.
    pub fn address(&self) -> u64 {
        self.elements.as_ptr().addr() as u64
    }

    /// `[..middle]` and `[middle..]`.
    ///
    /// # Panics
    /// `middle` is past the end.
    pub fn split_at_mut(&mut self, middle: usize) -> (&mut Self, &mut Self) {
        let (start, len) = (self.address(), self.len());
        assert!(middle <= len, "split at {middle} of {len} elements on a device");
        // SAFETY: two ranges of the same memory that do not overlap, borrowed as long as it.
        unsafe {
            (
                &mut *at(start, middle),
                &mut *at(start + (middle * size_of::<T>()) as u64, len - middle),
            )
        }
    }

    fn range(&self, range: Range<usize>) -> *mut Self {
        let len = self.len();
        assert!(
            range.start <= range.end && range.end <= len,
            "range {range:?} of {len} elements on a device"
        );
        at(self.address() + (range.start * size_of::<T>()) as u64, range.end - range.start)
    }
}

impl DeviceSlice<f32> {
    /// The same memory as twice as many halves of numbers, for what moves bits and does not compute.
    pub fn halves(&self) -> &DeviceSlice<bf16> {
        // SAFETY: the same bytes, borrowed as long as they.
        unsafe { &*at(self.address(), 2 * self.len()) }
    }

    /// As [`Self::halves`].
    pub fn halves_mut(&mut self) -> &mut DeviceSlice<bf16> {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { &mut *at(self.address(), 2 * self.len()) }
    }
}

/// A slice at an address, which is no place that this program could read.
fn at<T: Plain>(address: u64, len: usize) -> *mut DeviceSlice<T> {
    let elements: *mut Element<T> = std::ptr::without_provenance_mut(address as usize);
    std::ptr::slice_from_raw_parts_mut(elements, len) as *mut DeviceSlice<T>
}

macro_rules! index {
    ($($range:ty => |$self:ident, $r:ident| $full:expr),*) => {$(
        impl<T: Plain> Index<$range> for DeviceSlice<T> {
            type Output = Self;
            fn index(&self, $r: $range) -> &Self {
                let $self = self;
                // SAFETY: a range of the same memory, borrowed as long as it.
                unsafe { &*self.range($full) }
            }
        }
        impl<T: Plain> IndexMut<$range> for DeviceSlice<T> {
            fn index_mut(&mut self, $r: $range) -> &mut Self {
                let $self = &*self;
                // SAFETY: as above.
                unsafe { &mut *self.range($full) }
            }
        }
    )*};
}
index!(
    Range<usize> => |slice, r| { let _ = slice; r },
    RangeFrom<usize> => |slice, r| r.start..slice.len(),
    RangeTo<usize> => |slice, r| { let _ = slice; 0..r.end },
    RangeFull => |slice, _r| 0..slice.len()
);

/// Memory on a device of `len` numbers, given back on drop: to the device, or to the arena that it came
/// from. What it holds at first is undefined (NaN on the emulated device).
pub struct DeviceBuffer<T: Plain> {
    address: u64,
    len: usize,
    owner: Owner,
    _numbers: PhantomData<T>,
}

/// Whom memory is given back to.
pub(super) enum Owner {
    Device(Gpu),
    /// It is page-locked memory of the host.
    Pinned(Gpu),
    Arena(arena::Place),
}

impl<T: Plain> DeviceBuffer<T> {
    pub(super) fn new(address: u64, len: usize, owner: Owner) -> Self {
        Self { address, len, owner, _numbers: PhantomData }
    }
}

impl<T: Plain> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        match &mut self.owner {
            Owner::Device(gpu) => gpu.free(self.address),
            Owner::Pinned(gpu) => gpu.free_pinned(self.address),
            Owner::Arena(place) => place.give_back(self.address),
        }
    }
}

impl<T: Plain> Deref for DeviceBuffer<T> {
    type Target = DeviceSlice<T>;
    fn deref(&self) -> &DeviceSlice<T> {
        // SAFETY: the buffer's own memory, borrowed as long as the buffer.
        unsafe { &*at(self.address, self.len) }
    }
}

impl<T: Plain> DerefMut for DeviceBuffer<T> {
    fn deref_mut(&mut self) -> &mut DeviceSlice<T> {
        // SAFETY: as above.
        unsafe { &mut *at(self.address, self.len) }
    }
}

impl Gpu {
    /// Memory for `len` numbers.
    ///
    /// # Errors
    /// The device has no such memory left.
    pub fn alloc<T: Plain>(&self, len: usize) -> Result<DeviceBuffer<T>> {
        let address = self.allocate(len * size_of::<T>())?;
        #[cfg_attr(not(test), expect(unused_mut))]
        let mut buffer = DeviceBuffer::new(address, len, Owner::Device(self.clone()));
        #[cfg(test)]
        self.poison(&mut buffer)?;
        Ok(buffer)
    }

    /// In tests, memory holds NaN at first on a GPU as it does on the emulated device, so that what a kernel
    /// leaves unwritten shows. UFT_TEST_POISON=0 leaves it alone, for tools that know what was written.
    #[cfg(test)]
    pub(super) fn poison<T: Plain>(&self, slice: &mut DeviceSlice<T>) -> Result<()> {
        const PIECE: usize = 1 << 26;
        static POISON: std::sync::LazyLock<Vec<u8>> =
            std::sync::LazyLock::new(|| vec![0xff; PIECE]);
        let left_alone = std::env::var("UFT_TEST_POISON").is_ok_and(|value| value == "0");
        if !self.lends_pieces() || left_alone {
            return Ok(());
        }
        let bytes = slice.len() * size_of::<T>();
        // SAFETY: the slice's own memory as bytes, mutably borrowed.
        let all: &mut DeviceSlice<u8> = unsafe { &mut *at(slice.address(), bytes) };
        for first in (0..bytes).step_by(PIECE) {
            let end = bytes.min(first + PIECE);
            self.upload(&POISON[..end - first], &mut all[first..end])?;
        }
        Ok(())
    }

    /// Memory that holds `numbers`.
    ///
    /// # Errors
    /// As [`Gpu::alloc`].
    pub fn uploaded<T: Plain>(&self, numbers: &[T]) -> Result<DeviceBuffer<T>> {
        let mut buffer = self.alloc(numbers.len())?;
        self.upload(numbers, &mut buffer)?;
        Ok(buffer)
    }

    /// What `buffer` holds, when all launches so far are done.
    ///
    /// # Errors
    /// As [`Gpu::download`].
    pub fn downloaded<T: Plain>(&self, buffer: &DeviceSlice<T>) -> Result<Vec<T>> {
        // SAFETY: all bits are a number of every plain type.
        let mut numbers = vec![unsafe { std::mem::zeroed() }; buffer.len()];
        self.download(buffer, &mut numbers)?;
        Ok(numbers)
    }
}
