//! The `uft` binary.

fn main() {
    uft::cli::main();
}
