//! UDP to TUN: the sender of a received train is checked, each datagram
//! verified to be one whole IP packet, packets of a flow coalesced, and the
//! result written to the TUN queue.

use std::net::IpAddr;

use super::counters::Counters;
use super::engine::Engine;
use super::table::Table;
use crate::packet::coalesce::{Coalescer, Offloads};
use crate::packet::ip::{self, Malformed};

/// The inbound half of a worker.
#[derive(Debug)]
pub struct Inbound {
    coalescer: Coalescer,
}

impl Inbound {
    /// `offloads`: the super-packets that the TUN device takes.
    pub fn new(offloads: Offloads) -> Self {
        Self {
            coalescer: Coalescer::new(offloads),
        }
    }

    /// Takes in the datagrams of one receive: `payload` holds them back to
    /// back, each of `segment_bytes` but the last.
    #[inline]
    pub fn push(
        &mut self,
        payload: &[u8],
        segment_bytes: usize,
        sender: IpAddr,
        table: &Table,
        counters: &Counters,
        engine: &mut impl Engine,
    ) {
        counters.trains_received.add(1);
        let datagrams = payload.chunks(segment_bytes.max(1));
        if !table.is_sender(sender) {
            counters
                .drop_sender_unknown
                .add(datagrams.len().max(1) as u64);
            return;
        }
        if payload.is_empty() {
            counters.drop_short.add(1);
            return;
        }
        let (mut packets, mut bytes) = (0, 0);
        for datagram in datagrams {
            match ip::verify(datagram) {
                Ok(version) => {
                    packets += 1;
                    bytes += datagram.len() as u64;
                    self.coalescer.push(version, datagram, engine);
                }
                Err(Malformed::Short) => counters.drop_short.add(1),
                Err(Malformed::Version) => counters.drop_version.add(1),
                Err(Malformed::Length) => counters.drop_length.add(1),
            }
        }
        counters.packets_received.add(packets);
        counters.bytes_received.add(bytes);
    }

    /// Writes all that is still held for merging: no more datagrams are at hand.
    #[inline]
    pub fn flush(&mut self, engine: &mut impl Engine) {
        self.coalescer.flush(engine);
    }
}
