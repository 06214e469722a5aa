//! A plugin's file, as far as it is looked at before the loader runs its code.

use super::Target;

pub const TARGET: Target = Target { name: "plugin_file", run, seeds, tokens: &TOKENS };

const TOKENS: [&str; 4] =
    ["\x7fELF", "\x02\x01", "\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f", "\0\0\0\0\0\0\0\0"];

fn run(input: &[u8]) {
    // Only looked at: running a mutated library would show nothing about this program.
    let _ = uft::plugins::elf::check(input);
}

/// The header of an ELF-64 file for this processor, with `programs` program headers behind it, each
/// of which loads the whole file.
fn elf(programs: u16) -> Vec<u8> {
    let machine: u16 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
    let size = 64 + 56 * u64::from(programs);
    let mut file = vec![0; 64];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    file[18..20].copy_from_slice(&machine.to_le_bytes());
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[54..56].copy_from_slice(&56u16.to_le_bytes());
    file[56..58].copy_from_slice(&programs.to_le_bytes());
    for _ in 0..programs {
        let mut header = [0; 56];
        header[0] = 1;
        header[32..40].copy_from_slice(&size.to_le_bytes());
        file.extend_from_slice(&header);
    }
    file
}

fn seeds() -> Vec<Vec<u8>> {
    assert_eq!(uft::plugins::elf::check(&elf(2)), Ok(()), "the seeds are whole files");
    let executable = std::env::current_exe().and_then(std::fs::read).expect("our own executable");
    vec![elf(0), elf(1), elf(2), executable[..4096].to_vec()]
}
