//! The loop that moves packets: one thread, one TUN queue, one UDP socket.
//!
//! Take in what is there, both directions in the order of arrival; start the
//! output that is complete; and when nothing more is there, close what was
//! left open for merging, start that too, and sleep. Nothing here allocates,
//! locks or logs per packet.

pub(crate) mod idle;
pub(crate) mod in_flight;
#[doc(hidden)]
pub mod inbound;
#[doc(hidden)]
pub mod outbound;
mod rate;
mod report;
mod send_queue;
pub(crate) mod sessions;
pub mod table;
mod tapped;

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender};

use self::idle::{Idle, Spin};
use self::inbound::Inbound;
use self::outbound::Outbound;
use self::sessions::Inbox;
use self::table::Table;
use crate::counters::Counters;
use crate::error::Result;
use crate::io::engine::{Engine, Event, ReceiveMeta};
use crate::packet::ecn::Ecn;
use crate::packet::fq_codel::Aqm;

/// What the control thread tells a worker.
#[derive(Debug)]
pub(crate) enum WorkerCommand {
    /// End the loop.
    Stop,
    /// Forward by the table that is there by now, and let go of the sender once that is
    /// so: who waits for it is told by the channel's end.
    Table(Arc<Mutex<Arc<Table>>>, Sender<Infallible>),
    /// Try batches of full size again on all paths.
    ResetLimits,
    /// Let go of the sender: who waits is told by the channel's end that the worker runs.
    Answer(Sender<Infallible>),
}

/// What a worker is told. An [`Event::Wake`] follows.
#[derive(Debug)]
pub(crate) struct Commands {
    /// By the control thread.
    pub(crate) queue: Receiver<WorkerCommand>,
    /// By the handshake thread.
    pub(crate) inbox: Arc<Inbox>,
}

/// How packets wait for a socket to have room, and what their datagrams look like.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queueing {
    /// How many bytes the socket holds before packets wait outside it; `None`: as few as
    /// keep the link busy.
    pub limit: Option<usize>,
    /// In what order they leave, and which of them are dropped.
    pub aqm: Aqm,
    /// Whether the datagrams have the DSCP of the packet inside (RFC 2983's uniform model)
    /// in place of 0.
    pub inherits_dscp: bool,
}

/// Most events taken in before the output they gave is started.
const TURN_EVENTS_MAX: usize = 64;

/// Events that an open batch or vnet packet may wait for more while more arrives, so
/// that nothing waits behind an endless stream.
const CARRIED_EVENTS_MAX: usize = 64;

/// Most vnet packets read before what waits is sent on: all that have come, as a rule,
/// so that the flows that have little to send are known.
const READ_AHEAD_MAX: usize = 256;

/// Runs a worker until it is told to stop.
///
/// # Errors
/// When the engine fails for good, such as when the device was deleted.
pub(crate) fn run(
    engine: &mut impl Engine,
    commands: &Commands,
    mut table: Arc<Table>,
    mut outbound: Outbound,
    mut inbound: Inbound,
    spin: Spin,
    counters: &Counters,
) -> Result<()> {
    counters.tap.set_generation(table.generation());
    let mut idle = Idle::new(spin);
    let (mut carried, mut read_ahead, mut turn_bytes) = (0, 0, 0);
    // What was said before the worker started comes before all that has arrived.
    let both = (&mut outbound, &mut inbound);
    let mut is_stopping = obey(commands, &mut table, both, counters, engine);
    loop {
        if outbound.is_fifo() {
            // Nothing more is read than there is room for.
            outbound.pump(&table, counters, engine);
        }
        // Take in and forward.
        let mut vnet_packets = 0;
        for _ in 0..TURN_EVENTS_MAX {
            let Some(event) = engine.next_event() else {
                break;
            };
            carried += 1;
            match event {
                Event::VnetPacket(mut received) => {
                    vnet_packets += 1;
                    turn_bytes += received.bytes().len();
                    outbound.push(received.bytes_mut(), &table, counters, engine);
                    engine.recycle(received);
                }
                Event::Datagrams { mut received, meta } => {
                    turn_bytes += received.bytes().len();
                    inbound.push(received.bytes_mut(), meta, &table, counters, engine);
                    engine.recycle(received);
                }
                Event::SendFailed(failure) => outbound.failed(&failure, &table, counters),
                Event::Wake => {
                    let both = (&mut outbound, &mut inbound);
                    is_stopping |= obey(commands, &mut table, both, counters, engine);
                }
            }
        }
        if outbound.is_backlogged() {
            // All that the TUN queue has comes first, as far as may be: of what waits,
            // it may be what goes next.
            read_ahead += vnet_packets;
            if vnet_packets > 0 && read_ahead < READ_AHEAD_MAX && engine.has_event() {
                continue;
            }
            read_ahead = 0;
            outbound.flush(&table, counters, engine);
            outbound.pump(&table, counters, engine);
        }
        // Submit what is complete. While more arrives, what is open may still
        // grow: a vnet packet rarely fills its last batch.
        if carried < CARRIED_EVENTS_MAX {
            outbound.send_closed(&table, counters, engine);
            engine.submit()?;
            if engine.has_event() {
                continue;
            }
        }
        // Submit the rest.
        outbound.flush(&table, counters, engine);
        if outbound.is_backlogged() {
            // What has just found no room: the engine has to wait for some.
            outbound.pump(&table, counters, engine);
        }
        inbound.flush(&table, counters, engine);
        engine.submit()?;
        carried = 0;
        // Sleep.
        if !is_stopping {
            idle.wait(std::mem::take(&mut turn_bytes), engine)?;
        } else if !engine.has_event() {
            return Ok(());
        }
    }
}

