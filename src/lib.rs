//! fastvpn: a userspace network tunnel for Linux, one UDP datagram per IP packet.
//!
//! A tour for who wants to change it. A packet on its way out meets [`io::tun`]
//! (the TUN queue it is read from), [`dataplane::outbound`] with
//! [`packet::segment`] and [`packet::train`], and [`io::udp`] (the socket it is
//! sent on); on its way in [`io::udp`], [`dataplane::inbound`] with
//! [`packet::ip`] and [`packet::coalesce`], and [`io::tun`] again.
//! [`dataplane::run`] is the loop, [`io::engine::Engine`] what it needs of the
//! kernel, [`io::uring`] the io_uring that provides it, and [`io::epoll`] what
//! does where there is no io_uring. [`packet`] does no I/O and has no `unsafe`;
//! [`io`] has all the data path's `unsafe`.
//!
//! Nothing else is in a packet's way: [`cli`] and [`config`] say what is wanted,
//! [`daemon`] sets it up, runs it and takes it down, [`routing`] knows the peers
//! and their prefixes, [`host`] talks to the kernel about links, addresses and
//! routes, and [`control`] to whoever asks a running tunnel. [`testbed`] makes
//! networks inside one machine, for people and for tests.

pub mod cli;
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
pub mod routing;
pub mod testbed;
pub(crate) mod wire;
