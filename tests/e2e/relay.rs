//! A firewall or NAT between two hosts, in user space: it passes UDP datagrams
//! on as the one or the other would, and notes which ports they came from.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use fastvpn::error::{Error, Result};
use fastvpn::packet::probe::Probe;
use ipnet::IpNet;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use testbed::Namespace;

use crate::support::{enlarge_receive_buffer, fail, link};

/// Addresses of host A and host B.
pub const HOSTS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 77, 1, 2), Ipv4Addr::new(10, 77, 2, 2)];

/// Where each host finds the other one: the relay's address on its side.
pub const FACES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 77, 1, 1), Ipv4Addr::new(10, 77, 2, 1)];

/// The port that both tunnels listen on.
pub const PORT: u16 = 8285;

/// The first port that a rewriting relay gives host B's datagrams.
pub const REWRITTEN: u16 = 20_000;

/// What a relay does with host B's ports.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ports {
    /// Leaves them.
    Kept,
    /// Gives each another one, and lets in only what goes there.
    Rewritten,
}

/// Two hosts with a relay between them. They see its addresses alone.
pub struct Relay {
    /// Host A.
    pub a: Namespace,
    /// Host B: the one behind the firewall or NAT.
    pub b: Namespace,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// To host B only what answers it: from a port that it has sent to, to the
    /// port that it has sent from.
    is_firewall: AtomicBool,
    /// Datagrams that were no probes, by sending host and its port.
    sent: Mutex<BTreeMap<(usize, u16), u64>>,
}

impl Relay {
    /// Starts one.
    pub fn start(ports: Ports, is_firewall: bool) -> Result<Self> {
        let (a, b, middle) = (Namespace::new()?, Namespace::new()?, Namespace::new()?);
        let names = ["side0", "side1"];
        for (side, host) in [&a, &b].into_iter().enumerate() {
            testbed::join(host, &middle, testbed::UNDERLAY_NAME, names[side])?;
            for (namespace, name, address) in [
                (host, testbed::UNDERLAY_NAME, HOSTS[side]),
                (&middle, names[side], FACES[side]),
            ] {
                let index = link(namespace, name)?.index;
                let mut netlink = namespace.netlink()?;
                netlink.set_up(index)?;
                netlink.add_address(index, IpNet::new_assert(address.into(), 24))?;
            }
        }
        let shared = Arc::new(Shared::default());
        shared.is_firewall.store(is_firewall, Ordering::Relaxed);
        let for_thread = Arc::clone(&shared);
        let carry = move || Carrier::new(ports, for_thread)?.carry();
        let thread = testbed::spawn_thread(&middle, "relay", carry)?;
        Ok(Self {
            a,
            b,
            shared,
            thread: Some(thread),
        })
    }

    /// Admits to host B only what answers it, from now on.
    pub fn close(&self) {
        self.shared.is_firewall.store(true, Ordering::Relaxed);
    }

    /// The ports that a host has sent anything but probes from, since the last
    /// call.
    pub fn take_ports(&self, host: usize) -> BTreeSet<u16> {
        let mut sent = self
            .shared
            .sent
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let ports = sent.keys().filter(|(from, _)| *from == host);
        let ports = ports.map(|(_, port)| *port).collect();
        sent.retain(|(from, _), _| *from != host);
        ports
    }

    /// Ends it; an error if it has ended before.
    pub fn stop(mut self) -> Result<()> {
        self.shared.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(Ok(()))) => Ok(()),
            Some(Ok(Err(cause))) => Err(Error::os("the relay failed", cause)),
            _ => fail("the relay panicked"),
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

/// A port of one host as the other one sees it.
struct Face {
    /// The host that sees it.
    side: usize,
    /// The other host's own port.
    port: u16,
    socket: UdpSocket,
}

struct Carrier {
    ports: Ports,
    shared: Arc<Shared>,
    faces: Vec<Face>,
    /// Places of faces by their side and port.
    places: HashMap<(usize, u16), usize>,
    /// Ports of host B, and those of host A that it has sent to from there.
    flows: BTreeSet<(u16, u16)>,
}

impl Carrier {
    fn new(ports: Ports, shared: Arc<Shared>) -> io::Result<Self> {
        let mut carrier = Self {
            ports,
            shared,
            faces: Vec::new(),
            places: HashMap::new(),
            flows: BTreeSet::new(),
        };
        // Host A, and host B unless it has to speak first.
        carrier.face(1, PORT)?;
        if ports == Ports::Kept {
            carrier.face(0, PORT)?;
        }
        Ok(carrier)
    }

    /// The place of the face that shows `side` this port of the other host.
    fn face(&mut self, side: usize, port: u16) -> io::Result<usize> {
        if let Some(&place) = self.places.get(&(side, port)) {
            return Ok(place);
        }
        let place = self.faces.len();
        let shown = match (self.ports, side) {
            (Ports::Rewritten, 0) => REWRITTEN + place as u16,
            _ => port,
        };
        let socket = UdpSocket::bind((FACES[side], shown))?;
        socket.set_nonblocking(true)?;
        enlarge_receive_buffer(&socket, 4 << 20);
        self.faces.push(Face { side, port, socket });
        self.places.insert((side, port), place);
        Ok(place)
    }

    fn carry(mut self) -> io::Result<()> {
        while !self.shared.stop.load(Ordering::Relaxed) {
            let sockets = self.faces.iter().map(|face| face.socket.as_fd());
            let mut ready: Vec<_> = sockets
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
                .collect();
            poll(&mut ready, PollTimeout::from(20u8))?;
            let ready: Vec<_> = ready.iter().map(|fd| fd.any() == Some(true)).collect();
            for (place, _) in ready.iter().enumerate().filter(|(_, is_ready)| **is_ready) {
                self.carry_from(place)?;
            }
        }
        Ok(())
    }

    fn carry_from(&mut self, place: usize) -> io::Result<()> {
        let mut buffer = [0; 2048];
        for _ in 0..64 {
            let Face { side, port, socket } = &self.faces[place];
            let (side, port) = (*side, *port);
            let (length, from) = match socket.recv_from(&mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // What the network says of earlier datagrams.
                Err(_) => continue,
            };
            let datagram = &buffer[..length];
            if Probe::from_packet(datagram).is_none() {
                let sent = self.shared.sent.lock();
                let mut sent = sent.unwrap_or_else(PoisonError::into_inner);
                *sent.entry((side, from.port())).or_default() += 1;
            }
            if side == 1 {
                self.flows.insert((from.port(), port));
            } else if self.shared.is_firewall.load(Ordering::Relaxed)
                && !self.flows.contains(&(port, from.port()))
            {
                continue;
            }
            let out = self.face(1 - side, from.port())?;
            let to = SocketAddr::from((HOSTS[1 - side], port));
            // A full buffer loses it, as on any path.
            let _ = self.faces[out].socket.send_to(datagram, to);
        }
        Ok(())
    }
}
