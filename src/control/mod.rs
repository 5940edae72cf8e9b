//! The control socket: what can be asked of a running tunnel, and how it answers.

pub mod client;
pub(crate) mod codec;
pub(crate) mod credentials;
pub mod protocol;
pub mod server;
mod socket_name;
pub mod summary;
pub(crate) mod text;
