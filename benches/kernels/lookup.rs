//! What is asked of every packet: is it whole, where does it go, who sent it?

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use fastvpn::counters::PeerCounters;
use fastvpn::dataplane::table::{PeerSnapshot, Table};
use fastvpn::packet::icmp::TunnelAddresses;
use fastvpn::packet::ip::{self, Version};
use fastvpn::packet::lpm::Prefixes;
use fastvpn::packet::segment::Segments;
use fastvpn::packet::{TCP, UDP};
use ipnet::IpNet;

use super::inputs::{self, MTU_BYTES};
use super::{Case, Kernel};

/// Questions per run.
const QUESTIONS: usize = 256;

const SMALL_BYTES: usize = 64;

pub const CASES: &[Case] = &[
    ("header/verify4", || verify(Version::V4)),
    ("header/verify6", || verify(Version::V6)),
    ("header/vnet_packet-tcp4", vnet_packet_header),
    ("lookup/next-hop", next_hop),
    ("lookup/sender-of-1", || sender(1)),
    ("lookup/sender-of-64", || sender(64)),
];

/// Inbound: whether datagrams are whole IP packets.
fn verify(version: Version) -> Kernel {
    let first = inputs::packet(version, UDP, 0);
    let payload = inputs::flow(first, SMALL_BYTES, QUESTIONS).concat();
    let work = move || {
        let datagrams = black_box(payload.as_slice()).chunks(SMALL_BYTES);
        datagrams
            .filter(|datagram| black_box(ip::verify(datagram)).is_ok())
            .count() as u64
    };
    Kernel::new(QUESTIONS, SMALL_BYTES, QUESTIONS, work)
}

/// Outbound: a TSO vnet packet's virtio-net header, IP header and TCP header, and
/// what its packets' checksums have in common.
fn vnet_packet_header() -> Kernel {
    let whole = inputs::packet(Version::V4, TCP, 0);
    let gso_bytes = MTU_BYTES - whole.header_bytes();
    let vnet_packet = whole.filling(2 * MTU_BYTES).vnet_packet(gso_bytes);
    let work = move || {
        let vnet_packets = (0..QUESTIONS).map(|_| Segments::new(black_box(&vnet_packet)));
        vnet_packets
            .filter(|segments| black_box(segments).is_ok())
            .count() as u64
    };
    Kernel::new(QUESTIONS, 2 * MTU_BYTES, QUESTIONS, work)
}

/// Outbound: the destination of a packet, and the peer that it goes to.
fn next_hop() -> Kernel {
    let table = table_of(1);
    let packet = inputs::packet(Version::V4, UDP, 0).filling(SMALL_BYTES);
    let packet = packet.bytes();
    let work = move || {
        let found = (0..QUESTIONS).map(|_| {
            let destination = ip::destination(Version::V4, black_box(&packet));
            black_box(&table).peer(destination)
        });
        found.filter(|hop| black_box(hop).is_some()).count() as u64
    };
    Kernel::new(QUESTIONS, SMALL_BYTES, QUESTIONS, work)
}

/// Inbound: whether datagrams come from a peer.
fn sender(peers: usize) -> Kernel {
    let table = table_of(peers);
    let addresses: Vec<IpAddr> = (0..QUESTIONS).map(|at| address(at % peers)).collect();
    let work = move || {
        let senders = black_box(addresses.as_slice()).iter();
        senders
            .filter(|sender| table.senders().has(**sender))
            .count() as u64
    };
    Kernel::new(QUESTIONS, SMALL_BYTES, QUESTIONS, work)
}

fn table_of(peers: usize) -> Table {
    let peer = |index| PeerSnapshot {
        endpoint: Some(SocketAddr::new(address(index), 8285)),
        mtu_bytes: MTU_BYTES,
        is_fragmented: true,
        traffic: Arc::new([PeerCounters::default()]),
        ..PeerSnapshot::default()
    };
    // All goes to the first, as with a single peer.
    let anywhere = [(IpNet::V4(Default::default()), 0)];
    let peers = (0..peers).map(peer).collect();
    let prefixes = Arc::new(Prefixes::new(anywhere));
    Table::new(peers, prefixes, TunnelAddresses::default(), false)
}

fn address(index: usize) -> IpAddr {
    Ipv4Addr::new(10, 211, 55, index as u8).into()
}
