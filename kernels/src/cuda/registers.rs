//! What a kernel takes of a multiprocessor, as the assembler reports it: registers decide how many blocks
//! run at once, and what they cannot hold goes to memory.

use super::kernel::{Kernel, Module};
use super::nvrtc::Nvrtc;
use super::{Error, Result, cache};
use std::collections::BTreeMap;

/// One kernel's use, by the report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// Of a thread.
    pub registers: u32,
    /// Bytes of a thread in local memory: arrays that are indexed at run time, spilled registers.
    pub stack: u32,
    /// Bytes stored to and loaded from there for want of registers.
    pub spilled: u32,
}

/// By name, every kernel of the module for the architecture.
pub(super) fn usage(
    nvrtc: &Nvrtc,
    kernel: &Kernel,
    architecture: &str,
) -> Result<BTreeMap<String, Usage>> {
    let module = kernel.module();
    let log = report(nvrtc, &module, architecture)?;
    let found = parse(&log);
    match found {
        Some(found) => Ok(found),
        None => Err(Error::Failed(format!("the assembler's report is not understood:\n{log}"))),
    }
}

/// The compiler's log, kept as a cubin is.
fn report(nvrtc: &Nvrtc, module: &Module, architecture: &str) -> Result<String> {
    let parts = nvrtc.parts(module, architecture);
    let parts: Vec<&[u8]> = parts.iter().map(String::as_bytes).collect();
    let path = cache::get_or_make(module.stem(), &parts, "log", |path| {
        let compiled = nvrtc.compile(module, architecture)?;
        std::fs::write(path, compiled.log)
            .map_err(|e| Error::Failed(format!("{}: {e}", path.display())))
    })?;
    std::fs::read_to_string(&path).map_err(|e| Error::Failed(format!("{}: {e}", path.display())))
}

