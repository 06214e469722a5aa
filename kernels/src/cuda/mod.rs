//! Kernels on a GPU: the device, its memory, launches.
//!
//! An op's kernels are in `OP.cu` next to its `OP.rs`, and `OP::cuda` launches them: same meaning and order
//! of arguments as the CPU's functions, with bf16 where they have f32. A [`Gpu`] is one of two:
//!
//! * a CUDA device: NVRTC compiles a source for it, at first use, to a cubin;
//! * the emulated device, which executes the same sources on the processor, thousands of times slower: g++
//!   compiles them, with emulation/, to a library. It is there to test kernels without a GPU.
//!
//! A third one only counts ([`Gpu::counting`]): nothing is computed on it.
//!
//! Everything above, from the plan to the argument list of a launch, is one code for both. Compiled files
//! are kept in a cache ([`cache_folder`]).
//!
//! Launches, copies and zeroing are done one after the other, in the order of the calls. On a GPU the calls
//! return before that; [`Gpu::download`] and [`Gpu::synchronize`] wait, and report an earlier launch's
//! failure. Beside them a second stream copies what is not needed for a while to the host's memory and back
//! ([`Offload`]). A shape that does not fit is a mistake of the caller and panics, as in the CPU's ops; what
//! the device refuses is an [`Error`].

mod arena;
mod cache;
mod counter;
#[cfg(test)]
mod documented;
mod driver;
mod emulation;
mod emulator;
mod error;
#[cfg(test)]
mod fault;
#[cfg(test)]
mod full_size;
mod guarded;
#[cfg(test)]
mod hardware;
mod kernel;
mod landing;
mod late;
mod launch;
mod memory;
mod nvrtc;
mod offload;
#[cfg(test)]
mod registers;
mod ring;
mod tensor_map;
#[cfg(test)]
mod tests;

pub use arena::{Arena, Ranges};
pub use cache::folder as cache_folder;
pub use emulator::Compiler;
pub use error::{Error, Result};
#[cfg(test)]
pub(crate) use fault::Fault;
pub(crate) use kernel::TILE;
pub use kernel::{HOPPER, HOPPER_PRODUCTS};
pub use kernel::{Kernel, Source};
pub use landing::Downloading;
pub use launch::{Args, Argument};
pub use memory::{DeviceBuffer, DeviceSlice, Plain};
pub use nvrtc::Nvrtc;
pub use offload::{Copying, Offload, Offloaded};
pub use tensor_map::TensorMap;

use std::sync::Arc;

/// Every kernel of every op, for what has to be done with all: compiling them, checking their registers.
pub const KERNELS: &[&[Kernel]] = &[
    crate::adamw::cuda::KERNELS,
    &crate::attention::cuda::KERNELS,
    crate::elementwise::cuda::KERNELS,
    crate::embedding::cuda::KERNELS,
    crate::logprob::cuda::KERNELS,
    &crate::matmul::cuda::KERNELS,
    &crate::matmul::cuda::adapter::KERNELS,
    &crate::rmsnorm::cuda::KERNELS,
    crate::rope::cuda::KERNELS,
    crate::swiglu::cuda::KERNELS,
];

/// Those that only Hopper has the instructions for.
pub const HOPPER_KERNELS: &[&[Kernel]] = &[
    &crate::matmul::cuda::hopper::KERNELS,
    &crate::matmul::cuda::fused::KERNELS,
    crate::logprob::cuda::HOPPER_KERNELS,
    &crate::attention::cuda::hopper::KERNELS,
];

/// A device. A clone is the same one.
#[derive(Clone)]
pub struct Gpu(Arc<Device>);

enum Device {
    Driver(driver::Driver),
    Emulator(emulator::Emulator),
    Counter(counter::Counter),
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    pub name: String,
    /// Major and minor.
    pub compute_capability: (i32, i32),
    /// Bytes.
    pub memory: u64,
    pub multiprocessors: u32,
    /// Shared memory that a block may have, in bytes.
    pub shared_bytes: u32,
}

