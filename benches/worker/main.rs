//! How many instructions a worker's whole way takes, each way: `cargo bench --bench worker`.
//!
//! As `cargo bench --bench instructions` counts them, but in a binary of its own: what has one
//! caller there, and is inlined, would have two.

#[path = "../instructions/main.rs"]
mod instructions;

use std::process::ExitCode;

fn main() -> ExitCode {
    instructions::main()
}
