//! fastvpn: a userspace network tunnel for Linux.
pub mod error;
pub mod packet;
pub mod transport;
