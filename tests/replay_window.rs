//! WireGuard's replay window under loom: all interleavings of a few threads, and all values
//! that the memory model lets them see.
//!
//! The window is compiled here a second time, with loom's atomics in place of the standard
//! library's. That needs no `--cfg loom`, which would have all dependencies built anew. It has
//! two words here, so that few counters suffice to come to a word in its next round.

#![allow(dead_code)]

use std::collections::BTreeMap;

use loom::sync::Arc;
use loom::thread;

#[path = "../src/wire/wireguard/replay.rs"]
mod replay;

mod atomic {
    pub use loom::sync::atomic::{AtomicU64, Ordering};
}

type Window = replay::ReplayWindow<2>;

/// Counters of one round: two words.
const ROUND: u64 = 64;

/// Has each thread offer its counters, in order, in all ways in which the threads' steps may
/// interleave. No counter may pass twice, then or later. `check` gets the counters that
/// passed.
fn explore(threads: &'static [&'static [u64]], check: impl Fn(&[u64]) + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    // More of them take minutes, and two find every fault that was put in on trial.
    model.preemption_bound = Some(3);
    model.check(move || {
        let window = Arc::new(Window::new());
        let offer = |counters: &'static [u64]| {
            let window = Arc::clone(&window);
            move || {
                let fresh = |counter: &u64| window.take(*counter).is_ok();
                counters.iter().copied().filter(fresh).collect::<Vec<u64>>()
            }
        };
        let (first, others) = threads.split_first().expect("threads");
        let others: Vec<_> = others
            .iter()
            .map(|counters| thread::spawn(offer(counters)))
            .collect();
        let mut passed = offer(first)();
        for other in others {
            passed.extend(other.join().expect("a thread ends"));
        }
        let mut times = BTreeMap::new();
        for counter in &passed {
            *times.entry(*counter).or_insert(0) += 1;
        }
        assert!(
            times.values().all(|times| *times == 1),
            "passed twice: {times:?}"
        );
        for counter in &passed {
            assert!(
                window.take(*counter).is_err(),
                "{counter} passed later again"
            );
        }
        check(&passed);
    });
}

#[test]
fn of_two_threads_with_one_counter_one_takes_it() {
    explore(&[&[5], &[5]], |passed| assert_eq!(passed, [5]));
}

#[test]
fn threads_in_one_word_do_not_undo_each_other() {
    explore(&[&[1, 2], &[3, 1]], |passed| {
        let mut passed = passed.to_vec();
        passed.sort_unstable();
        assert_eq!(passed, [1, 2, 3]);
    });
}

/// A thread comes late with a counter of an earlier round, to a word that others use in
/// theirs.
#[test]
fn a_late_thread_does_not_take_a_word_back() {
    explore(&[&[ROUND, ROUND], &[0]], |passed| {
        assert!(passed.contains(&ROUND))
    });
    explore(&[&[0, ROUND], &[0, ROUND]], |passed| {
        assert!(passed.contains(&ROUND))
    });
    explore(&[&[0], &[ROUND], &[ROUND]], |passed| {
        assert!(passed.contains(&ROUND))
    });
}

/// Two threads move the newest block on, the late one to an earlier block.
#[test]
fn the_newest_block_does_not_go_back() {
    explore(&[&[ROUND], &[2 * ROUND, 2 * ROUND]], |passed| {
        assert!(passed.contains(&(2 * ROUND)));
    });
}

/// The newest block moves on in the other word; the late thread's is in its first round yet.
#[test]
fn a_word_that_lags_behind_is_not_taken_for_a_fresh_one() {
    explore(&[&[0, ROUND + 32], &[0, ROUND]], |passed| {
        assert!(passed.contains(&(ROUND + 32)));
        assert!(passed.contains(&ROUND));
    });
}