/// What every CUDA device of this machine is.
///
/// # Errors
/// There is no driver, or it does not work.
pub fn devices() -> Result<Vec<Properties>> {
    driver::devices()
}

/// The version of CUDA that the driver is made for, major and minor.
///
/// # Errors
/// There is no driver, or it does not work.
pub fn driver_version() -> Result<(i32, i32)> {
    driver::driver_version().map(|version| (version / 1000, version % 1000 / 10))
}

impl Gpu {
    /// CUDA's device of this number.
    ///
    /// # Errors
    /// There is no driver, no such device, no NVRTC, or the device is older than the kernels allow.
    pub fn open(ordinal: usize) -> Result<Self> {
        Ok(Self(Arc::new(Device::Driver(driver::Driver::open(ordinal)?))))
    }

    /// The emulated device. The seed decides in which order threads run, which must not matter: 0 is a plain
    /// order, others are drawn. Bits 32 to 47, where they are not 0, are one more than the number of a warp of each block
    /// that runs only when no other thread can; with bit 48 its first lane is not held back.
    ///
    /// # Errors
    /// There is no C++ compiler.
    pub fn emulated(seed: u64) -> Result<Self> {
        Ok(Self(Arc::new(Device::Emulator(emulator::Emulator::new(seed, false)?))))
    }

    /// The emulated device with what only Hopper has.
    ///
    /// # Errors
    /// As [`Gpu::emulated`].
    pub fn emulated_hopper(seed: u64) -> Result<Self> {
        Ok(Self(Arc::new(Device::Emulator(emulator::Emulator::new(seed, true)?))))
    }

    /// The emulated device, compiling one source with a fault in it.
    #[cfg(test)]
    pub(crate) fn emulated_with_fault(seed: u64, fault: Fault) -> Result<Self> {
        Self::emulated_faulty(emulator::Emulator::new(seed, false)?, fault)
    }

    /// The same with what only Hopper has.
    #[cfg(test)]
    pub(crate) fn emulated_hopper_with_fault(seed: u64, fault: Fault) -> Result<Self> {
        Self::emulated_faulty(emulator::Emulator::new(seed, true)?, fault)
    }

    #[cfg(test)]
    fn emulated_faulty(mut emulator: emulator::Emulator, fault: Fault) -> Result<Self> {
        emulator.fault = Some(fault);
        Ok(Self(Arc::new(Device::Emulator(emulator))))
    }

    /// Compiles kernels, several at a time, and loads them, so that no launch has to.
    ///
    /// # Errors
    /// A kernel does not compile or load.
    pub fn prepare(&self, kernels: &[Kernel]) -> Result<()> {
        match &*self.0 {
            Device::Driver(device) => device.prepare(kernels),
            Device::Emulator(device) => device.prepare(kernels),
            Device::Counter(_) => Ok(()),
        }
    }

    /// Times that the host waited until everything was done, downloads among them. None for a device that only
    /// counts.
    pub fn waits(&self) -> usize {
        match &*self.0 {
            Device::Driver(device) => device.waits(),
            Device::Emulator(device) => device.waits(),
            Device::Counter(_) => 0,
        }
    }

    /// What takes time where it is not expected: allocations, those of arenas' buffers not included, and modules
    /// loaded so far. None for a device that only counts.
    pub fn made(&self) -> (usize, usize) {
        match &*self.0 {
            Device::Driver(device) => device.made(),
            Device::Emulator(device) => device.made(),
            Device::Counter(_) => (0, 0),
        }
    }

    pub fn is_emulated(&self) -> bool {
        matches!(&*self.0, Device::Emulator(_))
    }

    pub fn properties(&self) -> &Properties {
        match &*self.0 {
            Device::Driver(device) => &device.properties,
            Device::Emulator(device) => &device.properties,
            Device::Counter(device) => &device.properties,
        }
    }

