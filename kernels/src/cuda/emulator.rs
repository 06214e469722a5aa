//! The device that is none: kernels compiled by the system's C++ compiler and executed by emulation/, with
//! a thread of CUDA as a fiber. Made to find mistakes, not to be fast.

use super::arena::Spot;
use super::emulation::FILES;
use super::guarded::Guarded;
use super::kernel::{Declared, Kernel, Module};
use super::landing::Landing;
use super::late::{Late, Task};
use super::launch::{Arg, Args, Parameter, Type};
use super::ring::Ring;
use super::{Error, Properties, Result, cache};
use libloading::Library;
use rayon::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, OsString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// What an A100 allows a block, and an H100.
const SHARED_BYTES: u32 = 163 << 10;
const SHARED_BYTES_HOPPER: u32 = 227 << 10;
/// As emulation/launch.h: threads of a cluster.
const MOST_THREADS: u32 = 1024;
const OPTIONS: &str = "-std=c++17 -O2 -shared -fPIC -fvisibility=hidden -fno-stack-protector \
                       -fstack-clash-protection -fcf-protection=none -U_FORTIFY_SOURCE -Wl,-Bsymbolic";

/// Bytes through which uploads go, and downloads that are not waited for at once: few, so that even small tests go round.
const RING: usize = 16 << 10;
const LANDING: usize = 4 << 10;

pub(super) struct Emulator {
    seed: u64,
    compiler: &'static Compiler,
    pub properties: Properties,
    /// What is put off until it is waited for.
    pub(super) late: Option<Late>,
    pub(super) uploads: Mutex<Ring<u64>>,
    pub(super) landing: Landing,
    /// The ring's, and the landing's.
    _ring: Box<[u8]>,
    _landing: Box<[u8]>,
    memory: Mutex<Allocations>,
    allocated: AtomicUsize,
    /// Buffers of arenas so far.
    placed: AtomicUsize,
    pub(super) waits: AtomicUsize,
    modules: Mutex<HashMap<ModuleKey, Loaded>>,
    /// Launches, while they are asked for.
    traced: Mutex<Option<Vec<&'static str>>>,
    #[cfg(test)]
    pub fault: Option<super::Fault>,
    /// Of the times that a stream is told to wait for the other, the one at which it does not.
    #[cfg(test)]
    pub forgotten: Option<usize>,
    #[cfg(test)]
    pub orders: AtomicUsize,
}

/// By address.
pub(super) type Allocations = BTreeMap<u64, Allocation>;

pub(super) struct Allocation {
    pub memory: Guarded,
    /// Of a buffer of an arena, the range that it would have on a GPU, and how many others had been placed before.
    pub spot: Option<(Spot, usize)>,
}

/// The list of `emulation::Worker`s, which all modules share.
static WORKERS: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

