//! The types of this crate pass for uft-core's: `abi_stable` notes the package that a type is from.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-env=CARGO_PKG_NAME=uft-core");
}
