//! The sockets of a running tunnel: what can be asked of it, and how it answers.
//!
//! [`protocol`] is fastvpn's own, which `server` serves; [`uapi`] is that of `wg(8)`;
//! [`metrics`] is HTTP, for Prometheus.

pub(crate) mod client;
pub(crate) mod codec;
pub(crate) mod credentials;
pub mod metrics;
pub mod protocol;
pub(crate) mod server;
mod socket_name;
pub(crate) mod summary;
pub(crate) mod text;
pub mod uapi;
