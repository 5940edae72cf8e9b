//! A tunnel as one writes it first: one packet per system call, a thread per
//! direction, no offloads. What fastvpn's design is to be measured by.
//!
//! The tunnel's ends are this very program again, with hidden arguments.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Command;
use std::thread;

use fastvpn::error::{Error, Result};
use fastvpn::host::link::{LinkConfig, bring_up};
use fastvpn::host::netlink::Netlink;
use ipnet::IpNet;
use testbed::Pair;
use tun_rs::{DeviceBuilder, SyncDevice};

use super::{Link, TUNNEL, TUNNEL_PREFIX, Target, UNDERLAY, UNDERLAY_MTU_BYTES, daemon};

/// First argument of this program when it is to be a tunnel's end; then comes
/// which one, `0` or `1`.
pub const FORWARDER_ARGUMENT: &str = "one-packet-forwarder";

const TUN_NAME: &str = "onepacket0";
const PORT: u16 = 8285;

/// UDP and IPv4 headers.
const OVERHEAD_BYTES: u32 = 28;

/// The kernel's default for TUN devices.
const TXQUEUELEN: u32 = 500;

/// More than any packet.
const BUFFER_BYTES: usize = 2048;

/// One packet per system call.
pub struct OnePacket;

impl Target for OnePacket {
    fn key(&self) -> &'static str {
        "one-packet"
    }

    fn title(&self) -> &'static str {
        "one packet per call"
    }

    fn detail(&self) -> String {
        format!(
            "read, sendto and recvfrom, write; a thread per direction, MTU {}",
            UNDERLAY_MTU_BYTES - OVERHEAD_BYTES
        )
    }

    fn missing(&self) -> Option<String> {
        None
    }

    fn start(&self, pair: &Pair) -> Result<Link> {
        let program = std::env::current_exe()
            .map_err(|cause| Error::os("cannot find the path of this program", cause))?;
        let commands = ["0", "1"].map(|own| {
            let mut command = Command::new(&program);
            command.args([FORWARDER_ARGUMENT, own]);
            command
        });
        daemon::start(pair, commands)
    }
}

/// Forwards packets at host `own` until it is killed.
///
/// # Errors
/// When the device or the socket cannot be made, or fails for good.
pub fn forward(own: &str) -> Result<()> {
    let own = match own {
        "0" => 0,
        "1" => 1,
        _ => return Err(Error::new(format!("{own} is not an end of a tunnel"))),
    };
    let device = DeviceBuilder::new()
        .name(TUN_NAME)
        .enable(false)
        .build_sync()
        .map_err(|cause| Error::os(format!("cannot create TUN device {TUN_NAME}"), cause))?;
    let config = LinkConfig {
        addresses: vec![IpNet::new_assert(TUNNEL[own].into(), TUNNEL_PREFIX)],
        mtu_bytes: UNDERLAY_MTU_BYTES - OVERHEAD_BYTES,
        txqueuelen: TXQUEUELEN,
    };
    let mut netlink = Netlink::open()?;
    let index = netlink.link_index(TUN_NAME)?;
    bring_up(
        &mut netlink,
        index.ok_or_else(|| Error::new("the TUN device has vanished"))?,
        &config,
        &[],
    )?;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT))
        .map_err(|cause| Error::os(format!("cannot listen on UDP port {PORT}"), cause))?;
    let peer = SocketAddr::from((UNDERLAY[1 - own], PORT));
    let ended = |cause| Error::os("cannot forward packets", cause);
    thread::scope(|scope| {
        let inbound = scope.spawn(|| inbound(&socket, &device));
        outbound(&device, &socket, peer).map_err(ended)?;
        match inbound.join() {
            Ok(result) => result.map_err(ended),
            Err(payload) => std::panic::resume_unwind(payload),
        }
    })
}

fn outbound(device: &SyncDevice, socket: &UdpSocket, peer: SocketAddr) -> io::Result<()> {
    let mut packet = [0; BUFFER_BYTES];
    loop {
        let length = device.recv(&mut packet)?;
        // A packet that the network does not take is lost, as on any network.
        let _ = socket.send_to(&packet[..length], peer);
    }
}

fn inbound(socket: &UdpSocket, device: &SyncDevice) -> io::Result<()> {
    let mut packet = [0; BUFFER_BYTES];
    loop {
        let (length, _) = socket.recv_from(&mut packet)?;
        let _ = device.send(&packet[..length]);
    }
}