    /// Bytes of memory that are free; of the emulated device, all that the machine has.
    ///
    /// # Errors
    /// The driver's.
    pub fn free_memory(&self) -> Result<u64> {
        match &*self.0 {
            Device::Driver(device) => Ok(device.memory()?.0),
            Device::Emulator(device) => Ok(device.properties.memory),
            Device::Counter(device) => Ok(device.properties.memory),
        }
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        match &*self.0 {
            Device::Driver(device) => device.allocate(bytes),
            Device::Emulator(device) => device.allocate(bytes),
            Device::Counter(device) => Ok(device.allocate(bytes)),
        }
    }

    fn free(&self, address: u64) {
        match &*self.0 {
            Device::Driver(device) => device.free(address),
            Device::Emulator(device) => device.free(address),
            Device::Counter(device) => device.free(address),
        }
    }

    /// Whether an arena's buffers are pieces of one allocation. Otherwise each is a mapping of its own with guards
    /// around it, or nothing at all.
    fn lends_pieces(&self) -> bool {
        matches!(&*self.0, Device::Driver(_))
    }

    /// Memory for a buffer of an arena that is no piece of it, but stands for one.
    fn place_apart(&self, bytes: usize, spot: arena::Spot) -> Result<u64> {
        match &*self.0 {
            // The arena counts it. An address as good as any: nothing is ever there.
            Device::Counter(_) => Ok(1 << 40),
            Device::Emulator(device) => device.place(bytes, Some(spot)),
            Device::Driver(device) => device.allocate(bytes),
        }
    }

    fn give_back_apart(&self, address: u64, kind: arena::Kind) {
        match &*self.0 {
            Device::Counter(_) => {}
            Device::Emulator(device) if kind == arena::Kind::Pinned => device.free_pinned(address),
            Device::Emulator(_) | Device::Driver(_) => self.free(address),
        }
    }

