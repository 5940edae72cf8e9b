//! A running tunnel handed over to another process, which goes on where the
//! first one stops: the same TUN queues, the same UDP sockets, the same
//! operators' socket.
//!
//! The successor asks over the operators' socket. Both sides then take turns:
//!
//! 1. The predecessor sends a [`Manifest`], one line of JSON.
//! 2. Successor: [`Step::Ready`]. Predecessor: the descriptors, one message for
//!    each worker and one for the operators' socket (`SCM_RIGHTS`, unix(7)).
//! 3. The successor makes its workers ready on them. It says which addresses it is
//!    about to give the device, one line of JSON, and gives it these: who carries
//!    on if it fails takes them back, and no others. [`Step::Go`].
//! 4. The predecessor's workers send what they hold and stop. [`Step::Done`], or
//!    [`Step::DoneReloadDue`]. Packets wait in the TUN queues and socket buffers
//!    meanwhile.
//! 5. Successor: [`Step::Taken`], and its workers start. The predecessor ends
//!    and leaves everything in place.
//!
//! Either side may die at any of these steps, and the other carries on. A process
//! that lives never just closes the connection: the old one refuses in place of the
//! manifest, or says [`Step::Kept`]. So, for the new one, an end without a word is
//! the old one's death.
//!
//! - The new process dies before [`Step::Taken`], or is silent for too long: the
//!   old one runs on, or starts its workers again. It settles that by reading no
//!   more than what has come by then, so that a new process that is only late
//!   cannot take the tunnel any more, and hears [`Step::Kept`].
//! - The old process dies before all descriptors have been sent: what was sent is
//!   closed, the device goes, and the new process starts afresh, as if there had
//!   been nobody to take over from.
//! - The old process dies later: the new one has the device and the sockets, and
//!   carries on. Only what the old one's workers held is lost.
//!
//! After [`Step::Taken`] the new process is the tunnel, as any that runs.

mod predecessor;
mod successor;
#[cfg(test)]
mod tests;
mod wire;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

#[doc(hidden)]
pub use predecessor::receive;
pub use predecessor::{Inherited, Predecessor, ask};
pub use successor::{Successor, WorkerDescriptors};

/// Version of all this. Processes of different versions do not take over from
/// each other.
pub const PROTOCOL: u32 = 4;

/// How long either side waits for the other, before it gives up.
const PATIENCE: Duration = Duration::from_secs(10);

/// What either side says by one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// The successor can use what the manifest promises.
    Ready = b'r',
    /// Descriptors come with this byte.
    Descriptors = b'f',
    /// The successor has all it needs: stop.
    Go = b'g',
    /// The predecessor has stopped: start.
    Done = b'd',
    /// The same, and that a reload was asked for which is still to be done.
    DoneReloadDue = b'h',
    /// The successor starts: end.
    Taken = b't',
    /// The predecessor runs on, or has started again, or has been told to end.
    Kept = b'k',
}

/// What is handed over, in words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always true: the form of all answers on the operators' socket.
    pub ok: bool,
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The predecessor's process id.
    #[serde(default)]
    pub pid: u32,
    /// Its version.
    #[serde(default)]
    pub version: String,
    /// Name of the TUN device.
    pub tun: String,
    /// Workers, each with descriptors of its own.
    pub workers: u16,
    /// Address and port of the UDP sockets.
    pub listen: SocketAddr,
    /// Super-packets that the TUN device passes: TCP, UDP.
    pub tun_offloads: [bool; 2],
    /// Offloads of the UDP sockets: `UDP_SEGMENT`, `UDP_GRO`.
    pub udp_offloads: [bool; 2],
    /// Which of the device's were asked of the kernel.
    pub tun_wanted: [bool; 2],
    /// Which of the sockets' were asked of the kernel.
    pub udp_wanted: [bool; 2],
    /// Whether a flow's queue depends on the flow alone.
    pub is_steered: bool,
    /// The addresses that the predecessor gave the device.
    pub addresses: Vec<IpNet>,
    /// Peers that operators added while it ran.
    pub runtime_peers: Vec<RuntimePeer>,
    /// Prefixes that operators gave configured peers, with the peers' names.
    pub runtime_prefixes: Vec<(IpNet, String)>,
}

/// A peer that operators added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimePeer {
    /// `HOST:PORT`.
    pub peer: String,
    /// Whether it takes what no prefix matches.
    pub is_default: bool,
    /// Its prefixes.
    pub prefixes: Vec<IpNet>,
}

/// What became of the other side.
fn in_words(error: io::Error) -> io::Error {
    match error.kind() {
        _ if is_end(&error) => io::Error::other("it has closed the connection"),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::other("it does not answer")
        }
        _ => error,
    }
}

/// Whether the other side has closed the connection.
fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}
