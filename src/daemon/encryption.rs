//! What only an encrypted tunnel has: the handshake thread, and what it shares with the
//! workers.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use crossbeam_channel::{Receiver, bounded};
use socket2::Socket;

use super::workers::{Workers, event_counter};
use crate::config::{Config, PEERS_MAX};
use crate::dataplane::sessions::Sessions;
use crate::error::Result;
use crate::io::udp;
use crate::routing::overlay::Overlay;
use crate::wire::Endpoint;
use crate::wire::wireguard::keys::PublicKey;
use crate::wire::wireguard::sessions::{SessionMap, WorkerRequest};
use crate::wireguard::{Handshakes, Identities, Intervals, PeerConfig, PeerTimestamps, Setup};

/// Indices for the current, the next and the previous session of each peer, and for a
/// handshake under way. Memory is taken as they are used.
const INDICES_MAX: usize = 4 * PEERS_MAX;

/// What workers may ask for until the handshake thread looks: each peer asks once.
const REQUESTS_MAX: usize = 1024;

/// See the module's documentation.
pub struct Encryption {
    /// Member of the shared port's group: it receives what is not data.
    socket: Arc<Socket>,
    sessions: Sessions,
    requests: Receiver<WorkerRequest>,
    /// `None` while the workers stand still. It ends all sessions with itself, so that no
    /// process seals with keys that another one may still use.
    handshakes: Option<Handshakes>,
    /// How far handshakes had come when they ended, here or in another process.
    pub timestamps: Vec<PeerTimestamps>,
    /// What the kernel had dropped at the socket before.
    drops_before: u32,
    /// This host's identity, if its key follows from a shared secret.
    own_identity: Option<String>,
}

impl Encryption {
    /// Nothing runs yet.
    ///
    /// # Errors
    /// When there are not enough descriptors.
    pub fn new(socket: Socket) -> Result<Self> {
        let (sender, requests) = bounded(REQUESTS_MAX);
        Ok(Self {
            drops_before: udp::drops(socket.as_fd()).unwrap_or(0),
            socket: Arc::new(socket),
            sessions: Sessions {
                map: Arc::new(SessionMap::new(INDICES_MAX)),
                requests: sender,
                wake: Arc::new(event_counter()?),
            },
            requests,
            handshakes: None,
            timestamps: Vec::new(),
            own_identity: None,
        })
    }

    /// What workers need.
    pub fn sessions(&self) -> Sessions {
        self.sessions.clone()
    }

    /// The handshake socket, for another process.
    pub fn socket(&self) -> &Arc<Socket> {
        &self.socket
    }

    /// Goes on with another socket. Sessions stay.
    pub fn use_socket(&mut self, socket: Socket) {
        self.drops_before = 0;
        self.socket = Arc::new(socket);
        if let Some(handshakes) = &self.handshakes {
            handshakes.set_socket(Arc::clone(&self.socket));
        }
    }

    /// Starts the handshake thread, with the peers that there are.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn start(&mut self, config: &Config, overlay: &Overlay, workers: &Workers) -> Result<()> {
        let pass_on = workers.stray_taker();
        let handshakes = Handshakes::start(Setup {
            private_key: config.private_key.clone(),
            intervals: Intervals::of_this_build(),
            socket: Arc::clone(&self.socket),
            map: Arc::clone(&self.sessions.map),
            requests: self.requests.clone(),
            wake: Arc::clone(&self.sessions.wake),
            earlier: std::mem::take(&mut self.timestamps),
            wake_workers: Box::new(workers.session_waker()),
            pass_on: Box::new(move |sender: Endpoint, datagram: &[u8]| {
                pass_on(sender, datagram);
            }),
        })?;
        self.handshakes = Some(handshakes);
        self.own_identity.clone_from(&config.own_identity);
        self.follow(overlay);
        Ok(())
    }

    /// Makes new sessions with the peers: another process had those that there were.
    pub fn renew(&self) {
        if let Some(handshakes) = &self.handshakes {
            handshakes.renew();
        }
    }

    /// Ends the handshake thread, and all sessions.
    pub fn stop(&mut self) {
        if let Some(handshakes) = self.handshakes.take() {
            self.timestamps = handshakes.end();
        }
    }

    /// Makes the peers of `overlay` those that there are.
    pub fn follow(&self, overlay: &Overlay) {
        if let Some(handshakes) = &self.handshakes {
            handshakes.set_peers(peers(overlay).collect());
            handshakes.set_identities(self.identities(overlay));
        }
    }

    /// Who is who, if keys follow from a shared secret.
    fn identities(&self, overlay: &Overlay) -> Option<Identities> {
        let peers = overlay.peers().filter_map(|(_, peer)| {
            let identity = peer.identity()?.to_string();
            Some((peer.name.key()?, identity))
        });
        Some(Identities {
            own: self.own_identity.clone()?,
            peers: peers.collect(),
        })
    }

    /// Lets in the peers of `new` besides those of `old`: workers may ask for their sessions
    /// before the change is in force, and none of the old ones is lost if it comes to
    /// nothing.
    pub fn admit(&self, old: &Overlay, new: &Overlay) {
        let Some(handshakes) = &self.handshakes else {
            return;
        };
        let known: HashSet<PublicKey> = peers(new).map(|peer| peer.public_key).collect();
        let others = peers(old).filter(|peer| !known.contains(&peer.public_key));
        handshakes.set_peers(peers(new).chain(others).collect());
    }

    /// Goes on with another key of this host.
    pub fn set_private_key(&mut self, config: &Config) {
        self.own_identity.clone_from(&config.own_identity);
        if let Some(handshakes) = &self.handshakes {
            handshakes.set_private_key(config.private_key.clone());
        }
    }

    /// When the latest handshake with a peer was.
    pub fn latest_handshake(&self, peer: &PublicKey) -> Option<SystemTime> {
        self.handshakes.as_ref()?.latest_handshake(peer)
    }

    /// Whether packets can be carried: a peer has a session, or none is due.
    pub fn is_ready(&self, overlay: &Overlay) -> bool {
        let peers = overlay.peers();
        let sessions = peers.filter_map(|(_, peer)| Some(&peer.secure.as_ref()?.sessions));
        let mut is_due = false;
        for peer in sessions {
            if peer.has_session() {
                return self.handshakes.is_some();
            }
            is_due |= peer.is_due.load(Ordering::Relaxed);
        }
        self.handshakes.is_some() && !is_due
    }

    /// What the handshake thread has counted, by name.
    pub fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counters = self.handshakes.iter();
        let counters = counters.flat_map(|handshakes| handshakes.counters().values());
        // The kernel's count wraps round.
        let drops = udp::drops(self.as_fd()).unwrap_or(self.drops_before);
        let drops = drops.wrapping_sub(self.drops_before);
        counters.chain([("drop_at_socket", drops.into())])
    }
}

impl AsFd for Encryption {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The peers as the handshake thread takes them.
fn peers(overlay: &Overlay) -> impl Iterator<Item = PeerConfig> {
    overlay.peers().filter_map(|(_, peer)| {
        let secure = peer.secure.as_ref()?;
        Some(PeerConfig {
            public_key: peer.name.key()?,
            preshared_key: secure.preshared_key.clone(),
            is_suspended: peer.is_suspended,
            persistent_keepalive: secure.persistent_keepalive,
            sessions: Arc::clone(&secure.sessions),
        })
    })
}
