//! Packets and datagrams on their way: what comes out is what went in.

pub mod exact;
pub mod fallbacks;
pub mod full_socket;
pub mod gso_packets;
pub mod queues;
pub mod raw;
pub mod slow_link;
pub mod traffic;
