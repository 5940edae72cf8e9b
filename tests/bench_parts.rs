//! Tests of the parts of `cargo bench --bench tunnel`: a bench has none of its own.

// The bench uses what these tests do not.
#![allow(dead_code)]

#[path = "../benches/tunnel/blast.rs"]
mod blast;
#[path = "../benches/tunnel/cli.rs"]
mod cli;
#[path = "../benches/tunnel/facts.rs"]
mod facts;
#[path = "../benches/tunnel/measure.rs"]
mod measure;
#[path = "../benches/tunnel/progress.rs"]
mod progress;
#[path = "../benches/tunnel/quiet.rs"]
mod quiet;
#[path = "../benches/tunnel/report/mod.rs"]
mod report;
#[path = "../benches/tunnel/results.rs"]
mod results;
#[path = "../benches/tunnel/syscalls.rs"]
mod syscalls;
#[path = "../benches/tunnel/table.rs"]
mod table;
#[path = "../benches/tunnel/targets/mod.rs"]
mod targets;
#[path = "../benches/tunnel/traffic.rs"]
mod traffic;
#[path = "../benches/tunnel/underlay.rs"]
mod underlay;
#[path = "../benches/tunnel/variant.rs"]
mod variant;
