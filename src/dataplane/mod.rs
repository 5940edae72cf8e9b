//! The loop that moves packets: one thread, one TUN queue, one UDP socket.
//!
//! Take in what is there, both directions in the order of arrival; start the
//! output that is complete; and when nothing more is there, close what was
//! left open for merging, start that too, and sleep. Nothing here allocates,
//! locks or logs per packet.

pub(crate) mod idle;
pub(crate) mod inbound;
mod outbound;
mod rate;
mod report;
pub mod table;

use std::convert::Infallible;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};

use self::idle::{Idle, Spin};
use self::inbound::Inbound;
use self::outbound::Outbound;
use self::table::Table;
use crate::counters::Counters;
use crate::error::Result;
use crate::io::engine::{Engine, Event};

/// What the control thread tells a worker. An [`Event::Wake`] follows.
#[derive(Debug)]
pub(crate) enum WorkerCommand {
    /// End the loop.
    Stop,
    /// Forward by this table from now on, and let go of the sender once that is
    /// so: who waits for it is told by the channel's end.
    Table(Arc<Table>, Sender<Infallible>),
    /// Try batches of full size again on all paths.
    ResetLimits,
}

/// Most events taken in before the output they gave is started.
const TURN_EVENTS_MAX: usize = 64;

/// Events that an open batch or vnet packet may wait for more while more arrives, so
/// that nothing waits behind an endless stream.
const CARRIED_EVENTS_MAX: usize = 64;

/// Runs the worker with this index until it is told to stop.
///
/// # Errors
/// When the engine fails for good, such as when the device was deleted.
pub(crate) fn run(
    index: usize,
    engine: &mut impl Engine,
    commands: &Receiver<WorkerCommand>,
    mut table: Arc<Table>,
    mut inbound: Inbound,
    spin: Spin,
    counters: &Counters,
) -> Result<()> {
    let mut outbound = Outbound::new(index);
    let mut idle = Idle::new(spin);
    let mut carried = 0;
    // What was said before the worker started comes before all that has arrived.
    let mut is_stopping = obey(commands, &mut table, &mut outbound, engine);
    loop {
        // Take in and forward.
        for _ in 0..TURN_EVENTS_MAX {
            let Some(event) = engine.next_event() else {
                break;
            };
            carried += 1;
            match event {
                Event::VnetPacket(mut received) => {
                    outbound.push(received.bytes_mut(), &table, counters, engine);
                    engine.recycle(received);
                }
                Event::Datagrams {
                    mut received,
                    sender,
                    segment_bytes,
                } => {
                    let payload = received.bytes_mut();
                    inbound.push(payload, segment_bytes, sender, &table, counters, engine);
                    engine.recycle(received);
                }
                Event::SendFailed(failure) => outbound.failed(&failure, &table, counters),
                Event::Wake => {
                    is_stopping |= obey(commands, &mut table, &mut outbound, engine);
                }
            }
        }
        // Submit what is complete. While more arrives, what is open may still
        // grow: a vnet packet rarely fills its last batch.
        if carried < CARRIED_EVENTS_MAX {
            outbound.send_closed(engine);
            engine.submit()?;
            if engine.has_event() {
                continue;
            }
        }
        // Submit the rest.
        outbound.flush(engine);
        inbound.flush(engine);
        engine.submit()?;
        carried = 0;
        // Sleep.
        if !is_stopping {
            idle.wait(engine)?;
        } else if !engine.has_event() {
            return Ok(());
        }
    }
}

/// Carries out what the control thread has said; `true` if that is to stop.
fn obey(
    commands: &Receiver<WorkerCommand>,
    table: &mut Arc<Table>,
    outbound: &mut Outbound,
    engine: &mut impl Engine,
) -> bool {
    let mut is_stopping = false;
    for command in commands.try_iter() {
        match command {
            // What has arrived is still carried: the next process may go on with
            // what has not.
            WorkerCommand::Stop => {
                is_stopping = true;
                engine.quiesce();
            }
            WorkerCommand::Table(new, in_force) => {
                // What was looked up in the old one leaves before what is looked
                // up in the new one.
                outbound.flush(engine);
                *table = new;
                drop(in_force);
            }
            WorkerCommand::ResetLimits => engine.reset_limits(),
        }
    }
    is_stopping
}
