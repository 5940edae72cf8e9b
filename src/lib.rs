//! fastvpn: a userspace network tunnel for Linux, one UDP datagram per IP packet.
//!
//! A tour for those who want to change it. [`dataplane`] is the loop of a worker, and
//! [`io`] all that it needs of the kernel: the TUN device, UDP sockets, and an engine, on
//! io_uring or on epoll. [`packet`] is pure code about bytes, and [`wire`] knows what a
//! datagram is. docs/architecture.md follows a packet through all of them, function by
//! function.
//!
//! [`wireguard`] makes the keys of the sessions that packets are sealed in, on a thread of its
//! own. Nothing else is in a packet's way. [`daemon`] sets a tunnel up, runs it and takes it
//! down; [`routing`] knows the peers and their prefixes, [`host`] talks to the kernel about
//! links, addresses and routes, and [`control`] answers those who ask a running tunnel.
//! [`capture`] has copies of packets for those who watch it.
//! [`cli`] and [`config`] say what is wanted. [`testbed`] makes networks inside one
//! machine, for the demo and for tests.
//!
//! The rooms, each with those that it uses. `tests/layers.rs` holds the sources against
//! this map.
//!
//! ```text
//! cli -> daemon, control, registry, config, host, io, wire, capture, packet, testbed, error
//! testbed -> host, wire, error
//! daemon -> control, routing, registry, host, wireguard, dataplane, config, io, wire, counters, capture, packet, clock, log, error
//! control -> config, wire, counters, error
//! routing -> dataplane, config, wire, packet, counters, error
//! registry -> config, wire, error
//! config -> wire, packet, log, error
//! host -> wire, packet, error
//! wireguard -> io, wire, counters, clock, error
//! dataplane -> io, wire, counters, capture, packet, clock, error
//! io -> wire, packet, counters, error
//! wire -> packet
//! counters -> capture
//! capture -> packet
//! packet ->
//! clock ->
//! log ->
//! error ->
//! ```

pub mod capture;
pub mod cli;
pub(crate) mod clock;
pub mod config;
pub mod control;
pub mod counters;
pub mod daemon;
pub mod dataplane;
pub mod error;
pub mod host;
pub mod io;
pub mod log;
pub mod packet;
pub mod registry;
pub mod routing;
pub mod testbed;
pub mod wire;
pub(crate) mod wireguard;
