//! How long the packet code takes, kernel by kernel: `cargo bench --bench packet`.
//!
//! Times are per packet, and so is the throughput's count of bytes. A part of
//! a name picks kernels, as in `cargo bench --bench packet -- coalesce/`. Times
//! say something only on a quiet machine; for what changed from commit to
//! commit, see the instruction counts (`--bench instructions`).

#[path = "../kernels/mod.rs"]
mod kernels;
mod prefixes;

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};

/// A kernel runs for microseconds: this is thousands of runs.
const MEASUREMENT_TIME: Duration = Duration::from_secs(2);
const WARM_UP_TIME: Duration = Duration::from_millis(500);

fn main() {
    let mut criterion = Criterion::default()
        .measurement_time(MEASUREMENT_TIME)
        .warm_up_time(WARM_UP_TIME)
        .configure_from_args();
    for name in kernels::names() {
        let (group, case) = name.split_once('/').unwrap_or((name, ""));
        let mut group = criterion.benchmark_group(group);
        if let Some(kernel) = kernels::kernel(name) {
            // Per packet, like the times below. All packets of a kernel have
            // the same size.
            group.throughput(Throughput::BytesDecimal(kernel.bytes / kernel.packets));
        }
        group.bench_function(case, |bencher| {
            let Some(mut kernel) = kernels::kernel(name) else {
                return;
            };
            assert_eq!(kernel.run(), kernel.outputs, "{name} does not do its work");
            bencher.iter_custom(|runs| {
                let start = Instant::now();
                for _ in 0..runs {
                    black_box(kernel.run());
                }
                let elapsed = start.elapsed().as_secs_f64();
                Duration::from_secs_f64(elapsed / kernel.packets as f64)
            });
        });
        group.finish();
    }
    prefixes::bench(&mut criterion);
    criterion.final_summary();
}
