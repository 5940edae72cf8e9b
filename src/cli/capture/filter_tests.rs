use etherparse::PacketBuilder;
use proptest::prelude::*;

use super::*;

/// A packet's protocol, addresses and ports.
#[derive(Clone, Debug)]
struct Packet {
    is_tcp: bool,
    ends: [(IpAddr, u16); 2],
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let [(source, from), (destination, to)] = self.ends;
        let builder = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                PacketBuilder::ipv4(source.octets(), destination.octets(), 64)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                PacketBuilder::ipv6(source.octets(), destination.octets(), 64)
            }
            _ => unreachable!("both are of one family"),
        };
        let mut bytes = Vec::new();
        match self.is_tcp {
            true => builder.tcp(from, to, 1, 1).write(&mut bytes, b"x"),
            false => builder.udp(from, to).write(&mut bytes, b"x"),
        }
        .unwrap();
        bytes
    }
}

fn wants(filter: &str, packet: &[u8]) -> bool {
    parse(filter).unwrap().wants(View::of(packet).as_ref())
}

#[test]
fn filters_tell_packets_apart() {
    let ends = |source: &str, destination: &str| {
        [
            (source.parse().unwrap(), 443),
            (destination.parse().unwrap(), 5000),
        ]
    };
    let tcp = Packet {
        is_tcp: true,
        ends: ends("10.1.0.1", "10.2.0.2"),
    };
    let udp = Packet {
        is_tcp: false,
        ends: ends("fd00:1::1", "fd00:2::2"),
    };
    for (filter, takes_tcp, takes_udp) in [
        ("tcp", true, false),
        ("udp", false, true),
        ("ip", true, false),
        ("ip6", false, true),
        ("icmp", false, false),
        ("tcp port 443", true, false),
        ("tcp dst port 443", false, false),
        ("port 443", true, true),
        ("src port 443", true, true),
        ("dst port 5000 and udp", false, true),
        ("host 10.1.0.1", true, false),
        ("dst host 10.1.0.1", false, false),
        ("ip6 host fd00:2::2", false, true),
        ("net 10.0.0.0/8", true, false),
        ("src net fd00:1::/32", false, true),
        ("dst net fd00:1::/32", false, false),
        ("not tcp", false, true),
        ("!tcp", false, true),
        ("not (tcp or udp)", false, false),
        ("not(tcp)||port 443", true, true),
        ("tcp or udp and port 1", true, false),
        ("(tcp or udp) and port 1", false, false),
        ("tcp && !port 80", true, false),
        ("not not tcp", true, false),
    ] {
        assert_eq!(wants(filter, &tcp.bytes()), takes_tcp, "{filter}, TCP");
        assert_eq!(wants(filter, &udp.bytes()), takes_udp, "{filter}, UDP");
    }
    // What is none of IP is neither.
    assert!(!wants("ip or ip6", &[0x15; 60]) && wants("not ip", &[0x15; 60]));
}

#[test]
fn what_is_no_filter_is_refused_with_a_reason() {
    let deep = "( ".repeat(WORDS_MAX);
    let many = "not ".repeat(DEPTH_MAX + 1) + "tcp";
    for (text, part) in [
        ("", "words"),
        ("tcp port", "a number"),
        ("port 70000", "`70000` is not a port"),
        ("host vpn.example", "`vpn.example` is not an address"),
        ("net 10.1.0.0", "is not a prefix"),
        ("tcp udp", "not `udp`"),
        ("src", "`host`"),
        ("(tcp", "`)`"),
        ("tcp)", "not `)`"),
        ("tcp and", "`host`"),
        ("ether host 1", "not `ether`"),
        ("not", "`host`"),
        (&deep, "nested"),
        (&many, "nested"),
    ] {
        let error = parse(text).unwrap_err();
        assert!(error.contains(part), "{text}: {error}");
        assert!(error.len() < 300 && !error.contains('\n'), "{error}");
    }
}

fn an_end() -> impl Strategy<Value = (IpAddr, u16)> {
    let address = (0..3_u8, 0..3_u8).prop_map(|(net, host)| IpAddr::from([10, net, 0, host]));
    (address, 1..5_u16)
}

