//! Which peer a packet goes to and may come from.

pub mod churn;
pub mod endpoints;
pub mod keepalive;
pub mod mesh;
pub mod names;
pub mod nested;
pub mod overlay_errors;
pub mod overlay_mtu;
pub mod peers;
pub mod plain_peer;
pub mod sources;
pub mod strangers;
