//! Both directions of the text.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use nix::errno::Errno;
use proptest::prelude::*;

use super::request::{AllowedIp, PeerChange, Request, Set, parse};
use super::{Device, Peer, refusal};
use crate::config::HostPort;
use crate::wire::wireguard::keys::{PresharedKey, PrivateKey, PublicKey};

const KEY: &str = "0123456789abcdef0123456789ABCDEF0123456789abcdef0123456789abcdef";

fn set(lines: &str) -> Result<Set, Errno> {
    match parse(format!("set=1\n{lines}\n").as_bytes())? {
        Request::Set(set) => Ok(*set),
        Request::Get => panic!("{lines} is not a get"),
    }
}

fn peer(lines: &str) -> Result<PeerChange, Errno> {
    let set = set(&format!("public_key={KEY}\n{lines}"))?;
    Ok(set.peers[0].clone())
}

#[test]
fn a_request_begins_with_what_it_is() {
    assert_eq!(parse(b"get=1\n\n"), Ok(Request::Get));
    assert_eq!(parse(b"set=1\n\n"), Ok(Request::Set(Box::default())));
    for bad in [
        "\n",
        "get=2\n\n",
        "get=1\nget=1\n\n",
        "get=1\nset=1\n\n",
        "set=1\nset=1\n\n",
        "set\n\n",
        "fwmark=1\n\n",
        "set=1\nfwmark\n\n",
    ] {
        assert_eq!(parse(bad.as_bytes()), Err(Errno::EINVAL), "{bad:?}");
    }
    assert_eq!(parse(b"set=1\nfwmark=\xff\n\n"), Err(Errno::EINVAL));
}

#[test]
fn all_of_a_tunnel_can_be_set() {
    let text = format!("private_key={KEY}\nlisten_port=51820\nfwmark=4294967295\n");
    let all = set(&(text + "replace_peers=true\n")).unwrap();
    let key = all.private_key.clone().unwrap().unwrap();
    // Clamped.
    assert_eq!(key.as_bytes()[..2], [0, 0x23]);
    assert_eq!(all.listen_port, Some(51820));
    assert_eq!(all.firewall_mark, Some(u32::MAX));
    assert!(all.replaces_peers && all.peers.is_empty());
    let zeros = format!("private_key={}\n", "0".repeat(64));
    assert_eq!(set(&zeros).unwrap().private_key, Some(None));
    assert_eq!(set("").unwrap(), Set::default());
    for bad in [
        "listen_port=65536\n",
        "listen_port=-1\n",
        "listen_port=+1\n",
        "listen_port=\n",
        "fwmark=0x10\n",
        "replace_peers=false\n",
        "private_key=\n",
        "private_key=0\n",
        "unknown=1\n",
        "remove=true\n",
        "errno=0\n",
    ] {
        assert_eq!(set(bad), Err(Errno::EINVAL), "{bad:?}");
    }
    let long = format!("private_key={KEY}0\n");
    assert_eq!(set(&long), Err(Errno::EINVAL));
    let multibyte = format!("private_key={}éé\n", &KEY[4..]);
    assert_eq!(set(&multibyte), Err(Errno::EINVAL));
}

#[test]
fn all_of_a_peer_can_be_set() {
    let all = peer(&format!(
        "update_only=true\npreshared_key={KEY}\nendpoint=[fe80::1%eth0]:51820\n\
         persistent_keepalive_interval=25\nreplace_allowed_ips=true\nallowed_ip=10.1.2.3/16\n\
         allowed_ip=-fd00::/64\nprotocol_version=1\n"
    ));
    let all = all.unwrap();
    assert!(all.updates_only && all.replaces_allowed_ips && !all.is_removed);
    assert!(all.preshared_key.unwrap().is_set());
    assert_eq!(all.endpoint.unwrap().to_string(), "[fe80::1%eth0]:51820");
    let every = Some(Duration::from_secs(25));
    assert_eq!(all.persistent_keepalive, Some(every));
    let allowed_ip = |prefix: &str, is_removed| AllowedIp {
        prefix: prefix.parse().unwrap(),
        is_removed,
    };
    assert_eq!(
        all.allowed_ips,
        [
            allowed_ip("10.1.0.0/16", false),
            allowed_ip("fd00::/64", true)
        ]
    );
    assert!(peer("remove=true\n").unwrap().is_removed);
    let off = peer("persistent_keepalive_interval=0\n").unwrap();
    assert_eq!(off.persistent_keepalive, Some(None));
    for bad in [
        "private_key=\n",
        "listen_port=1\n",
        "remove=1\n",
        "protocol_version=2\n",
        "persistent_keepalive_interval=off\n",
        "allowed_ip=10.0.0.0\n",
        "allowed_ip=10.0.0.0/33\n",
        "allowed_ip=--10.0.0.0/8\n",
        "public_key=\n",
        "unknown=1\n",
    ] {
        assert_eq!(peer(bad), Err(Errno::EINVAL), "{bad:?}");
    }
}

#[test]
fn an_endpoint_is_an_address_and_a_port() {
    let read = |text: &str| {
        let peer = peer(&format!("endpoint={text}\n"));
        peer.map(|peer| peer.endpoint.unwrap().to_string())
    };
    for good in ["10.0.0.1:1", "[fd00::1]:65535", "[fe80::1%3]:51820"] {
        assert_eq!(read(good), Ok(good.into()));
    }
    for bad in [
        "far.example:1",
        "10.0.0.1",
        "10.0.0.1:0",
        "10.0.0.1:65536",
        "10.0.0.1%eth0:1",
        "[10.0.0.1]:1",
        "fd00::1:1",
        "[fd00::1]",
        "[fd00::1:1",
        "[fe80::1%]:1",
        "[fe80::1%a b]:1",
        "[fe80::1%sixteen-letters-]:1",
        "[]:1",
        ":1",
        "",
    ] {
        assert_eq!(read(bad), Err(Errno::EINVAL), "{bad:?}");
    }
}

