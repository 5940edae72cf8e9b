//! The host's side: the TUN device, its addresses and routes.

pub mod link;
pub mod steering;
pub mod tun;
