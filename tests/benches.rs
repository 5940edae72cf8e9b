//! The parts of the benches that can be wrong without anybody seeing it: that
//! kernels do the work they are named after, and that a regression is one.

#[path = "../benches/instructions/baseline.rs"]
mod baseline;
#[path = "../benches/kernels/mod.rs"]
mod kernels;

use baseline::{Baseline, Count, Counts, Surroundings, Verdict};

#[test]
fn every_kernel_does_its_work_in_every_run() {
    for name in kernels::names() {
        let mut kernel = kernels::kernel(name).unwrap();
        assert_eq!(
            kernel.bytes % kernel.packets,
            0,
            "{name}: packets of one size"
        );
        for run in 0..3 {
            assert_eq!(kernel.run(), kernel.outputs, "{name}, run {run}");
        }
    }
}

#[test]
fn names_are_unique_and_have_a_group() {
    let mut names: Vec<_> = kernels::names().collect();
    assert!(names.iter().all(|name| name.split('/').count() == 2));
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
    assert!(kernels::kernel("no such kernel").is_none());
}

fn count(instructions: u64) -> Count {
    Count {
        instructions,
        packets: 10,
        bytes: 500,
    }
}

fn surroundings() -> Surroundings {
    let [target, rustc, libc, valgrind, simd] = ["t", "r", "l", "v", "s"].map(String::from);
    Surroundings {
        target,
        rustc,
        libc,
        valgrind,
        simd,
    }
}

fn baseline_of(instructions: u64) -> Baseline {
    Baseline {
        surroundings: surroundings(),
        tolerance_percent: 3.0,
        counts: Counts::from([("a/b".to_string(), count(instructions))]),
    }
}

#[test]
fn more_instructions_than_tolerated_fail() {
    let baseline = baseline_of(1000);
    let judge = |instructions| baseline.judge("a/b", &count(instructions));
    assert_eq!(judge(1000), Verdict::Same(0.0));
    assert!(matches!(judge(1029), Verdict::Same(_)));
    assert!(matches!(judge(1031), Verdict::Worse(change) if change > 3.0));
    assert!(matches!(judge(971), Verdict::Same(_)));
    assert!(matches!(judge(969), Verdict::Better(change) if change < -3.0));
    assert!(judge(1031).is_failure());
    assert!(!judge(1029).is_failure() && !judge(969).is_failure());
}

#[test]
fn counts_are_judged_per_packet() {
    let twice = Count {
        instructions: 2000,
        packets: 20,
        bytes: 1000,
    };
    assert_eq!(baseline_of(1000).judge("a/b", &twice), Verdict::Same(0.0));
    assert_eq!((twice.per_packet(), twice.per_byte()), (100.0, 2.0));
}

#[test]
fn kernels_that_come_and_go_are_seen() {
    let baseline = baseline_of(1000);
    assert_eq!(baseline.judge("a/c", &count(1)), Verdict::New);
    assert!(Verdict::New.is_failure());
    assert_eq!(baseline.gone(&["a/c"]), ["a/b"]);
    assert!(baseline.gone(&["a/b", "a/c"]).is_empty());
}

#[test]
fn other_surroundings_are_named() {
    let then = surroundings();
    assert!(then.differences(&then).is_empty());
    let mut now = surroundings();
    now.rustc = "rustc 9".to_string();
    let differences = then.differences(&now);
    assert_eq!(differences, [r#"rustc: baseline "r", now "rustc 9""#]);
}

#[test]
fn the_baseline_in_the_tree_is_of_these_kernels() {
    let text = include_str!("../benches/instructions/baseline.json");
    let baseline: Baseline = serde_json::from_str(text).unwrap();
    let names: Vec<_> = kernels::names().collect();
    assert!(baseline.gone(&names).is_empty());
    for name in names {
        let kernel = kernels::kernel(name).unwrap();
        let kept = baseline.counts.get(name).expect(name);
        assert_eq!(
            (kept.packets, kept.bytes),
            (kernel.packets, kernel.bytes),
            "{name}"
        );
    }
}
