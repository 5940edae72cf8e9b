//! The control socket: what can be asked of a running tunnel, and how it answers.

pub(crate) mod client;
pub(crate) mod codec;
pub(crate) mod credentials;
pub mod protocol;
pub(crate) mod server;
mod socket_name;
pub(crate) mod summary;
pub(crate) mod text;
