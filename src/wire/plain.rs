//! Plain mode: a datagram is one whole IP packet, with nothing ahead of it or
//! behind it. Who sent it is known by its address alone, as with IPIP or GRE:
//! nothing is protected.

use std::net::IpAddr;

use crate::packet::batch::NextHop;
use crate::packet::ip::{self, Malformed, Version};

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
    /// These addresses. Peers may share one.
    pub fn new(peers: impl Iterator<Item = (IpAddr, NextHop)>) -> Self {
        let mut senders: Vec<_> = peers.collect();
        senders.sort_unstable();
        let (addresses, peers) = senders.into_iter().unzip();
        Self { addresses, peers }
    }

    /// Whether any peer sends from `address`. The source port says nothing: a
    /// peer's workers send from several.
    #[inline]
    pub fn has(&self, address: IpAddr) -> bool {
        self.addresses.binary_search(&address).is_ok()
    }

    /// The peers that send from `address`.
    pub fn peers(&self, address: IpAddr) -> &[NextHop] {
        let start = self.addresses.partition_point(|other| *other < address);
        let rest = &self.addresses[start..];
        let count = rest.partition_point(|other| *other == address);
        &self.peers[start..start + count]
    }

    /// One of them: the first counts for all.
    pub fn peer(&self, address: IpAddr) -> Option<NextHop> {
        self.peers(address).first().copied()
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
        assert_eq!(senders.peers(address("10.0.0.2")), [1, 2]);
        assert!(senders.peers(address("10.0.0.1")).is_empty());
    }
}
