//! Peers' addresses by their names: at the start of a tunnel, and from the answers
//! that come while it runs.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::reach;
use crate::config::{HostPort, PeerName};
use crate::error::{Error, Result};
use crate::packet::batch::NextHop;
use crate::routing::dns::{self, Lookup, Names};
use crate::routing::overlay::{Overlay, Peer};

/// How long names have at the start. What does not resolve until then is
/// waited for while the tunnel runs.
const NAMES_WAIT_MAX: Duration = Duration::from_secs(5);

/// Addresses of peers by name, as an old process knows them, and whether they are those of
/// peers that have roamed there.
pub type Known = HashMap<String, (SocketAddr, bool)>;

/// Gives peers that have no address yet theirs, as far as names resolve within
/// a few seconds; tells why the others do not. Names that did not resolve a
/// moment ago are not waited for again. An address that cannot be a peer's, for
/// sockets on `listen`, is as good as none.
pub fn resolve_now(overlay: &mut Overlay, names: &mut Names, listen: SocketAddr) -> Vec<Error> {
    let now = Instant::now();
    names.watch(overlay.dns_names(), now);
    let mut waiting: HashSet<HostPort> = unresolved(overlay)
        .filter_map(Peer::dns_name)
        .filter(|name| names.is_expected(name, now))
        .cloned()
        .collect();
    let mut failed = HashMap::new();
    let deadline = now + NAMES_WAIT_MAX;
    names.tick(now);
    while !waiting.is_empty() {
        let wait = deadline.saturating_duration_since(Instant::now());
        let Ok(answer) = names.answers().recv_timeout(wait) else {
            break;
        };
        // A name that failed may have been asked for again meanwhile: its answer is not one
        // of those that are still to come.
        waiting.remove(&answer.name);
        let check = |overlay: &Overlay, peer| reach::check_endpoint(listen, overlay, peer);
        for (hop, result) in take_answer(overlay, names, answer, |_| false, check) {
            if let Err(error) = result {
                failed.insert(hop, error);
            }
        }
    }
    let mut reasons = Vec::new();
    for peer in unresolved(overlay) {
        let hop = overlay.find(&peer.name).map(|(hop, _)| hop);
        reasons.extend(match peer.dns_name() {
            Some(name) if waiting.contains(name) => Some(no_answer_yet(name)),
            _ => hop.and_then(|hop| failed.remove(&hop)),
        });
    }
    reasons
}

/// The peers without an address, in the order of their names.
fn unresolved(overlay: &Overlay) -> impl Iterator<Item = &Peer> {
    overlay
        .peers_by_name()
        .filter(|peer| peer.endpoint.is_none())
}

/// A peer's address before and after an answer.
type Moved = (Option<SocketAddr>, SocketAddr);

/// Gives peers the best of the addresses in an answer about their name that `check` lets
/// pass; another one than it has, if it `is_silent` there. One that has called from
/// elsewhere stays there until then.
/// Addresses that cannot be a peer's are as good as none: the name is asked for
/// again until it has another. Nothing comes of it if nobody wants to know any more.
pub fn take_answer(
    overlay: &mut Overlay,
    names: &mut Names,
    answer: Lookup,
    is_silent: impl Fn(NextHop) -> bool,
    mut check: impl FnMut(&Overlay, SocketAddr) -> Result<()>,
) -> Vec<(NextHop, Result<Moved>)> {
    let Lookup { name, result } = answer;
    // There is room for another one.
    names.tick(Instant::now());
    let mut taken = Vec::new();
    for hop in overlay.placed_at(&name) {
        let Some(peer) = overlay.peer(hop) else {
            continue;
        };
        let (old, is_silent) = (peer.endpoint, is_silent(hop));
        let found = match (&result, old) {
            (_, Some(old)) if peer.has_roamed() && !is_silent => Ok(old),
            (Ok(addresses), _) => {
                let addresses = dns::in_order(addresses.clone(), old, is_silent);
                dns::first_usable(&peer.name, addresses, |endpoint| check(overlay, endpoint))
            }
            (Err(error), _) => Err(Error::new(error.to_string())),
        };
        taken.push((hop, found.map(|new| (old, new))));
    }
    let is_good = taken.iter().all(|(_, result)| result.is_ok());
    if !names.note_answer(&name, is_good, Instant::now()) {
        return Vec::new();
    }
    for (hop, result) in &taken {
        if let Ok((_, endpoint)) = result {
            overlay.set_endpoint(*hop, Some(*endpoint));
        }
    }
    taken
}

fn no_answer_yet(name: &HostPort) -> Error {
    Error::new(format!("cannot resolve peer {}: no answer yet", name.host))
        .hint("check the name, or give the address")
}

