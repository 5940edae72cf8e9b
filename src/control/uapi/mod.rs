//! WireGuard's configuration protocol for programs in user space
//! (<https://www.wireguard.com/xplatform/>): what `wg(8)` speaks to an encrypted tunnel.
//!
//! A request is lines `KEY=VALUE`, the first of which is `get=1` or `set=1`, and an empty line.
//! The answer is more such lines, of which the last is `errno=0` or, negative, why not.
//!
//! - `request`: from text to what is wanted; pure.
//! - `device`: from what there is to text; pure.
//! - `server`: the socket that `wg` looks for.

mod device;
mod request;
#[cfg(test)]
mod request_tests;
pub(crate) mod server;

pub(crate) use device::{Device, Peer, refusal};
pub(crate) use request::PeerChange;
pub use request::{Parser, Request, Set};
