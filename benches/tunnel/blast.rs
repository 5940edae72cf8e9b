//! Floods of host `b` with datagrams that nobody wants.

use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastvpn::error::{Error, Result};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, MultiHeaders, sendmmsg};
use testbed::Namespace;
use testbed::wireguard::{INITIATION_BYTES, Key, forged_handshake};

use crate::targets::{STRANGER, STRANGERS, UNDERLAY};
use crate::traffic::{Flooder, INITIATIONS_PPS};

/// Bytes of a datagram that is not a packet.
const GARBAGE_BYTES: usize = 64;

/// The first byte of a data message of WireGuard's.
const DATA: u8 = 4;

/// How many different initiations there are. Their codes take longer than sending them.
const INITIATIONS: usize = 1024;

/// How many different data messages.
const DATA_MESSAGES: u32 = 1024;

/// Datagrams per system call, where there is a rate.
const BATCH: usize = 32;

/// What is sent, from where, and how often.
pub struct Blast {
    sources: Vec<Ipv4Addr>,
    datagrams: Vec<Vec<u8>>,
    /// In a second; as many as one thread can send without it.
    rate_pps: Option<u64>,
}

/// Addresses of host `a` that no link knows.
pub fn strangers() -> impl Iterator<Item = Ipv4Addr> {
    let first = u32::from(STRANGER);
    (first..first + u32::from(STRANGERS)).map(Ipv4Addr::from)
}

impl Blast {
    /// What this flooder sends; `None` if it lacks host `b`'s key.
    pub fn new(by: Flooder, public_key: Option<&Key>) -> Option<Self> {
        let garbage = || vec![vec![0; GARBAGE_BYTES]];
        let (sources, datagrams, rate_pps) = match by {
            Flooder::Peer => (vec![UNDERLAY[0]], garbage(), None),
            Flooder::Stranger => (vec![STRANGER], garbage(), None),
            Flooder::Initiators => (
                strangers().collect(),
                initiations(public_key?),
                Some(INITIATIONS_PPS),
            ),
            Flooder::Garbage => {
                // Only where it means anything.
                public_key?;
                (strangers().collect(), data_messages(), None)
            }
        };
        Some(Self {
            sources,
            datagrams,
            rate_pps,
        })
    }

    /// Sends to a port of host `b`'s until it is done.
    ///
    /// # Errors
    /// When a socket cannot be opened, or a rate is not kept by half.
    pub fn send(&self, host: &Namespace, port: u16, done: &AtomicBool) -> Result<()> {
        let cannot = |cause| Error::os(format!("cannot flood port {port}"), cause);
        let open = |source: &Ipv4Addr| -> io::Result<UdpSocket> {
            let socket = host.run(|| UdpSocket::bind((*source, 0)))?;
            socket.connect((UNDERLAY[1], port))?;
            Ok(socket)
        };
        let sockets: io::Result<Vec<_>> = self.sources.iter().map(open).collect();
        let sockets = sockets.map_err(cannot)?;
        match self.rate_pps {
            None => {
                flat_out(&sockets, &self.datagrams, done);
                Ok(())
            }
            Some(rate_pps) => self.paced(&sockets, rate_pps, done),
        }
    }

