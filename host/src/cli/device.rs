//! `uft device`.

use super::print;
use crate::Result;
use clap::Args;
use std::fmt::{Display, Write};
use uft_kernels::cuda;

#[derive(Args)]
pub struct DeviceArgs {}

/// Says what was found, and of each thing that was not, what to do. That nothing was found is an answer too.
pub fn run(_args: &DeviceArgs) -> Result<()> {
    let mut out = String::new();
    line(
        &mut out,
        "driver",
        cuda::driver_version().map(|(major, minor)| format!("CUDA {major}.{minor}")),
    );
    match cuda::devices() {
        Ok(devices) => {
            for (ordinal, device) in devices.iter().enumerate() {
                line(&mut out, &format!("GPU {ordinal}"), Ok::<_, cuda::Error>(describe(device)));
            }
            if devices.is_empty() {
                line(&mut out, "GPUs", Ok::<_, cuda::Error>("none"));
            }
        }
        // The driver's line says why.
        Err(_) => line(&mut out, "GPUs", Ok::<_, cuda::Error>("none")),
    }
    let nvrtc = cuda::Nvrtc::find().map(|nvrtc| {
        let ((major, minor), path) = (nvrtc.version, nvrtc.path.display());
        format!("{major}.{minor}, {path}")
    });
    line(&mut out, "NVRTC", nvrtc);
    let compiler = cuda::Compiler::find();
    let compiler = compiler.map(|c| format!("{}: {}", c.command.display(), c.version));
    line(&mut out, "C++ compiler for device = \"emulated\"", compiler);
    line(
        &mut out,
        "compiled kernels",
        cuda::cache_folder().map(|folder| {
            let (files, bytes) = size(&folder);
            format!(
                "{}, {files} files, {:.1} MiB",
                folder.display(),
                bytes as f64 / (1 << 20) as f64
            )
        }),
    );
    print(&out)
}

fn line(out: &mut String, what: &str, found: std::result::Result<impl Display, impl Display>) {
    let _ = match found {
        Ok(found) => writeln!(out, "{what}: {found}"),
        Err(error) => writeln!(out, "{what}: {error}"),
    };
}

fn describe(device: &cuda::Properties) -> String {
    let ((major, minor), name) = (device.compute_capability, &device.name);
    let memory = device.memory as f64 / f64::from(1 << 30);
    let multiprocessors = device.multiprocessors;
    let too_old = if (major, minor) < (8, 0) { ", too old: 8.0 is needed" } else { "" };
    format!(
        "{name}, compute capability {major}.{minor}{too_old}, {memory:.1} GiB, {multiprocessors} multiprocessors"
    )
}

/// Number of files in a folder, and their bytes; nothing where there is no folder yet.
fn size(folder: &std::path::Path) -> (usize, u64) {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let lengths = entries.filter_map(|entry| entry.metadata().ok()).filter(|m| m.is_file());
    lengths.fold((0, 0), |(files, bytes), metadata| (files + 1, bytes + metadata.len()))
}
