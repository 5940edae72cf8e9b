//! Notes packets on the points of their way where they are in clear, for those who capture
//! ([`Tap`]): what comes from the TUN queue, what is written to it, and what is dropped.

use super::table::Table;
use crate::capture::{Direction, Note, Reason, Tap};
use crate::packet::batch::NextHop;
use crate::packet::ip;
use crate::packet::virtio::{self, Header};
use crate::packet::vnet_packet::{VnetPacket, VnetSink};

/// A vnet packet from the TUN queue: its packet, or GSO packet, as the kernel gave it.
#[inline]
pub fn outbound(vnet_packet: &[u8], peer: Option<NextHop>) -> Note<'_> {
    let (packet, gso_bytes) = parts(vnet_packet);
    Note::carried(Direction::Out, peer, packet).gso(gso_bytes)
}

/// A packet into the host that goes no further. `peer`: who sent it, if that is known.
#[inline]
pub fn refused(packet: &[u8], peer: Option<NextHop>, reason: Reason) -> Note<'_> {
    Note::carried(Direction::In, peer, packet).dropped(reason)
}

/// The packet of a vnet packet, and its GSO size if it is a GSO packet.
fn parts(vnet_packet: &[u8]) -> (&[u8], u16) {
    match Header::parse(vnet_packet) {
        Some((header, packet)) if header.gso_type == virtio::GSO_NONE => (packet, 0),
        Some((header, packet)) => (packet, header.gso_bytes),
        None => (vnet_packet, 0),
    }
}

/// Where vnet packets to the TUN queue go, noted on their way.
pub struct Tapped<'a, S> {
    /// Where they go.
    pub sink: &'a mut S,
    /// Where they are noted.
    pub tap: &'a Tap,
    /// Whose peers they come from; none of what this host has made itself.
    pub table: Option<&'a Table>,
}

impl<S> Tapped<'_, S> {
    fn inbound<'p>(&self, vnet_packet: &'p VnetPacket) -> Note<'p> {
        let (packet, gso_bytes) = parts(vnet_packet.bytes());
        // A packet comes from the peer that packets to its source go to: it was checked.
        let peer = self.table.and_then(|table| {
            let version = ip::verify(packet).ok()?;
            let (next_hop, _) = table.peer(ip::source(version, packet))?;
            Some(next_hop)
        });
        Note::carried(Direction::In, peer, packet).gso(gso_bytes)
    }
}