    /// From each socket in turn, a batch when it is due.
    fn paced(&self, sockets: &[UdpSocket], rate_pps: u64, done: &AtomicBool) -> Result<()> {
        let start = Instant::now();
        let mut sent = 0u64;
        let mut headers = MultiHeaders::<()>::preallocate(BATCH, None);
        let batches: Vec<Vec<_>> = self
            .datagrams
            .chunks_exact(BATCH)
            .map(|batch| batch.iter().map(|bytes| [IoSlice::new(bytes)]).collect())
            .collect();
        let turns = sockets.iter().cycle().zip(batches.iter().cycle());
        for (socket, batch) in turns {
            while sent > (start.elapsed().as_secs_f64() * rate_pps as f64) as u64 {
                thread::sleep(Duration::from_micros(100));
            }
            if done.load(Ordering::Relaxed) {
                break;
            }
            let fd = socket.as_raw_fd();
            let result = sendmmsg(
                fd,
                &mut headers,
                batch,
                [None; BATCH],
                [],
                MsgFlags::empty(),
            );
            match result {
                Ok(results) => sent += results.count() as u64,
                // A refusal is what a closed port is for.
                Err(Errno::ECONNREFUSED) => sent += 1,
                Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => return Err(Error::os("cannot flood", errno.into())),
            }
        }
        let due = start.elapsed().as_secs_f64() * rate_pps as f64;
        match sent as f64 > due / 2.0 {
            true => Ok(()),
            false => Err(Error::new(format!(
                "the flood was slow: {sent} datagrams instead of {due:.0}"
            ))),
        }
    }
}

fn flat_out(sockets: &[UdpSocket], datagrams: &[Vec<u8>], done: &AtomicBool) {
    let turns = sockets.iter().cycle().zip(datagrams.iter().cycle());
    for (socket, datagram) in turns {
        if done.load(Ordering::Relaxed) {
            break;
        }
        // A refusal is what a closed port is for.
        let _ = socket.send(datagram);
    }
}

/// Of different sessions, none of which there is, as far as chance goes.
fn data_messages() -> Vec<Vec<u8>> {
    let one = |number: u32| {
        let mut message = vec![0; GARBAGE_BYTES];
        message[0] = DATA;
        // Spread over all indices.
        message[4..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9).to_le_bytes());
        message
    };
    (1..=DATA_MESSAGES).map(one).collect()
}

/// Different ones, so that no cache helps.
fn initiations(public_key: &Key) -> Vec<Vec<u8>> {
    let one = |number: u32| forged_handshake(public_key, INITIATION_BYTES, &number.to_le_bytes());
    (0..INITIATIONS as u32).map(one).collect()
}

#[cfg(test)]
mod tests {
    use boringtun::noise::rate_limiter::RateLimiter;
    use boringtun::noise::{Packet, Tunn};

    use super::*;

    /// Or the flood would cost its victim next to nothing.
    #[test]
    fn initiations_pass_the_first_check() {
        let public = [7; 32];
        let limiter = RateLimiter::new(&public.into(), 10);
        let mut answer = [0; INITIATION_BYTES];
        for message in initiations(&public).iter().take(3) {
            let checked = limiter.verify_packet(None, message, &mut answer);
            assert!(matches!(checked, Ok(Packet::HandshakeInit(_))));
        }
        let others = initiations(&[8; 32]);
        let checked = limiter.verify_packet(None, &others[0], &mut answer);
        assert!(checked.is_err());
    }

    #[test]
    fn initiations_need_a_key_and_come_from_many_addresses() {
        assert!(Blast::new(Flooder::Initiators, None).is_none());
        let blast = Blast::new(Flooder::Initiators, Some(&[7; 32])).unwrap();
        assert_eq!(blast.sources.len(), usize::from(STRANGERS));
        assert_eq!(blast.datagrams.len() % BATCH, 0);
        assert!(
            blast
                .datagrams
                .iter()
                .all(|one| one.len() == INITIATION_BYTES)
        );
        assert_ne!(blast.datagrams[0], blast.datagrams[1]);
        assert!(Blast::new(Flooder::Garbage, None).is_none());
        let garbage = Blast::new(Flooder::Garbage, Some(&[7; 32])).unwrap();
        for one in &garbage.datagrams {
            let parsed = Tunn::parse_incoming_packet(one);
            assert!(matches!(parsed, Ok(Packet::PacketData(_))));
        }
        let peer = Blast::new(Flooder::Peer, None).unwrap();
        assert_eq!(peer.sources, [UNDERLAY[0]]);
    }
}
