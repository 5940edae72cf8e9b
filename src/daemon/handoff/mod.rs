//! A running tunnel handed off to another process, which goes on where the first
//! one stops: the same TUN queues, the same UDP sockets, the same control socket.
//!
//! They talk over the control socket ([`wire`]):
//!
//! 1. The new process asks for the tunnel. The old one answers with a [`Manifest`] and
//!    with all descriptors. The new one starts its workers on them, which wait; the old
//!    one carries packets meanwhile.
//! 2. The new process sends [`wire::Ready`]. The old process's workers send what they
//!    hold and stop, and it answers [`wire::Go`], with the timestamps of the last initiations:
//!    later ones must not be older. Packets wait in the TUN queues and socket buffers.
//! 3. The new process sends [`wire::Taken`], and its workers go on. The old one ends.
//! 4. The connection closes when the old process has ended. A SIGHUP may have reached it
//!    until then, so the new one reads its configuration file again.
//!
//! Either side may die at any of these steps, and the other carries on. Instead of each
//! answer the old process may send [`wire::Kept`]: it keeps the tunnel. Once it has sent
//! the whole manifest it never closes the connection without [`wire::Taken`] or
//! [`wire::Kept`], so the new process knows that it has died if the connection ends
//! otherwise. [`wire::Taken`] either arrives or fails to be sent: an old process that does
//! not wait for it any longer closes its side of the connection first. So one of the two
//! carries packets, and never both.
//!
//! - The new process dies before it sends [`wire::Taken`], or takes too long: the old one
//!   runs on, or starts its workers again, and then says [`wire::Kept`].
//! - The old process dies before the whole manifest has been sent: the new one closes
//!   what it has, the device goes, and it starts as if no process had been running. In an
//!   upgrade it fails instead: the old one may have been told to stop.
//! - The old process dies later: the new one has the device and the sockets, and
//!   carries on. Only what the old one's workers held is lost.

mod new;
mod old;
#[cfg(test)]
mod tests;
mod wire;

#[doc(hidden)]
pub use super::manifest::Manifest;
#[doc(hidden)]
pub use new::receive;
pub(super) use new::{ask, take_over};
pub(super) use old::{Handoff, hand_over};
#[doc(hidden)]
pub use old::{NewProcess, serve};

/// Version of all this. Processes of different versions do not take over from
/// each other.
pub const PROTOCOL: u32 = 8;
