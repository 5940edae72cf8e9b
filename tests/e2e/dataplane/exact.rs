//! What leaves the far end is what entered the near one, bit for bit, and each
//! flow in its order: told by observers that share no code with the tunnel.

use std::io::{self, IoSlice};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use fastvpn::error::{Error, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use testbed::Pair;
use tun_rs::SyncDevice;

use crate::packets::{BUFFER_BYTES, TUNNEL_NAME, Tap, checksum, plain_tun, source, wait_until_up};
use crate::script::{SOURCE_V4, SOURCE_V6, Scripted, script};
use crate::support::{
    UNDERLAY, all_cores, check, enlarge_receive_buffer, fail, hosts, start_dual_stack, stop_all,
    without_backlog_drops,
};

#[testbed::trial(each_engine)]
fn exact_outbound() -> Result<()> {
    outbound(&["--queues", "1"], Order::Total)
}

#[testbed::trial(each_engine)]
fn exact_outbound_4_queues() -> Result<()> {
    outbound(&["--queues", "4"], Order::PerFlow)
}

#[testbed::trial(each_engine)]
fn exact_outbound_without_offloads() -> Result<()> {
    let without = "tso,uso,udp-segment,udp-gro";
    outbound(&["--queues", "1", "--without", without], Order::Total)
}

#[testbed::trial(each_engine)]
fn exact_inbound_datagrams() -> Result<()> {
    inbound(&[], false)
}

#[testbed::trial(each_engine)]
fn exact_inbound_batches() -> Result<()> {
    inbound(&[], true)
}

#[testbed::trial(each_engine)]
fn exact_inbound_batches_without_gro() -> Result<()> {
    inbound(&["--without", "udp-gro"], true)
}

#[testbed::trial(each_engine)]
fn exact_inbound_batches_without_tso_uso() -> Result<()> {
    inbound(&["--without", "tso,uso"], true)
}

/// Packets in the script, and under way at a time.
const PACKETS: usize = 6000;
const WINDOW: usize = 64;

/// How long a packet may take; see `datagrams::ARRIVAL_MAX`.
const ARRIVAL_MAX: Duration = Duration::from_secs(30);

const PORT: u16 = 8285;

/// Which order is expected.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// As sent.
    Total,
    /// Each flow's own.
    PerFlow,
}

/// Packets that must come, and those that came.
struct Expected<'a> {
    missing: Vec<(usize, Vec<u8>)>,
    order: Order,
    script: &'a [Scripted],
}

impl<'a> Expected<'a> {
    fn new(script: &'a [Scripted], order: Order, change: impl Fn(&[u8]) -> Vec<u8>) -> Self {
        let missing = script
            .iter()
            .map(|it| (it.flow, change(&it.packet)))
            .collect();
        Self {
            missing,
            order,
            script,
        }
    }

    /// Takes note of a packet that came.
    fn arrived(&mut self, packet: &[u8]) -> Result<()> {
        // The hosts' own kernels have something to say, too.
        if ![Some(SOURCE_V4.into()), Some(SOURCE_V6.into())].contains(&source(packet)) {
            return Ok(());
        }
        let Some(index) = self.missing.iter().position(|(_, other)| other == packet) else {
            let near = self
                .missing
                .iter()
                .find(|(_, other)| other.len() == packet.len());
            return fail(format!(
                "not sent, or twice: {packet:x?}; perhaps it was {near:x?}"
            ));
        };
        let (flow, _) = self.missing[index];
        let earlier = &self.missing[..index];
        let overtaken = match self.order {
            Order::Total => !earlier.is_empty(),
            Order::PerFlow => earlier.iter().any(|(other, _)| *other == flow),
        };
        check(!overtaken, || format!("flow {flow} overtook: {packet:x?}"))?;
        self.missing.remove(index);
        Ok(())
    }

    fn lost(&self, cause: io::Error) -> Error {
        let flows: Vec<usize> = self.missing.iter().map(|(flow, _)| *flow).collect();
        let what = format!(
            "of {} packets those of flows {flows:?} missing",
            self.script.len()
        );
        Error::os(what, cause)
    }
}

/// From the near TUN to a socket that stands for the far end.
fn outbound(flags: &[&str], order: Order) -> Result<()> {
    let hosts = hosts(1500)?;
    let cores = all_cores();
    let far = socket(&hosts, 1)?;
    let tunnel = start_dual_stack(&hosts, 0, &[flags, &["--cores", &cores]].concat())?;
    let (v4, v6) = (Tap::on_tunnel(&hosts.a)?, Tap::on_tunnel_v6(&hosts.a)?);
    let script = script(PACKETS);
    let mut buffer = vec![0; BUFFER_BYTES];
    for window in script.chunks(WINDOW) {
        without_backlog_drops(|| {
            let mut expected = Expected::new(window, order, <[u8]>::to_vec);
            for Scripted { packet, .. } in window {
                let tap = if packet[0] >> 4 == 4 { &v4 } else { &v6 };
                tap.inject(packet)?;
            }
            while !expected.missing.is_empty() {
                let length = far
                    .recv(&mut buffer)
                    .map_err(|cause| expected.lost(cause))?;
                expected.arrived(&buffer[..length])?;
            }
            Ok(())
        })?;
    }
    let [ended] = stop_all([tunnel])?;
    check(ended.all_dropped() == ended.dropped("tun-error"), || {
        ended.log.clone()
    })
}