impl<S: VnetSink> VnetSink for Tapped<'_, S> {
    #[inline]
    fn take_vnet_packet(&mut self) -> Option<VnetPacket> {
        self.sink.take_vnet_packet()
    }

    #[inline]
    fn write(&mut self, vnet_packet: VnetPacket) {
        self.tap.note(|| self.inbound(&vnet_packet));
        self.sink.write(vnet_packet);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::capture::Ring;
    use crate::capture::frame::{self, HEADER_BYTES};
    use crate::counters::Counters;
    use crate::dataplane::Queueing;
    use crate::dataplane::inbound::Inbound;
    use crate::dataplane::outbound::Outbound;
    use crate::dataplane::table::PeerSnapshot;
    use crate::dataplane::test_support::Fake;
    use crate::io::engine::ReceiveMeta;
    use crate::packet::coalesce::TunOffloads;
    use crate::packet::ecn::Ecn;
    use crate::packet::fq_codel::Aqm;
    use crate::packet::icmp::TunnelAddresses;
    use crate::packet::lpm::Prefixes;

    /// Direction, peer, reason, and the packet.
    type Noted = (
        Option<Direction>,
        Option<NextHop>,
        Option<&'static str>,
        Vec<u8>,
    );

    /// What was noted since the last call.
    fn noted(ring: &Ring) -> Vec<Noted> {
        let mut all = Vec::new();
        let mut unread = ring.unread();
        while unread.peek().is_some() {
            let mut frame = Vec::new();
            unread.take(0, &mut frame);
            let (header, packet) = frame.split_first_chunk::<HEADER_BYTES>().unwrap();
            let it = frame::Header::read(header);
            all.push((it.direction(), it.peer(), it.reason_name(), packet.to_vec()));
        }
        all
    }

    /// A peer behind which 10.1.0.0/16 is.
    fn table() -> Table {
        let peer = PeerSnapshot {
            endpoint: "10.0.0.2:8285".parse().ok(),
            mtu_bytes: 1472,
            ..PeerSnapshot::default()
        };
        let net: ipnet::IpNet = "10.1.0.0/16".parse().unwrap();
        let prefixes = Arc::new(Prefixes::new([(net, 0)]));
        let addresses = TunnelAddresses {
            v4: Some("10.0.0.77/24".parse().unwrap()),
            v6: None,
            accept_local: true,
        };
        Table::new(vec![peer], prefixes, addresses, false)
    }

    fn packet(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![];
        etherparse::PacketBuilder::ipv4(source, destination, 64)
            .udp(1000, 2000)
            .write(&mut packet, b"some payload")
            .unwrap();
        packet
    }

    fn tapped_counters() -> (Counters, Arc<Ring>) {
        let (counters, ring) = (Counters::default(), Arc::new(Ring::new(1 << 16, 256)));
        counters.tap.attach(Arc::clone(&ring));
        (counters, ring)
    }

    #[test]
    fn what_leaves_the_host_is_noted() {
        let ((counters, ring), table) = (tapped_counters(), table());
        let queueing = Queueing {
            limit: None,
            aqm: Aqm::FqCodel,
            inherits_dscp: false,
        };
        let mut engine = Fake::default();
        let mut outbound = Outbound::new(0, queueing, None, &mut engine);
        let mut send = |packet: &[u8]| {
            let mut vnet_packet = [&[0; virtio::HEADER_BYTES], packet].concat();
            outbound.push(&mut vnet_packet, &table, &counters, &mut engine);
            noted(&ring)
        };
        let out = Some(Direction::Out);
        let carried = packet([10, 0, 0, 1], [10, 1, 0, 2]);
        assert_eq!(send(&carried), [(out, Some(0), None, carried)]);
        let lost = packet([10, 0, 0, 1], [10, 9, 0, 2]);
        // Its sender is told: that comes in.
        let [dropped, told] = &send(&lost)[..] else {
            panic!("not two");
        };
        assert_eq!(*dropped, (out, None, Some("no_route"), lost));
        assert_eq!((told.0, told.1, told.2), (Some(Direction::In), None, None));
        assert_eq!(send(&[1]), [(out, None, Some("tun_malformed"), vec![1])]);
    }

    #[test]
    fn what_comes_into_the_host_is_noted() {
        let ((counters, ring), table) = (tapped_counters(), table());
        let offloads = TunOffloads {
            tcp: true,
            udp: true,
        };
        let mut inbound = Inbound::new(offloads, 0, crossbeam_channel::bounded(1).0, None);
        let mut engine = Fake::default();
        let mut receive = |sender: &str, bytes: &[u8], segment_bytes: usize| {
            let meta = ReceiveMeta {
                sender: sender.parse().unwrap(),
                called: None,
                is_shared: true,
                segment_bytes,
                ecn: Ecn::NotEct,
            };
            let mut bytes = bytes.to_vec();
            inbound.push(&mut bytes, meta, &table, &counters, &mut engine);
            inbound.flush(&table, &counters, &mut engine);
            noted(&ring)
        };
        let (here, peer) = (Some(Direction::In), "10.0.0.2:8285");
        let good = packet([10, 1, 0, 2], [10, 0, 0, 1]);
        let found = receive(peer, &good, good.len());
        assert_eq!(found, [(here, Some(0), None, good.clone())]);
        // Two that are merged are one to the TUN queue, and so here.
        let found = receive(peer, &good.repeat(2), good.len());
        let bytes = found.iter().map(|(.., packet)| packet.len());
        assert_eq!(
            bytes.collect::<Vec<_>>(),
            [good.len() + b"some payload".len()]
        );
        let found = receive("10.0.0.3:8285", &good, good.len());
        assert_eq!(found, [(here, None, Some("sender_unknown"), good.clone())]);
        let bad = packet([10, 9, 0, 2], [10, 0, 0, 1]);
        let found = receive(peer, &bad, bad.len());
        assert_eq!(found, [(here, Some(0), Some("source_not_allowed"), bad)]);
        let found = receive(peer, &good[..7], 7);
        assert_eq!(found, [(here, None, Some("short"), good[..7].to_vec())]);
    }
}
