//! The reference: a plain peer as the teaching VPN has it. One datagram, one
//! packet, one system call each way, no offloads. fastvpn must work with it in
//! place of either end.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use testbed::{Namespace, Pair, StaticRoutes, spawn_thread};
use tun_rs::SyncDevice;

use crate::datagrams::{Order, exchange, exchange_batches};
use crate::dataplane::traffic::{batches, directions, pings, transfer, transfer_both_ways};
use crate::packets::{BUFFER_BYTES, destination, plain_tun};
use crate::support::{
    FAMILIES, UNDERLAY, all_cores, check, dual_stack, enlarge_receive_buffer, fail, hosts,
    start_dual_stack, stop_all, wait_for,
};

#[testbed::trial(each_engine)]
fn plain_peer_to_fastvpn_1_queue() -> Result<()> {
    plain_peer(0, 1)
}

#[testbed::trial(each_engine)]
fn plain_peer_to_fastvpn_4_queues() -> Result<()> {
    plain_peer(0, 4)
}

#[testbed::trial(each_engine)]
fn fastvpn_1_queue_to_plain_peer() -> Result<()> {
    plain_peer(1, 1)
}

#[testbed::trial(each_engine)]
fn fastvpn_4_queues_to_plain_peer() -> Result<()> {
    plain_peer(1, 4)
}

/// Name of the TUN device of a plain peer.
const NAME: &str = "plain0";

/// The port that peers use unless told otherwise.
pub const PORT: u16 = 8285;

/// The underlay's MTU less 28.
const MTU_BYTES: u32 = 1472;

/// Where a plain peer sends packets to, by their destination.
pub type Table = Vec<(IpNet, SocketAddr)>;

/// A plain peer, running until it is dropped.
pub struct PlainPeer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl PlainPeer {
    /// Starts it as host A (0) or host B (1).
    fn start(namespace: &Namespace, host: usize) -> Result<Self> {
        let nets: Vec<_> = dual_stack(host)
            .iter()
            .filter_map(|net| net.parse().ok())
            .collect();
        let peer = SocketAddr::from((UNDERLAY[1 - host], PORT));
        let everything = [IpNet::V4(Default::default()), IpNet::V6(Default::default())];
        let table = everything.map(|net| (net, peer)).to_vec();
        Self::start_with(namespace, UNDERLAY[host], &nets, table)
    }

    /// Starts it at `address`, with addresses of its TUN and routes through it
    /// to all that is in the table.
    pub fn start_with(
        namespace: &Namespace,
        address: Ipv4Addr,
        nets: &[IpNet],
        table: Table,
    ) -> Result<Self> {
        let tun = plain_tun(namespace, NAME, nets, MTU_BYTES)?;
        let mut netlink = namespace.netlink()?;
        let index = netlink.link_index(NAME)?;
        for (prefix, _) in table.iter().filter(|(prefix, _)| prefix.prefix_len() > 0) {
            netlink.add_route(*prefix, None, index)?;
        }
        let socket = namespace
            .run(|| UdpSocket::bind((address, PORT)))
            .map_err(|cause| Error::os("no socket for the plain peer", cause))?;
        // Room for what a fast sender has under way.
        enlarge_receive_buffer(&socket, 8 << 20);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = spawn_thread(namespace, "plain-peer", move || {
            carry(&tun, &socket, &table, &stopped)
        })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// Ends it; an error if it has ended before.
    pub fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(Ok(()))) => Ok(()),
            Some(Ok(Err(cause))) => Err(Error::os("the plain peer failed", cause)),
            _ => fail("the plain peer panicked"),
        }
    }
}

impl Drop for PlainPeer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The whole of a plain tunnel.
fn carry(
    tun: &SyncDevice,
    socket: &UdpSocket,
    table: &[(IpNet, SocketAddr)],
    stop: &AtomicBool,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    socket.set_nonblocking(true)?;
    while !stop.load(Ordering::Relaxed) {
        let mut ready = [
            PollFd::new(tun.as_fd(), PollFlags::POLLIN),
            PollFd::new(socket.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut ready, PollTimeout::from(100u8))?;
        if let Some(length) = arrived(tun.recv(&mut buffer))? {
            let packet = &buffer[..length];
            if let Some(peer) = destination(packet).and_then(|inner| longest_match(table, inner)) {
                // ECONNREFUSED, ENOBUFS: what a network does with a datagram.
                let _ = socket.send_to(packet, peer);
            }
        }
        if let Some((length, from)) = arrived(socket.recv_from(&mut buffer))? {
            // The port is the sending worker's.
            if table.iter().any(|(_, peer)| peer.ip() == from.ip()) {
                // EINVAL: no packet.
                let _ = tun.send(&buffer[..length]);
            }
        }
    }
    Ok(())
}

fn longest_match(table: &[(IpNet, SocketAddr)], inner: IpAddr) -> Option<SocketAddr> {
    let matching = table.iter().filter(|(prefix, _)| prefix.contains(&inner));
    let longest = matching.max_by_key(|(prefix, _)| prefix.prefix_len());
    longest.map(|(_, peer)| *peer)
}

fn arrived<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        result => result.map(Some),
    }
}

/// A plain peer as host `plain` against fastvpn as the other.
fn plain_peer(plain: usize, queues: u16) -> Result<()> {
    let hosts = hosts(1500)?;
    let peer = PlainPeer::start([&hosts.a, &hosts.b][plain], plain)?;
    let (queues, cores) = (queues.to_string(), all_cores());
    let flags = ["--queues", &queues, "--cores", &cores];
    let tunnel = start_dual_stack(&hosts, 1 - plain, &flags)?;
    for family in FAMILIES {
        wait_for(&hosts.a, family[1])?;
    }
    work(&hosts)?;
    peer.stop()?;
    let [ended] = stop_all([tunnel])?;
    for reason in ["sender-unknown", "length", "version", "short", "truncated"] {
        check(ended.dropped(reason) == 0, || ended.log.clone())?;
    }
    Ok(())
}

/// All that must work between the hosts.
fn work(hosts: &Pair) -> Result<()> {
    pings(hosts, &[0, 1, 56, 1444, 1445, 9000, 65_000])?;
    for [from, to] in directions(hosts) {
        let full = if to.1.is_ipv6() { 1424 } else { 1444 };
        let whole: Vec<usize> = (0..full).step_by(7).chain([full]).collect();
        exchange(from, to, &whole, Order::Kept)?;
        let fragmented: Vec<usize> = (full..3000).step_by(29).chain([20_000, 65_000]).collect();
        exchange(from, to, &fragmented, Order::Any)?;
        exchange_batches(from, to, &batches(full))?;
        for streams in [1, 8] {
            transfer(from.0, to.0, to.1, streams, 20_000_000)?;
        }
    }
    for addresses in FAMILIES {
        transfer_both_ways(hosts, addresses, 4, 20_000_000)?;
    }
    Ok(())
}
