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
    use crate::cuda::{KERNELS, Source};
    use rayon::prelude::*;
    use std::fmt::Write;
    use std::path::Path;

    const ARCHITECTURES: [&str; 2] = ["sm_80", "sm_90a"];
    /// That the numbers of registers.txt are of.
    const VERSION: (i32, i32) = (13, 0);
    const HEAD: &str = "\
# Registers of a thread of every kernel, by architecture, as NVRTC 13.0 compiles it; more is refused.
# To record what there is now: UFT_RECORD_REGISTERS=1 cargo test -p uft-kernels registers
";

    fn compiler() -> &'static Nvrtc {
        let remedy = "python3 -m venv target/nvrtc && target/nvrtc/bin/pip install nvidia-cuda-nvrtc==13.0.88 && \
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
    fn measure() -> BTreeMap<String, [u32; 2]> {
        let nvrtc = compiler();
        let all: Vec<&Kernel> = KERNELS.iter().flat_map(|kernels| kernels.iter()).collect();
        all.par_iter()
            .map(|kernel| {
                let registers = ARCHITECTURES.map(|architecture| {
                    let label = kernel.label();
                    let modules = usage(nvrtc, kernel, architecture);
                    let modules = modules.unwrap_or_else(|error| panic!("{label}: {error}"));
                    let usage = modules.get(kernel.name).unwrap_or_else(|| panic!("no {label}"));
                    assert!(
                        usage.stack == 0 && usage.spilled == 0,
                        "{label} for {architecture} uses local memory: {usage:?}"
                    );
                    usage.registers
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
        for (label, [old, new]) in &found {
            let _ = writeln!(table, "{label} {old} {new}");
        }
        if std::env::var_os("UFT_RECORD_REGISTERS").is_some() {
            std::fs::write(&path, &table).unwrap();
        }
        let recorded = std::fs::read_to_string(&path).unwrap();
        let mut recorded: BTreeMap<&str, [u32; 2]> = recorded
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| {
                let mut parts = line.rsplitn(3, ' ');
                let mut number = || parts.next().unwrap().parse().unwrap();
                let (new, old) = (number(), number());
                (parts.next().unwrap(), [old, new])
            })
            .collect();
        let mut wrong = String::new();
        for (label, found) in &found {
            match recorded.remove(label.as_str()) {
                Some(most) if (0..2).all(|i| found[i] <= most[i]) => {}
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