#[test]
fn errno_is_negative() {
    assert_eq!(refusal(None), "errno=0\n\n");
    assert_eq!(refusal(Some(Errno::EINVAL)), "errno=-22\n\n");
}

/// A zone belongs to addresses on a link alone.
#[test]
fn endpoints_can_be_resolved() {
    let shown = |ip: &str| {
        let ip: Ipv6Addr = ip.parse().unwrap();
        let endpoint = SocketAddrV6::new(ip, 1, 0, 3);
        let mut peer = nobody();
        peer.endpoint = Some(endpoint.into());
        let device = Device {
            private_key: None,
            listen_port: 1,
            firewall_mark: 0,
            peers: vec![peer],
        };
        let text = device.to_text().to_string();
        let line = text.lines().find_map(|line| line.strip_prefix("endpoint="));
        line.unwrap().to_string()
    };
    assert_eq!(shown("fe80::1"), "[fe80::1%3]:1");
    assert_eq!(shown("fd00::1"), "[fd00::1]:1");
}

fn nobody() -> Peer {
    Peer {
        public_key: PublicKey([1; 32]),
        preshared_key: PresharedKey::default(),
        endpoint: None,
        latest_handshake: None,
        bytes_sent: 0,
        bytes_received: 0,
        persistent_keepalive: None,
        allowed_ips: Vec::new(),
    }
}

fn prefixes() -> impl Strategy<Value = IpNet> {
    (any::<IpAddr>(), 0..=128u8).prop_map(|(ip, length)| {
        let max = IpNet::from(ip).max_prefix_len();
        IpNet::new(ip, length.min(max)).unwrap().trunc()
    })
}

fn peers() -> impl Strategy<Value = Peer> {
    let endpoint = proptest::option::of((any::<IpAddr>(), 1..=u16::MAX));
    let seconds = proptest::option::of(1..=u16::MAX);
    let allowed_ips = proptest::collection::vec(prefixes(), 0..5);
    let numbers = any::<(u32, u64, u64)>();
    (
        any::<[u8; 32]>(),
        any::<[u8; 32]>(),
        endpoint,
        seconds,
        allowed_ips,
        numbers,
    )
        .prop_map(
            |(key, preshared, endpoint, seconds, allowed_ips, numbers)| Peer {
                public_key: PublicKey(key),
                preshared_key: PresharedKey::from_bytes(&preshared),
                endpoint: endpoint.map(SocketAddr::from),
                latest_handshake: Some(SystemTime::UNIX_EPOCH + Duration::from_nanos(numbers.1)),
                bytes_sent: numbers.1,
                bytes_received: numbers.2,
                persistent_keepalive: seconds.map(|it| Duration::from_secs(it.into())),
                allowed_ips,
            },
        )
}

/// What is said of a peer as a change that makes it so.
fn as_change(peer: &Peer) -> PeerChange {
    PeerChange {
        preshared_key: Some(peer.preshared_key.clone()),
        endpoint: peer.endpoint.map(|endpoint| HostPort {
            host: endpoint.ip().to_string(),
            port: endpoint.port(),
        }),
        persistent_keepalive: Some(peer.persistent_keepalive),
        allowed_ips: peer
            .allowed_ips
            .iter()
            .map(|&prefix| AllowedIp {
                prefix,
                is_removed: false,
            })
            .collect(),
        ..PeerChange::new(peer.public_key)
    }
}

proptest! {
    /// What is shown of a tunnel, less what only it can know, makes another one like it.
    #[test]
    fn what_is_shown_can_be_set(
        key in any::<[u8; 32]>(),
        listen_port in any::<u16>(),
        firewall_mark in 1..=u32::MAX,
        peers in proptest::collection::vec(peers(), 0..4),
    ) {
        let private_key = PrivateKey::from_bytes(&key);
        let device = Device {
            private_key: Some(private_key.clone()), listen_port, firewall_mark, peers,
        };
        let text = device.to_text();
        prop_assert!(text.ends_with("errno=0\n\n"));
        let seen = ["errno", "tx_bytes", "rx_bytes", "last_handshake_time_"];
        let mut request = "set=1\n".to_string();
        for line in text.lines() {
            if !seen.iter().any(|key| line.starts_with(key)) {
                request += line;
                request.push('\n');
            }
        }
        let expected = Set {
            private_key: Some(Some(private_key)),
            listen_port: Some(listen_port),
            firewall_mark: Some(firewall_mark),
            replaces_peers: false,
            peers: device.peers.iter().map(as_change).collect(),
        };
        let parsed = parse(request.as_bytes());
        prop_assert_eq!(parsed, Ok(Request::Set(Box::new(expected))));
    }

    /// Whatever the bytes are, reading them ends, and in pieces as in one.
    #[test]
    fn any_bytes_are_read(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&bytes);
        let _ = parse(&[b"set=1\n", &bytes[..]].concat());
        let of_peer = format!("set=1\npublic_key={KEY}\n");
        let _ = parse(&[of_peer.as_bytes(), &bytes].concat());
    }
}
