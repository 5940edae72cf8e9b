//! What is running, in a few log lines.

use super::tunnel::Tunnel;
use super::workers::Workers;
use crate::config::Feature;

/// Peers that are named one by one. More are counted.
const PEERS_NAMED_MAX: usize = 8;

/// Says what is running, and what the kernel lacks.
pub fn announce(tunnel: &Tunnel) {
    let file = match &tunnel.config.config_file {
        Some(path) => format!("configuration file {}", path.display()),
        None => "no configuration file".into(),
    };
    tracing::info!(
        "fastvpn {}, process {}, {file}",
        env!("CARGO_PKG_VERSION"),
        std::process::id(),
    );
    let own_ports = tunnel.workers.own_ports().into_iter().flatten();
    let ports: Vec<String> = own_ports.map(|port| format!(", {port}")).collect();
    let listen = tunnel.settings.listen;
    tracing::info!(
        "UDP: listening on {listen}, sending from port {}{}",
        listen.port(),
        ports.concat()
    );
    tracing::warn!(
        "plain mode: packets are neither encrypted nor authenticated; use it on networks that \
         you trust"
    );
    let link = &tunnel.settings.link;
    let addresses: Vec<String> = link.addresses.iter().map(ToString::to_string).collect();
    let queues = tunnel.workers.count();
    tracing::info!(
        "{}: {}, MTU {}, {queues} {}",
        tunnel.host.device.name,
        addresses.join(" "),
        link.mtu_bytes,
        if queues == 1 { "queue" } else { "queues" },
    );
    let prefix_counts = tunnel.peers.overlay.prefix_counts();
    for peer in tunnel.peers.overlay.peers_by_name().take(PEERS_NAMED_MAX) {
        let name = match peer.endpoint {
            Some(endpoint) => endpoint.to_string(),
            None => format!("{} (not resolved yet)", peer.name),
        };
        let hop = tunnel.peers.overlay.find(&peer.name).map(|(hop, _)| hop);
        let prefixes = hop.and_then(|hop| prefix_counts.get(&hop).copied());
        match (tunnel.settings.peer_address, prefixes.unwrap_or(0)) {
            (Some(address), _) => tracing::info!("peer {name}, in the tunnel {address}"),
            (None, 0) => tracing::info!("peer {name}"),
            (None, 1) => tracing::info!("peer {name}, 1 prefix"),
            (None, count) => tracing::info!("peer {name}, {count} prefixes"),
        }
    }
    let count = tunnel.peers.overlay.peers().count();
    if count > PEERS_NAMED_MAX {
        tracing::info!("and {} more peers", count - PEERS_NAMED_MAX);
    }
    tracing::info!(
        "offloads: {}; engine: {}",
        offloads(&tunnel.workers),
        tunnel.workers.engine()
    );
    lacks(tunnel);
    warn_of_fragments(tunnel);
    if !tunnel.workers.is_steered {
        tracing::warn!(
            "no eBPF here (CAP_BPF): the TUN driver picks queues; use the same --queues at both ends"
        );
    }
}

/// Warns of an MTU for which packets are sent in fragments.
pub fn warn_of_fragments(tunnel: &Tunnel) {
    let mtu_bytes = tunnel.settings.link.mtu_bytes;
    if let Some((fits, peer)) = tunnel.peers.overlay.smallest_path()
        && fits < mtu_bytes as usize
    {
        tracing::warn!(
            "the MTU {mtu_bytes} is more than the path to peer {peer} takes: packets of more than \
             {fits} bytes are sent in fragments, which is slow, and loses all with one"
        );
    }
}

/// The offloads in use, in words.
pub fn offloads(workers: &Workers) -> String {
    let on_off = |on| if on { "on" } else { "off" };
    format!(
        "TSO {}, USO {}, UDP_SEGMENT {}, UDP_GRO {}",
        on_off(workers.tun_offloads().tcp),
        on_off(workers.tun_offloads().udp),
        on_off(workers.udp_offloads().segment),
        on_off(workers.udp_offloads().gro),
    )
}

/// Names the kernel features that were wanted and are not there.
fn lacks(tunnel: &Tunnel) {
    let (tun, udp) = (tunnel.workers.tun_offloads(), tunnel.workers.udp_offloads());
    let uses = |feature| tunnel.config.uses(feature);
    let missing = [
        (
            uses(Feature::Uso) && !tun.udp,
            "USO (Linux 6.2): UDP crosses the TUN packet by packet",
        ),
        (
            uses(Feature::UdpSegment) && !udp.segment,
            "UDP_SEGMENT (Linux 4.18): one datagram per send",
        ),
        (
            uses(Feature::UdpGro) && !udp.gro,
            "UDP_GRO (Linux 5.0): one datagram per receive",
        ),
    ];
    for (_, what) in missing.iter().filter(|(is_missing, _)| *is_missing) {
        tracing::warn!("this kernel lacks {what}");
    }
}
