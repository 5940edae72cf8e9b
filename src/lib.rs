//! fastvpn: a userspace network tunnel for Linux, one UDP datagram per IP packet.
//!
//! A tour for who wants to change it. A packet on its way out meets
//! [`device`] (the TUN queue it is read from), [`worker::outbound`] with
//! [`packet::segment`] and [`packet::train`], and [`transport`] (the socket it
//! is sent on); on its way in [`transport`], [`worker::inbound`] with
//! [`packet::ip`] and [`packet::coalesce`], and [`device`] again.
//! [`worker::run`] is the loop, [`worker::engine::Engine`] what it needs of the
//! kernel, [`ring`] the io_uring that provides it, and [`epoll`] what does where
//! there is no io_uring. [`packet`] does no I/O and has no `unsafe`; [`ring`]
//! and [`io`], which both engines share, have all the data path's `unsafe`.
//!
//! Nothing else is in a packet's way: [`cli`] and [`config`] say what is wanted,
//! [`tunnel`] sets it up and takes it down, [`control`] runs the workers, and
//! [`netlink`] talks to the kernel about links, addresses and routes. [`check`]
//! says beforehand what a host has to offer. [`lab`] and [`demo`] make networks
//! inside one machine, for people and for tests.

pub mod check;
pub mod cli;
pub mod client;
pub mod config;
pub mod control;
pub mod demo;
pub mod device;
pub mod epoll;
pub mod error;
pub mod io;
pub mod lab;
pub mod netlink;
pub mod packet;
pub mod ring;
pub mod transport;
pub mod tunnel;
pub mod worker;
