//! The control thread's tools: workers started, told and ended, signals,
//! logging, and the summary of counters. None of it is in a packet's path.

pub mod logging;
pub mod summary;
pub mod workers;
