//! Whether a file can be a whole shared library. `dlopen` maps a cut-off file and then dies of
//! SIGBUS on the missing pages, so this is asked before.

/// `e_machine` of this process: `dlopen` says of a library for another one that it is not there.
const MACHINE: Option<u64> = if cfg!(target_arch = "x86_64") {
    Some(62)
} else if cfg!(target_arch = "aarch64") {
    Some(183)
} else {
    None
};

/// Checks that the headers of an ELF-64 file and everything they point to lie within the file.
/// Other formats pass: only ELF loaders are known to die.
///
/// # Errors
/// Why it cannot be a whole shared library.
pub fn check(file: &[u8]) -> Result<(), String> {
    if !cfg!(target_os = "linux") {
        return Ok(());
    }
    if file.len() < 64 || &file[..4] != b"\x7fELF" || file[4] != 2 || file[5] != 1 {
        return Err("it is not a shared library (ELF, 64 bit); give the library that cargo built for the plugin".into());
    }
    let number = |at: usize, bytes: usize| -> u64 {
        file[at..at + bytes].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
    };
    let within = |start: u64, length: u64| match start.checked_add(length) {
        Some(end) if end <= file.len() as u64 => Ok(()),
        _ => Err(format!("the file is cut short ({} bytes); build or copy it again", file.len())),
    };
    let machine = number(18, 2);
    if MACHINE.is_some_and(|ours| ours != machine) {
        return Err(format!(
            "it is built for another processor (ELF machine {machine}); build it for this one"
        ));
    }
    let (programs, sections) = (number(32, 8), number(40, 8));
    let (program_size, program_count) = (number(54, 2), number(56, 2));
    within(programs, program_size * program_count)?;
    within(sections, number(58, 2) * number(60, 2))?;
    for index in 0..program_count {
        let header = (programs + index * program_size) as usize;
        const LOAD: u64 = 1;
        if program_size >= 56 && number(header, 4) == LOAD {
            within(number(header + 8, 8), number(header + 32, 8))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn our_own_executable_is_whole_and_every_cut_of_it_is_not() {
        let file = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(super::check(&file), Ok(()));
        for cut in [0, 3, 63, 64, 4096, file.len() / 2, file.len() - 1] {
            assert!(super::check(&file[..cut]).is_err(), "{cut}");
        }
        assert!(super::check(&[b'a'; 100]).is_err());
    }
}
