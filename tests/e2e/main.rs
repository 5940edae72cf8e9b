//! End-to-end tests: real fastvpn processes between network namespaces that
//! each test makes for itself and that vanish with it.
//!
//! Needs root, or else a system that allows user namespaces; it fails with a
//! clear line where neither is available.
//!
//! What carries traffic is run on each I/O engine, as `uring::` and `epoll::`,
//! and some of it with a different one at each end, as `mixed::`.
//!
//! To add one, write a function under `#[testbed::trial]`, in a file of the room that
//! it is about. What takes minutes, or needs a program that a fresh machine lacks, says
//! `long` there: it is shown as ignored by `cargo test`, and run by `tests/long.sh`.

mod cli;
mod control;
mod daemon;
mod datagrams;
mod dataplane;
mod host;
mod icmp_error;
mod memory;
mod numbered;
mod operator;
mod packets;
mod registry;
mod relay;
mod routing;
mod script;
mod site;
mod support;
mod tools;
mod wireguard;

use std::num::NonZero;
use std::process::ExitCode;

use fastvpn::io::uring;
use libtest_mimic::{Arguments, Completion, Trial};

use crate::support::Engines;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Many wait for something most of the time.
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    arguments.test_threads.get_or_insert(cores + 2);
    // Before the first thread: only a process with one thread may enter a
    // user namespace.
    if let Err(error) = testbed::enter_user_namespace_if_needed() {
        eprintln!("the end-to-end tests cannot run: {error}");
        return ExitCode::FAILURE;
    }
    // Shown as ignored, never left out in silence.
    let without_uring = uring::probe(1).is_err().then_some("needs io_uring");
    let without_root = support::is_in_user_namespace().then_some("needs root");
    let mut trials = Vec::new();
    for test in testbed::trials() {
        let without_root = without_root.filter(|_| test.needs_root);
        let without_program = || test.needs.and_then(|missing| missing());
        let lacks = without_root.map(Into::into).or_else(without_program);
        let lacks_uring = || lacks.clone().or(without_uring.map(Into::into));
        if test.each_engine {
            trials.push(trial(Engines::Uring, test, lacks_uring()));
            trials.push(trial(Engines::Epoll, test, lacks.clone()));
        }
        if test.mixed {
            trials.push(trial(Engines::Mixed, test, lacks_uring()));
        }
        if !test.each_engine && !test.mixed {
            trials.push(trial(Engines::Any, test, lacks));
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A test, run with tunnels on these engines, unless this system lacks something.
fn trial(engines: Engines, test: &'static testbed::Trial, lacks: Option<String>) -> Trial {
    let name = match engines {
        Engines::Any => test.name.to_string(),
        Engines::Uring => format!("uring::{}", test.name),
        Engines::Epoll => format!("epoll::{}", test.name),
        Engines::Mixed => format!("mixed::{}", test.name),
    };
    let trial = Trial::ignorable_test(name, move || {
        if let Some(reason) = lacks {
            return Ok(Completion::ignored_with(reason));
        }
        engines.use_here();
        (test.run)()?;
        Ok(Completion::Completed)
    });
    trial.with_ignored_flag(test.long)
}
