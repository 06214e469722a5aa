//! The command line under test.

fn main() {
    uft::cli::main();
}
