//! A kernel under valgrind's callgrind: how many instructions one run takes.
//!
//! This program runs itself again, one process per kernel, so that no kernel
//! finds memory in a state that another one left. Collection is on only
//! inside [`collected_run`]; nothing has to be subtracted.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::kernels::{self, Kernel};

/// The option that makes this program one that is counted.
pub const RUN_OPTION: &str = "--run";

/// What a counted process said, and what it cost.
pub struct Run {
    /// Instructions executed in [`collected_run`].
    pub instructions: u64,
    /// The code path that the CPU which valgrind shows led to.
    pub simd: String,
}

/// Counts one run of the kernel called `name`.
pub fn count(name: &str) -> Result<Run, Box<dyn Error>> {
    let program = std::env::current_exe()?;
    let out = out_file(name);
    let output = valgrind()
        .args(["--tool=callgrind", "--collect-atstart=no"])
        // The name is mangled, hence the stars.
        .arg("--toggle-collect=*collected_run*")
        .arg(format!("--callgrind-out-file={}", out.display()))
        // Neither the length of a path nor an environment shall move what is
        // on the stack, and with it the ways through memcpy.
        .current_dir(program.parent().unwrap_or(Path::new("/")))
        .arg(Path::new(".").join(program.file_name().unwrap_or_default()))
        .args([RUN_OPTION, name])
        .output()
        .map_err(|error| format!("cannot run valgrind ({error}): install the package valgrind"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("valgrind on kernel {name}: {}\n{said}", output.status).into());
    }
    let text = fs::read_to_string(&out)
        .map_err(|error| format!("cannot read {}: {error}", out.display()))?;
    let instructions = parse_totals(&text)
        .filter(|instructions| *instructions > 0)
        .ok_or_else(|| format!("nothing was counted in {}", out.display()))?;
    Ok(Run {
        instructions,
        simd: String::from_utf8_lossy(&output.stdout).trim().to_string(),
    })
}

/// Where callgrind writes what it found: `callgrind_annotate` reads it.
pub fn out_file(name: &str) -> PathBuf {
    let file = format!("callgrind.{}.out", name.replace('/', "."));
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(file)
}

/// Version of valgrind.
pub fn version() -> Option<String> {
    let output = valgrind().arg("--version").output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_string())
}

fn valgrind() -> Command {
    let mut command = Command::new("valgrind");
    command
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin");
    command
}

/// The sum over all that was collected, of the only event there is without
/// cache simulation: instructions (callgrind's file format, line `totals:`).
fn parse_totals(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("totals:"))?;
    line.trim().parse().ok()
}

/// What the counted process does: runs the kernel, once to settle what happens
/// at first use, once counted. Prints the code path taken.
pub fn run(name: &str) -> Result<(), Box<dyn Error>> {
    let mut kernel = kernels::kernel(name).ok_or_else(|| format!("no kernel {name}"))?;
    kernel.run();
    let outputs = collected_run(&mut kernel);
    if outputs != kernel.outputs {
        return Err(format!("kernel {name} gave {outputs}, not {}", kernel.outputs).into());
    }
    println!("{}", simd());
    Ok(())
}

/// Callgrind collects from entry to exit of this function.
#[inline(never)]
fn collected_run(kernel: &mut Kernel) -> u64 {
    kernel.run()
}

/// The path that `fastvpn-simd` takes on the CPU seen here.
fn simd() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        return "AVX2";
    }
    "portable"
}
