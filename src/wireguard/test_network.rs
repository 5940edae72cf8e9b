//! Hosts without sockets, on a network of virtual time that loses, repeats and reorders what
//! it is told to. Each host is an [`Exchange`] and a stand-in for its workers. Whatever is
//! sent is checked: no counter is used twice, and initiations keep their distance.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use super::counters::HandshakeCounters;
use super::exchange::{Exchange, Latest};
use super::outside::{Now, Outside};
use super::peers::{PeerConfig, PeerTimestamps};
use super::timers::Intervals;
use crate::wire::Endpoint;
use crate::wire::wireguard::keys::{PresharedKey, PrivateKey, PublicKey};
use crate::wire::wireguard::message::{DATA, DATA_HEADER_BYTES, INITIATION};
use crate::wire::wireguard::session::{OVERHEAD_BYTES, Session};
use crate::wire::wireguard::sessions::{PeerSessions, SessionMap};

pub(super) const SECOND_NS: u64 = 1_000_000_000;

/// When a network's time begins.
const START_NS: u64 = 1 << 50;

/// Bytes of a packet: a number that tells it from others, in a padded packet.
const PACKET_BYTES: usize = 16;

/// What the network does to datagrams.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weather {
    pub loss_percent: u64,
    pub duplicate_percent: u64,
    /// Each takes a time up to this, so that they overtake each other.
    pub delay_max_ns: u64,
}

impl Weather {
    pub(super) const FAIR: Self = Self {
        loss_percent: 0,
        duplicate_percent: 0,
        delay_max_ns: 20_000_000,
    };
}

/// A datagram on its way.
#[derive(Clone, Debug)]
pub(super) struct Datagram {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub bytes: Vec<u8>,
}

impl Datagram {
    pub(super) fn kind(&self) -> u8 {
        self.bytes[0]
    }

    pub(super) fn is_keepalive(&self) -> bool {
        self.kind() == DATA && self.bytes.len() == OVERHEAD_BYTES
    }
}

/// What a host's exchange has done.
#[derive(Debug, Default)]
pub(super) struct Output {
    pub sent: Vec<(SocketAddr, Vec<u8>)>,
    pub is_woken: bool,
    pub passed_on: usize,
}

impl Outside for Output {
    fn send(&mut self, to: Endpoint, datagram: &[u8]) {
        self.sent.push((to.address, datagram.to_vec()));
    }

    fn wake_workers(&mut self) {
        self.is_woken = true;
    }

    fn pass_on(&mut self, _: Endpoint, _: &mut [u8]) {
        self.passed_on += 1;
    }
}

/// What a host knows of another.
pub(super) struct Far {
    pub config: PeerConfig,
    /// Numbers of packets that wait for a session.
    held: Vec<u64>,
}

pub(super) struct Host {
    pub exchange: Exchange,
    pub private_key: PrivateKey,
    pub address: SocketAddr,
    pub map: Arc<SessionMap>,
    pub counters: Arc<HandshakeCounters>,
    pub latest: Arc<Latest>,
    /// By their hosts.
    pub peers: BTreeMap<usize, Far>,
    /// Numbers of the packets that have arrived.
    pub received: HashSet<u64>,
    /// Its workers drop what they hold, and do not send it.
    pub has_given_up: bool,
}

impl Host {
    fn new(number: usize) -> Self {
        let private_key = PrivateKey::generate();
        let map = Arc::new(SessionMap::new(512));
        let (counters, latest) = (Arc::default(), Arc::default());
        Self {
            exchange: exchange(&private_key, &map, &counters, &latest),
            private_key,
            address: (Ipv4Addr::new(192, 0, 2, number as u8 + 1), 51820).into(),
            map,
            counters,
            latest,
            peers: BTreeMap::new(),
            received: HashSet::new(),
            has_given_up: false,
        }
    }

    /// What it shares with its workers about a peer.
    pub(super) fn sessions(&self, peer: usize) -> &Arc<PeerSessions> {
        &self.peers[&peer].config.sessions
    }

