//! Lookups against a search through all prefixes.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

type Entry = (IpNet, NextHop);

/// The last of the longest prefixes that hold the address.
fn naive(prefixes: &[Entry], address: IpAddr) -> Option<NextHop> {
    let matches = prefixes.iter().filter(|(net, _)| net.contains(&address));
    matches
        .max_by_key(|(net, _)| net.prefix_len())
        .map(|(_, next_hop)| *next_hop)
}

/// Addresses where something changes: each prefix's first and last one, those
/// next to them, and the ends of both families.
fn edges(prefixes: &[Entry]) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = vec![
        Ipv4Addr::UNSPECIFIED.into(),
        Ipv4Addr::BROADCAST.into(),
        Ipv6Addr::UNSPECIFIED.into(),
        Ipv6Addr::from_bits(u128::MAX).into(),
    ];
    for (net, _) in prefixes {
        for address in [net.network(), net.broadcast()] {
            match address {
                IpAddr::V4(address) => addresses.extend(
                    [-1, 0, 1]
                        .map(|by| address.to_bits().wrapping_add_signed(by))
                        .map(|bits| IpAddr::from(Ipv4Addr::from_bits(bits))),
                ),
                IpAddr::V6(address) => addresses.extend(
                    [-1, 0, 1]
                        .map(|by| address.to_bits().wrapping_add_signed(by))
                        .map(|bits| IpAddr::from(Ipv6Addr::from_bits(bits))),
                ),
            }
        }
    }
    addresses
}

fn assert_like_naive(prefixes: &[Entry], addresses: impl IntoIterator<Item = IpAddr>) {
    let table = Prefixes::new(prefixes.iter().copied());
    for address in addresses {
        assert_eq!(
            table.lookup(address),
            naive(prefixes, address),
            "{address} among {prefixes:?}"
        );
    }
    let distinct: BTreeMap<IpNet, ()> = prefixes.iter().map(|(net, _)| (net.trunc(), ())).collect();
    assert_eq!(table.len(), distinct.len());
}

/// Addresses of few distinct bits, so that prefixes overlap, repeat and touch;
/// and of all bits.
fn v4_bits() -> impl Strategy<Value = u32> {
    prop_oneof![
        any::<u32>(),
        any::<u8>().prop_map(|bits| 0x0a00_0000 | u32::from(bits)),
        any::<u16>().prop_map(|bits| u32::from(bits) << 16),
        (0..4u32).prop_map(|bits| bits << 30 | bits),
    ]
}

fn v6_bits() -> impl Strategy<Value = u128> {
    prop_oneof![
        any::<u128>(),
        any::<u8>().prop_map(|bits| 0x2001_0db8 << 96 | u128::from(bits)),
        any::<u16>().prop_map(|bits| u128::from(bits) << 60),
        (0..4u128).prop_map(|bits| bits << 126 | bits),
    ]
}

/// All lengths, the shortest and the longest more often.
fn prefix_len(bits: u8) -> impl Strategy<Value = u8> {
    prop_oneof![4 => 0..=bits, 1 => Just(0), 2 => bits - 6..=bits]
}

/// Few next hops: neighbours often have the same.
fn entry() -> impl Strategy<Value = Entry> {
    let net = prop_oneof![
        (v4_bits(), prefix_len(32)).prop_map(|(bits, len)| {
            IpNet::from(Ipv4Net::new_assert(Ipv4Addr::from_bits(bits), len))
        }),
        (v6_bits(), prefix_len(128)).prop_map(|(bits, len)| {
            IpNet::from(Ipv6Net::new_assert(Ipv6Addr::from_bits(bits), len))
        }),
    ];
    (net, prop_oneof![0..3u16, any::<u16>()])
}

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        v4_bits().prop_map(|bits| Ipv4Addr::from_bits(bits).into()),
        v6_bits().prop_map(|bits| Ipv6Addr::from_bits(bits).into()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn few_prefixes_match_as_a_search_does(
        prefixes in vec(entry(), 0..12),
        addresses in vec(address(), 32),
    ) {
        assert_like_naive(&prefixes, addresses.into_iter().chain(edges(&prefixes)));
    }

    #[test]
    fn many_prefixes_match_as_a_search_does(
        prefixes in vec(entry(), 50..200),
        addresses in vec(address(), 64),
    ) {
        let edges = edges(&prefixes);
        assert_like_naive(&prefixes, addresses.into_iter().chain(edges));
    }
}

fn table(prefixes: &[(&str, NextHop)]) -> Prefixes {
    Prefixes::new(
        prefixes
            .iter()
            .map(|(net, hop)| (net.parse().unwrap(), *hop)),
    )
}

fn lookup(table: &Prefixes, address: &str) -> Option<NextHop> {
    table.lookup(address.parse().unwrap())
}

#[test]
fn an_empty_table_matches_nothing() {
    let table = table(&[]);
    assert!(table.is_empty());
    for address in ["0.0.0.0", "255.255.255.255", "::", "2001:db8::1"] {
        assert_eq!(lookup(&table, address), None, "{address}");
    }
}

