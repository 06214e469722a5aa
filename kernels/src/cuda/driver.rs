//! A CUDA device, through the driver's API. The driver's library is opened at run time, so one program
//! runs with and without it.

mod copies;
mod events;

pub(super) use events::Event;

use super::kernel::{Kernel, Module};
use super::landing::Landing;
use super::launch::{Args, Parameter, Type};
use super::nvrtc::Nvrtc;
use super::ring::Ring;
use super::tensor_map::{Encoded, Layout};
use super::{Error, Properties, Result};
use copies::Copies;
use cudarc::driver::{DriverError, result, sys};
use rayon::prelude::*;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use sys::CUdevice_attribute_enum as Attribute;

/// The oldest architecture whose instructions the kernels use.
const OLDEST: (i32, i32) = (8, 0);
/// `cuFuncGetParamInfo` is in drivers of CUDA 12.4 and newer.
const KNOWS_PARAMETERS: i32 = 12_040;
/// `cuTensorMapEncodeTiled`, in those of CUDA 12.0.
const ENCODES_TENSOR_MAPS: i32 = 12_000;

/// Bytes of page-locked memory through which uploads go, and downloads that are not waited for at once.
const RING: usize = 32 << 20;
const LANDING: usize = 4 << 20;

pub(super) struct Driver {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    copies: Mutex<Copies>,
    uploads: Mutex<Uploads>,
    pub(super) landing: Landing,
    nvrtc: &'static Nvrtc,
    driver_version: i32,
    pub properties: Properties,
    allocated: AtomicUsize,
    waits: AtomicUsize,
    modules: Mutex<HashMap<ModuleKey, LoadedModule>>,
    /// Launches, while they are asked for.
    traced: Mutex<Option<Vec<Traced>>>,
}

/// Uploads on their way: the driver would wait for the stream before it took them from memory that is not
/// page-locked.
struct Uploads {
    ring: Ring<sys::CUevent>,
    /// Events that mark nothing now.
    events: Vec<sys::CUevent>,
}