    pub(super) fn current(&self, peer: usize) -> Option<Arc<Session>> {
        self.sessions(peer).current.load_full()
    }

    pub(super) fn configs(&self) -> Vec<PeerConfig> {
        self.peers.values().map(|far| far.config.clone()).collect()
    }

    /// How many indices are taken in its map.
    pub(super) fn indices(&self) -> usize {
        self.map.taken_count()
    }
}

fn exchange(
    private_key: &PrivateKey,
    map: &Arc<SessionMap>,
    counters: &Arc<HandshakeCounters>,
    latest: &Arc<Latest>,
) -> Exchange {
    Exchange::new(
        Intervals::STANDARD,
        Some(private_key.clone()),
        Arc::clone(map),
        Arc::clone(counters),
        Arc::clone(latest),
    )
}

pub(super) struct Network {
    pub hosts: Vec<Host>,
    pub weather: Weather,
    /// Everything that was sent, whether it arrived or not, and when.
    pub log: Vec<(u64, Datagram)>,
    /// How often hosts have looked at their timers.
    pub ticks: usize,
    now_ns: u64,
    /// What is on its way, by the time of its arrival and a number.
    air: BTreeMap<(u64, u64), Datagram>,
    random: Cell<u64>,
    numbers: u64,
    nonces: HashSet<(SocketAddr, u32, u64)>,
    initiations: HashMap<(SocketAddr, SocketAddr), u64>,
}

impl Network {
    /// Hosts that all know each other, and where the others are.
    pub(super) fn new(count: usize, seed: u64) -> Self {
        let mut network = Self {
            hosts: (0..count).map(Host::new).collect(),
            weather: Weather::FAIR,
            log: Vec::new(),
            ticks: 0,
            now_ns: START_NS,
            air: BTreeMap::new(),
            random: Cell::new(seed | 1),
            numbers: 0,
            nonces: HashSet::new(),
            initiations: HashMap::new(),
        };
        for near in 0..count {
            for far in (0..count).filter(|far| *far != near) {
                let config = network.config_of(far, Some(network.hosts[far].address));
                let far_host = Far {
                    config,
                    held: Vec::new(),
                };
                network.hosts[near].peers.insert(far, far_host);
            }
            network.configure(near);
        }
        network
    }

    /// A host as another has it configured.
    pub(super) fn config_of(&self, host: usize, endpoint: Option<SocketAddr>) -> PeerConfig {
        let sessions = PeerSessions::default();
        sessions
            .endpoint
            .store(endpoint.map(|to| Arc::new(to.into())));
        PeerConfig {
            public_key: self.hosts[host].private_key.public(),
            preshared_key: PresharedKey::default(),
            is_suspended: false,
            persistent_keepalive: None,
            sessions: Arc::new(sessions),
        }
    }

