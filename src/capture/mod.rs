//! Copies of packets for somebody who watches a tunnel (`fastvpn capture`).
//!
//! Each worker has a [`Tap`], beside its counters. While nobody watches, a packet costs it
//! the look whether it is on. While somebody does, the worker copies the first bytes of each
//! packet into a [`Ring`], whose memory was taken before, and goes on: a full ring loses the
//! copy and counts that, and the packet goes its way. A thread of the daemon takes the copies
//! out and sends them to whoever watches as [`frame`]s.

pub mod frame;
mod ring;
mod tap;

pub(crate) use ring::Ring;
pub use tap::{Direction, Note, Reason, Tap};