/// From a socket that stands for the near end to the far TUN; there the host
/// forwards it to a device without offloads, for which the kernel cuts
/// GSO packets up again and completes checksums.
fn inbound(flags: &[&str], in_batches: bool) -> Result<()> {
    let hosts = hosts(1500)?;
    let cores = all_cores();
    let near = socket(&hosts, 0)?;
    let far = SocketAddr::from((UNDERLAY[1], PORT));
    near.connect(far)
        .map_err(|cause| Error::os("no way to the far end", cause))?;
    for path in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        hosts.b.sysctl(path, "1")?;
    }
    let nets = ["10.99.0.1/24", "fd00:99::1/64"].map(|net| net.parse());
    let nets: Vec<_> = nets.into_iter().flatten().collect();
    let exit = plain_tun(&hosts.b, "exit0", &nets, 1500)?;
    let tunnel = start_dual_stack(&hosts, 1, &[flags, &["--cores", &cores]].concat())?;
    wait_until_up(&hosts.b, TUNNEL_NAME)?;
    let script = script(PACKETS);
    let mut buffer = vec![0; BUFFER_BYTES];
    for window in script.chunks(WINDOW) {
        without_backlog_drops(|| {
            let mut expected = Expected::new(window, Order::PerFlow, forwarded);
            if in_batches {
                send_batches(&near, window)?;
            } else {
                let mut all = window.iter();
                all.try_for_each(|it| near.send(&it.packet).map(|_| ()))
                    .map_err(|cause| Error::os("cannot send a datagram", cause))?;
            }
            while !expected.missing.is_empty() {
                let length = read(&exit, &mut buffer).map_err(|cause| expected.lost(cause))?;
                expected.arrived(&buffer[..length])?;
            }
            Ok(())
        })?;
    }
    let [ended] = stop_all([tunnel])?;
    check(ended.all_dropped() == 0, || ended.log.clone())?;
    let (_, received) = ended.packets("total")?;
    check(received == PACKETS as u64, || ended.log.clone())?;
    // A test of merging is none if nothing is merged. Without USO, which Linux 6.1
    // lacks, TCP still is.
    let merges_all = ended.log.contains("TSO on, USO on");
    let written = ended.total_before("to the TUN")?;
    let receives = ended.total_before("receives")?;
    if in_batches && ended.log.contains("UDP_GRO on") {
        check(receives < received / 4, || ended.log.clone())?;
        let much_merged = written < received * 2 / 3;
        check(!merges_all || much_merged, || ended.log.clone())?;
    }
    let merges = ended.log.contains("TSO on");
    check(merges || written == received, || ended.log.clone())
}

/// A UDP socket at the tunnel's port of host A (0) or host B (1).
fn socket(hosts: &Pair, host: usize) -> Result<UdpSocket> {
    let open = || {
        let socket = UdpSocket::bind((UNDERLAY[host], PORT))?;
        socket.set_read_timeout(Some(ARRIVAL_MAX))?;
        // Without CAP_NET_ADMIN over the machine: as much as there is.
        enlarge_receive_buffer(&socket, 4 << 20);
        Ok(socket)
    };
    let opened = [&hosts.a, &hosts.b][host].run(open);
    opened.map_err(|cause| Error::os("no socket for a plain end", cause))
}

/// Sends packets as fastvpn does: equal ones together, the last may be shorter.
fn send_batches(socket: &UdpSocket, packets: &[Scripted]) -> Result<()> {
    let mut rest = packets;
    while let Some(first) = rest.first() {
        let size = first.packet.len();
        let mut count = rest
            .iter()
            .take_while(|it| it.packet.len() == size)
            .count()
            .min(60_000 / size);
        if rest.get(count).is_some_and(|it| it.packet.len() < size) {
            count += 1;
        }
        let (batch, later) = rest.split_at(count);
        let slices: Vec<_> = batch.iter().map(|it| IoSlice::new(&it.packet)).collect();
        let segment = size as u16;
        let segments = [ControlMessage::UdpGsoSegments(&segment)];
        let control = if count > 1 { &segments[..] } else { &[] };
        sendmsg::<()>(
            socket.as_raw_fd(),
            &slices,
            control,
            MsgFlags::empty(),
            None,
        )
        .map_err(|errno| Error::os(format!("cannot send {count} times {size}"), errno.into()))?;
        rest = later;
    }
    Ok(())
}

/// The next packet that the host sends into a device.
fn read(device: &SyncDevice, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match device.recv(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
        let mut ready = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(ARRIVAL_MAX).unwrap_or(PollTimeout::MAX);
        if poll(&mut ready, timeout)? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

/// What a router makes of a packet: one hop less (RFC 791, RFC 8200).
fn forwarded(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 6 {
        packet[7] -= 1;
        return packet;
    }
    let header_bytes = usize::from(packet[0] & 15) * 4;
    packet[8] -= 1;
    packet[10..12].fill(0);
    let sum = checksum(&packet[..header_bytes]);
    packet[10..12].copy_from_slice(&sum);
    packet
}
