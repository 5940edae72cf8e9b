//! Plain mode: a datagram is one whole IP packet, with nothing ahead of it or
//! behind it. Who sent it is known by its address alone, as with IPIP or GRE:
//! nothing is protected.
//!
//! What another mode would do differently is here: how much room a packet needs
//! around it ([`HEADROOM_BYTES`], [`TAILROOM_BYTES`]), whose datagrams are looked
//! at ([`Senders`]), and what turns a datagram into a packet ([`open`]).

use std::net::IpAddr;

use crate::packet::batch::NextHop;
use crate::packet::ip::{self, Malformed, Version};

/// Bytes kept free ahead of each packet in its datagram, for a mode that puts a
/// header there.
pub const HEADROOM_BYTES: usize = 0;

/// Bytes kept free behind each packet, for a mode that seals it in place.
pub const TAILROOM_BYTES: usize = 0;

/// Bytes of the datagram that carries a packet.
#[inline]
pub const fn datagram_bytes(packet_bytes: usize) -> usize {
    HEADROOM_BYTES + packet_bytes + TAILROOM_BYTES
}

/// Where the packet goes in a datagram of [`datagram_bytes`].
#[inline]
pub fn packet_room(datagram: &mut [u8]) -> &mut [u8] {
    let end = datagram.len() - TAILROOM_BYTES;
    &mut datagram[HEADROOM_BYTES..end]
}

/// The packet in a datagram of ours.
#[inline]
pub fn packet(datagram: &[u8]) -> &[u8] {
    let end = datagram.len() - TAILROOM_BYTES;
    &datagram[HEADROOM_BYTES..end]
}

/// The packet in a datagram that was received.
///
/// # Errors
/// When it is not one whole IP packet.
#[inline]
pub fn open(datagram: &mut [u8]) -> Result<(Version, &mut [u8]), Malformed> {
    let version = ip::verify(datagram)?;
    Ok((version, datagram))
}

/// The addresses that peers send from.
#[derive(Debug)]
pub struct Senders {
    /// Sorted.
    addresses: Vec<IpAddr>,
    /// In the order of those: a peer that sends from there.
    peers: Vec<NextHop>,
}

impl Senders {
    /// These addresses. Where peers share one, the first of them counts.
    pub fn new(peers: impl Iterator<Item = (IpAddr, NextHop)>) -> Self {
        let mut senders: Vec<_> = peers.collect();
        senders.sort_unstable();
        senders.dedup_by_key(|(address, _)| *address);
        let (addresses, peers) = senders.into_iter().unzip();
        Self { addresses, peers }
    }

    /// Whether any peer sends from `address`. The source port says nothing: a
    /// peer's workers send from several.
    #[inline]
    pub fn has(&self, address: IpAddr) -> bool {
        self.addresses.binary_search(&address).is_ok()
    }

    /// A peer that sends from `address`.
    pub fn peer(&self, address: IpAddr) -> Option<NextHop> {
        let found = self.addresses.binary_search(&address).ok()?;
        self.peers.get(found).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_its_senders() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let peers = ["fd00::2", "10.0.0.2", "10.0.0.2"];
        let senders = Senders::new(peers.map(address).into_iter().zip(0..));
        for (text, peer) in [("10.0.0.2", Some(1)), ("fd00::2", Some(0)), ("::", None)] {
            assert_eq!(senders.peer(address(text)), peer);
            assert_eq!(senders.has(address(text)), peer.is_some());
        }
    }

    #[test]
    fn the_packet_comes_out_where_it_was_put() {
        let mut packet = [0; 28];
        packet[0] = 0x45;
        packet[3] = 28;
        let mut datagram = vec![0; datagram_bytes(packet.len())];
        packet_room(&mut datagram).copy_from_slice(&packet);
        assert_eq!(open(&mut datagram), Ok((Version::V4, &mut packet[..])));
        datagram.pop();
        assert_eq!(open(&mut datagram), Err(Malformed::Length));
    }
}
