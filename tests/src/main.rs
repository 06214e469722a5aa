//! The command line under test.

#[global_allocator]
static ALLOCATOR: uft::allocator::OrExit = uft::allocator::OrExit;

fn main() {
    uft::cli::main();
}