/// Carries out what the control thread has said; `true` if that is to stop.
fn obey(
    commands: &Commands,
    table: &mut Arc<Table>,
    (outbound, inbound): (&mut Outbound, &mut Inbound),
    counters: &Counters,
    engine: &mut impl Engine,
) -> bool {
    let mut is_stopping = false;
    for command in commands.queue.try_iter() {
        match command {
            // What has arrived is still carried: the next process may go on with
            // what has not.
            WorkerCommand::Stop => {
                is_stopping = true;
                outbound.release(table, counters, engine);
                engine.quiesce();
            }
            WorkerCommand::Table(new, in_force) => {
                // What was looked up in the old one leaves before what is looked
                // up in the new one.
                outbound.flush(table, counters, engine);
                inbound.flush(table, counters, engine);
                let new = Arc::clone(&new.lock().unwrap_or_else(PoisonError::into_inner));
                if !new.has_sessions_of(table) {
                    // What waits would be sealed for another peer.
                    outbound.drain(table, counters, engine);
                }
                *table = new;
                // What is held may be another peer's now.
                outbound.retry(table, counters, engine);
                counters.tap.set_generation(table.generation());
                drop(in_force);
            }
            WorkerCommand::ResetLimits => engine.reset_limits(),
            WorkerCommand::Answer(asked) => drop(asked),
        }
    }
    if commands.inbox.take_sessions() {
        outbound.retry(table, counters, engine);
    }
    for (sender, mut datagram) in commands.inbox.strays() {
        let meta = ReceiveMeta {
            sender: sender.address,
            called: sender.source,
            is_shared: false,
            segment_bytes: datagram.len(),
            // That of its own is not known any more.
            ecn: Ecn::NotEct,
        };
        inbound.push(&mut datagram, meta, table, counters, engine);
    }
    is_stopping
}

#[cfg(test)]
mod test_support;

#[cfg(test)]
mod wireguard_tests;

#[cfg(test)]
mod tests {
    use super::test_support::Fake;
    use super::*;
    use crate::dataplane::table::PeerSnapshot;
    use crate::io::engine::Received;
    use crate::packet::batch::NextHop;
    use crate::packet::coalesce::TunOffloads;
    use crate::packet::icmp::TunnelAddresses;
    use crate::packet::lpm::Prefixes;
    use crate::packet::virtio;

    /// Strangers are worth nothing to the engine.
    #[test]
    fn only_peers_are_noted() {
        let peer = PeerSnapshot {
            endpoint: "10.0.0.2:8285".parse().ok(),
            ..PeerSnapshot::default()
        };
        let prefixes = Arc::new(Prefixes::new([]));
        let table = Table::new(vec![peer], prefixes, TunnelAddresses::default(), false);
        let offloads = TunOffloads {
            tcp: false,
            udp: false,
        };
        let mut inbound = Inbound::new(offloads, 0, crossbeam_channel::bounded(1).0, None);
        let (counters, mut engine) = (Counters::default(), Fake::default());
        let mut receive = |sender: &str, payload: &mut [u8]| {
            let meta = ReceiveMeta {
                sender: sender.parse().unwrap(),
                called: None,
                is_shared: true,
                segment_bytes: 100,
                ecn: Ecn::NotEct,
            };
            inbound.push(payload, meta, &table, &counters, &mut engine);
        };
        receive("10.0.0.3:8285", &mut [0; 300]);
        receive("10.0.0.2:8286", &mut []);
        receive("10.0.0.2:8286", &mut [0; 300]);
        assert_eq!(engine.noted, [("10.0.0.2:8286".parse().unwrap(), 300)]);
    }

    /// What is queued in the last turn before the worker sleeps has been given to the
    /// socket, or the engine waits for room.
    #[test]
    fn nothing_waits_for_the_next_arrival() {
        let mut packet = vec![0; virtio::HEADER_BYTES + 1400];
        let ip = &mut packet[virtio::HEADER_BYTES..];
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&1400_u16.to_be_bytes());
        let peer = PeerSnapshot {
            endpoint: "10.0.0.2:8285".parse().ok(),
            mtu_bytes: 1472,
            is_fragmented: true,
            ..PeerSnapshot::default()
        };
        let all: (ipnet::IpNet, NextHop) = ("0.0.0.0/0".parse().unwrap(), 0);
        let prefixes = Arc::new(Prefixes::new([all]));
        let table = Table::new(vec![peer], prefixes, TunnelAddresses::default(), false);
        let (sender, queue) = crossbeam_channel::unbounded();
        let commands = Commands {
            queue,
            inbox: Arc::default(),
        };
        let mut engine = Fake::default();
        // Together they are longer than a batch may be.
        for _ in 0..4 {
            let received = Received::from_bytes(packet.clone());
            engine.events.push_back(Event::VnetPacket(received));
        }
        engine.on_wait = Some(Box::new(move |events| {
            if sender.send(WorkerCommand::ResetLimits).is_ok() {
                let _ = sender.send(WorkerCommand::Stop);
                events.push_back(Event::Wake);
            }
        }));
        let queueing = Queueing {
            limit: Some(5000),
            aqm: Aqm::FqCodel,
            inherits_dscp: false,
        };
        let outbound = Outbound::new(0, queueing, None, &mut engine);
        let offloads = TunOffloads {
            tcp: false,
            udp: false,
        };
        let inbound = Inbound::new(offloads, 0, crossbeam_channel::bounded(1).0, None);
        let counters = Counters::default();
        let table = Arc::new(table);
        let spin = Spin::Off;
        run(
            &mut engine,
            &commands,
            table,
            outbound,
            inbound,
            spin,
            &counters,
        )
        .unwrap();
        assert!(engine.is_waiting, "it has slept without waiting for room");
        assert_eq!(engine.sent.concat().len(), 4, "the rest went at the end");
    }
}