type ModuleKey = (*const u8, [Option<(&'static str, i64)>; 8]);

/// A compiled module, which stays in the process: its fault handler may be asked at any time.
#[derive(Clone, Copy)]
struct Loaded {
    entries: *const Entry,
    run: unsafe extern "C" fn(*mut Launch),
}

// SAFETY: pointers into a library that is never closed, to constants.
unsafe impl Send for Emulator {}
// SAFETY: as above; what changes is behind locks.
unsafe impl Sync for Emulator {}

/// `emulation::Entry`.
#[repr(C)]
struct Entry {
    name: *const c_char,
    threads: u32,
    cluster: u32,
    parameter_count: u32,
    parameters: *const RawParameter,
    call: unsafe extern "C" fn(*mut *mut c_void),
}

/// `emulation::Parameter`.
#[repr(C)]
struct RawParameter {
    size: u8,
    is_pointer: u8,
    is_writable: u8,
    of: u8,
}

/// `emulation::Launch`.
#[repr(C)]
struct Launch {
    entry: *const Entry,
    arguments: *mut *mut c_void,
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u64,
    seed: u64,
    next_cluster: u64,
    workers: *mut *mut c_void,
    failed: u32,
    working: u32,
    told: u64,
    fault_address: u64,
    message: [u8; 1024],
}

/// The C++ compiler.
pub struct Compiler {
    pub command: OsString,
    /// The first line of what it says of itself.
    pub version: String,
}

impl Compiler {
    /// $CXX, or g++, asked once.
    ///
    /// # Errors
    /// There is none.
    pub fn find() -> Result<&'static Self> {
        static FOUND: OnceLock<Result<Compiler>> = OnceLock::new();
        let found = FOUND.get_or_init(|| {
            let named = std::env::var_os("CXX").filter(|name| !name.is_empty());
            let command = named.unwrap_or_else(|| "g++".into());
            let asked = Command::new(&command).arg("--version").output();
            let version = asked.ok().filter(|output| output.status.success()).and_then(|output| {
                String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
            });
            match version {
                Some(version) => Ok(Self { command, version }),
                None => Err(Error::Missing(format!(
                    "the emulated device needs a C++ compiler, and {} does not run: install g++, or set CXX",
                    command.display()
                ))),
            }
        });
        found.as_ref().map_err(Clone::clone)
    }

    /// Makes a library of the module, with a table of its kernels.
    fn compile(&self, module: &Module, to: &Path) -> Result<()> {
        let failed = |e: std::io::Error| Error::Failed(format!("{}: {e}", to.display()));
        let folder = to.with_extension("sources");
        std::fs::create_dir_all(&folder).map_err(failed)?;
        let mut table = format!("#include \"{}\"\n", module.source.name);
        table += "extern \"C\" __attribute__((visibility(\"default\")))\n";
        table += "const emulation::Entry emulation_entries[] = {\n";
        for Declared { name, threads, cluster } in module.kernels()? {
            table += &format!("    EMULATED({name}, ({threads}), ({cluster})),\n");
        }
        table += "    {}\n};\n";
        let main = folder.join("table.cpp");
        std::fs::write(&main, table).map_err(failed)?;
        let own = [(module.source.name, module.source.text)];
        for (name, text) in module.headers().chain(FILES).chain(own) {
            std::fs::write(folder.join(name), text).map_err(failed)?;
        }
        let output = Command::new(&self.command)
            .args(OPTIONS.split_whitespace())
            .args(module.options())
            .arg(main)
            .arg("-o")
            .arg(to)
            .output()
            .map_err(failed)?;
        let _ = std::fs::remove_dir_all(&folder);
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(Error::Failed(format!("{}: {}", module.source.name, said.trim_end())))
    }

    fn cached(&self, module: &Module) -> Result<PathBuf> {
        let (text, emulation) = (module.text(), FILES.map(|(_, text)| text).concat());
        let parts =
            [self.version.as_bytes(), OPTIONS.as_bytes(), text.as_bytes(), emulation.as_bytes()];
        cache::get_or_make(module.stem(), &parts, "so", |path| self.compile(module, path))
    }
}

impl Emulator {
    /// `hopper`: of compute capability 9.0, otherwise 8.0.
    pub fn new(seed: u64, hopper: bool) -> Result<Self> {
        if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            let message = "the emulated device needs Linux on x86-64; use device = \"cpu\"";
            return Err(Error::Missing(message.into()));
        }
        let properties = Properties {
            name: "emulated".into(),
            compute_capability: if hopper { (9, 0) } else { (8, 0) },
            memory: physical_memory(),
            multiprocessors: rayon::current_num_threads() as u32,
            shared_bytes: if hopper { SHARED_BYTES_HOPPER } else { SHARED_BYTES },
        };
        let compiler = Compiler::find()?;
        let (memory, modules, traced) = (Mutex::default(), Mutex::default(), Mutex::default());
        let mut ring = vec![0; RING].into_boxed_slice();
        // SAFETY: the memory lives as long as the ring, and only the ring is used.
        let uploads = Mutex::new(unsafe { Ring::new(ring.as_mut_ptr(), RING) });
        let mut landed = vec![0xff; LANDING].into_boxed_slice();
        // SAFETY: as above.
        let landing = unsafe { Landing::new(landed.as_mut_ptr(), LANDING) };
        Ok(Self {
            seed,
            compiler,
            properties,
            late: None,
            uploads,
            landing,
            _ring: ring,
            _landing: landed,
            memory,
            allocated: AtomicUsize::new(0),
            placed: AtomicUsize::new(0),
            waits: AtomicUsize::new(0),
            modules,
            traced,
            #[cfg(test)]
            fault: None,
            #[cfg(test)]
            forgotten: None,
            #[cfg(test)]
            orders: AtomicUsize::new(0),
        })
    }

    pub fn allocate(&self, bytes: usize) -> Result<u64> {
        self.allocated.fetch_add(1, Ordering::Relaxed);
        self.place(bytes, None)
    }

    /// Allocations, and modules loaded.
    pub fn made(&self) -> (usize, usize) {
        let modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner).len();
        (self.allocated.load(Ordering::Relaxed), modules)
    }

    /// Memory with guards around it.
    pub fn place(&self, bytes: usize, spot: Option<Spot>) -> Result<u64> {
        let memory = Guarded::new(bytes)?;
        let address = memory.address();
        let spot = spot.map(|spot| (spot, self.placed.fetch_add(1, Ordering::Relaxed)));
        self.allocations().insert(address, Allocation { memory, spot });
        Ok(address)
    }

    pub(super) fn release(&self, address: u64) {
        self.allocations().remove(&address);
    }

    pub(super) fn allocations(&self) -> MutexGuard<'_, Allocations> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn launch(
        &self,
        kernel: &Kernel,
        grid: [u32; 3],
        shared_bytes: u32,
        args: &Args,
    ) -> Result<()> {
        let launch = self.check(kernel, grid, shared_bytes, args)?;
        if let Some(list) = &mut *self.traced() {
            list.push(kernel.name);
        }
        self.tell(Task::Launch(Box::new(launch))).map(drop)
    }

    /// Name of every launch of `work`, in their order.
    pub fn trace(&self, work: impl FnOnce() -> Result<()>) -> Result<Vec<&'static str>> {
        *self.traced() = Some(Vec::new());
        let done = work();
        let launches = self.traced().take().unwrap_or_default();
        done.map(|()| launches)
    }

    fn traced(&self) -> MutexGuard<'_, Option<Vec<&'static str>>> {
        self.traced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that can be said before the kernel runs.
    fn check(
        &self,
        kernel: &Kernel,
        grid: [u32; 3],
        shared_bytes: u32,
        args: &Args,
    ) -> Result<Checked> {
        let loaded = self.load(&kernel.module())?;
        let entry = loaded.find(kernel)?;
        args.check(kernel, &entry.parameters())?;
        if kernel.threads > entry.threads {
            let (given, most) = (kernel.threads, entry.threads);
            let name = kernel.name;
            return Err(Error::Failed(format!(
                "kernel {name}: {given} threads, it is compiled for {most}"
            )));
        }
        let cluster = entry.cluster;
        if !grid[0].is_multiple_of(cluster) || cluster * kernel.threads > MOST_THREADS {
            let (name, blocks, threads) = (kernel.name, grid[0], kernel.threads);
            return Err(Error::Failed(format!(
                "kernel {name}: {blocks} blocks of {threads} threads, in clusters of {cluster}"
            )));
        }
        let args = args.list.clone();
        Ok(Checked { kernel: *kernel, run: loaded.run, entry, grid, shared_bytes, args })
    }

    /// Runs every block, on the threads of rayon's current pool.
    pub(super) fn run(&self, checked: &Checked) -> Result<()> {
        let &Checked { kernel, run, entry, grid, shared_bytes, ref args } = checked;
        let mut pointers: Vec<*mut c_void> =
            args.iter().map(|arg| arg.bytes.as_ptr().cast_mut().cast()).collect();
        let mut launch = Launch {
            entry,
            arguments: pointers.as_mut_ptr(),
            grid,
            threads: kernel.threads,
            shared_bytes: shared_bytes.into(),
            seed: self.seed,
            next_cluster: 0,
            workers: WORKERS.as_ptr(),
            failed: 0,
            working: 0,
            told: 0,
            fault_address: 0,
            message: [0; 1024],
        };
        let shared = Shared(&raw mut launch);
        let blocks = grid.iter().map(|&n| n as usize).product::<usize>();
        let workers = rayon::current_num_threads().min(blocks);
        // SAFETY: the launch outlives the loop, and its fields that change are atomic to those who work at
        // it. Arguments are as the kernel's parameters are, checked above.
        (0..workers).into_par_iter().with_max_len(1).for_each(|_| unsafe {
            let shared = &shared;
            run(shared.0);
        });
        if launch.failed != 0 {
            let message = CStr::from_bytes_until_nul(&launch.message).unwrap_or_default();
            let place = self.describe(launch.fault_address);
            let message = message.to_string_lossy();
            return Err(Error::Failed(format!("{message}{place} (seed {})", self.seed)));
        }
        self.check_overruns(&kernel, args)
    }

    pub fn prepare(&self, kernels: &[Kernel]) -> Result<()> {
        let compile = |kernel: &Kernel| self.compiled(&kernel.module()).map(drop);
        kernels.par_iter().try_for_each(compile)?;
        kernels.iter().try_for_each(|kernel| self.load(&kernel.module()).map(drop))
    }

    fn compiled(&self, module: &Module) -> Result<PathBuf> {
        #[cfg(test)]
        let module = &super::Fault::planted(self.fault.as_ref(), module);
        self.compiler.cached(module)
    }

    fn load(&self, module: &Module) -> Result<Loaded> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = modules.get(&module.key()) {
            return Ok(*loaded);
        }
        let path = self.compiled(module)?;
        let failed = |e: libloading::Error| Error::Failed(format!("{}: {e}", path.display()));
        // SAFETY: compiled from sources that are part of this program; loading it runs nothing of note.
        let loaded = unsafe {
            let library = Library::new(&path).map_err(failed)?;
            let entries: *const Entry = *library.get(b"emulation_entries").map_err(failed)?;
            let run = *library.get(b"emulation_run").map_err(failed)?;
            std::mem::forget(library);
            Loaded { entries, run }
        };
        modules.insert(module.key(), loaded);
        Ok(loaded)
    }

    /// Where an address lies from the nearest allocation, or nothing if there is no address.
    fn describe(&self, address: u64) -> String {
        if address == 0 {
            return String::new();
        }
        let allocations = self.allocations();
        let before = allocations.range(..=address).next_back();
        let after = allocations.range(address..).next();
        let past = before.map(|(start, a)| (address - start - a.memory.len() as u64, &a.memory));
        let ahead = after.map(|(start, a)| (start - address, &a.memory));
        match (past, ahead) {
            (Some((past, memory)), ahead) if ahead.is_none_or(|(ahead, _)| past <= ahead) => {
                format!(", {past} bytes past the end of a buffer of {} bytes", memory.len())
            }
            (_, Some((ahead, memory))) => {
                format!(", {ahead} bytes before a buffer of {} bytes", memory.len())
            }
            (Some(_), None) | (None, None) => ", where no buffer is".into(),
        }
    }

    /// Writes next to a buffer that did not reach the pages where they fault.
    fn check_overruns(&self, kernel: &Kernel, args: &[Arg]) -> Result<()> {
        let allocations = self.allocations();
        for (number, arg) in args.iter().enumerate().filter(|(_, arg)| arg.writable) {
            let buffer = allocations.range(..=arg.address).next_back();
            if let Some(place) = buffer.and_then(|(_, a)| a.memory.overrun()) {
                return Err(Error::Failed(format!(
                    "kernel {}: wrote outside argument {number}'s buffer, {place} (seed {})",
                    kernel.name, self.seed
                )));
            }
        }
        Ok(())
    }
}

