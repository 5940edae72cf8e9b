//! End-to-end tests: real fastvpn processes between network namespaces that
//! each test makes for itself and that vanish with it.
//!
//! Needs root, or else a system that allows user namespaces; it fails with a
//! clear line where neither is to be had.

mod checks;
mod datagrams;
mod errors;
mod exact;
mod fallbacks;
mod hosts;
mod life;
mod packets;
mod peers;
mod plain_peer;
mod queues;
mod raw;
mod script;
mod strangers;
mod super_packets;
mod support;
mod tools;
mod traffic;
mod underlay;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

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
        underlay::tests(),
        life::tests(),
        errors::tests(),
        checks::tests(),
    ];
    let trial = |(name, test): support::Test| Trial::test(name, move || Ok(test()?));
    let mut trials: Vec<Trial> = tests.into_iter().flatten().map(trial).collect();
    // Shown as ignored, never left out in silence.
    let without_ebpf = support::is_in_user_namespace();
    let need_ebpf = queues::tests_that_need_ebpf().into_iter();
    trials.extend(need_ebpf.map(|test| trial(test).with_ignored_flag(without_ebpf)));
    libtest_mimic::run(&arguments, trials).exit_code()
}
