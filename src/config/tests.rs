use super::*;
use crate::cli::Cli;
use clap::Parser;
use std::net::SocketAddr;

fn config(flags: &str) -> Result<Config> {
    let words = std::iter::once("fastvpn").chain(flags.split_whitespace());
    let cli = Cli::try_parse_from(words).expect("flags that parse");
    Config::from_args(&cli.tunnel)
}

/// With the peers' addresses taken for what they resolve to.
fn settled(flags: &str) -> Result<Settled> {
    let config = config(flags)?;
    let peers = config.peers.iter();
    let resolved: Vec<SocketAddr> = peers.filter_map(|peer| peer.endpoint.literal()).collect();
    config.settle(&resolved)
}

#[test]
fn fills_in_what_was_left_open() {
    let flags = "--queues 3 --peer 127.0.1.9 --address 10.9.0.1/24";
    let config = config(flags).unwrap();
    assert_eq!(config.queues, 3);
    assert_eq!(config.peers[0].endpoint.to_string(), "127.0.1.9:8285");
    assert!(config.wanted.tun.udp && config.wanted.udp.gro);
    assert_eq!((config.io, config.txqueuelen), (Io::Auto, 1000));
    assert_eq!(config.control, default_control_path("fastvpn0"));
    assert!(config.control_is_default && !config.hop && !config.no_routes);
    let settled = settled(flags).unwrap();
    assert_eq!(settled.listen, "0.0.0.0:8285".parse().unwrap());
    assert_eq!(settled.link.mtu_bytes, 65507);
    assert!(!settled.address_is_derived && settled.peer_address.is_none());
}