/// A filter as text, and what it means.
fn a_filter() -> impl Strategy<Value = (String, Filter)> {
    let side = prop::sample::select(vec![
        ("", Side::Either),
        ("src ", Side::Source),
        ("dst ", Side::Destination),
    ]);
    let ends = prop_oneof![
        an_end()
            .prop_map(|(address, _)| { (format!("host {address}"), IpNet::from(address), None) }),
        (0..3_u8).prop_map(|net| {
            let net = format!("10.{net}.0.0/16");
            (format!("net {net}"), net.parse().unwrap(), None)
        }),
        (1..5_u16).prop_map(|port| { (format!("port {port}"), IpNet::default(), Some(port)) }),
    ];
    let end = (side, ends).prop_map(|((word, side), (text, net, port))| {
        let filter = match port {
            Some(port) => Filter::Port(side, port),
            None => Filter::Net(side, net),
        };
        (format!("{word}{text}"), filter)
    });
    let protocol = prop::sample::select(vec![
        ("tcp".to_string(), Filter::Protocol(Protocol::Tcp)),
        ("udp".to_string(), Filter::Protocol(Protocol::Udp)),
        ("ip".to_string(), Filter::Protocol(Protocol::Ip)),
    ]);
    prop_oneof![end, protocol].prop_recursive(4, 20, 3, |inner| {
        let many = prop::collection::vec(inner.clone(), 2..4);
        prop_oneof![
            inner.prop_map(|(text, filter)| {
                (format!("not ({text})"), Filter::Not(Box::new(filter)))
            }),
            (many, any::<bool>()).prop_map(|(some, is_all)| {
                let texts: Vec<_> = some.iter().map(|(text, _)| format!("({text})")).collect();
                let filters = some.into_iter().map(|(_, filter)| filter).collect();
                match is_all {
                    true => (texts.join(" and "), Filter::All(filters)),
                    false => (texts.join(" or "), Filter::Any(filters)),
                }
            }),
        ]
    })
}

/// What a filter means, of a packet's fields.
fn means(filter: &Filter, packet: &Packet) -> bool {
    let [(source, from), (destination, to)] = packet.ends;
    let either = |side: &Side, first: bool, second: bool| match side {
        Side::Source => first,
        Side::Destination => second,
        Side::Either => first | second,
    };
    match filter {
        Filter::All(all) => !all.iter().any(|filter| !means(filter, packet)),
        Filter::Any(some) => some.iter().any(|filter| means(filter, packet)),
        Filter::Not(filter) => !means(filter, packet),
        Filter::Protocol(Protocol::Tcp) => packet.is_tcp,
        Filter::Protocol(Protocol::Udp) => !packet.is_tcp,
        Filter::Protocol(_) => true,
        Filter::Net(side, net) => either(side, net.contains(&source), net.contains(&destination)),
        Filter::Port(side, port) => either(side, from == *port, to == *port),
    }
}

proptest! {
    #[test]
    fn a_filter_takes_what_it_means(
        (text, filter) in a_filter(),
        is_tcp: bool,
        (first, second) in (an_end(), an_end()),
    ) {
        let parsed = parse(&text).unwrap();
        prop_assert_eq!(&parsed, &filter, "{}", text);
        let packet = Packet { is_tcp, ends: [first, second] };
        let bytes = packet.bytes();
        prop_assert_eq!(parsed.wants(View::of(&bytes).as_ref()), means(&filter, &packet));
    }

    #[test]
    fn any_text_is_read_or_refused(text in "[ -~é]{0,60}") {
        let _ = parse(&text);
    }

    #[test]
    fn any_words_are_read_or_refused(words in prop::collection::vec(
        prop::sample::select(vec![
            "tcp", "ip6", "src", "dst", "host", "net", "port", "and", "or", "not", "(", ")",
            "1", "10.0.0.1", "10.0.0.0/8", "!",
        ]),
        0..12,
    )) {
        if let Ok(filter) = parse(&words.join(" ")) {
            filter.wants(None);
            filter.wants(View::of(&[0x45; 60]).as_ref());
        }
    }
}
