//! The control socket: commands and requests.

pub mod commands;
pub mod requests;
