//! A tunnel's life: set up, run until told to stop, taken down.
//!
//! Everything that is visible outside the process hangs on descriptors: the
//! TUN device, with its addresses and routes, goes when its last queue is
//! closed, and the ports with their sockets. So nothing is left behind,
//! however the process ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded, select, tick};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

use crate::config::{Config, Settled};
use crate::control::engine::Engine;
use crate::control::summary;
use crate::control::workers::{Setup, Workers};
use crate::device::{link, tun};
use crate::error::{Error, Result};
use crate::netlink::{LinkStats, Netlink};
use crate::packet::coalesce;
use crate::packet::train::Limits;
use crate::ring;
use crate::transport::path;
use crate::transport::socket::{self, WorkerSockets};
use crate::worker::Command;
use crate::worker::counters::Snapshot;
use crate::worker::table::{Peer, Table};

/// How often trains of full size are tried again on paths that refused them: as
/// often as the kernel forgets a path MTU (`net.ipv4.route.mtu_expires`).
const LIMITS_RESET_INTERVAL: Duration = Duration::from_secs(600);

/// How long, and how often, a killed predecessor's port and device are waited
/// for. Longer than the kernel takes; short enough for who has mistyped.
const PREDECESSOR_WAIT_MAX: Duration = Duration::from_secs(1);
const PREDECESSOR_WAIT_STEP: Duration = Duration::from_millis(10);

/// Runs a tunnel until SIGINT or SIGTERM.
///
/// # Errors
/// When it cannot be set up, or when the device is taken away.
pub fn run(config: &Config) -> Result<()> {
    let [peer] = &config.peers[..] else {
        return Err(Error::new(format!("{} times --peer", config.peers.len()))
            .hint("one peer is supported for now"));
    };
    let listen = config.listen.map(|listen| listen.ip);
    let peer = path::resolve(&peer.endpoint.host, peer.endpoint.port, listen)?;
    let settled = config.settle(&[peer])?;
    let signals = SignalWatch::start()?;
    raise_descriptor_limit();
    let mut netlink = Netlink::open()?;
    let Claimed {
        sockets,
        udp,
        device,
    } = claim_after_predecessor(config, &settled, &mut netlink)?;
    let table = Table::new(vec![Peer { endpoint: peer }]);
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
        engine: Engine::choose(config.io, config.wanted.uring),
        busy_poll: config.busy_poll,
        cores: config.cores.clone(),
        table: Arc::new(table),
    };
    let workers = Workers::start(device.queues, sockets, &setup)?;
    link::bring_up(&mut netlink, &config.tun, &settled.link)?;
    link::check_outside(&mut netlink, &config.tun, peer.ip())?;
    announce(
        config,
        &settled,
        peer,
        device.offloads,
        udp,
        workers.engine(),
    );
    if !device.steered {
        tracing::warn!(
            "no eBPF here (CAP_BPF): the TUN driver picks queues; use the same --queues at both ends"
        );
    }

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

/// Five descriptors per worker: 256 workers need more than the usual 1024.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// What exists once in a namespace: the port and the device.
struct Claimed {
    sockets: Vec<WorkerSockets>,
    udp: socket::Offloads,
    device: tun::Tun,
}

/// Claims the port and the device, and waits a moment for those of a process
/// that was just killed: io_uring lets go of them on a kernel workqueue
/// (`io_ring_exit_work` in `io_uring/io_uring.c`), some milliseconds after the
/// process.
fn claim_after_predecessor(
    config: &Config,
    settled: &Settled,
    netlink: &mut Netlink,
) -> Result<Claimed> {
    let deadline = Instant::now() + PREDECESSOR_WAIT_MAX;
    loop {
        let name_taken = netlink.link_index(&config.tun)?.is_some();
        match claim(config, settled, netlink) {
            Err(error)
                if (name_taken || error.errno() == Some(libc::EADDRINUSE))
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(PREDECESSOR_WAIT_STEP);
            }
            result => return result,
        }
    }
}

fn claim(config: &Config, settled: &Settled, netlink: &mut Netlink) -> Result<Claimed> {
    if settled.address_is_derived {
        for address in &settled.link.addresses {
            if let ipnet::IpNet::V4(address) = address {
                link::check_free(netlink, *address)?;
            }
        }
    }
    // Sockets first: they fail without a trace when the port is in use.
    let (sockets, udp) = socket::open(settled.listen, config.queues, config.wanted.udp)?;
    let device = tun::create(&config.tun, config.queues, config.wanted.tun)?;
    Ok(Claimed {
        sockets,
        udp,
        device,
    })
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
    settled: &Settled,
    peer: SocketAddr,
    tun: coalesce::Offloads,
    udp: socket::Offloads,
    engine: Engine,
) {
    let addresses: Vec<String> = settled
        .link
        .addresses
        .iter()
        .map(ToString::to_string)
        .collect();
    tracing::info!(
        "{}: {}, MTU {}, {} {}",
        config.tun,
        addresses.join(" "),
        settled.link.mtu_bytes,
        config.queues,
        if config.queues == 1 {
            "queue"
        } else {
            "queues"
        },
    );
    match settled.peer_address {
        Some(address) => tracing::info!("peer {peer}, in the tunnel {address}"),
        None => tracing::info!("peer {peer}"),
    }
    let on_off = |on| if on { "on" } else { "off" };
    tracing::info!(
        "offloads: TSO {}, USO {}, UDP_SEGMENT {}, UDP_GRO {}; engine: {engine}",
        on_off(tun.tcp),
        on_off(tun.udp),
        on_off(udp.segment),
        on_off(udp.gro),
    );
    let wanted = &config.wanted;
    let lacks = |feature: fn(&ring::Features) -> bool| match engine {
        Engine::Uring(in_use) => feature(&wanted.uring) && !feature(&in_use),
        Engine::Epoll => false,
    };
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
            lacks(|uring| uring.receive_multishot),
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
