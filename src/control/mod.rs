//! The control thread's tools: the choice of an I/O engine, workers started,
//! told and ended, signals,
//! logging, kernel routes, and the summary of counters. None of it is in a packet's path.

pub mod engine;
pub mod logging;
pub mod routes;
pub mod summary;
pub mod workers;
