//! Plugins are shared libraries: what their instrumentation calls is in the executable, which must
//! show it to them.
fn main() {
    println!("cargo:rustc-link-arg-bins=-rdynamic");
}
