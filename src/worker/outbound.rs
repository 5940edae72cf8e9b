//! TUN to UDP: a frame from the TUN queue is segmented, its destination looked
//! up, and every packet appended to its next hop's train. Trains stay open
//! across the frames of a batch, which is what makes small packets fast.

use std::net::SocketAddr;

use super::counters::Counters;
use super::engine::Engine;
use super::table::Table;
use crate::packet::ip;
use crate::packet::segment::Segments;
use crate::packet::train::{NextHop, TRAIN_BYTES_MAX, Train};

/// Next hops whose trains can be open at a time. The oldest makes room.
pub const OPEN_TRAINS_MAX: usize = 8;

/// The trains being filled, at most one per next hop, oldest first.
#[derive(Debug, Default)]
pub struct Outbound {
    open: Vec<(Train, SocketAddr)>,
}

impl Outbound {
    /// No train yet, and room for all that can be open.
    pub fn new() -> Self {
        Self {
            open: Vec::with_capacity(OPEN_TRAINS_MAX),
        }
    }

    /// Takes in one frame: virtio-net header and packet.
    #[inline]
    pub fn push(
        &mut self,
        frame: &[u8],
        table: &Table,
        counters: &Counters,
        engine: &mut impl Engine,
    ) {
        counters.tun_frames_read.add(1);
        let Ok(segments) = Segments::new(frame) else {
            counters.drop_frame_malformed.add(1);
            return;
        };
        let count = segments.count();
        let destination = ip::destination(segments.version(), segments.packet());
        let Some((next_hop, endpoint)) = table.next_hop(destination) else {
            counters.drop_no_route.add(count as u64);
            return;
        };
        if segments.packet_bytes(0) > TRAIN_BYTES_MAX {
            counters.drop_oversize.add(count as u64);
            return;
        }
        let Some(mut index) = self.train_to(next_hop, endpoint, engine) else {
            counters.drop_no_buffer.add(count as u64);
            return;
        };
        for packet in 0..count {
            let packet_bytes = segments.packet_bytes(packet);
            let mut room = self.open[index].0.reserve(packet_bytes);
            if room.is_none() {
                // Full, or of another size: on with the next train.
                let (train, endpoint) = self.open.remove(index);
                engine.send(train, endpoint);
                match self.start_train(next_hop, endpoint, engine) {
                    Some(fresh) => index = fresh,
                    None => {
                        counters.drop_no_buffer.add((count - packet) as u64);
                        break;
                    }
                }
                room = self.open[index].0.reserve(packet_bytes);
            }
            if let Some(room) = room {
                segments.write(packet, room);
            }
        }
    }

    /// Sends the trains that cannot grow any more.
    #[inline]
    pub fn send_closed(&mut self, engine: &mut impl Engine) {
        while let Some(index) = self.open.iter().position(|(train, _)| train.is_closed()) {
            let (train, endpoint) = self.open.remove(index);
            engine.send(train, endpoint);
        }
    }

    /// Sends all open trains: no more frames are at hand.
    #[inline]
    pub fn flush(&mut self, engine: &mut impl Engine) {
        for (train, endpoint) in self.open.drain(..) {
            engine.send(train, endpoint);
        }
    }

    /// Index of the open train toward `next_hop`, a fresh one if there is none.
    #[inline]
    fn train_to(
        &mut self,
        next_hop: NextHop,
        endpoint: SocketAddr,
        engine: &mut impl Engine,
    ) -> Option<usize> {
        let found = self.open.iter().position(|(train, to)| {
            // The endpoint of a next hop changes with the table.
            train.next_hop() == next_hop && *to == endpoint
        });
        found.or_else(|| self.start_train(next_hop, endpoint, engine))
    }

    fn start_train(
        &mut self,
        next_hop: NextHop,
        endpoint: SocketAddr,
        engine: &mut impl Engine,
    ) -> Option<usize> {
        if self.open.len() == OPEN_TRAINS_MAX {
            let (train, endpoint) = self.open.remove(0);
            engine.send(train, endpoint);
        }
        let mut train = engine.take_train()?;
        train.start(next_hop, engine.limits(next_hop));
        self.open.push((train, endpoint));
        Some(self.open.len() - 1)
    }
}
