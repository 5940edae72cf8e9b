//! Tells the sender of a packet that it was dropped and why: an ICMP error,
//! written into the TUN queue as if a router had sent it.
//!
//! It has work only with packets that are dropped anyway, so that nothing here
//! is in the way of those that are sent on.

use std::time::Instant;

use super::rate::RateLimit;
use crate::counters::Counters;
use crate::packet::PACKET_BYTES_MAX;
use crate::packet::icmp::{ErrorMessage, Problem, TunnelAddresses};
use crate::packet::segment::Segments;
use crate::packet::vnet_packet::VnetSink;

/// The reports of one worker. All memory is taken at the start.
#[derive(Debug)]
pub struct Reporter {
    limit: RateLimit,
    /// Where the packet that a report quotes is written out.
    offender: Box<[u8]>,
}

impl Reporter {
    /// One that has reported nothing yet.
    pub fn new() -> Self {
        Self {
            limit: RateLimit::new(Instant::now()),
            offender: vec![0; PACKET_BYTES_MAX].into_boxed_slice(),
        }
    }

    /// Puts an ICMP error about the first packet of `segments` into `sink`,
    /// if there may be one about it and the rate limit has room. One is enough
    /// for a GSO packet: its packets have one sender and one fate.
    pub fn report(
        &mut self,
        now: Instant,
        problem: Problem,
        segments: &Segments<'_>,
        addresses: &TunnelAddresses,
        counters: &Counters,
        sink: &mut impl VnetSink,
    ) {
        let about = ErrorMessage::about(problem, segments.version(), segments.packet(), addresses);
        let Some(error) = about else {
            return;
        };
        if !self.limit.allow(error.destination(), now) {
            counters.icmp_suppressed.add(1);
            return;
        }
        let Some(mut vnet_packet) = sink.take_vnet_packet() else {
            return;
        };
        // Written out, so that the quote has its own length and checksums and
        // not those that a GSO packet shares.
        let offender = &mut self.offender[..segments.packet_bytes(0)];
        segments.write(0, offender);
        vnet_packet.fill(|room| match room.first_chunk_mut() {
            Some(room) => error.write(offender, room),
            None => 0,
        });
        sink.write(vnet_packet);
        counters.icmp_sent.add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::virtio::{self, Header};
    use crate::packet::vnet_packet::VnetPacket;

    /// Has a given number of vnet packets.
    struct Sink {
        spare: Vec<VnetPacket>,
        vnet_packets: Vec<Vec<u8>>,
    }

    impl VnetSink for Sink {
        fn take_vnet_packet(&mut self) -> Option<VnetPacket> {
            self.spare.pop()
        }
        fn write(&mut self, vnet_packet: VnetPacket) {
            self.vnet_packets.push(vnet_packet.bytes().to_vec());
        }
    }

    fn sink(vnet_packets: u16) -> Sink {
        Sink {
            spare: (0..vnet_packets).map(VnetPacket::new).collect(),
            vnet_packets: vec![],
        }
    }

    fn addresses() -> TunnelAddresses {
        TunnelAddresses {
            v4: Some("10.0.0.77/24".parse().unwrap()),
            v6: None,
            accept_local: true,
        }
    }

    /// A UDP datagram from 10.0.0.1, or a GSO packet, and the bytes that
    /// etherparse gives it.
    fn vnet_packet(payload: &[u8], gso_bytes: u16) -> Vec<u8> {
        let mut packet = vec![];
        etherparse::PacketBuilder::ipv4([10, 0, 0, 1], [10, 9, 9, 9], 1)
            .udp(1000, 2000)
            .write(&mut packet, payload)
            .unwrap();
        let mut header = Header::default();
        if gso_bytes > 0 {
            header.flags = virtio::NEEDS_CHECKSUM;
            header.gso_type = virtio::GSO_UDP_L4;
            header.gso_bytes = gso_bytes;
            header.checksum_start = 20;
            header.checksum_offset = 6;
            // The field holds the pseudo-header's sum.
            let sum = crate::packet::checksum::Sum::ZERO
                .add_bytes(&packet[12..20])
                .add_u16(17)
                .add_u16(packet.len() as u16 - 20);
            packet[26..28].copy_from_slice(&sum.partial());
        }
        [&header.to_bytes()[..], &packet].concat()
    }

    fn report(reporter: &mut Reporter, vnet_packet: &[u8], counters: &Counters, sink: &mut Sink) {
        let segments = Segments::new(vnet_packet).unwrap();
        let now = Instant::now();
        reporter.report(
            now,
            Problem::NoRoute,
            &segments,
            &addresses(),
            counters,
            sink,
        );
    }

    #[test]
    fn quotes_a_packet_as_it_came() {
        let (mut reporter, counters, mut sink) = (Reporter::new(), Counters::default(), sink(1));
        let offender = vnet_packet(b"some payload", 0);
        report(&mut reporter, &offender, &counters, &mut sink);
        assert_eq!(sink.vnet_packets.len(), 1);
        let (header, error) = Header::parse(&sink.vnet_packets[0]).unwrap();
        assert_eq!(header, Header::default());
        assert_eq!(error[20..22], [3, 0]);
        assert_eq!(error[28..], offender[virtio::HEADER_BYTES..]);
        assert_eq!(counters.icmp_sent.get(), 1);
    }

    /// The quote is the first segment as it would have been sent, with its own
    /// lengths and checksums.
    #[test]
    fn quotes_the_first_segment_of_a_super_packet() {
        let (mut reporter, counters, mut sink) = (Reporter::new(), Counters::default(), sink(1));
        let payload: Vec<u8> = (0..=255).cycle().take(1000).collect();
        report(
            &mut reporter,
            &vnet_packet(&payload, 300),
            &counters,
            &mut sink,
        );
        assert_eq!(sink.vnet_packets.len(), 1);
        let (_, error) = Header::parse(&sink.vnet_packets[0]).unwrap();
        let alone = vnet_packet(&payload[..300], 0);
        assert_eq!(error[28..], alone[virtio::HEADER_BYTES..]);
    }

    #[test]
    fn the_rate_limit_is_asked_and_counted() {
        let (mut reporter, counters, mut sink) = (Reporter::new(), Counters::default(), sink(100));
        let offender = vnet_packet(b"", 0);
        let segments = Segments::new(&offender).unwrap();
        let now = Instant::now();
        for _ in 0..100 {
            reporter.report(
                now,
                Problem::TimeExceeded,
                &segments,
                &addresses(),
                &counters,
                &mut sink,
            );
        }
        assert_eq!(sink.vnet_packets.len(), 25);
        let snapshot = counters.snapshot();
        assert_eq!((snapshot.icmp_sent, snapshot.icmp_suppressed), (25, 75));
        assert_eq!(snapshot.drops().count(), 0);
    }

    #[test]
    fn silence_costs_no_vnet_packet_and_no_token() {
        let (mut reporter, counters, mut sink) = (Reporter::new(), Counters::default(), sink(1));
        let mut offender = vnet_packet(b"", 0);
        // To a multicast group.
        offender[virtio::HEADER_BYTES + 16] = 224;
        for _ in 0..100 {
            report(&mut reporter, &offender, &counters, &mut sink);
        }
        assert_eq!((sink.vnet_packets.len(), sink.spare.len()), (0, 1));
        assert_eq!(counters.snapshot(), Counters::default().snapshot());
        report(&mut reporter, &vnet_packet(b"", 0), &counters, &mut sink);
        assert_eq!(sink.vnet_packets.len(), 1);
    }

    #[test]
    fn a_sink_without_a_vnet_packet_is_left_to_count_it() {
        let (mut reporter, counters, mut sink) = (Reporter::new(), Counters::default(), sink(0));
        report(&mut reporter, &vnet_packet(b"", 0), &counters, &mut sink);
        assert_eq!(counters.snapshot(), Counters::default().snapshot());
    }

    #[test]
    fn the_longest_packet_can_be_quoted() {
        let (mut reporter, counters, mut sink) = (Reporter::new(), Counters::default(), sink(1));
        let offender = vnet_packet(&vec![7; PACKET_BYTES_MAX - 28], 0);
        report(&mut reporter, &offender, &counters, &mut sink);
        let (_, error) = Header::parse(&sink.vnet_packets[0]).unwrap();
        assert_eq!(error.len(), 576);
        assert_eq!(error[28..], offender[virtio::HEADER_BYTES..][..548]);
    }
}
