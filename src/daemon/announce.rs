//! What is running, in a few log lines.

use super::running::Running;

/// Peers that are named one by one. More are counted.
const PEERS_NAMED_MAX: usize = 8;

/// Says what is running, and what the kernel lacks.
pub fn announce(running: &Running) {
    let file = match &running.config.config_file {
        Some(path) => format!("configuration file {}", path.display()),
        None => "no configuration file".into(),
    };
    tracing::info!(
        "fastvpn {}, process {}, {file}",
        env!("CARGO_PKG_VERSION"),
        std::process::id(),
    );
    let ports: Vec<String> = running
        .ports
        .own()
        .into_iter()
        .map(|port| format!(", {port}"))
        .collect();
    let listen = running.settled.listen;
    tracing::info!(
        "UDP: listening on {listen}, sending from port {}{}",
        listen.port(),
        ports.concat()
    );
    tracing::warn!(
        "plain mode: packets are neither encrypted nor authenticated; use it on networks that \
         you trust"
    );
    let link = &running.settled.link;
    let addresses: Vec<String> = link.addresses.iter().map(ToString::to_string).collect();
    let queues = running.worker_count;
    tracing::info!(
        "{}: {}, MTU {}, {queues} {}",
        running.device.name,
        addresses.join(" "),
        link.mtu_bytes,
        if queues == 1 { "queue" } else { "queues" },
    );
    for peer in running.overlay.peers_by_name().take(PEERS_NAMED_MAX) {
        let name = match peer.endpoint {
            Some(endpoint) => endpoint.to_string(),
            None => format!("{} (not resolved yet)", peer.name),
        };
        match (running.settled.peer_address, peer.prefix_count) {
            (Some(address), _) => tracing::info!("peer {name}, in the tunnel {address}"),
            (None, 0) => tracing::info!("peer {name}"),
            (None, 1) => tracing::info!("peer {name}, 1 prefix"),
            (None, count) => tracing::info!("peer {name}, {count} prefixes"),
        }
    }
    let count = running.overlay.peer_count();
    if count > PEERS_NAMED_MAX {
        tracing::info!("and {} more peers", count - PEERS_NAMED_MAX);
    }
    tracing::info!(
        "offloads: {}; engine: {}",
        offloads(running),
        running.workers().engine()
    );
    lacks(running);
    warn_of_fragments(running);
    if !running.is_steered {
        tracing::warn!(
            "no eBPF here (CAP_BPF): the TUN driver picks queues; use the same --queues at both ends"
        );
    }
    if running.server.is_some() {
        tracing::debug!("operators' socket: {}", running.config.control.display());
    }
}

/// Warns of an MTU for which packets are sent in fragments.
pub fn warn_of_fragments(running: &Running) {
    let mtu_bytes = running.settled.link.mtu_bytes;
    if let Some((fits, peer)) = running.overlay.smallest_path()
        && fits < mtu_bytes as usize
    {
        tracing::warn!(
            "the MTU {mtu_bytes} is more than the path to peer {peer} takes: packets of more than \
             {fits} bytes are sent in fragments, which is slow, and loses all with one"
        );
    }
}

/// The offloads in use, in words.
pub fn offloads(running: &Running) -> String {
    let on_off = |on| if on { "on" } else { "off" };
    format!(
        "TSO {}, USO {}, UDP_SEGMENT {}, UDP_GRO {}",
        on_off(running.tun_offloads.tcp),
        on_off(running.tun_offloads.udp),
        on_off(running.udp_offloads.segment),
        on_off(running.udp_offloads.gro),
    )
}

/// Names the kernel features that were wanted and are not there.
fn lacks(running: &Running) {
    let (wanted, tun, udp) = (
        &running.config.wanted,
        running.tun_offloads,
        running.udp_offloads,
    );
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
    ];
    for (_, what) in missing.iter().filter(|(is_missing, _)| *is_missing) {
        tracing::warn!("this kernel lacks {what}");
    }
}