/// Gives peers the addresses that are known already: those with keys also in place of what
/// they were given, as that is where they were last seen. Their names are asked for
/// all the same, but nobody waits for the answers.
pub fn set_known(overlay: &mut Overlay, known: &Known, listen: SocketAddr) {
    let found: Vec<_> = overlay
        .peers()
        .filter(|(_, peer)| peer.endpoint.is_none() || peer.secure.is_some())
        .filter_map(|(hop, peer)| {
            let (endpoint, has_roamed) = *known.get(&peer.name.to_string())?;
            Some((hop, peer.name.clone(), endpoint, has_roamed))
        })
        .filter(|(_, _, endpoint, _)| !overlay.leads_back(listen, *endpoint))
        .collect();
    for (hop, name, endpoint, has_roamed) in found {
        let PeerName::Host(place) = name else {
            match has_roamed {
                true => overlay.set_roamed(hop, endpoint),
                false => overlay.set_endpoint(hop, Some(endpoint)),
            };
            continue;
        };
        let mut configured = endpoint;
        configured.set_port(place.port);
        overlay.set_endpoint(hop, Some(configured));
        if configured != endpoint {
            overlay.set_learned_port(hop, Some(endpoint.port()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv6Addr};

    use super::*;
    use crate::config::{DEFAULT_PORT, PeerSpec, parse_peer};
    use crate::routing::overlay::Origin;

    const ANY: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), DEFAULT_PORT);

    fn name(host: &str) -> HostPort {
        HostPort {
            host: host.to_string(),
            port: 8285,
        }
    }

    fn spec(host: &str) -> PeerSpec {
        PeerSpec::new(PeerName::Host(name(host)), Some(name(host)))
    }

    /// An overlay with peers of these names.
    fn overlay(hosts: &[&str]) -> Overlay {
        let mut overlay = Overlay::default();
        for (host, number) in hosts.iter().zip(0..) {
            let prefix = ipnet::IpNet::from(std::net::IpAddr::from([10, 0, 0, number]));
            let mut spec = spec(host);
            spec.prefixes = vec![prefix];
            overlay.add_peer(&spec, false, Origin::Config).unwrap();
        }
        overlay
    }

    fn endpoint(overlay: &Overlay, host: &str) -> Option<SocketAddr> {
        overlay
            .find(&PeerName::Host(name(host)))
            .unwrap()
            .1
            .endpoint
    }

    fn answer(host: &str, address: Option<&str>) -> Lookup {
        Lookup {
            name: name(host),
            result: match address {
                Some(address) => Ok(address.split(' ').map(|one| one.parse().unwrap()).collect()),
                None => Err(Error::new(format!("no {host}"))),
            },
        }
    }

    /// The second answer about one name is not taken for that about another.
    #[test]
    fn a_name_that_fails_twice_keeps_no_other_from_being_waited_for() {
        let (mut names, asked, answers) = Names::without_threads();
        let mut overlay = overlay(&["bad", "slow", "slower"]);
        let server = std::thread::spawn(move || {
            let mut first: Vec<_> = asked.iter().take(3).map(|name| name.host).collect();
            first.sort();
            answers.send(answer("bad", None)).unwrap();
            // Until "bad" is due again, at the next tick.
            std::thread::sleep(Duration::from_millis(1100));
            answers.send(answer("slow", Some("10.1.0.1:8285"))).unwrap();
            let again = asked.recv().unwrap().host;
            answers.send(answer(&again, None)).unwrap();
            answers
                .send(answer("slower", Some("10.1.0.2:8285")))
                .unwrap();
            (first, again)
        });
        let failed = resolve_now(&mut overlay, &mut names, ANY);
        let (first, again) = server.join().unwrap();
        assert_eq!(first, ["bad", "slow", "slower"]);
        assert_eq!(again, "bad");
        assert_eq!(endpoint(&overlay, "bad"), None);
        for (host, address) in [("slow", "10.1.0.1:8285"), ("slower", "10.1.0.2:8285")] {
            assert_eq!(endpoint(&overlay, host), Some(address.parse().unwrap()));
        }
        let failed: Vec<_> = failed.iter().map(ToString::to_string).collect();
        assert_eq!(failed, ["no bad"]);
    }

    /// Not even a name server that is silent holds up a new process.
    #[test]
    fn what_is_known_is_asked_for_but_not_waited_for() {
        let (mut names, asked, _answers) = Names::without_threads();
        let mut overlay = overlay(&["known"]);
        let at = |address: &str| (address.parse().unwrap(), false);
        let other = ("other:8285".to_string(), at("10.1.0.9:8285"));
        let known = ("known:8285".to_string(), at("10.1.0.1:8285"));
        set_known(&mut overlay, &Known::from([other, known.clone()]), ANY);
        assert!(resolve_now(&mut overlay, &mut names, ANY).is_empty());
        assert_eq!(endpoint(&overlay, "known"), Some(known.1.0));
        names.tick(Instant::now());
        assert_eq!(asked.try_iter().collect::<Vec<_>>(), [name("known")]);
    }

    /// A new process's peers stay where they are if they may be there.
    #[test]
    fn what_is_known_stays_while_it_is_among_the_answers() {
        let (mut names, _asked, answers) = Names::without_threads();
        let mut overlay = overlay(&["kept", "moved", "new"]);
        let known = ["kept", "moved"].map(|host| {
            (
                format!("{host}:8285"),
                ("10.1.0.2:8285".parse().unwrap(), false),
            )
        });
        set_known(&mut overlay, &known.into(), ANY);
        for (host, addresses) in [
            ("kept", "10.1.0.3:8285 10.1.0.1:8285 10.1.0.2:8285"),
            ("moved", "10.1.0.3:8285 10.1.0.1:8285"),
            ("new", "10.1.0.3:8285 10.1.0.1:8285 10.1.0.2:8285"),
        ] {
            answers.send(answer(host, Some(addresses))).unwrap();
        }
        assert!(resolve_now(&mut overlay, &mut names, ANY).is_empty());
        for (host, address) in [
            ("kept", "10.1.0.2:8285"),
            ("moved", "10.1.0.3:8285"),
            ("new", "10.1.0.3:8285"),
        ] {
            assert_eq!(
                endpoint(&overlay, host),
                Some(address.parse().unwrap()),
                "{host}"
            );
        }
    }

    /// As a new process does, for the peers that it inherits.
    #[test]
    fn what_was_asked_for_in_vain_is_not_waited_for_again() {
        let (mut names, asked, answers) = Names::without_threads();
        let mut overlay = overlay(&["bad", "good"]);
        answers.send(answer("bad", None)).unwrap();
        answers.send(answer("good", Some("10.1.0.1:8285"))).unwrap();
        assert_eq!(resolve_now(&mut overlay, &mut names, ANY).len(), 1);
        assert_eq!(asked.try_iter().count(), 2);
        assert!(resolve_now(&mut overlay, &mut names, ANY).is_empty());
        assert_eq!(asked.try_iter().count(), 0);
        // One that is new is.
        overlay
            .add_peer(&spec("new"), true, Origin::Runtime)
            .unwrap();
        answers.send(answer("new", Some("10.1.0.3:8285"))).unwrap();
        assert!(resolve_now(&mut overlay, &mut names, ANY).is_empty());
        assert_eq!(asked.try_iter().collect::<Vec<_>>(), [name("new")]);
        assert!(endpoint(&overlay, "new").is_some());
    }

    /// Not only once a second.
    #[test]
    fn after_an_answer_the_next_name_is_asked_for() {
        let (mut names, asked, _answers) = Names::without_threads();
        let mut overlay = overlay(&["answered", "due"]);
        names.watch([name("answered")].iter(), Instant::now());
        names.tick(Instant::now());
        assert_eq!(asked.try_recv(), Ok(name("answered")));
        let both = [name("answered"), name("due")];
        names.watch(both.iter(), Instant::now());
        let answer = answer("answered", Some("10.1.0.1:8285"));
        let taken = take_answer(&mut overlay, &mut names, answer, |_| false, |_, _| Ok(()));
        assert!(taken[0].1.is_ok());
        assert_eq!(asked.try_iter().collect::<Vec<_>>(), [name("due")]);
    }

    /// Where it has roamed to counts no more once it is to be somewhere else.
    #[test]
    fn a_peer_that_has_roamed_follows_another_name() {
        const KEY: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        let spec = |host: &str| parse_peer(&format!("{KEY}@{host}=10.8.0.0/16")).unwrap();
        let (mut names, _asked, _answers) = Names::without_threads();
        let mut overlay = Overlay::default();
        overlay.configure(&[spec("old.example")]).unwrap();
        let roamed = "192.0.2.7:1024".parse().unwrap();
        overlay.set_roamed(0, roamed);
        for (host, endpoint) in [
            ("old.example", roamed),
            ("new.example", "10.1.0.1:8285".parse().unwrap()),
        ] {
            overlay.configure(&[spec(host)]).unwrap();
            assert_eq!(overlay.peer(0).unwrap().endpoint, Some(roamed));
            names.watch(overlay.dns_names(), Instant::now());
            names.tick(Instant::now());
            let answer = answer(host, Some("10.1.0.1:8285"));
            take_answer(&mut overlay, &mut names, answer, |_| false, |_, _| Ok(()));
            assert_eq!(overlay.peer(0).unwrap().endpoint, Some(endpoint), "{host}");
        }
    }

    #[test]
    fn a_name_that_is_late_is_reported() {
        let (mut names, _asked, answers) = Names::without_threads();
        let mut overlay = overlay(&["early", "late"]);
        answers
            .send(answer("early", Some("10.1.0.1:8285")))
            .unwrap();
        // Nobody will answer any more, which is as good as too late.
        drop(answers);
        let failed = resolve_now(&mut overlay, &mut names, ANY);
        let failed: Vec<_> = failed.iter().map(ToString::to_string).collect();
        assert_eq!(failed.len(), 1, "{failed:?}");
        assert!(failed[0].starts_with("cannot resolve peer late: no answer yet"));
    }
}
