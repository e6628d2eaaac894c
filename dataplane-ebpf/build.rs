//! What the linker of the eBPF programs is told.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("bpf") {
        // Otherwise it makes a call of each copy of a few bytes. Kernels before 6.4 do not follow what they know of numbers
        // through calls: they would walk through the packet programs until they give up, see `budget.txt`.
        println!("cargo::rustc-link-arg-bins=--disable-expand-memcpy-in-order");
    }
}
