//! Many peers of a host that speaks WireGuard, which have sessions and are silent.

use std::fmt::Write as _;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use fastvpn::error::{Error, Result};
use testbed::Namespace;
use testbed::wireguard::{self, Key};

/// How far apart handshakes begin: a host under load would ask for cookies.
const INTERVAL: Duration = Duration::from_millis(7);

/// How long an answer may take.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Address of the first one's prefix; the others follow.
const PREFIX_START: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 0);

/// Room for any message of a handshake.
const MESSAGE_BYTES_MAX: usize = 256;

/// Their private keys.
pub(super) struct Crowd(Vec<Key>);

impl Crowd {
    /// So many peers.
    pub(super) fn new(count: u32) -> Result<Self> {
        let keys = (0..count).map(|_| wireguard::random_key());
        Ok(Self(keys.collect::<Result<_>>()?))
    }

    /// What a host's configuration file says of them.
    pub(super) fn configuration(&self) -> String {
        let mut text = String::new();
        for (private, number) in self.0.iter().zip(0..) {
            let public = wireguard::base64(&wireguard::public_key(private));
            let prefix = Ipv4Addr::from(u32::from(PREFIX_START) + number);
            // Writing to a string does not fail.
            let _ = write!(
                text,
                "[[peer]]\npublic-key = \"{public}\"\nprefixes = [\"{prefix}/32\"]\n"
            );
        }
        text
    }

    /// Makes a session of each with the host of this key, which listens on `to`.
    pub(super) fn call(&self, from: &Namespace, to: SocketAddr, public_key: &Key) -> Result<()> {
        let open = || -> io::Result<UdpSocket> {
            let socket = from.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(ANSWER_MAX))?;
            Ok(socket)
        };
        let cannot = |cause| Error::os(format!("cannot shake hands with {to}"), cause);
        let socket = open().map_err(cannot)?;
        for (private, number) in self.0.iter().zip(0..) {
            let start = Instant::now();
            let tunnel = Tunn::new(
                (*private).into(),
                (*public_key).into(),
                None,
                None,
                number,
                None,
            );
            shake_hands(&socket, tunnel).map_err(cannot)?;
            thread::sleep(INTERVAL.saturating_sub(start.elapsed()));
        }
        Ok(())
    }
}

/// Sends an initiation, and with what comes back the first message of the session.
fn shake_hands(socket: &UdpSocket, mut tunnel: Tunn) -> io::Result<()> {
    let (mut out, mut answer) = ([0; MESSAGE_BYTES_MAX], [0; MESSAGE_BYTES_MAX]);
    let send = |result: TunnResult<'_>| match result {
        TunnResult::WriteToNetwork(message) => socket.send(message).map(drop),
        other => Err(io::Error::other(format!("{other:?}"))),
    };
    send(tunnel.format_handshake_initiation(&mut out, false))?;
    let bytes = socket.recv(&mut answer)?;
    send(tunnel.decapsulate(None, &answer[..bytes], &mut out))
}
