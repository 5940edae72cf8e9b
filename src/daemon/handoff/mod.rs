//! A running tunnel handed off to another process, which goes on where the first
//! one stops: the same TUN queues, the same UDP sockets, the same control socket.
//!
//! The new process asks three times, over the control socket ([`wire`]):
//!
//! 1. For the tunnel. The old process answers with a [`Manifest`], and with all
//!    descriptors. The new one makes its workers ready on them; the old one carries
//!    packets meanwhile.
//! 2. [`wire::Ready`], with the addresses that it will give the device. The old
//!    process's workers send what they hold and stop, and it answers [`wire::Go`].
//!    Packets wait in the TUN queues and socket buffers meanwhile.
//! 3. The new process adds the addresses. [`wire::Taken`], and its workers start. The
//!    old process leaves everything in place, answers [`wire::Ended`], and ends. With
//!    it goes the last word on whether a reload is due, so that none is lost.
//!
//! Either side may die at any of these steps, and the other carries on. In place of each
//! answer the old process may say [`wire::Kept`]. Once it has sent the whole manifest
//! it never just closes the connection while it lives: for the new process, an end
//! without a word is the old one's death. Before that, as in the midst of the manifest,
//! the new process then asks the control socket whether the old one is still there.
//!
//! - The new process dies before [`wire::Taken`], or is silent for too long: the old
//!   one runs on, or starts its workers again, and takes back the addresses. It
//!   settles that by reading no more than what has come by then, so that a new process
//!   that is only late cannot take the tunnel any more, and hears [`wire::Kept`].
//! - The old process dies before the whole manifest has been sent: what was sent is
//!   closed, the device goes, and the new process starts afresh, as if there had been
//!   nobody to take over from.
//! - The old process dies later: the new one has the device and the sockets, and
//!   carries on. Only what the old one's workers held is lost.

mod manifest;
mod new;
mod old;
#[cfg(test)]
mod tests;
mod wire;

use std::time::Duration;

#[doc(hidden)]
pub use manifest::Manifest;
#[doc(hidden)]
pub use new::receive;
pub(super) use new::{ask, take_over};
pub(super) use old::Handoff;
#[doc(hidden)]
pub use old::{NewProcess, serve};

/// Version of all this. Processes of different versions do not take over from
/// each other.
pub const PROTOCOL: u32 = 5;

/// How long either side waits for the other, before it gives up.
const PATIENCE: Duration = Duration::from_secs(10);