/// Lines like `Compiling entry function 'NAME' for 'sm_80'`, `0 bytes stack frame, 4 bytes spill stores, 8
/// bytes spill loads` and `Used 18 registers, …`, in this order.
fn parse(log: &str) -> Option<BTreeMap<String, Usage>> {
    let number = |text: &str| text.trim().parse::<u32>().ok();
    let before =
        |line: &str, mark: &str| number(line.split(mark).next()?.rsplit([' ', ',']).next()?);
    let mut found = BTreeMap::new();
    let mut current = None;
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("entry function '") {
            let name = rest.split('\'').next()?.to_owned();
            found.insert(name.clone(), Usage::default());
            current = Some(name);
        }
        let Some(usage) = current.as_ref().and_then(|name| found.get_mut(name)) else { continue };
        if line.contains(" bytes stack frame") {
            // A function that was not inlined has a line of its own, and counts too.
            usage.stack += before(line, " bytes stack frame")?;
            usage.spilled +=
                before(line, " bytes spill stores")? + before(line, " bytes spill loads")?;
        }
        if let Some((_, rest)) = line.split_once("Used ") {
            usage.registers = number(rest.split(" registers").next()?)?;
        }
    }
    let complete = !found.is_empty() && found.values().all(|usage| usage.registers > 0);
    complete.then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{HOPPER_KERNELS, HOPPER_PRODUCTS, KERNELS, Source};
    use rayon::prelude::*;
    use std::fmt::Write;
    use std::path::Path;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const HOPPER: &str = "sm_90a";
    const ARCHITECTURES: [&str; 2] = ["sm_80", HOPPER];
    /// That the numbers of registers.txt are of.
    const VERSION: (i32, i32) = (13, 0);
    const HEAD: &str = "\
# Registers of a thread of every kernel on sm_80 and sm_90a, as NVRTC 13.0 compiles it; more is refused. With `-` it is for sm_90a
# alone, where setmaxnreg gives other numbers once it runs.
# To record what there is now: UFT_RECORD_REGISTERS=1 cargo test -p uft-kernels registers
";

    fn compiler() -> &'static Nvrtc {
        let remedy = "python3 -m venv target/nvrtc && target/nvrtc/bin/pip install nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-nvdisasm==13.5.37 && \
                      export UFT_NVRTC=$(echo $PWD/target/nvrtc/lib/python3*/site-packages/nvidia/cu13/lib)";
        let nvrtc = Nvrtc::find().unwrap_or_else(|error| panic!("{error}\nHere: {remedy}"));
        let (found, path) = (nvrtc.version, nvrtc.path.display());
        assert!(
            found == VERSION,
            "{path} is NVRTC {found:?}, the table is of {VERSION:?}: {remedy}"
        );
        nvrtc
    }

    /// One line a kernel; the checks that need no table are made on the way.
    fn measure() -> BTreeMap<String, [Option<u32>; 2]> {
        let nvrtc = compiler();
        let everywhere = KERNELS.iter().flat_map(|kernels| kernels.iter()).map(|it| (it, false));
        let hopper = HOPPER_KERNELS.iter().flat_map(|kernels| kernels.iter()).map(|it| (it, true));
        let all: Vec<(&Kernel, bool)> = everywhere.chain(hopper).collect();
        all.par_iter()
            .map(|&(kernel, hopper)| {
                let registers = ARCHITECTURES.map(|architecture| {
                    if hopper && architecture != HOPPER {
                        return None;
                    }
                    let label = kernel.label();
                    if hopper {
                        let log = report(nvrtc, &kernel.module(), architecture).unwrap();
                        // Products that wait for each other, or a register count that setmaxnreg cannot change.
                        let slow = ["serialized", "injected", "setmaxnreg"];
                        assert!(!slow.iter().any(|word| log.contains(word)), "{label}: {log}");
                    }
                    let modules = usage(nvrtc, kernel, architecture);
                    let modules = modules.unwrap_or_else(|error| panic!("{label}: {error}"));
                    let usage = modules.get(kernel.name).unwrap_or_else(|| panic!("no {label}"));
                    assert!(
                        usage.stack == 0 && usage.spilled == 0,
                        "{label} for {architecture} uses local memory: {usage:?}"
                    );
                    Some(usage.registers)
                });
                (kernel.label(), registers)
            })
            .collect()
    }

    #[test]
    fn no_kernel_spills_or_takes_more_registers_than_recorded() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/registers.txt");
        let found = measure();
        let mut table = HEAD.to_owned();
        for (label, registers) in &found {
            let [old, new] =
                registers.map(|found| found.map_or("-".into(), |found| found.to_string()));
            let _ = writeln!(table, "{label} {old} {new}");
        }
        if std::env::var_os("UFT_RECORD_REGISTERS").is_some() {
            std::fs::write(&path, &table).unwrap();
        }
        let recorded = std::fs::read_to_string(&path).unwrap();
        let mut recorded: BTreeMap<&str, [Option<u32>; 2]> = recorded
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| {
                let mut parts = line.rsplitn(3, ' ');
                let mut number = || match parts.next().unwrap() {
                    "-" => None,
                    number => Some(number.parse().unwrap()),
                };
                let (new, old) = (number(), number());
                (parts.next().unwrap(), [old, new])
            })
            .collect();
        let mut wrong = String::new();
        for (label, found) in &found {
            match recorded.remove(label.as_str()) {
                Some(most)
                    if (0..2).all(|i| {
                        found[i].is_none() == most[i].is_none() && found[i] <= most[i]
                    }) => {}
                most => {
                    let _ = writeln!(wrong, "{label}: registers {found:?}, recorded {most:?}");
                }
            }
        }
        for label in recorded.keys() {
            let _ = writeln!(wrong, "{label}: recorded, but there is no such kernel");
        }
        assert!(wrong.is_empty(), "{wrong}{HEAD}");
    }

    /// What the assembler made of a module for Hopper, as NVIDIA's disassembler shows it.
    fn disassembled(kernel: &Kernel) -> String {
        let nvrtc = compiler();
        let remedy = "target/nvrtc/bin/pip install nvidia-cuda-nvdisasm==13.5.37, beside NVRTC";
        let beside = nvrtc.path.parent().unwrap().with_file_name("bin").join("nvdisasm");
        let cubin = nvrtc.cached(&kernel.module(), HOPPER).unwrap();
        let folder = cache::folder().unwrap();
        // Tests that run at the same time look at the same kernels.
        static FILES: AtomicUsize = AtomicUsize::new(0);
        let number = FILES.fetch_add(1, Ordering::Relaxed);
        let file = folder.join(format!("{}.{}.{number}.sass", kernel.label(), std::process::id()));
        std::fs::write(&file, cubin).unwrap();
        let ran = std::process::Command::new(&beside).arg("-c").arg(&file).output();
        std::fs::remove_file(&file).unwrap();
        let ran = ran.unwrap_or_else(|error| panic!("{}: {error}: {remedy}", beside.display()));
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8(ran.stdout).unwrap()
    }

    /// Kernels for Hopper whose warpgroups multiply.
    fn multiplying(kernels: &'static [Kernel]) -> impl Iterator<Item = &'static Kernel> {
        kernels.iter().filter(|kernel| kernel.source.headers.contains(&HOPPER_PRODUCTS))
    }

    /// Products are the tensor cores' of a warpgroup, boxes the copy engine's, and between the first barrier of a cluster and the
    /// last nothing waits for the whole GPU.
    #[test]
    fn instructions_of_hopper_are_what_is_meant() {
        for kernel in HOPPER_KERNELS.iter().flat_map(|kernels| multiplying(kernels)) {
            let (label, sass) = (kernel.label(), disassembled(kernel));
            let count = |word: &str| sass.matches(word).count();
            let kernels = kernel.module().kernels().unwrap().len();
            // Attention writes rows that no box has, and no two of its blocks read the same.
            let attention = kernel.name.starts_with("hopper_attention");
            let adds = kernel.source.name == "hopper_backward.cu";
            let words: &[&str] = match attention {
                true => &["HGMMA", "UTMALDG.3D", "USETMAXREG", "STSM"],
                false => &["HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "STSM", "MULTICAST"],
            };
            for word in words {
                assert!(count(word) >= kernels, "{label}: no {word}");
            }
            assert_eq!(
                (count("UBLKRED.G.S.ADD.F32") > 0, count("UBLKCP.G.S") > 0),
                (adds, adds),
                "{label}"
            );
            // Of a warp's own products there are those of an adapter's rank, beside what is activated.
            let of_a_warp = count("HMMA.") > 0;
            assert!(!of_a_warp || kernel.source.name == "hopper_swiglu.cu", "{label}: HMMA");
            assert_eq!(count("LDL") + count("STL"), 0, "{label}");
            // A slice's products start one behind the other, with those of short sides between them.
            if let Some((_, groups)) = kernel.defines().find(|(name, _)| *name == "SHORT_GROUPS") {
                let waits = |line: &&str| line.contains("HGMMA") || line.contains("DEPBAR.LE gsb0");
                let lines: Vec<&str> = sass.lines().filter(waits).collect();
                let runs = lines.split(|line| !line.contains("HGMMA")).map(<[&str]>::len);
                let slice = if groups > 0 { 8 } else { 4 };
                assert!(runs.max() >= Some(slice), "{label}: products wait for each other");
            }
            let barriers = count("MEMBAR.ALL.GPU") + count("MEMBAR.SC.GPU");
            assert!(barriers <= 2 * kernels, "{label}: {barriers} fences of the whole GPU");
        }
    }

    /// The softmax of attention runs beside products: exponentials are behind a wait that leaves one of them under way, and before
    /// the next wait or start.
    #[test]
    fn exponentials_run_beside_products() {
        for kernel in multiplying(&crate::attention::cuda::hopper::KERNELS) {
            let (label, sass) = (kernel.label(), disassembled(kernel));
            let (mut beside, mut most, mut now) = (false, 0, 0);
            for line in sass.lines() {
                if line.contains("DEPBAR.LE gsb0") || line.contains("HGMMA") {
                    beside = line.contains("DEPBAR.LE gsb0, 0x1");
                    now = 0;
                }
                now += usize::from(beside && line.contains("MUFU.EX2"));
                most = most.max(now);
            }
            // As many as a thread has of a tile's scores.
            let all = if kernel.defines().any(|it| it == ("QUERIES", 64)) { 32 } else { 64 };
            assert!(most >= all, "{label}: {most} of {all} exponentials");
        }
    }

    #[test]
    fn spills_are_seen() {
        const HUNGRY: &str = "#include \"device.cuh\"\n\
            KERNEL(1024) hungry(const float* x, float* y) {\n\
            float held[150];\n\
            _Pragma(\"unroll\") for (int i = 0; i < 150; i++) held[i] = x[i * 1024 + threadIdx.x];\n\
            __syncthreads();\n\
            _Pragma(\"unroll\") for (int i = 0; i < 150; i++) y[i * 1024 + threadIdx.x] = held[i] * held[149 - i];\n\
            }\n";
        static SOURCE: Source = Source { name: "hungry.cu", text: HUNGRY, headers: &[] };
        let kernel = Kernel::new(&SOURCE, "hungry", 1024);
        for architecture in ARCHITECTURES {
            let usage = usage(compiler(), &kernel, architecture).unwrap()["hungry"];
            assert!(usage.spilled > 0 && usage.registers <= 64, "{architecture}: {usage:?}");
        }
    }

    #[test]
    fn reports_are_read() {
        let log = "ptxas info    : 8 bytes gmem\n\
            ptxas info    : Compiling entry function 'one' for 'sm_80'\n\
            ptxas info    : Function properties for one\n\
            ptxas         .     16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n\
            ptxas info    : Used 18 registers, used 1 barriers, 388 bytes cmem[0]\n";
        let usage = Usage { registers: 18, stack: 16, spilled: 12 };
        assert_eq!(parse(log), Some(BTreeMap::from([("one".to_owned(), usage)])));
        assert_eq!(parse("nothing of it"), None);
    }
}
