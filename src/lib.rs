//! fastvpn: a userspace network tunnel for Linux.
pub mod cli;
pub mod config;
pub mod control;
pub mod demo;
pub mod device;
pub mod error;
pub mod lab;
pub mod netlink;
pub mod packet;
pub mod ring;
pub mod simd;
pub mod transport;
pub mod tunnel;
pub mod worker;
