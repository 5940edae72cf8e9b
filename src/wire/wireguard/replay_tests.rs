//! The window against a model, and under threads. These are not in replay.rs, which
//! tests/replay_window.rs compiles a second time.

use std::collections::BTreeSet;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread;

use proptest::prelude::*;

use super::replay::{ReplayWindow, Replayed};

/// Counters of one round.
const WINDOW: u64 = 8192;

/// What the window should do, in the plainest way.
#[derive(Default)]
struct Model {
    highest: u64,
    taken: BTreeSet<u64>,
}

impl Model {
    fn take(&mut self, counter: u64, words: u64) -> Result<(), Replayed> {
        self.highest = self.highest.max(counter);
        let is_old = counter / 32 + words <= self.highest / 32;
        if is_old || !self.taken.insert(counter) {
            return Err(Replayed);
        }
        Ok(())
    }
}

/// Where a counter lies, seen from the highest so far.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// This far ahead.
    Ahead(u64),
    /// This far behind.
    Behind(u64),
    /// As many rounds ahead, and a few counters more or less.
    Rounds(u64, i8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..40u64).prop_map(Step::Ahead),
        8 => (0..70u64).prop_map(Step::Behind),
        4 => (0..9000u64).prop_map(Step::Behind),
        2 => (0..9000u64).prop_map(Step::Ahead),
        1 => (0..1u64 << 40).prop_map(Step::Ahead),
        2 => (0..3u64, any::<i8>()).prop_map(|(rounds, more)| Step::Rounds(rounds, more)),
    ];
    proptest::collection::vec(step, 1..400)
}

fn agrees_with_the_model<const W: usize>(start: u64, steps: &[Step]) {
    let window = ReplayWindow::<W>::new();
    let mut model = Model::default();
    let round = 32 * W as u64;
    let first = [Step::Ahead(start)];
    for step in first.iter().chain(steps) {
        let counter = match *step {
            Step::Ahead(by) => model.highest.saturating_add(by),
            Step::Behind(by) => model.highest.saturating_sub(by),
            Step::Rounds(rounds, more) => {
                let base = model.highest.saturating_add(rounds * round);
                base.saturating_add_signed(more.into())
            }
        };
        let (got, wanted) = (window.take(counter), model.take(counter, W as u64));
        assert_eq!(got, wanted, "{counter}, highest {}", model.highest);
    }
}

proptest! {
    #[test]
    fn the_window_agrees_with_a_model(
        start in prop_oneof![Just(0), 0..20_000u64, any::<u64>()],
        steps in steps(),
    ) {
        agrees_with_the_model::<256>(start, &steps);
        agrees_with_the_model::<2>(start, &steps);
    }
}

#[test]
fn the_window_reaches_back_as_far_as_it_says() {
    let window = <ReplayWindow>::new();
    let highest = 10 * WINDOW + 31;
    assert_eq!(window.take(highest), Ok(()));
    let oldest = highest - (WINDOW - 1);
    assert_eq!(window.take(oldest - 1), Err(Replayed));
    for counter in oldest..highest {
        assert_eq!(window.take(counter), Ok(()), "{counter}");
        assert_eq!(window.take(counter), Err(Replayed), "{counter}");
    }
    // A single counter ahead is a block ahead here.
    assert_eq!(window.take(highest + 1), Ok(()));
    assert_eq!(window.take(oldest + 31), Err(Replayed));
    assert_eq!(window.take(highest + 2), Ok(()));
}

#[test]
fn a_jump_forgets_what_was_before_and_nothing_else() {
    let window = <ReplayWindow>::new();
    for counter in 0..WINDOW {
        assert_eq!(window.take(counter), Ok(()));
    }
    for rounds in [1, 2, 1 << 20, 1 << 31] {
        let first = rounds * WINDOW;
        assert_eq!(window.take(first + WINDOW - 1), Ok(()));
        for counter in first..first + WINDOW - 1 {
            assert_eq!(window.take(counter), Ok(()), "{counter}");
        }
        assert_eq!(window.take(first - 1), Err(Replayed));
        assert_eq!(window.take(0), Err(Replayed));
    }
}

/// Two threads offer all counters, each in an order of its own.
#[test]
fn each_counter_passes_on_one_of_two_threads() {
    const COUNTERS: u64 = 200_000;
    let window = <ReplayWindow>::new();
    let passes: Vec<AtomicU8> = (0..COUNTERS).map(|_| AtomicU8::new(0)).collect();
    let start = Barrier::new(2);
    let offer = |swapped: u64| {
        start.wait();
        for counter in 0..COUNTERS {
            let counter = counter ^ swapped;
            if window.take(counter).is_ok() {
                passes[counter as usize].fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| offer(0));
        scope.spawn(|| offer(31));
    });
    // Exactly one: a thread finds a counter too old only after the other has offered it.
    for (counter, passes) in passes.iter().enumerate() {
        assert_eq!(passes.load(Ordering::Relaxed), 1, "{counter}");
    }
}

/// Threads take counters of the same words at the same time: none may undo another's.
#[test]
fn counters_inside_the_window_are_not_lost() {
    const THREADS: u64 = 4;
    let window = <ReplayWindow>::new();
    let base = 7 * WINDOW;
    let failures = AtomicU64::new(0);
    let start = Barrier::new(THREADS as usize);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (window, failures, start) = (&window, &failures, &start);
            scope.spawn(move || {
                start.wait();
                for counter in (base + thread..base + WINDOW).step_by(THREADS as usize) {
                    if window.take(counter).is_err() {
                        failures.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    assert_eq!(failures.into_inner(), 0);
    for counter in base..base + WINDOW {
        assert_eq!(window.take(counter), Err(Replayed), "{counter}");
    }
}
