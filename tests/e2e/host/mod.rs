//! Links, addresses, routes and paths of the host.

pub mod device;
pub mod hosts;
pub mod path_mtu;
pub mod ports;
pub mod routes;
pub mod surroundings;
pub mod tuning;
pub mod underlay;
