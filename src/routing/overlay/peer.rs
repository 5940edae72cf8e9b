//! A peer: who it is, where it is, and what is known of the way there.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::config::{HostPort, PeerName, PeerSpec};
use crate::counters::PeerCounters;
use crate::packet::batch::BATCH_BYTES_MAX;
use crate::wire::Mode;
use crate::wire::wireguard::keys::PresharedKey;
use crate::wire::wireguard::sessions::PeerSessions;

/// Where a peer or a prefix comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A flag or the configuration file. A reload brings it back or takes it
    /// away.
    Config,
    /// The control socket. A reload leaves it.
    Runtime,
    /// The registry, which adds and removes it.
    Registry,
}

impl Origin {
    /// As operators read it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Runtime => "runtime",
            Self::Registry => "registry",
        }
    }
}

/// What a peer with a key has besides.
#[derive(Clone, Debug)]
pub struct Secure {
    /// Its sessions: the peer's as long as it is there, like its counters.
    pub(crate) sessions: Arc<PeerSessions>,
    /// What its key follows from, if that is a secret that all hosts share.
    pub(crate) identity: Option<String>,
    /// A secret that both ends share besides their keys; zeros for none.
    pub(crate) preshared_key: PresharedKey,
    /// How often something is sent, to keep a NAT's mapping alive.
    pub(crate) persistent_keepalive: Option<Duration>,
    /// It has sent from where it is, so that is not where it was said to be.
    pub(crate) has_roamed: bool,
}

impl Secure {
    fn new(spec: &PeerSpec) -> Self {
        Self {
            sessions: Arc::default(),
            identity: spec.identity.clone(),
            preshared_key: spec.preshared_key.clone(),
            persistent_keepalive: spec.persistent_keepalive,
            has_roamed: false,
        }
    }
}

/// A peer.
#[derive(Clone, Debug)]
pub struct Peer {
    /// What it is called.
    pub(crate) name: PeerName,
    /// Host and port as they were given: a plain peer's are its name.
    pub(crate) place: Option<HostPort>,
    /// Where it comes from.
    pub(crate) origin: Origin,
    /// Its address, with the port that it was given; `None` while its name does
    /// not resolve. A peer with a key is wherever it last sent from.
    pub(crate) endpoint: Option<SocketAddr>,
    /// The port that it has been seen to send from instead.
    pub(crate) learned_port: Option<u16>,
    /// Its route leads through the tunnel itself, so nothing is sent.
    pub(crate) is_suspended: bool,
    /// MTU of the path to it in bytes, if it is known.
    pub(crate) path_mtu_bytes: Option<u32>,
    /// A router on the path takes less than this host's interface.
    pub(crate) is_path_narrow: bool,
    /// What the workers count for it.
    pub(crate) traffic: Arc<[PeerCounters]>,
    /// `None`: it is a plain peer.
    pub(crate) secure: Option<Secure>,
}

impl Peer {
    /// A peer of which nothing is known yet.
    pub(super) fn new(spec: &PeerSpec, origin: Origin, workers: usize) -> Self {
        let mut peer = Self {
            name: spec.name.clone(),
            place: spec.endpoint.clone(),
            origin,
            endpoint: spec.endpoint.as_ref().and_then(HostPort::literal),
            learned_port: None,
            is_suspended: false,
            path_mtu_bytes: None,
            is_path_narrow: false,
            traffic: Arc::default(),
            secure: spec.name.key().map(|_| Secure::new(spec)),
        };
        peer.count_for(workers);
        peer
    }

    /// Lets `workers` count for it, from zero.
    pub(super) fn count_for(&mut self, workers: usize) {
        self.traffic = (0..workers).map(|_| PeerCounters::default()).collect();
    }

    /// Longest inner packet that reaches it in one piece.
    pub(super) fn inner_mtu_bytes(&self) -> usize {
        match (self.endpoint, self.path_mtu_bytes) {
            (Some(endpoint), Some(path_mtu_bytes)) => {
                let overhead_bytes = self.mode().overhead_bytes(endpoint.ip());
                path_mtu_bytes.saturating_sub(overhead_bytes) as usize
            }
            // Nothing is known yet: nothing is refused.
            _ => BATCH_BYTES_MAX,
        }
    }

    /// How its datagrams are made.
    pub(crate) fn mode(&self) -> Mode {
        Mode::with_keys(self.secure.is_some())
    }

    /// What its key follows from, if that is a secret that all hosts share.
    pub(crate) fn identity(&self) -> Option<&str> {
        self.secure.as_ref()?.identity.as_deref()
    }

    /// Whether it has a key and is where it last sent from.
    pub(crate) fn has_roamed(&self) -> bool {
        self.secure.as_ref().is_some_and(|secure| secure.has_roamed)
    }

    /// The name that is to be resolved, if it was given one and no address.
    pub(crate) fn dns_name(&self) -> Option<&HostPort> {
        self.place
            .as_ref()
            .filter(|place| place.literal().is_none())
    }

    /// Whether all but prefixes that can be configured of a peer is as in `other`.
    pub(super) fn is_configured_as(&self, other: &Self) -> bool {
        let configured = |peer: &Self| {
            let secure = peer.secure.as_ref();
            secure.map(|it| (it.preshared_key.clone(), it.persistent_keepalive))
        };
        self.place == other.place && configured(self) == configured(other)
    }

    /// Whether `endpoint` is the address that it was given.
    pub(crate) fn was_given(&self, endpoint: SocketAddr) -> bool {
        let given = self.place.as_ref().and_then(HostPort::literal);
        given.is_some_and(|given| given.ip() == endpoint.ip())
    }

    /// Its address, with the port that was learned, if one was.
    pub(crate) fn endpoint_learned(&self) -> Option<SocketAddr> {
        let mut endpoint = self.endpoint?;
        let port = self.learned_port.unwrap_or(endpoint.port());
        endpoint.set_port(port);
        Some(endpoint)
    }

    /// The address of this host that it sends to, if it has a key and is where it last sent
    /// from.
    pub(crate) fn called(&self) -> Option<IpAddr> {
        let to = self.secure.as_ref()?.sessions.endpoint.load();
        let to = to.as_deref().filter(|to| Some(to.address) == self.endpoint);
        to?.source
    }

    /// Where its datagrams go now, if anywhere.
    pub(crate) fn endpoint_in_use(&self) -> Option<SocketAddr> {
        self.endpoint_learned().filter(|_| !self.is_suspended)
    }
}
