//! The host: links, addresses, routes and the paths to the peers, all by way of
//! the kernel's netlink sockets.

pub mod link;
pub(crate) mod masquerade;
pub(crate) mod mtu_probe;
pub mod netlink;
pub(crate) mod path;
pub mod routes;
pub(crate) mod unreachable;
