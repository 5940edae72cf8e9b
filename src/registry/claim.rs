//! Which subnet a host is to have.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::network::Network;
use crate::error::{Error, Result};

/// What a host should do to have a subnet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// It has this one.
    Own(Ipv4Net),
    /// This one is free, as far as is known.
    Free(Ipv4Net),
}

/// Chooses the subnet of the host with the address `own`: the one that it has, else the
/// `previous` one, else the one that its address leads to, else the next one that is free.
/// Hosts that come at once so begin at different places. `taken`: who has which.
///
/// # Errors
/// When all are taken.
pub(crate) fn choose(
    network: &Network,
    own: Ipv4Addr,
    previous: Option<Ipv4Net>,
    taken: &BTreeMap<Ipv4Net, Ipv4Addr>,
) -> Result<Claim> {
    let is_own = |subnet: Ipv4Net| taken.get(&subnet) == Some(&own);
    let previous = previous.filter(|subnet| network.has_subnet(*subnet));
    let had = taken.keys().copied();
    let mut had = had.filter(|subnet| is_own(*subnet) && network.has_subnet(*subnet));
    if let Some(own) = previous
        .filter(|subnet| is_own(*subnet))
        .or_else(|| had.next())
    {
        return Ok(Claim::Own(own));
    }
    let is_free = |subnet: &Ipv4Net| !taken.contains_key(subnet);
    let (count, first) = (network.subnet_count(), start(own));
    let mut others = (0..count).map(|step| network.subnet((first % count + step) % count));
    let free = previous.filter(is_free).or_else(|| others.find(is_free));
    free.map(Claim::Free).ok_or_else(|| {
        let what = format!("all {count} subnets of {} are taken", network.network);
        Error::new(what).hint("`fastvpn registry show` lists them; a larger Network has more")
    })
}

/// A number that hosts with addresses side by side do not have in common (the finalizer of
/// MurmurHash3).
fn start(address: Ipv4Addr) -> u32 {
    let mut hash = u32::from(address);
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn network(text: &str) -> Network {
        Network::parse(format!(r#"{{"Network":"{text}"}}"#).as_bytes()).unwrap()
    }

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    const OWN: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const OTHER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    #[test]
    fn a_host_keeps_what_it_has() {
        let network = network("10.50.0.0/16");
        let taken = BTreeMap::from([
            (net("10.50.7.0/24"), OWN),
            (net("10.50.8.0/24"), OWN),
            (net("10.50.9.0/24"), OTHER),
        ]);
        let choose = |previous: &str| {
            let previous = (!previous.is_empty()).then(|| net(previous));
            choose(&network, OWN, previous, &taken).unwrap()
        };
        assert_eq!(choose(""), Claim::Own(net("10.50.7.0/24")));
        assert_eq!(choose("10.50.8.0/24"), Claim::Own(net("10.50.8.0/24")));
        assert_eq!(choose("10.50.9.0/24"), Claim::Own(net("10.50.7.0/24")));
    }

    #[test]
    fn a_host_that_has_none_gets_the_previous_one_if_that_is_free() {
        let network = network("10.50.0.0/16");
        let taken = BTreeMap::from([(net("10.50.9.0/24"), OTHER)]);
        let choose = |previous: &str| choose(&network, OWN, Some(net(previous)), &taken).unwrap();
        assert_eq!(choose("10.50.8.0/24"), Claim::Free(net("10.50.8.0/24")));
        for gone in [
            "10.50.9.0/24",
            "10.51.1.0/24",
            "10.50.0.0/24",
            "10.50.8.0/25",
        ] {
            let Claim::Free(subnet) = choose(gone) else {
                panic!("it has none");
            };
            assert!(network.has_subnet(subnet) && subnet != net(gone), "{gone}");
        }
    }

    #[test]
    fn a_full_network_says_so() {
        let network = network("10.50.0.0/22");
        let all = (0..3).map(|number| (network.subnet(number), OTHER));
        let error = choose(&network, OWN, None, &all.collect()).unwrap_err();
        assert!(error.to_string().contains("all 3 subnets"), "{error}");
    }

    proptest! {
        /// Hosts that come one after the other all get one, as long as there are any.
        #[test]
        fn all_subnets_can_be_had(first in any::<u32>()) {
            let network = network("10.50.0.0/18");
            let mut taken = BTreeMap::new();
            for number in 0..network.subnet_count() {
                let own = Ipv4Addr::from(first.wrapping_add(number));
                let claim = choose(&network, own, None, &taken).unwrap();
                let Claim::Free(subnet) = claim else {
                    return Err(TestCaseError::fail("it had none"));
                };
                prop_assert_eq!(taken.insert(subnet, own), None);
            }
            prop_assert!(choose(&network, first.wrapping_sub(1).into(), None, &taken).is_err());
        }
    }

    /// Fifty neighbours hardly ever try the same one first.
    #[test]
    fn neighbours_begin_at_different_places() {
        let network = network("10.50.0.0/16");
        let firsts: BTreeSet<_> = (0..50)
            .map(|host| {
                let own = Ipv4Addr::new(10, 211, 55, host);
                match choose(&network, own, None, &BTreeMap::new()) {
                    Ok(Claim::Free(subnet)) => subnet,
                    other => panic!("{other:?}"),
                }
            })
            .collect();
        assert!(firsts.len() >= 40, "{}", firsts.len());
    }
}
