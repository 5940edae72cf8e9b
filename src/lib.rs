//! fastvpn: a userspace network tunnel for Linux.
pub mod demo;
pub mod error;
pub mod lab;
pub mod netlink;
