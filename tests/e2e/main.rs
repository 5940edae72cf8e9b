//! End-to-end tests: real fastvpn processes between network namespaces that
//! each test makes for itself and that vanish with it.
//!
//! Needs root, or else a system that allows user namespaces; it fails with a
//! clear line where neither is to be had.
//!
//! What carries traffic is run on each I/O engine, as `uring::` and `epoll::`,
//! and some of it with a different one at each end, as `mixed::`.
//!
//! What takes minutes, or needs a program that a fresh machine lacks (`nft`), is
//! in the long tier: add the test's name to the list in `long.rs`.

mod checks;
mod churn;
mod control;
mod datagrams;
mod device;
mod endpoints;
mod errors;
mod exact;
mod fallbacks;
mod full_socket;
mod guides;
mod handover;
mod hosts;
mod icmp_error;
mod killed;
mod life;
mod long;
mod memory;
mod mesh;
mod names;
mod nested;
mod numbered;
mod operator;
mod overlay_errors;
mod overlay_mtu;
mod packets;
mod path_mtu;
mod peers;
mod plain_peer;
mod ports;
mod queues;
mod raw;
mod relay;
mod reload;
mod reload_device;
mod requests;
mod routes;
mod script;
mod settings;
mod site;
mod soak;
mod sources;
mod strangers;
mod super_packets;
mod support;
mod surroundings;
mod takeover;
mod tools;
mod traffic;
mod trouble;
mod tuning;
mod underlay;

use std::num::NonZero;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};

use crate::support::{Engines, Test};

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
    let tests = [
        traffic::tests(),
        plain_peer::tests(),
        fallbacks::tests(),
        queues::tests(),
        raw::tests(),
        exact::tests(),
        super_packets::tests(),
        hosts::tests(),
        peers::tests(),
        full_socket::tests(),
        ports::tests(),
        strangers::tests(),
        trouble::tests(),
        mesh::tests(),
        sources::tests(),
        nested::tests(),
        churn::tests(),
        endpoints::tests(),
        overlay_errors::tests(),
        overlay_mtu::tests(),
        path_mtu::tests(),
        reload::tests(),
        takeover::tests(),
        handover::tests(),
        killed::tests(),
        underlay::tests(),
        life::tests(),
        device::tests(),
    ];
    let of_mixed_engines = [
        traffic::tests_of_mixed_engines(),
        takeover::tests_of_mixed_engines(),
        soak::tests(),
    ];
    let of_no_engine = [
        errors::tests(),
        checks::tests(),
        life::tests_of_the_demo(),
        tuning::tests(),
        control::tests(),
        requests::tests(),
        names::tests(),
        reload::tests_of_control(),
        settings::tests(),
        reload_device::tests(),
        routes::tests(),
        surroundings::tests(),
        device::tests_of_control(),
        takeover::tests_of_control(),
        handover::tests_of_control(),
        overlay_mtu::tests_of_no_engine(),
        trouble::tests_of_no_engine(),
        path_mtu::tests_of_no_engine(),
        ports::tests_of_no_engine(),
        guides::tests(),
    ];
    // Shown as ignored, never left out in silence.
    let without_uring = fastvpn::io::uring::probe()
        .is_err()
        .then_some("needs io_uring");
    let without_ebpf = support::is_in_user_namespace().then_some("needs root, for eBPF");
    let need_ebpf = queues::tests_that_need_ebpf();
    let mut trials = Vec::new();
    let mut add = |engines, tests: &[Test], lacks: Option<&'static str>| {
        trials.extend(tests.iter().map(|test| trial(engines, test, lacks)));
    };
    for (engines, lacks) in [(Engines::Uring, without_uring), (Engines::Epoll, None)] {
        add(engines, &tests.concat(), lacks);
        add(engines, &need_ebpf, lacks.or(without_ebpf));
    }
    add(Engines::Mixed, &of_mixed_engines.concat(), without_uring);
    add(Engines::Any, &of_no_engine.concat(), None);
    add(Engines::Any, &tuning::tests_that_need_root(), without_ebpf);
    let without_run = support::is_in_user_namespace().then_some("needs root, for /run");
    add(Engines::Any, &trouble::tests_that_need_root(), without_run);
    let without_users = support::is_in_user_namespace().then_some("needs root, for another user");
    add(
        Engines::Any,
        &handover::tests_that_need_root(),
        without_users,
    );
    let unknown = long::unknown(trials.iter().map(Trial::name));
    if !unknown.is_empty() {
        eprintln!("tests/e2e/long.rs names trials that do not exist: {unknown:?}");
        return ExitCode::FAILURE;
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A test, run with tunnels on these engines, unless this system lacks something.
fn trial(engines: Engines, &(name, test): &Test, lacks: Option<&'static str>) -> Trial {
    let name = match engines {
        Engines::Any => name.to_string(),
        Engines::Uring => format!("uring::{name}"),
        Engines::Epoll => format!("epoll::{name}"),
        Engines::Mixed => format!("mixed::{name}"),
    };
    let is_long = long::has(&name);
    let trial = Trial::ignorable_test(name, move || {
        if let Some(reason) = lacks {
            return Ok(Completion::ignored_with(reason));
        }
        engines.use_here();
        test()?;
        Ok(Completion::Completed)
    });
    trial.with_ignored_flag(is_long)
}