#[test]
fn default_routes_match_their_family_and_need_no_index() {
    let v4 = table(&[("0.0.0.0/0", 7)]);
    assert_eq!(lookup(&v4, "192.0.2.1"), Some(7));
    assert_eq!(lookup(&v4, "2001:db8::1"), None);
    let both = table(&[("0.0.0.0/0", 7), ("::/0", NextHop::MAX)]);
    assert_eq!(lookup(&both, "255.255.255.255"), Some(7));
    assert_eq!(lookup(&both, "ffff::"), Some(NextHop::MAX));
    assert_eq!(both.len(), 2);
    assert_eq!(heap_bytes(&both), 2 * size_of::<Option<NextHop>>());
}

#[test]
fn the_longest_prefix_wins() {
    let table = table(&[
        ("10.1.2.3/32", 4),
        ("0.0.0.0/0", 1),
        ("10.0.0.0/8", 2),
        ("10.1.0.0/16", 3),
        ("2001:db8::1/128", 6),
        ("2001:db8::/32", 5),
    ]);
    assert_eq!(lookup(&table, "9.255.255.255"), Some(1));
    assert_eq!(lookup(&table, "10.0.255.255"), Some(2));
    assert_eq!(lookup(&table, "10.1.2.2"), Some(3));
    assert_eq!(lookup(&table, "10.1.2.3"), Some(4));
    assert_eq!(lookup(&table, "10.1.2.4"), Some(3));
    assert_eq!(lookup(&table, "11.0.0.0"), Some(1));
    assert_eq!(lookup(&table, "2001:db8::1"), Some(6));
    assert_eq!(lookup(&table, "2001:db8::2"), Some(5));
    assert_eq!(lookup(&table, "2001:db9::"), None);
}

#[test]
fn host_bits_do_not_matter_and_the_last_of_equal_prefixes_counts() {
    let table = table(&[
        ("10.1.2.3/8", 1),
        ("10.0.0.0/16", 3),
        ("10.200.0.0/8", 2),
        ("2001:db8::5/64", 8),
        ("2001:db8::/64", 9),
    ]);
    assert_eq!(table.len(), 3);
    assert_eq!(lookup(&table, "10.0.0.1"), Some(3));
    assert_eq!(lookup(&table, "10.1.0.1"), Some(2));
    assert_eq!(lookup(&table, "2001:db8::1"), Some(9));
}

#[test]
fn an_ipv4_mapped_address_is_an_ipv6_address() {
    let table = table(&[("10.0.0.0/8", 1)]);
    assert_eq!(lookup(&table, "::ffff:10.0.0.1"), None);
}

/// Nests as deep as it goes: a prefix of every length around one address, and
/// the worst for an index that divides by the leading bits.
#[test]
fn prefixes_of_all_lengths_nest() {
    let v4 = (0..=32).map(|len| Ipv4Net::new_assert(Ipv4Addr::new(170, 85, 170, 85), len));
    let v6 = (0..=128).map(|len| Ipv6Net::new_assert(Ipv6Addr::from_bits(!0 / 3), len));
    let nets = v4.map(IpNet::from).chain(v6.map(IpNet::from));
    let prefixes: Vec<Entry> = nets.zip(0..).collect();
    assert_like_naive(&prefixes, edges(&prefixes));
}

/// Sites far apart, each of them dense: nodes below nodes.
#[test]
fn dense_sites_far_apart() {
    let sites = (0..64u128).map(|site| site.wrapping_mul(0x9e37_79b9_7f4a_7c15) << 64);
    let nets = sites.flat_map(|site| {
        (0..48u128).map(move |host| Ipv6Net::new_assert(Ipv6Addr::from_bits(site | host), 128))
    });
    let prefixes: Vec<Entry> = nets.map(IpNet::from).zip(0..).collect();
    let sample = edges(&prefixes).into_iter().step_by(7);
    assert_like_naive(&prefixes, sample);
}

#[test]
fn neighbours_with_one_next_hop_take_one_range() {
    let nets = (0..=255u8).map(|byte| Ipv4Net::new_assert(Ipv4Addr::new(byte, 0, 0, 0), 8));
    let table = Prefixes::new(nets.map(|net| (net.into(), 3)));
    assert_eq!(table.len(), 256);
    assert_eq!(lookup(&table, "200.1.2.3"), Some(3));
    assert_eq!(heap_bytes(&table), 2 * size_of::<Option<NextHop>>());
}

#[test]
fn threads_may_share_a_table() {
    fn shared<T: Send + Sync>() {}
    shared::<Prefixes>();
}

/// Bytes that the table takes on the heap.
fn heap_bytes(table: &Prefixes) -> usize {
    of_family(&table.v4) + of_family(&table.v6)
}

fn of_family<A: Address>(ranges: &Ranges<A>) -> usize {
    size_of_val(&*ranges.nodes)
        + size_of_val(&*ranges.slots)
        + size_of_val(&*ranges.highs)
        + size_of_val(&*ranges.lows)
        + size_of_val(&*ranges.next_hops)
}
