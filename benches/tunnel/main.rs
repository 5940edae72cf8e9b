//! `cargo bench --bench tunnel`: what fastvpn is worth beside other ways to
//! link two hosts. See [`cli`] for what it can be told.
//!
//! - [`targets`]: the links that are compared.
//! - [`traffic`]: the kinds of traffic and their figures.
//! - [`underlay`]: the cable between the hosts.
//! - [`measure`]: one sample. [`blast`]: floods. [`syscalls`]: system calls, in a pass of their own.
//! - [`quiet`]: whether anybody else disturbed it.
//! - [`run`]: targets in turn, round after round.
//! - [`results`]: what came out; [`table`] shows it.

// Cargo sets `test` for benches too, but without the harness nothing runs the
// tests of the modules; tests/bench_parts.rs does.
#![cfg_attr(test, allow(dead_code, unused_imports))]

mod blast;
mod cli;
mod facts;
mod measure;
mod progress;
mod quiet;
mod report;
mod results;
mod run;
mod syscalls;
mod table;
mod targets;
mod traffic;
mod underlay;
mod variant;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::Parser;
use fastvpn::error::{Error, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use testbed::enter_user_namespace_if_needed;

use cli::Cli;
use measure::Method;
use results::Results;
use run::{Outcome, Plan};
use targets::{Target, one_packet};
use traffic::Traffic;

fn main() -> ExitCode {
    let result = if std::env::args().nth(1).as_deref() == Some(one_packet::FORWARDER_ARGUMENT) {
        one_packet::forward(&std::env::args().nth(2).unwrap_or_default())
    } else if cfg!(debug_assertions) {
        // `cargo test --all-targets` comes by here.
        say("nothing measured: this is a build without optimization; use cargo bench");
        Ok(())
    } else {
        bench(&Cli::parse())
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("tunnel bench: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn bench(cli: &Cli) -> Result<()> {
    // Before the first thread: only a process with one thread may enter a
    // user namespace.
    enter_user_namespace_if_needed()?;
    let traffic = traffic::select(&cli.rows).map_err(Error::new)?;
    let targets = targets(cli)?;
    if cli.list {
        print(&list(&targets));
        return Ok(());
    }
    // Read first: a mistyped path is better known before the run than after it.
    let old = cli.compare.as_deref().map(read_json).transpose()?;
    let baseline = baseline(cli, &targets)?;
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&stop))
            .map_err(|cause| Error::os(format!("cannot catch signal {signal}"), cause))?;
    }
    let plan = Plan {
        targets,
        traffic,
        underlay: cli.underlay,
        rounds: cli.rounds.into(),
        method: Method {
            time: Duration::from_secs_f64(cli.seconds),
            verify: !cli.no_verify,
            stop,
        },
    };
    let started = facts::now();
    let mut outcome = run::run(&plan);
    let ended = outcome.ended.take();
    let failed = outcome.failed.len();
    let results = results(started, &plan.traffic, outcome, cli);
    print(&table::render(&results, &baseline));
    for (name, value) in &results.settings {
        print(&format!("{name}: {value}\n"));
    }
    if let Some(error) = ended {
        // Half a run must not take the place of a whole one.
        return Err(error);
    }
    write_json(&results, &cli.json)?;
    report::write_html(&results, &cli.html)?;
    if let Some(path) = &cli.svg {
        report::write_svg(&results, path)?;
    }
    say(&format!("the report is {}", cli.html.display()));
    if let Some(old) = old {
        print(&format!("\n{}", table::compare(&old, &results)));
    }
    match failed {
        0 => Ok(()),
        count => Err(Error::new(format!("{count} links or samples failed"))),
    }
}

/// What is to be compared: what was asked for, or all there is, and variants.
fn targets(cli: &Cli) -> Result<Vec<Box<dyn Target>>> {
    let mut all = targets::all()?;
    if let Some(unknown) = cli
        .targets
        .iter()
        .find(|key| all.iter().all(|target| target.key() != key.as_str()))
    {
        return Err(Error::new(format!(
            "there is no target {unknown}; --list shows all"
        )));
    }
    if let Some(taken) = cli.variant.iter().enumerate().find(|(index, variant)| {
        let mut earlier = cli.variant[..*index].iter();
        all.iter().any(|target| target.key() == variant.name)
            || earlier.any(|earlier| earlier.name == variant.name)
    }) {
        let name = &taken.1.name;
        return Err(Error::new(format!("the name {name} of a variant is taken")));
    }
    if !cli.targets.is_empty() {
        all.retain(|target| cli.targets.iter().any(|key| key == target.key()));
    }
    for variant in &cli.variant {
        all.push(Box::new(targets::fastvpn::from_variant(variant.clone())?));
    }
    Ok(all)
}