    /// Copies numbers to the device. They may change once the call has returned.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn upload<T: Plain>(&self, from: &[T], to: &mut DeviceSlice<T>) -> Result<()> {
        assert_eq!(from.len(), to.len(), "upload: as many numbers as there is room for");
        if to.len() == 0 {
            return Ok(());
        }
        // SAFETY: plain numbers are bytes.
        let bytes = unsafe { std::slice::from_raw_parts(from.as_ptr().cast(), size_of_val(from)) };
        match &*self.0 {
            Device::Driver(device) => device.upload(bytes, to.address()),
            Device::Emulator(device) => device.upload(bytes, to.address()),
            Device::Counter(_) => Ok(()),
        }
    }

    /// Copies numbers from the device, when everything before is done.
    ///
    /// # Errors
    /// The driver's, or the failure of an earlier launch.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn download<T: Plain>(&self, from: &DeviceSlice<T>, to: &mut [T]) -> Result<()> {
        assert_eq!(from.len(), to.len(), "download: as many numbers as there is room for");
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: plain numbers are bytes, and all bytes are numbers.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(to.as_mut_ptr().cast(), size_of_val(to)) };
        match &*self.0 {
            Device::Driver(device) => device.download(from.address(), bytes),
            Device::Emulator(device) => device.download(from.address(), bytes),
            Device::Counter(_) => Ok(()),
        }
    }

    /// `to = from` on the device.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn copy<T: Plain>(&self, from: &DeviceSlice<T>, to: &mut DeviceSlice<T>) -> Result<()> {
        assert_eq!(from.len(), to.len(), "copy: as many numbers as there is room for");
        if to.len() == 0 {
            return Ok(());
        }
        let bytes = from.len() * size_of::<T>();
        match &*self.0 {
            Device::Driver(device) => device.copy(from.address(), to.address(), bytes),
            Device::Emulator(device) => device.copy(from.address(), to.address(), bytes),
            Device::Counter(_) => Ok(()),
        }
    }

    /// Sets all to 0.
    ///
    /// # Errors
    /// The driver's.
    pub fn zero<T: Plain>(&self, to: &mut DeviceSlice<T>) -> Result<()> {
        if to.len() == 0 {
            return Ok(());
        }
        let bytes = to.len() * size_of::<T>();
        match &*self.0 {
            Device::Driver(device) => device.zero(to.address(), bytes),
            Device::Emulator(device) => device.zero(to.address(), bytes),
            Device::Counter(_) => Ok(()),
        }
    }

    /// Runs a kernel on `grid` blocks of its threads, each with `shared_bytes` of shared memory.
    ///
    /// # Errors
    /// The kernel does not compile; grid, shared memory or arguments do not fit; on the emulated device
    /// whatever the kernel does wrong.
    pub fn launch(
        &self,
        kernel: &Kernel,
        grid: [u32; 3],
        shared_bytes: u32,
        args: Args,
    ) -> Result<()> {
        let refuse = |what: String| Err(Error::Failed(format!("kernel {}: {what}", kernel.name)));
        let [x, y, z] = grid;
        if x == 0 || y == 0 || z == 0 || x > i32::MAX as u32 || y > 65_535 || z > 65_535 {
            return refuse(format!("a grid of {x} × {y} × {z} blocks is not possible"));
        }
        if kernel.threads == 0 || kernel.threads > 1024 {
            return refuse(format!("a block of {} threads is not possible", kernel.threads));
        }
        let most = self.properties().shared_bytes;
        if shared_bytes > most {
            let name = &self.properties().name;
            return refuse(format!("{shared_bytes} bytes of shared memory, {name} has {most}"));
        }
        match &*self.0 {
            Device::Driver(device) => device.launch(kernel, grid, shared_bytes, &args),
            Device::Emulator(device) => device.launch(kernel, grid, shared_bytes, &args),
            Device::Counter(device) => {
                device.launch(kernel);
                Ok(())
            }
        }
    }

    /// Milliseconds that a GPU needs for what `work` launches, by its own clock; waits for it. None on a device
    /// whose time says nothing.
    ///
    /// # Errors
    /// What `work` says, and a driver older than CUDA 12.8.
    pub fn timed(&self, work: impl FnOnce() -> Result<()>) -> Result<Option<f64>> {
        match &*self.0 {
            Device::Driver(device) => device.timed(work).map(Some),
            Device::Emulator(_) | Device::Counter(_) => work().map(|()| None),
        }
    }

    /// Every launch of `work`, in their order: the kernel's name, and on a GPU its milliseconds, between moments that are
    /// marked before and after it, which takes a few microseconds. Waits for it.
    ///
    /// # Errors
    /// As [`Gpu::timed`].
    pub fn traced(
        &self,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<Vec<(&'static str, Option<f64>)>> {
        match &*self.0 {
            Device::Driver(device) => {
                let launches = device.traced(work)?;
                Ok(launches.into_iter().map(|(name, ms)| (name, Some(ms))).collect())
            }
            Device::Emulator(device) => {
                let launches = device.trace(work)?;
                Ok(launches.into_iter().map(|name| (name, None)).collect())
            }
            Device::Counter(_) => work().map(|()| Vec::new()),
        }
    }

    /// Waits until everything is done.
    ///
    /// # Errors
    /// The failure of an earlier launch.
    pub fn synchronize(&self) -> Result<()> {
        match &*self.0 {
            Device::Driver(device) => device.synchronize(),
            Device::Emulator(device) => device.synchronize(),
            Device::Counter(_) => Ok(()),
        }
    }
}

/// The emulated device's address in this process.
fn here(address: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

/// Blocks of `each` items for `items` of them, as a grid counts them.
pub(crate) fn blocks(items: usize, each: usize) -> u32 {
    let blocks = items.div_ceil(each);
    assert!(
        blocks <= i32::MAX as usize,
        "a grid of {blocks} blocks, a device has at most 2^31 - 1"
    );
    blocks as u32
}

/// Kernels read and write 16 bytes at a time: a slice that begins elsewhere is the caller's mistake.
#[track_caller]
pub(crate) fn assert_aligned<const N: usize>(op: &str, slices: [&DeviceSlice<half::bf16>; N]) {
    for slice in slices {
        let address = slice.address();
        assert!(
            address.is_multiple_of(16),
            "{op}: a slice on the device begins at {address:#x}, it must be a multiple of 16 bytes"
        );
    }
}