    pub(super) fn now(&self) -> Now {
        let passed = Duration::from_nanos(self.now_ns - START_NS);
        Now {
            ns: self.now_ns,
            wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 30) + passed,
        }
    }

    /// Seconds since the beginning.
    pub(super) fn seconds(&self) -> f64 {
        (self.now_ns - START_NS) as f64 / SECOND_NS as f64
    }

    /// Has a host do something, and sends what comes of it.
    pub(super) fn with<T>(
        &mut self,
        host: usize,
        work: impl FnOnce(&mut Exchange, Now, &mut Output) -> T,
    ) -> T {
        let (now, mut output) = (self.now(), Output::default());
        let result = work(&mut self.hosts[host].exchange, now, &mut output);
        let from = self.hosts[host].address;
        for (to, bytes) in output.sent {
            self.launch(Datagram { from, to, bytes });
        }
        if output.is_woken {
            self.release(host);
        }
        result
    }

    /// Tells a host of its peers as they are now.
    pub(super) fn configure(&mut self, host: usize) {
        let configs = self.hosts[host].configs();
        self.with(host, |exchange, now, out| {
            exchange.set_peers(now, configs, out);
        });
    }

    /// Ends a host's thread, and starts it anew. What waits is lost.
    pub(super) fn restart(&mut self, host: usize) {
        self.begin_anew(host, Vec::new());
    }

    /// The same with what the first thread knew of initiations.
    pub(super) fn take_over(&mut self, host: usize) {
        let earlier = self.hosts[host].exchange.timestamps();
        self.begin_anew(host, earlier);
    }

    fn begin_anew(&mut self, host: usize, earlier: Vec<PeerTimestamps>) {
        let it = &mut self.hosts[host];
        it.exchange = exchange(&it.private_key, &it.map, &it.counters, &it.latest);
        it.exchange.go_on_after(earlier);
        for far in it.peers.values_mut() {
            far.held.clear();
            let sessions = PeerSessions::default();
            let endpoint = far.config.sessions.endpoint.load_full();
            sessions.endpoint.store(endpoint);
            far.config.sessions = Arc::new(sessions);
        }
        let from = it.address;
        self.initiations.retain(|(sender, _), _| *sender != from);
        self.configure(host);
    }

    /// A packet out of `near` to `far`. Returns its number.
    pub(super) fn send(&mut self, near: usize, far: usize) -> u64 {
        self.numbers += 1;
        let number = self.numbers;
        self.send_numbered(near, far, number);
        number
    }

    fn send_numbered(&mut self, near: usize, far: usize, number: u64) {
        let now_ns = self.now_ns;
        let shared = Arc::clone(self.hosts[near].sessions(far));
        let Some(session) = shared.usable(now_ns).clone() else {
            let held = &mut self.hosts[near].peers.get_mut(&far).unwrap().held;
            held.push(number);
            if !shared.is_wanted.swap(true, Ordering::AcqRel) {
                self.with(near, |exchange, now, out| {
                    exchange.request(now, &shared, out);
                });
            }
            return;
        };
        let mut bytes = vec![0; OVERHEAD_BYTES + PACKET_BYTES];
        bytes[DATA_HEADER_BYTES..][..8].copy_from_slice(&number.to_le_bytes());
        session
            .seal(&mut bytes, OVERHEAD_BYTES + PACKET_BYTES)
            .unwrap();
        shared.note_sent(now_ns, true);
        let to = shared.address().unwrap();
        let from = self.hosts[near].address;
        self.launch(Datagram { from, to, bytes });
    }

    /// The workers of a host send what they hold.
    fn release(&mut self, host: usize) {
        let peers = self.hosts[host].peers.iter_mut();
        let held = peers.map(|(far, it)| (*far, std::mem::take(&mut it.held)));
        let held: Vec<_> = held.collect();
        if self.hosts[host].has_given_up {
            return;
        }
        for (far, numbers) in held {
            for number in numbers {
                self.send_numbered(host, far, number);
            }
        }
    }

    /// Puts a datagram into the air, or not.
    pub(super) fn launch(&mut self, datagram: Datagram) {
        self.check(&datagram);
        self.log.push((self.now_ns, datagram.clone()));
        if self.chance() % 100 < self.weather.loss_percent {
            return;
        }
        let is_double = self.chance() % 100 < self.weather.duplicate_percent;
        for _ in 0..1 + usize::from(is_double) {
            let delay_ns = 1 + self.chance() % self.weather.delay_max_ns.max(1);
            self.numbers += 1;
            let at = (self.now_ns + delay_ns, self.numbers);
            self.air.insert(at, datagram.clone());
        }
    }

    /// What holds for all that an honest host sends.
    fn check(&mut self, datagram: &Datagram) {
        let Some(host) = self
            .hosts
            .iter()
            .position(|host| host.address == datagram.from)
        else {
            return;
        };
        match datagram.kind() {
            DATA => {
                let index = u32::from_le_bytes(datagram.bytes[4..8].try_into().unwrap());
                let counter = u64::from_le_bytes(datagram.bytes[8..16].try_into().unwrap());
                let is_new = self.nonces.insert((datagram.from, index, counter));
                assert!(is_new, "host {host} has used a counter twice");
            }
            INITIATION => {
                let pair = (datagram.from, datagram.to);
                if let Some(last_ns) = self.initiations.insert(pair, self.now_ns) {
                    let apart_ns = self.now_ns - last_ns;
                    assert!(apart_ns >= 5 * SECOND_NS, "initiations {apart_ns} ns apart");
                }
            }
            _ => {}
        }
    }

    /// Lets an initiation follow soon: the host has reason to.
    pub(super) fn allow_initiation(&mut self) {
        self.initiations.clear();
    }

    /// A random number.
    fn chance(&self) -> u64 {
        let mut state = self.random.get();
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        self.random.set(state);
        state >> 16
    }

    /// Lets time pass.
    pub(super) fn run(&mut self, seconds: f64) {
        let end_ns = self.now_ns + (seconds * SECOND_NS as f64) as u64;
        loop {
            let arrival_ns = self.air.first_key_value().map(|((at_ns, _), _)| *at_ns);
            let ticks = self.hosts.iter().enumerate();
            let ticks = ticks.filter_map(|(host, it)| Some((it.exchange.next_ns()?, host)));
            let tick = ticks.min();
            let tick_ns = tick.map(|(at_ns, _)| at_ns);
            let Some(next_ns) = [arrival_ns, tick_ns].into_iter().flatten().min() else {
                break;
            };
            if next_ns > end_ns {
                break;
            }
            self.now_ns = self.now_ns.max(next_ns);
            match tick {
                Some((at_ns, host)) if arrival_ns.is_none_or(|arrival_ns| at_ns < arrival_ns) => {
                    self.ticks += 1;
                    self.with(host, |exchange, now, out| exchange.tick(now, out));
                }
                _ => {
                    if let Some((_, datagram)) = self.air.pop_first() {
                        self.deliver(datagram);
                    }
                }
            }
        }
        self.now_ns = end_ns;
    }

    /// A datagram arrives: at the handshake socket, or at a worker.
    pub(super) fn deliver(&mut self, mut datagram: Datagram) {
        let hosts = &mut self.hosts;
        let Some(host) = hosts.iter().position(|host| host.address == datagram.to) else {
            return;
        };
        if datagram.kind() != DATA {
            return self.with(host, |exchange, now, out| {
                exchange.receive(now, datagram.from.into(), &mut datagram.bytes, out);
            });
        }
        let index = u32::from_le_bytes(datagram.bytes[4..8].try_into().unwrap());
        let Some(session) = hosts[host].map.get(index).clone() else {
            return;
        };
        if !session.may_receive(self.now_ns) {
            return;
        }
        let Ok(packet) = session.open(&mut datagram.bytes) else {
            return;
        };
        let peer = Arc::clone(session.peer());
        peer.note_sender(datagram.from.into());
        peer.note_received(self.now_ns, !packet.is_empty());
        if let Some(number) = packet.first_chunk() {
            let is_new = hosts[host].received.insert(u64::from_le_bytes(*number));
            assert!(is_new, "a packet was received twice");
        }
        if peer.confirm(&session) {
            self.release(host);
            self.with(host, |exchange, now, out| {
                exchange.request(now, &peer, out);
            });
        }
    }

    /// How many datagrams of a kind were sent from a host.
    pub(super) fn count(&self, host: usize, kind: u8) -> usize {
        let from = self.hosts[host].address;
        let of_kind = |one: &&(u64, Datagram)| one.1.from == from && one.1.kind() == kind;
        self.log.iter().filter(of_kind).count()
    }

    /// Whether the sessions that two hosts send in are such as the other receives in.
    pub(super) fn agree(&self, a: usize, b: usize) -> bool {
        let is_known = |near: usize, far: usize| {
            let session = self.hosts[near].sessions(far).usable(self.now_ns).clone();
            session.is_some_and(|session| {
                let map = &self.hosts[far].map;
                map.get(session.remote_index()).is_some()
            })
        };
        is_known(a, b) && is_known(b, a)
    }

    /// The key that a host is known by.
    pub(super) fn key(&self, host: usize) -> PublicKey {
        self.hosts[host].private_key.public()
    }
}