/// A launch of which everything is known to fit.
pub(super) struct Checked {
    kernel: Kernel,
    run: unsafe extern "C" fn(*mut Launch),
    entry: &'static Entry,
    grid: [u32; 3],
    shared_bytes: u32,
    args: Vec<Arg>,
}

/// A launch that several threads work at.
struct Shared(*mut Launch);
// SAFETY: what those who work at it change, they change atomically.
unsafe impl Sync for Shared {}

impl Loaded {
    fn find(&self, kernel: &Kernel) -> Result<&'static Entry> {
        let mut entry = self.entries;
        // SAFETY: the table ends with an entry without a name, and is never unloaded.
        unsafe {
            while !(*entry).name.is_null() {
                if CStr::from_ptr((*entry).name).to_bytes() == kernel.name.as_bytes() {
                    return Ok(&*entry);
                }
                entry = entry.add(1);
            }
        }
        let (name, file) = (kernel.name, kernel.source.name);
        Err(Error::Failed(format!("{file} has no kernel {name}")))
    }
}

impl Entry {
    fn parameters(&self) -> Vec<Parameter> {
        // SAFETY: as many as the entry says.
        let raw =
            unsafe { std::slice::from_raw_parts(self.parameters, self.parameter_count as usize) };
        raw.iter()
            .map(|p| Parameter {
                size: p.size.into(),
                details: Some((p.is_pointer != 0, Type::of_number(p.of), p.is_writable != 0)),
            })
            .collect()
    }
}

fn physical_memory() -> u64 {
    // SAFETY: two numbers of the system.
    let (pages, size) =
        unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    u64::try_from(pages).unwrap_or(0) * u64::try_from(size).unwrap_or(0)
}
