//! The protocol's view of the outside: time in, effects out.

use std::time::SystemTime;

use crate::wire::Endpoint;

/// The time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    /// Nanoseconds of `CLOCK_BOOTTIME`.
    pub ns: u64,
    /// Wall-clock time. It may go backwards.
    pub wall: SystemTime,
}

/// What the protocol does to the world.
pub(crate) trait Outside {
    /// Sends a datagram from the port that this host receives on. It may be lost.
    fn send(&mut self, to: Endpoint, datagram: &[u8]);

    /// Has all workers send what waits for a session.
    fn wake_workers(&mut self);

    /// Gives a data message to a worker, as if it had come to that.
    fn pass_on(&mut self, from: Endpoint, datagram: &mut [u8]);
}
