//! End-to-end tests: real fastvpn processes between network namespaces that
//! each test makes for itself and that vanish with it.
//!
//! Needs root, or else a system that allows user namespaces; it fails with a
//! clear line where neither is to be had.
//!
//! What carries traffic is run on each I/O engine, as `uring::` and `epoll::`,
//! and some of it with a different one at each end, as `mixed::`.

mod checks;
mod churn;
mod control;
mod datagrams;
mod endpoints;
mod errors;
mod exact;
mod fallbacks;
mod handover;
mod hosts;
mod icmp_error;
mod life;
mod memory;
mod mesh;
mod names;
mod numbered;
mod operator;
mod overlay_errors;
mod overlay_mtu;
mod packets;
mod peers;
mod plain_peer;
mod queues;
mod raw;
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
mod tuning;
mod underlay;

use std::process::ExitCode;

use fastvpn::ring::Features;
use libtest_mimic::{Arguments, Trial};

use crate::support::{Engines, Test};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // Before the first thread: only a process with one thread may enter a
    // user namespace.
    if let Err(error) = fastvpn::lab::enter_user_namespace_if_needed() {
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
        strangers::tests(),
        mesh::tests(),
        sources::tests(),
        churn::tests(),
        endpoints::tests(),
        overlay_errors::tests(),
        overlay_mtu::tests(),
        reload::tests(),
        takeover::tests(),
        handover::tests(),
        underlay::tests(),
        life::tests(),
    ];
    let of_uring = [fallbacks::tests_of_uring(), exact::tests_of_uring()];
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
        takeover::tests_of_control(),
        handover::tests_of_control(),
        overlay_mtu::tests_of_no_engine(),
    ];
    // Shown as ignored, never left out in silence.
    let without_uring = fastvpn::ring::probe(URING_FEATURES).is_err();
    let without_ebpf = support::is_in_user_namespace();
    let mut trials = Vec::new();
    for (engines, ignored) in [(Engines::Uring, without_uring), (Engines::Epoll, false)] {
        let tests = tests.iter().flatten();
        trials.extend(tests.map(|test| trial(engines, test).with_ignored_flag(ignored)));
        let ignored = ignored || without_ebpf;
        let need_ebpf = queues::tests_that_need_ebpf();
        let need_ebpf = need_ebpf.iter();
        trials.extend(need_ebpf.map(|test| trial(engines, test).with_ignored_flag(ignored)));
    }
    for (engines, tests) in [
        (Engines::Uring, of_uring.concat()),
        (
            Engines::Mixed,
            [
                traffic::tests_of_mixed_engines(),
                takeover::tests_of_mixed_engines(),
                soak::tests(),
            ]
            .concat(),
        ),
    ] {
        let tests = tests.iter();
        trials.extend(tests.map(|test| trial(engines, test).with_ignored_flag(without_uring)));
    }
    let of_no_engine = of_no_engine.iter().flatten();
    trials.extend(of_no_engine.map(|test| trial(Engines::Any, test)));
    let need_root = tuning::tests_that_need_root();
    let need_root = need_root.iter();
    trials.extend(need_root.map(|test| trial(Engines::Any, test).with_ignored_flag(without_ebpf)));
    libtest_mimic::run(&arguments, trials).exit_code()
}

const URING_FEATURES: Features = Features {
    receive_multishot: true,
};

/// A test, run with tunnels on these engines.
fn trial(engines: Engines, &(name, test): &Test) -> Trial {
    let name = match engines {
        Engines::Any => name.to_string(),
        Engines::Uring => format!("uring::{name}"),
        Engines::Epoll => format!("epoll::{name}"),
        Engines::Mixed => format!("mixed::{name}"),
    };
    Trial::test(name, move || {
        engines.use_here();
        Ok(test()?)
    })
}
