//! How many instructions the packet code takes, kernel by kernel, and whether
//! that has become more: `cargo bench --bench instructions`.
//!
//! Unlike times, the counts are the same in every run, on a busy machine too,
//! so a regression is seen when it lands. The counts in `baseline.json` are
//! compared; one that has grown by more than the tolerance is a failure. They
//! hold for one compiler, C library and valgrind: with others the comparison
//! only warns. Nor is an instruction a time: what waits for memory or
//! divides counts as one, so `--bench packet` has the last word.
//!
//! ```text
//! cargo bench --bench instructions                       compare
//! cargo bench --bench instructions -- coalesce/          some kernels only
//! cargo bench --bench instructions -- --write-baseline   keep these counts
//! ```

mod baseline;
mod callgrind;
#[path = "../kernels/mod.rs"]
mod kernels;

use std::error::Error;
use std::fs;
use std::process::{Command, ExitCode};

use clap::Parser;

use baseline::{Baseline, Count, Counts, Surroundings, Verdict};

/// The counts in the tree.
const BASELINE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/benches/",
    env!("CARGO_CRATE_NAME"),
    "/baseline.json"
);

/// Growth that is let pass: what a changed register allocation may cost.
const TOLERANCE_PERCENT: f64 = 3.0;

/// Counts the instructions of the packet code.
#[derive(Parser)]
struct Options {
    /// Part of the names of kernels to count [default: all]
    filter: Option<String>,

    /// Replace the baseline by these counts
    #[arg(long, conflicts_with = "filter")]
    write_baseline: bool,

    /// Run one kernel, to be counted
    #[arg(long, hide = true)]
    run: Option<String>,

    /// What cargo bench adds
    #[arg(long, hide = true)]
    bench: bool,
}

/// As a program of its own, and for the kernels of `benches/worker`.
pub fn main() -> ExitCode {
    // `cargo test --benches` starts benches as well, with a test's options.
    let arguments: Vec<String> = std::env::args().collect();
    let is_asked = |option: &str| arguments.iter().any(|argument| argument == option);
    if !is_asked("--bench") && !is_asked(callgrind::RUN_OPTION) {
        println!("not counted: this is for cargo bench");
        return ExitCode::SUCCESS;
    }
    let options = Options::parse();
    let result = match &options.run {
        Some(kernel) => callgrind::run(kernel).map(|()| true),
        None => measure(&options),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("instructions: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Counts and compares; `false` when the gate must not pass.
fn measure(options: &Options) -> Result<bool, Box<dyn Error>> {
    let filter = options.filter.as_deref().unwrap_or_default();
    let names: Vec<&str> = kernels::names()
        .filter(|name| name.contains(filter))
        .collect();
    if names.is_empty() {
        return Err(format!("no kernel has {filter:?} in its name").into());
    }
    let known = if options.write_baseline {
        None
    } else {
        let text = fs::read_to_string(BASELINE)
            .map_err(|error| format!("cannot read {BASELINE}: {error}"))?;
        Some(
            serde_json::from_str::<Baseline>(&text)
                .map_err(|error| format!("cannot make sense of {BASELINE}: {error}"))?,
        )
    };

    let mut counts = Counts::new();
    let mut simd = String::new();
    let mut verdicts = Vec::with_capacity(names.len());
    println!(
        "{:<24} {:>12} {:>11} {:>9}",
        "kernel", "instructions", "per packet", "per byte"
    );
    for name in &names {
        let kernel = kernels::kernel(name).ok_or("a kernel has vanished")?;
        let run = callgrind::count(name)?;
        let count = Count {
            instructions: run.instructions,
            packets: kernel.packets,
            bytes: kernel.bytes,
        };
        let verdict = known.as_ref().map(|known| known.judge(name, &count));
        print_row(name, &count, verdict);
        verdicts.extend(verdict);
        simd = run.simd;
        counts.insert((*name).to_string(), count);
    }
    let surroundings = surroundings(simd);
    println!("code path counted: {}", surroundings.simd);
    match known {
        None => write(surroundings, counts).map(|()| true),
        Some(known) => {
            let gone = if filter.is_empty() {
                known.gone(&names)
            } else {
                vec![]
            };
            Ok(conclude(&known, &surroundings, &verdicts, &gone))
        }
    }
}

fn print_row(name: &str, count: &Count, verdict: Option<Verdict>) {
    let said = match verdict {
        None => String::new(),
        Some(Verdict::Same(change)) => format!("{change:+.2} %"),
        Some(Verdict::Better(change)) => format!("{change:+.2} %  better"),
        Some(Verdict::Worse(change)) => format!("{change:+.2} %  WORSE"),
        Some(Verdict::New) => "NOT IN THE BASELINE".to_string(),
    };
    println!(
        "{name:<24} {:>12} {:>11.2} {:>9.3}  {said}",
        count.instructions,
        count.per_packet(),
        count.per_byte()
    );
}

/// Says what the verdicts come to; `false` when the gate must not pass.
fn conclude(
    known: &Baseline,
    surroundings: &Surroundings,
    verdicts: &[Verdict],
    gone: &[&str],
) -> bool {
    const RENEW: &str = concat!(
        "cargo bench --bench ",
        env!("CARGO_CRATE_NAME"),
        " -- --write-baseline"
    );
    let differences = known.surroundings.differences(surroundings);
    let failures = verdicts.iter().filter(|verdict| verdict.is_failure());
    let failed = failures.count() + gone.len();
    let better = verdicts
        .iter()
        .any(|verdict| matches!(verdict, Verdict::Better(_)));
    for name in gone {
        println!("{name} is in the baseline and no kernel any more");
    }
    for difference in &differences {
        println!("warning: {difference}");
    }
    if !differences.is_empty() {
        println!("warning: counted with something else than the baseline was; nothing is judged.");
        println!("Renew the baseline, from a commit that is known to be good: {RENEW}");
        return true;
    }
    if failed > 0 {
        println!(
            "{failed} of {} kernels are not what the baseline says (tolerance {} %). \
             callgrind_annotate shows where: {}",
            verdicts.len(),
            known.tolerance_percent,
            callgrind::out_file("KERNEL").display()
        );
        println!("If it must be so, renew the baseline: {RENEW}");
        return false;
    }
    if better {
        println!("Better than the baseline; renew it, so that this is kept: {RENEW}");
    }
    true
}

fn write(surroundings: Surroundings, counts: Counts) -> Result<(), Box<dyn Error>> {
    let baseline = Baseline {
        surroundings,
        tolerance_percent: TOLERANCE_PERCENT,
        counts,
    };
    let text = serde_json::to_string_pretty(&baseline)? + "\n";
    fs::write(BASELINE, text).map_err(|error| format!("cannot write {BASELINE}: {error}"))?;
    println!("wrote {BASELINE}");
    Ok(())
}

/// What these counts were obtained with. cargo builds this program anew when
/// the compiler changes, so the compiler at hand is the one that built it.
fn surroundings(simd: String) -> Surroundings {
    Surroundings {
        target: std::env::consts::ARCH.to_string(),
        rustc: said_by("rustc", "--version"),
        libc: said_by("getconf", "GNU_LIBC_VERSION"),
        valgrind: callgrind::version().unwrap_or_default(),
        simd,
    }
}

/// The line that a program says to one argument; empty if it cannot.
fn said_by(program: &str, argument: &str) -> String {
    let output = Command::new(program).arg(argument).output();
    let line = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_string());
    line.unwrap_or_default()
}
