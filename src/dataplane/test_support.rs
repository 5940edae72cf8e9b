//! An engine that only notes what it is given.

use std::collections::VecDeque;
use std::net::SocketAddr;

use crate::error::Result;
use crate::io::engine::{Destination, Engine, Event, Received};
use crate::io::udp::Port;
use crate::packet::batch::{Batch, Limits};
use crate::packet::vnet_packet::{VnetPacket, VnetSink};

/// May add to what is to come.
type OnWait = Box<dyn FnMut(&mut VecDeque<Event>)>;

/// Sends into a socket that drains when it is told to.
#[derive(Default)]
pub struct Fake {
    /// The packets' flow and number, by batch.
    pub sent: Vec<Vec<(u8, u8)>>,
    /// The datagrams themselves, and where they went.
    pub datagrams: Vec<(SocketAddr, Vec<u8>)>,
    /// The peers that have sent something, and how many bytes.
    pub noted: Vec<(SocketAddr, usize)>,
    /// What the TUN queue was given.
    pub written: Vec<Vec<u8>>,
    pub unsent_bytes: usize,
    pub asked: usize,
    pub is_waiting: bool,
    pub send_buffer_bytes: usize,
    /// How often it was polled, and how often the worker slept.
    pub polls: usize,
    pub waits: usize,
    /// The poll from which on there is an event.
    pub ready_from: Option<usize>,
    /// What is to come.
    pub events: VecDeque<Event>,
    /// Called when the worker sleeps.
    pub on_wait: Option<OnWait>,
}

impl Engine for Fake {
    fn send(&mut self, batch: Batch, to: Destination) {
        self.unsent_bytes += batch.bytes().len();
        let datagrams = batch
            .datagrams()
            .map(|datagram| (to.endpoint.address, datagram.to_vec()));
        self.datagrams.extend(datagrams);
        let packets = batch.datagrams().map(|packet| (packet[15], packet[20]));
        self.sent.push(packets.collect());
    }
    fn take_batch(&mut self) -> Option<Batch> {
        Some(Batch::new(0))
    }
    fn put_back(&mut self, _: Batch) {}
    fn unsent_bytes(&mut self, _: Port) -> usize {
        self.asked += 1;
        self.unsent_bytes
    }
    fn others_hold_unsent(&self) -> bool {
        false
    }
    fn set_send_buffer(&mut self, _: Port, bytes: usize) -> usize {
        self.send_buffer_bytes = bytes;
        bytes
    }
    fn wait_for_room(&mut self, _: Port) {
        self.is_waiting = true;
    }
    fn is_waiting_for_room(&self, _: Port) -> bool {
        self.is_waiting
    }
    fn port(&self, wanted: Port) -> Port {
        wanted
    }
    fn limits(&self, _: SocketAddr) -> Limits {
        Limits::FULL
    }
    fn next_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }
    fn has_event(&mut self) -> bool {
        !self.events.is_empty()
    }
    fn recycle(&mut self, _: Received) {}
    fn submit(&mut self) -> Result<()> {
        Ok(())
    }
    fn poll(&mut self) -> Result<bool> {
        self.polls += 1;
        Ok(self.ready_from.is_some_and(|first| self.polls >= first))
    }
    fn wait(&mut self) -> Result<()> {
        self.waits += 1;
        if let Some(on_wait) = &mut self.on_wait {
            on_wait(&mut self.events);
        }
        Ok(())
    }
    fn note_sender(&mut self, sender: SocketAddr, bytes: usize, _: bool) {
        self.noted.push((sender, bytes));
    }
    fn quiesce(&mut self) {}
    fn reset_limits(&mut self) {}
}

impl VnetSink for Fake {
    fn take_vnet_packet(&mut self) -> Option<VnetPacket> {
        Some(VnetPacket::new(0))
    }
    fn write(&mut self, vnet_packet: VnetPacket) {
        self.written.push(vnet_packet.packet().to_vec());
    }
}
