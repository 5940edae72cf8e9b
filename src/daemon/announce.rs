//! What is running, in a few log lines.

use super::tunnel::Tunnel;
use super::workers::Workers;
use crate::config::Feature;
use crate::host::link::derive_address;

/// Says what is running, and what the kernel lacks.
pub fn announce(tunnel: &Tunnel) {
    let file = match tunnel.config.file() {
        Some(path) => format!("configuration file {}", path.display()),
        None => "no configuration file".into(),
    };
    let (version, process) = (env!("CARGO_PKG_VERSION"), std::process::id());
    tracing::info!(
        version,
        process,
        config_file = tunnel
            .config
            .file()
            .map(|path| tracing::field::display(path.display())),
        "fastvpn {version}, process {process}, {file}"
    );
    for note in &tunnel.config.notes {
        tracing::warn!("{note}");
    }
    let listen = tunnel.settings.listen;
    let own_ports = tunnel.workers.own_ports().into_iter();
    let ports: String = own_ports.map(|port| format!(", {port}")).collect();
    tracing::info!(
        %listen,
        "UDP: listening on {listen}, sending from port {}{ports}",
        listen.port()
    );
    match tunnel.config.public_key() {
        Some(key) => match &tunnel.config.own_identity {
            Some(identity) => tracing::info!(
                identity,
                public_key = %key,
                "encrypted (WireGuard) by a shared secret, as {identity}, public key {key}"
            ),
            None => {
                tracing::info!(public_key = %key, "encrypted (WireGuard), public key {key}");
            }
        },
        None if tunnel.config.is_encrypted() => {
            tracing::info!("encrypted (WireGuard); keys and peers come by `wg`");
        }
        None => tracing::warn!(
            "plain mode: packets are neither encrypted nor authenticated; use it on networks \
             that you trust"
        ),
    }
    let (tun, link) = (&tunnel.host.device.name, &tunnel.settings.link);
    let addresses: Vec<String> = link.addresses.iter().map(ToString::to_string).collect();
    let addresses = match addresses.join(" ") {
        none if none.is_empty() => "no address".into(),
        all => all,
    };
    tracing::info!(
        interface = tun,
        addresses,
        mtu_bytes = link.mtu_bytes,
        queues = tunnel.workers.descriptors.len(),
        "{tun}: {addresses}, MTU {}, queues: {}",
        link.mtu_bytes,
        tunnel.workers.descriptors.len()
    );
    let (overlay, is_derived) = (
        &tunnel.peers.overlay,
        !link.addresses.is_empty() && tunnel.config.addresses.is_empty(),
    );
    let peer = overlay.peers().find_map(|(_, peer)| peer.endpoint);
    let only = peer.filter(|_| is_derived && overlay.peers().count() == 1);
    match only.map(|peer| (peer, derive_address(peer.ip()))) {
        Some((peer, Ok(far))) => {
            let address = far.addr();
            tracing::info!(%peer, %address, "peer {peer}, in the tunnel {address}");
        }
        _ => {
            let (peers, prefixes) = (overlay.peers().count(), overlay.prefixes().count());
            tracing::info!(peers, prefixes, "peers: {peers}, prefixes: {prefixes}");
        }
    }
    let (engine, offloads) = (tunnel.workers.engine(), offloads(&tunnel.workers));
    tracing::info!(engine, offloads, "offloads: {offloads}; engine: {engine}");
    warn_of_missing_features(tunnel);
    warn_of_fragments(tunnel);
}

/// Warns of an MTU for which packets are sent in fragments.
pub fn warn_of_fragments(tunnel: &Tunnel) {
    let mtu_bytes = tunnel.settings.link.mtu_bytes;
    if let Some((fits, peer)) = tunnel.peers.overlay.smallest_path()
        && fits < mtu_bytes as usize
    {
        tracing::warn!(
            %peer,
            mtu_bytes,
            fits_bytes = fits,
            "the MTU {mtu_bytes} is more than the path to peer {peer} takes: packets of more than \
             {fits} bytes are sent in fragments, which is slow, and loses all with one"
        );
    }
}

/// The offloads in use, in words.
pub fn offloads(workers: &Workers) -> String {
    let on_off = |on| if on { "on" } else { "off" };
    let (tun, udp) = (workers.setup.tun, workers.udp_offloads);
    format!(
        "TSO {}, USO {}, UDP_SEGMENT {}, UDP_GRO {}",
        on_off(tun.tcp),
        on_off(tun.udp),
        on_off(udp.segment),
        on_off(udp.gro),
    )
}

/// Names the kernel features that were wanted and are not there.
fn warn_of_missing_features(tunnel: &Tunnel) {
    let (config, workers) = (&tunnel.config, &tunnel.workers);
    let (tun, udp) = (workers.setup.tun, workers.udp_offloads);
    if config.uses(Feature::Uso) && !tun.udp {
        tracing::warn!(
            feature = "uso",
            "no USO here (Linux 6.2): UDP crosses the TUN device packet by packet"
        );
    }
    if config.uses(Feature::UdpSegment) && !udp.segment {
        tracing::warn!(
            feature = "udp-segment",
            "no UDP_SEGMENT here (Linux 4.18): one datagram per send"
        );
    }
    if config.uses(Feature::UdpGro) && !udp.gro {
        tracing::warn!(
            feature = "udp-gro",
            "no UDP_GRO here (Linux 5.0): one datagram per receive"
        );
    }
    if !workers.is_steered {
        tracing::warn!(
            feature = "ebpf",
            "no eBPF here (CAP_BPF): the TUN driver picks queues; use the same --queues at both ends"
        );
    }
}
