//! The control thread's tools: the choice of an I/O engine, workers started,
//! told and ended; the overlay's state, its peers' names and its kernel routes;
//! the operators' socket; logging, and the summary of counters. None of it is in
//! a packet's path.

pub mod engine;
pub(crate) mod journal;
pub mod logging;
pub mod names;
pub mod overlay;
pub mod protocol;
pub mod routes;
pub mod server;
mod socket_name;
pub mod summary;
pub(crate) mod turns;
pub mod workers;
