//! A buffer for what a TUN queue is given: a virtio-net header and a packet.

use super::PACKET_BYTES_MAX;
use super::checksum::Sum;
use super::virtio::{self, Header};

/// A buffer for one outgoing vnet packet: virtio-net header and packet.
#[derive(Debug)]
pub struct VnetPacket {
    pub(super) bytes: Box<[u8]>,
    /// Bytes of the packet behind the virtio-net header.
    packet_bytes: usize,
    id: u16,
}

/// The packet starts at a multiple of 16, so that its addresses and payload
/// are aligned; the virtio-net header ends there.
const PACKET_START: usize = 16;
const VNET_PACKET_START: usize = PACKET_START - virtio::HEADER_BYTES;

impl VnetPacket {
    /// An empty vnet packet with room for the longest packet. `id` is the owner's
    /// name for it and never changes.
    pub fn new(id: u16) -> Self {
        // The odd cache line keeps the starts of neighbouring buffers from
        // falling into the same cache sets.
        let bytes = vec![0; PACKET_START + PACKET_BYTES_MAX + 1 + 64];
        Self {
            bytes: bytes.into_boxed_slice(),
            packet_bytes: 0,
            id,
        }
    }

    /// The virtio-net header and the packet: what one TUN write takes.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[VNET_PACKET_START..PACKET_START + self.packet_bytes]
    }

    /// The packet alone.
    #[inline]
    pub fn packet(&self) -> &[u8] {
        &self.bytes[PACKET_START..PACKET_START + self.packet_bytes]
    }

    /// The owner's name for this buffer.
    #[inline]
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Makes the vnet packet one packet as it is, with nothing left to an offload.
    /// `write` gets the room for it, [`PACKET_BYTES_MAX`] bytes or more, and
    /// says how many of them it wrote.
    #[inline]
    pub fn fill(&mut self, write: impl FnOnce(&mut [u8]) -> usize) {
        let room = &mut self.bytes[PACKET_START..];
        self.packet_bytes = write(room).min(PACKET_BYTES_MAX);
        self.set_header(Header::default());
    }

    #[inline]
    pub(super) fn packet_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[PACKET_START..PACKET_START + self.packet_bytes]
    }

    #[inline]
    pub(super) fn set(&mut self, packet: &[u8]) {
        self.packet_bytes = packet.len();
        self.packet_mut().copy_from_slice(packet);
        self.set_header(Header::default());
    }

    /// Copies `payload` behind the packet, which does not have it yet, and
    /// sums it up on the way: [`Self::extend`] makes it part of the packet.
    #[inline]
    pub(super) fn copy_behind(&mut self, payload: &[u8]) -> Sum {
        let start = PACKET_START + self.packet_bytes;
        let room = &mut self.bytes[start..start + payload.len()];
        Sum::ZERO.add_copied(payload, room)
    }

    /// Makes bytes behind the packet part of it.
    #[inline]
    pub(super) fn extend(&mut self, payload_bytes: usize) {
        self.packet_bytes += payload_bytes;
    }

    #[inline]
    pub(super) fn set_header(&mut self, header: Header) {
        self.bytes[VNET_PACKET_START..PACKET_START].copy_from_slice(&header.to_bytes());
    }
}

/// Where finished vnet packets go and where empty ones come from.
pub trait VnetSink {
    /// An empty vnet packet, or `None` when the sink has none left: the packet is
    /// then dropped, and the sink counts it.
    fn take_vnet_packet(&mut self) -> Option<VnetPacket>;
    /// Takes a finished vnet packet; vnet packets are written in the order given.
    fn write(&mut self, vnet_packet: VnetPacket);
}
