//! Where a model computes.

use crate::config::Device as Choice;
use crate::{Error, ErrorKind, Result};
use uft_kernels::cuda::{self, Gpu};

/// The processor, or a GPU.
#[derive(Clone)]
pub enum Device {
    Cpu,
    Gpu(Gpu),
}

impl Device {
    /// What `device` in the configuration or on the command line means on this machine.
    ///
    /// # Errors
    /// What is missing for it, and what to do about it. "auto" takes the processor where there is no GPU that is new
    /// enough, but where there is one that lacks something, it says what.
    pub fn open(choice: Choice) -> Result<Self> {
        let device = match choice {
            Choice::Cpu => Self::Cpu,
            // It is there to find mistakes, a missing wait among them.
            Choice::Emulated => {
                Self::Gpu(Gpu::emulated_late(0).map_err(|e| missing("emulated", &e))?)
            }
            Choice::Cuda => {
                Self::Gpu(Gpu::open(usable().unwrap_or(0)).map_err(|e| missing("cuda", &e))?)
            }
            Choice::Auto => match usable() {
                Some(ordinal) => Self::Gpu(Gpu::open(ordinal).map_err(|error| {
                    let why = missing("auto", &error);
                    Error::new(why.kind, format!("{}; or set device to \"cpu\"", why.message))
                })?),
                None => Self::Cpu,
            },
        };
        log::info!("computing on {}", device.name());
        Ok(device)
    }

    /// For messages, and to tell one arithmetic from another.
    pub fn name(&self) -> String {
        match self {
            Self::Cpu => "the CPU".into(),
            Self::Gpu(gpu) => gpu.properties().name.clone(),
        }
    }
}

/// The first GPU that is new enough.
fn usable() -> Option<usize> {
    let devices = cuda::devices().unwrap_or_default();
    devices.iter().position(|device| device.compute_capability >= (8, 0))
}

fn missing(choice: &str, error: &cuda::Error) -> Error {
    let kind = match error {
        cuda::Error::OutOfMemory(_) => ErrorKind::OutOfMemory,
        _ => ErrorKind::Config,
    };
    Error::new(kind, format!("device = \"{choice}\": {error}"))
}
