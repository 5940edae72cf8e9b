//! The control socket: commands and requests.

pub mod commands;
pub mod metrics;
pub mod monitoring;
pub mod requests;