/// What ratios are taken to.
fn baseline(cli: &Cli, targets: &[Box<dyn Target>]) -> Result<String> {
    let mut keys = targets.iter().map(|target| target.key());
    match &cli.baseline {
        Some(wanted) if keys.any(|key| key == wanted) => Ok(wanted.clone()),
        Some(wanted) => Err(Error::new(format!(
            "the baseline {wanted} is not among the targets"
        ))),
        None => {
            let present = |key: &str| targets.iter().any(|target| target.key() == key);
            let first = keys.next().unwrap_or_default();
            Ok(if present("vxlan") { "vxlan" } else { first }.into())
        }
    }
}

fn list(targets: &[Box<dyn Target>]) -> String {
    let mut text = "rows:\n".to_string();
    for traffic in traffic::ALL {
        text.push_str(&format!("  {:<18}{}\n", traffic.key, traffic.title));
    }
    text.push_str("targets:\n");
    for target in targets {
        let missing = target.missing();
        let missing = missing.map_or_else(String::new, |reason| format!(" (missing: {reason})"));
        text.push_str(&format!(
            "  {:<18}{}: {}{missing}\n",
            target.key(),
            target.title(),
            target.detail()
        ));
    }
    text
}

fn results(started: String, traffic: &[Traffic], outcome: Outcome, cli: &Cli) -> Results {
    let rows = traffic
        .iter()
        .flat_map(Traffic::rows)
        .filter(|row| outcome.cells.iter().any(|cell| cell.row == row.key))
        .collect();
    Results {
        started,
        version: facts::version(),
        machine: facts::machine(),
        settings: settings(&outcome, cli),
        targets: outcome.targets,
        rows,
        cells: outcome.cells,
    }
}

/// How it was measured, and what has to be known of the figures.
fn settings(outcome: &Outcome, cli: &Cli) -> Vec<(String, String)> {
    let verify = if cli.no_verify {
        "UDP datagrams and ping-pong only; TCP streams by their length"
    } else {
        "every byte of every transfer compared with what was sent"
    };
    let disturbed = match outcome.disturbed.len() {
        0 => "none".to_string(),
        _ => outcome.disturbed.join("; "),
    };
    let mut settings = vec![
        ("underlay", cli.underlay.describe().into()),
        ("rounds", cli.rounds.to_string()),
        ("seconds per sample", cli.seconds.to_string()),
        ("verification", verify.into()),
        ("TCP", "cubic, generator and sink on the same cores".into()),
        (
            "UDP",
            "one thread offers as much as it can, 64 datagrams per system call".into(),
        ),
        (
            "CPU",
            "of the link's processes alone, both ends unless said otherwise".into(),
        ),
        (
            "samples repeated because others used the machine",
            outcome.repeated.to_string(),
        ),
        ("samples that stayed disturbed", disturbed),
    ];
    if !outcome.failed.is_empty() {
        settings.push(("failed", outcome.failed.join("; ")));
    }
    if let Some(reason) = &outcome.no_system_calls {
        settings.push(("system calls not counted", reason.clone()));
    }
    settings
        .into_iter()
        .map(|(name, value)| (name.to_string(), value))
        .collect()
}

fn read_json(path: &Path) -> Result<Results> {
    let text = fs::read_to_string(path)
        .map_err(|cause| Error::os(format!("cannot read {}", path.display()), cause))?;
    serde_json::from_str(&text)
        .map_err(|error| Error::new(format!("{} holds no results: {error}", path.display())))
}

fn write_json(results: &Results, path: &Path) -> Result<()> {
    let shown = path.display();
    let failed = |cause| Error::os(format!("cannot write {shown}"), cause);
    let text = serde_json::to_string_pretty(results)
        .map_err(|error| Error::new(format!("cannot write {shown}: {error}")))?;
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed)?;
    }
    fs::write(path, text + "\n").map_err(failed)?;
    say(&format!("results are in {shown}"));
    Ok(())
}

fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