/// A launch's kernel, and the moments before and after it.
type Traced = (&'static str, [Event; 2]);

type ModuleKey = (*const u8, [Option<(&'static str, i64)>; 8]);

struct LoadedModule {
    handle: sys::CUmodule,
    functions: HashMap<&'static str, Function>,
}

#[derive(Clone)]
struct Function {
    handle: sys::CUfunction,
    /// None where the driver is too old to tell.
    parameters: Option<Vec<Parameter>>,
    most_threads: u32,
}

// SAFETY: handles of the driver may be used by any thread that made the context its current one, which
// every function here does first.
unsafe impl Send for Driver {}
// SAFETY: as above; what changes is behind a lock.
unsafe impl Sync for Driver {}

/// The version of CUDA that the driver is made for (13000 is 13.0).
///
/// # Errors
/// There is no driver, or it does not work.
pub(super) fn driver_version() -> Result<i32> {
    // SAFETY: only tries whether the library can be opened.
    if !unsafe { sys::is_culib_present() } {
        let message = "no CUDA driver: libcuda.so is not found; install NVIDIA's driver, or use device = \"cpu\"";
        return Err(Error::Missing(message.into()));
    }
    result::init().map_err(|e| no_device(&describe(e)))?;
    let mut version = 0;
    // SAFETY: writes one number.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }
        .result()
        .map_err(|e| failed("version", e))?;
    Ok(version)
}

/// What every device of this machine is.
///
/// # Errors
/// As [`driver_version`].
pub(super) fn devices() -> Result<Vec<Properties>> {
    driver_version()?;
    let count = result::device::get_count().map_err(|e| failed("number of devices", e))?;
    (0..count).map(|ordinal| properties(get(ordinal)?)).collect()
}

fn get(ordinal: i32) -> Result<sys::CUdevice> {
    result::device::get(ordinal).map_err(|e| failed("device", e))
}

fn properties(device: sys::CUdevice) -> Result<Properties> {
    let attribute = |which| {
        // SAFETY: a device that exists.
        unsafe { result::device::get_attribute(device, which) }.map_err(|e| failed("attribute", e))
    };
    // SAFETY: as above.
    let memory = unsafe { result::device::total_mem(device) }.map_err(|e| failed("memory", e))?;
    Ok(Properties {
        name: result::device::get_name(device).map_err(|e| failed("name", e))?,
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        memory: memory as u64,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
            as u32,
    })
}

impl Driver {
    pub fn open(ordinal: usize) -> Result<Self> {
        let driver_version = driver_version()?;
        let count = result::device::get_count().map_err(|e| failed("number of devices", e))?;
        if ordinal >= count as usize {
            let found = format!("GPU {ordinal} is asked for, the driver has {count}");
            return Err(no_device(&found));
        }
        let device = get(ordinal as i32)?;
        let properties = properties(device)?;
        if properties.compute_capability < OLDEST {
            let ((major, minor), name) = (properties.compute_capability, &properties.name);
            return Err(Error::Missing(format!(
                "{name} has compute capability {major}.{minor}, the kernels need 8.0 (Ampere) or newer; use device = \"cpu\""
            )));
        }
        let nvrtc = Nvrtc::find()?;
        // SAFETY: a device that exists; the context is released on drop.
        let context =
            unsafe { result::primary_ctx::retain(device) }.map_err(|e| failed("context", e))?;
        // SAFETY: the context was made just now.
        unsafe { result::ctx::set_current(context) }.map_err(|e| failed("context", e))?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|e| failed("stream", e))?;
        let copies = Mutex::new(Copies::new()?);
        let page_locked = |bytes: usize| {
            // SAFETY: freed on drop, after all that uses it.
            let memory = unsafe { result::malloc_host(bytes, 0) };
            memory.map_err(|e| failed(&format!("{bytes} bytes of page-locked memory"), e))
        };
        // SAFETY: the memory is there until the driver is dropped, and nobody else's.
        let (ring, landing) = unsafe {
            let ring = Ring::new(page_locked(RING)?.cast(), RING);
            (ring, Landing::new(page_locked(LANDING)?.cast(), LANDING))
        };
        let uploads = Mutex::new(Uploads { ring, events: Vec::new() });
        let (allocated, waits) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let (modules, traced) = (Mutex::default(), Mutex::default());
        Ok(Self {
            device,
            context,
            stream,
            copies,
            uploads,
            landing,
            nvrtc,
            driver_version,
            properties,
            allocated,
            waits,
            modules,
            traced,
        })
    }

    /// The architecture that cubins are made for; `a` gives all instructions of exactly this one.
    fn architecture(&self) -> String {
        let (major, minor) = self.properties.compute_capability;
        let exactly = if major >= 9 { "a" } else { "" };
        format!("sm_{major}{minor}{exactly}")
    }

    fn enter(&self) -> Result<()> {
        // SAFETY: a context that lives as long as self.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| failed("context", e))
    }

    pub fn allocate(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        self.allocated.fetch_add(1, Ordering::Relaxed);
        // SAFETY: given back by `free`.
        unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|e| match e.0 {
            sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY => {
                let free = result::mem_get_info().map_or(0, |(free, _)| free);
                let name = &self.properties.name;
                Error::OutOfMemory(format!("{name} has no {bytes} bytes left, only {free}"))
            }
            _ => failed("allocation", e),
        })
    }

    /// Waits for all launches first, as the driver does.
    pub fn free(&self, address: u64) {
        if self.enter().is_ok() {
            // SAFETY: came from `allocate`. An error here is an earlier launch's, which the next call says.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    pub fn synchronize(&self) -> Result<()> {
        self.enter()?;
        self.waits.fetch_add(1, Ordering::Relaxed);
        // SAFETY: a stream that lives as long as self.
        unsafe { result::stream::synchronize(self.stream) }
            .map_err(|e| failed("a kernel before this call", e))
    }

    /// Bytes that are free, and that there are.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (free, total) = result::mem_get_info().map_err(|e| failed("memory", e))?;
        Ok((free as u64, total as u64))
    }

    pub fn launch(
        &self,
        kernel: &Kernel,
        grid: [u32; 3],
        shared_bytes: u32,
        args: &Args,
    ) -> Result<()> {
        self.enter()?;
        let function = self.function(kernel)?;
        if kernel.threads > function.most_threads {
            let most = function.most_threads;
            return Err(Error::Failed(format!(
                "kernel {}: {} threads, it is compiled for {most}",
                kernel.name, kernel.threads
            )));
        }
        if let Some(parameters) = &function.parameters {
            args.check(kernel, parameters)?;
        }
        let mut pointers: Vec<*mut c_void> =
            args.list.iter().map(|arg| arg.bytes.as_ptr().cast_mut().cast()).collect();
        self.trace(kernel.name, || {
            // SAFETY: arguments as the kernel's parameters are, checked above; what it writes is borrowed
            // mutably by `args`, and memory is given back only after the stream is through.
            let launched = unsafe {
                result::launch_kernel(
                    function.handle,
                    grid.into(),
                    (kernel.threads, 1, 1),
                    shared_bytes,
                    self.stream,
                    &mut pointers,
                )
            };
            launched.map_err(|e| failed(&format!("launch of {}", kernel.name), e))
        })
    }

    /// Allocations, and modules loaded.
    pub fn made(&self) -> (usize, usize) {
        let modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner).len();
        (self.allocated.load(Ordering::Relaxed), modules)
    }

    /// Times that everything was waited for.
    pub fn waits(&self) -> usize {
        self.waits.load(Ordering::Relaxed)
    }

    pub fn prepare(&self, kernels: &[Kernel]) -> Result<()> {
        let architecture = self.architecture();
        let compile =
            |kernel: &Kernel| self.nvrtc.cached(&kernel.module(), &architecture).map(drop);
        kernels.par_iter().try_for_each(compile)?;
        self.enter()?;
        kernels.iter().try_for_each(|kernel| self.function(kernel).map(drop))
    }

    fn function(&self, kernel: &Kernel) -> Result<Function> {
        let module = kernel.module();
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = match modules.entry(module.key()) {
            Entry::Occupied(loaded) => loaded.into_mut(),
            Entry::Vacant(free) => free.insert(self.load(&module)?),
        };
        if let Some(function) = loaded.functions.get(kernel.name) {
            return Ok(function.clone());
        }
        let function = self.find(loaded.handle, kernel.name)?;
        loaded.functions.insert(kernel.name, function.clone());
        Ok(function)
    }

    fn load(&self, module: &Module) -> Result<LoadedModule> {
        let cubin = self.nvrtc.cached(module, &self.architecture())?;
        // SAFETY: a whole cubin, which carries its own length.
        let handle = unsafe { result::module::load_data(cubin.as_ptr().cast()) }
            .map_err(|e| failed(&format!("loading {}", module.source.name), e))?;
        Ok(LoadedModule { handle, functions: HashMap::new() })
    }

    fn find(&self, module: sys::CUmodule, name: &'static str) -> Result<Function> {
        let named = |e| failed(&format!("kernel {name}"), e);
        let c_name = CString::new(name).expect("no NUL in a kernel's name");
        // SAFETY: a module that stays loaded; attributes are numbers.
        unsafe {
            let handle = result::module::get_function(module, c_name).map_err(named)?;
            // All that the device has; what a launch takes counts, not what it may take.
            result::function::set_function_attribute(
                handle,
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                self.properties.shared_bytes as i32,
            )
            .map_err(named)?;
            let most_threads = result::function::get_function_attribute(
                handle,
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK,
            )
            .map_err(named)? as u32;
            let parameters = (self.driver_version >= KNOWS_PARAMETERS).then(|| parameters(handle));
            Ok(Function { handle, parameters, most_threads })
        }
    }

    /// A tensor map as the copy engine reads it.
    pub fn encode(&self, layout: &Layout) -> Result<Encoded> {
        use sys::CUtensorMapDataType_enum as DataType;
        if self.driver_version < ENCODES_TENSOR_MAPS {
            let driver = self.driver_version / 1000;
            let what =
                format!("the driver is of CUDA {driver}, Hopper's kernels need one of CUDA 12");
            return Err(Error::Missing(what));
        }
        let of = match layout.of {
            Type::Bf16 => DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Type::F32 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            other => {
                return Err(Error::Failed(format!("a tensor map of {other:?} is not foreseen")));
            }
        };
        let (columns, rows) = (layout.columns, layout.rows);
        let (box_columns, box_rows) = (layout.box_columns, layout.box_rows);
        // Two dimensions, or three; what is behind them is not read.
        let (dimensions, sides, pitches, sides_of_box) = match layout.heads {
            None => (2, [columns, rows, 0], [layout.pitch, 0], [box_columns, box_rows, 0]),
            Some((heads, box_heads)) => {
                let pitches = [layout.head_pitch(), layout.pitch];
                (3, [columns, heads, rows], pitches, [box_columns, box_heads, box_rows])
            }
        };
        let steps = [1; 3];
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: arrays of a number a dimension, one less of strides; nothing is read at the address.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                of,
                dimensions,
                layout.address as *mut c_void,
                sides.as_ptr(),
                pitches.as_ptr(),
                sides_of_box.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        encoded.result().map_err(|e| failed(&format!("tensor map {layout:?}"), e))?;
        Ok(Encoded(map.opaque))
    }
}

/// Sizes of a kernel's parameters.
///
/// # Safety
/// `function` is a kernel's handle, and the driver has `cuFuncGetParamInfo`.
unsafe fn parameters(function: sys::CUfunction) -> Vec<Parameter> {
    let mut sizes = Vec::new();
    let (mut offset, mut size) = (0, 0);
    // The first number that there is no parameter for is an error.
    while unsafe { sys::cuFuncGetParamInfo(function, sizes.len(), &raw mut offset, &raw mut size) }
        .result()
        .is_ok()
    {
        sizes.push(Parameter { size, details: None });
    }
    sizes
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        let modules = self.modules.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Uploads { ring, events } =
            self.uploads.get_mut().unwrap_or_else(PoisonError::into_inner);
        let (memory, marks) = ring.take_apart();
        let copies = self.copies.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nothing uses them any more: buffers hold the device, and launches are waited for.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            copies.destroy();
            for module in modules.values() {
                let _ = result::module::unload(module.handle);
            }
            for event in events.drain(..).chain(marks) {
                let _ = result::event::destroy(event);
            }
            let _ = result::free_host(memory.cast());
            let _ = result::free_host(self.landing.memory().cast());
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

fn no_device(what: &str) -> Error {
    Error::Missing(format!(
        "no CUDA device: {what}; see nvidia-smi and CUDA_VISIBLE_DEVICES, or use device = \"cpu\""
    ))
}

fn describe(error: DriverError) -> String {
    let name = error.error_name().map(|name| name.to_string_lossy().into_owned());
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
    match (name, text) {
        (Ok(name), Ok(text)) => format!("{text} ({name})"),
        _ => format!("error {:?}", error.0),
    }
}

fn failed(what: &str, error: DriverError) -> Error {
    Error::Failed(format!("CUDA, {what}: {}", describe(error)))
}
