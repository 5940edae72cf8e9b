//! Asks the other host itself whether a tunnel answers there.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use crate::config::DEFAULT_PORT;
use crate::io::random;
use crate::packet::ip::canonical;
use crate::packet::probe::{Kind, Probe};

/// How long to wait before asking again.
const STEP: Duration = Duration::from_millis(100);

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A fastvpn answers.
    Replied {
        /// From there.
        from: SocketAddr,
        /// And has seen this host's [`DEFAULT_PORT`] as this one.
        seen_port: u16,
    },
    /// Nothing receives on the port there.
    Refused,
    /// Nobody says anything.
    Silent,
    /// Another process has the port that answers come to.
    NotAsked,
}

/// Asks `peer` from the address `local`, for as long as `time`. A tunnel answers
/// its own peers alone, and to the port at which it has them: the default one is
/// taken for that.
pub fn ask(peer: SocketAddr, local: IpAddr, time: Duration) -> Answer {
    // A socket that is connected hears of refusals, and only of answers from
    // where it is connected to; so there are two.
    let listening = UdpSocket::bind((local, DEFAULT_PORT)).ok();
    let no_answer = match listening {
        Some(_) => Answer::Silent,
        None => Answer::NotAsked,
    };
    let connected = UdpSocket::bind((local, 0)).and_then(|socket| {
        socket.connect(peer)?;
        socket.set_read_timeout(Some(STEP))?;
        Ok(socket)
    });
    let (Ok(connected), Ok(nonce)) = (connected, random()) else {
        return no_answer;
    };
    let probe = |kind| Probe { kind, nonce }.to_packet(0);
    let started = Instant::now();
    while started.elapsed() < time {
        if let Some(listening) = &listening {
            let request = Kind::Request { port: DEFAULT_PORT };
            let _ = listening.send_to(&probe(request), peer);
        }
        let _ = connected.send(&probe(Kind::Size));
        let refused = connected.recv(&mut [0; 64]);
        if refused.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
            return Answer::Refused;
        }
        if let Some(replied) = listening.as_ref().and_then(|socket| reply(socket, nonce)) {
            return replied;
        }
    }
    no_answer
}

/// The reply, if it has come.
fn reply(socket: &UdpSocket, nonce: u64) -> Option<Answer> {
    socket.set_nonblocking(true).ok()?;
    let mut buffer = [0; 2048];
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        match Probe::from_packet(&buffer[..length]) {
            Some(probe) if probe.nonce == nonce => {
                if let Kind::Reply { port: seen_port } = probe.kind {
                    let from = canonical(from);
                    return Some(Answer::Replied { from, seen_port });
                }
            }
            _ => {}
        }
    }
    None
}
