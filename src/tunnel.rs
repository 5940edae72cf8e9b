//! A tunnel's life: set up, run until told to stop, taken down.
//!
//! Everything that is visible outside the process hangs on descriptors: the
//! TUN device, with its addresses and routes, goes when its last queue is
//! closed, and the ports with their sockets. So nothing is left behind,
//! however the process ends.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded, select, tick};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

use crate::config::Config;
use crate::control::summary;
use crate::control::workers::{Setup, Workers};
use crate::device::{link, tun};
use crate::error::{Error, Result};
use crate::netlink::{LinkStats, Netlink};
use crate::packet::coalesce;
use crate::packet::train::Limits;
use crate::ring;
use crate::transport::socket;
use crate::worker::Command;
use crate::worker::counters::Snapshot;
use crate::worker::table::{Peer, Table};

/// How often trains of full size are tried again on paths that refused them.
const LIMITS_RESET_INTERVAL: Duration = Duration::from_secs(60);

/// Runs a tunnel until SIGINT or SIGTERM.
///
/// # Errors
/// When it cannot be set up, or when the device is taken away.
pub fn run(config: &Config) -> Result<()> {
    let signals = SignalWatch::start()?;
    let mut netlink = Netlink::open()?;
    wait_for_predecessor(&config.tun);
    if config.address_is_derived {
        for address in &config.link.addresses {
            if let ipnet::IpNet::V4(address) = address {
                link::check_free(&mut netlink, *address)?;
            }
        }
    }
    // Sockets first: they fail without a trace when the port is in use.
    let (sockets, udp) = socket::open(config.listen, config.queues, config.wanted.udp)?;
    let device = tun::create(&config.tun, config.queues, config.wanted.tun)?;
    let table = Table::new(
        config
            .peers
            .iter()
            .map(|&endpoint| Peer { endpoint })
            .collect(),
    );
    let setup = Setup {
        tun: device.offloads,
        limits: Limits {
            segments_max: if udp.segment {
                Limits::FULL.segments_max
            } else {
                1
            },
            ..Limits::FULL
        },
        features: config.wanted.uring,
        cores: config.cores.clone(),
        table: Arc::new(table),
    };
    let workers = Workers::start(device.queues, sockets, &setup)?;
    link::bring_up(&mut netlink, &config.tun, &config.link)?;
    announce(config, device.offloads, udp, workers.features());

    let result = control_loop(&workers, &signals.received);
    let counters = workers.counters();
    let link_stats = read_link_stats(&mut netlink, &config.tun);
    drop(workers);
    let snapshots: Vec<Snapshot> = counters.iter().map(|worker| worker.snapshot()).collect();
    for line in summary::lines(&snapshots, link_stats.as_ref()) {
        tracing::info!("{line}");
    }
    result
}

/// How long a killed predecessor's interface may still be there: the kernel
/// takes a dead process's io_uring apart in the background.
const PREDECESSOR_TRIES: u32 = 50;
const PREDECESSOR_WAIT: Duration = Duration::from_millis(20);

fn wait_for_predecessor(tun: &str) {
    for _ in 0..PREDECESSOR_TRIES {
        if nix::net::if_::if_nametoindex(tun).is_err() {
            return;
        }
        std::thread::sleep(PREDECESSOR_WAIT);
    }
}

/// Waits for signals and for workers that fail.
fn control_loop(workers: &Workers, signals: &Receiver<i32>) -> Result<()> {
    let limits_reset = tick(LIMITS_RESET_INTERVAL);
    loop {
        select! {
            recv(signals) -> signal => {
                let name = match signal {
                    Ok(SIGTERM) => "SIGTERM",
                    _ => "SIGINT",
                };
                tracing::debug!("{name}: stopping");
                return Ok(());
            }
            recv(workers.failures()) -> failure => {
                return Err(failure.unwrap_or_else(|_| Error::new("all workers have ended")));
            }
            recv(limits_reset) -> _ => {
                workers.tell(|| Command::ResetLimits);
            }
        }
    }
}

fn read_link_stats(netlink: &mut Netlink, name: &str) -> Option<LinkStats> {
    let index = netlink.link_index(name).ok()??;
    netlink.link_stats(index).ok()
}

/// Says what is running, and what the kernel lacks.
fn announce(
    config: &Config,
    tun: coalesce::Offloads,
    udp: socket::Offloads,
    uring: ring::Features,
) {
    let addresses: Vec<String> = config
        .link
        .addresses
        .iter()
        .map(ToString::to_string)
        .collect();
    tracing::info!(
        "{}: {}, MTU {}, {} {}",
        config.tun,
        addresses.join(" "),
        config.link.mtu_bytes,
        config.queues,
        if config.queues == 1 {
            "queue"
        } else {
            "queues"
        },
    );
    for peer in &config.peers {
        match config.peer_address {
            Some(address) => tracing::info!("peer {peer}, in the tunnel {address}"),
            None => tracing::info!("peer {peer}"),
        }
    }
    let on_off = |on| if on { "on" } else { "off" };
    tracing::info!(
        "offloads: TSO {}, USO {}, UDP_SEGMENT {}, UDP_GRO {}; io_uring: multishot read {}, \
         multishot receive {}",
        on_off(tun.tcp),
        on_off(tun.udp),
        on_off(udp.segment),
        on_off(udp.gro),
        on_off(uring.read_multishot),
        on_off(uring.receive_multishot),
    );
    let wanted = &config.wanted;
    let missing = [
        (
            wanted.tun.udp && !tun.udp,
            "USO (Linux 6.2): UDP crosses the TUN packet by packet",
        ),
        (
            wanted.udp.segment && !udp.segment,
            "UDP_SEGMENT (Linux 4.18): one datagram per send",
        ),
        (
            wanted.udp.gro && !udp.gro,
            "UDP_GRO (Linux 5.0): one datagram per receive",
        ),
        (
            wanted.uring.read_multishot && !uring.read_multishot,
            "IORING_OP_READ_MULTISHOT (Linux 6.7): the TUN queue is polled",
        ),
        (
            wanted.uring.receive_multishot && !uring.receive_multishot,
            "multishot receive (Linux 6.0): the UDP socket is polled",
        ),
    ];
    for (_, what) in missing.iter().filter(|(is_missing, _)| *is_missing) {
        tracing::warn!("this kernel lacks {what}");
    }
    tracing::debug!(
        "operators' socket (not yet in use): {}",
        config.control.display()
    );
}

/// SIGINT and SIGTERM as messages.
struct SignalWatch {
    handle: Handle,
    received: Receiver<i32>,
}

impl SignalWatch {
    fn start() -> Result<Self> {
        let mut signals = Signals::new([SIGINT, SIGTERM])
            .map_err(|error| Error::os("cannot watch signals", error))?;
        let handle = signals.handle();
        let (sender, received) = bounded(4);
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    // More signals than fit say nothing new.
                    let _ = sender.try_send(signal);
                }
            })
            .map_err(|error| Error::os("cannot start the signal thread", error))?;
        Ok(Self { handle, received })
    }
}

impl Drop for SignalWatch {
    fn drop(&mut self) {
        self.handle.close();
    }
}
