//! The control socket: commands, requests and captures.

pub mod capture;
pub mod commands;
pub mod metrics;
pub mod monitoring;
pub mod requests;
