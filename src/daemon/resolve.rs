//! Peers' addresses by their names: at the start of a tunnel, and from the answers
//! that come while it runs.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::reach;
use crate::config::PeerName;
use crate::error::{Error, Result};
use crate::routing::dns::{self, Lookup, Names};
use crate::routing::overlay::{Overlay, Peer};

/// How long names have at the start. What does not resolve until then is
/// waited for while the tunnel runs.
const NAMES_WAIT_MAX: Duration = Duration::from_secs(5);

/// Addresses of peers by name, `HOST:PORT`, that an old process knows.
pub type Known = HashMap<String, SocketAddr>;

/// Gives peers that have no address yet theirs, as far as names resolve within
/// a few seconds; tells why the others do not. Names that did not resolve a
/// moment ago are not waited for again. An address that cannot be a peer's, for
/// sockets on `listen`, is as good as none.
pub fn resolve_now(overlay: &mut Overlay, names: &mut Names, listen: SocketAddr) -> Vec<Error> {
    let now = Instant::now();
    let all = overlay.peers().map(|(_, peer)| &peer.name);
    names.watch(all.filter(|name| name.literal().is_none()), now);
    let mut waiting: HashSet<PeerName> = overlay
        .peers_by_name()
        .filter(|peer| peer.endpoint.is_none() && names.is_expected(&peer.name, now))
        .map(|peer| peer.name.clone())
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
        if let Some((name, Err(error))) = take_answer(overlay, names, answer, false, check) {
            failed.insert(name, error);
        }
    }
    let unresolved = overlay
        .peers_by_name()
        .filter(|peer| peer.endpoint.is_none());
    let reasons = unresolved.filter_map(|Peer { name, .. }| match waiting.contains(name) {
        true => Some(no_answer_yet(name)),
        false => failed.remove(name),
    });
    reasons.collect()
}

/// A peer's address before and after an answer.
type Moved = (Option<SocketAddr>, SocketAddr);

/// Gives a peer the best of the addresses in an answer that `check` lets pass; another
/// one than it has, if it `is_silent` there.
/// Addresses that cannot be the peer's are as good as none: the name is asked for
/// again until it has another. `None`: nobody wants to know any more.
pub fn take_answer(
    overlay: &mut Overlay,
    names: &mut Names,
    answer: Lookup,
    is_silent: bool,
    mut check: impl FnMut(&Overlay, SocketAddr) -> Result<()>,
) -> Option<(PeerName, Result<Moved>)> {
    let Lookup { name, result } = answer;
    // There is room for another one.
    names.tick(Instant::now());
    let (hop, peer) = overlay.find(&name)?;
    let old = peer.endpoint;
    let result = result.and_then(|addresses| {
        let addresses = dns::in_order(addresses, old, is_silent);
        dns::first_usable(&name, addresses, |endpoint| check(overlay, endpoint))
    });
    if !names.note_answer(&name, result.is_ok(), Instant::now()) {
        return None;
    }
    if let Ok(endpoint) = &result {
        overlay.set_endpoint(hop, Some(*endpoint));
    }
    Some((name, result.map(|new| (old, new))))
}

fn no_answer_yet(name: &PeerName) -> Error {
    Error::new(format!("cannot resolve peer {}: no answer yet", name.host))
        .hint("check the name, or give the address")
}

/// Gives peers the addresses that are known already. Their names are asked for
/// all the same, but nobody waits for the answers.
pub fn set_known(overlay: &mut Overlay, known: &Known, listen: SocketAddr) {
    let found: Vec<_> = overlay
        .peers()
        .filter(|(_, peer)| peer.endpoint.is_none())
        .filter_map(|(hop, peer)| {
            let endpoint = *known.get(&peer.name.to_string())?;
            Some((hop, peer.name.port, endpoint))
        })
        .filter(|(.., endpoint)| !overlay.leads_back(listen, *endpoint))
        .collect();
    for (hop, port, endpoint) in found {
        let mut configured = endpoint;
        configured.set_port(port);
        overlay.set_endpoint(hop, Some(configured));
        if port != endpoint.port() {
            overlay.set_learned_port(hop, Some(endpoint.port()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv6Addr};

    use super::*;
    use crate::config::DEFAULT_PORT;
    use crate::routing::overlay::Origin;

    const ANY: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), DEFAULT_PORT);

    fn name(host: &str) -> PeerName {
        PeerName {
            host: host.to_string(),
            port: 8285,
        }
    }

    /// An overlay with peers of these names.
    fn overlay(hosts: &[&str]) -> Overlay {
        let mut overlay = Overlay::default();
        for (host, number) in hosts.iter().zip(0..) {
            let prefix = ipnet::IpNet::from(std::net::IpAddr::from([10, 0, 0, number]));
            overlay
                .add_peer(&name(host), false, &[prefix], Origin::Config)
                .unwrap();
        }
        overlay
    }

    fn endpoint(overlay: &Overlay, host: &str) -> Option<SocketAddr> {
        overlay.find(&name(host)).unwrap().1.endpoint
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
        let other = ("other:8285".to_string(), "10.1.0.9:8285".parse().unwrap());
        let known = ("known:8285".to_string(), "10.1.0.1:8285".parse().unwrap());
        set_known(&mut overlay, &Known::from([other, known.clone()]), ANY);
        assert!(resolve_now(&mut overlay, &mut names, ANY).is_empty());
        assert_eq!(endpoint(&overlay, "known"), Some(known.1));
        names.tick(Instant::now());
        assert_eq!(asked.try_iter().collect::<Vec<_>>(), [name("known")]);
    }

    /// A new process's peers stay where they are if they may be there.
    #[test]
    fn what_is_known_stays_while_it_is_among_the_answers() {
        let (mut names, _asked, answers) = Names::without_threads();
        let mut overlay = overlay(&["kept", "moved", "new"]);
        let known = ["kept", "moved"]
            .map(|host| (format!("{host}:8285"), "10.1.0.2:8285".parse().unwrap()));
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
            .add_peer(&name("new"), true, &[], Origin::Runtime)
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
        take_answer(&mut overlay, &mut names, answer, false, |_, _| Ok(()))
            .unwrap()
            .1
            .unwrap();
        assert_eq!(asked.try_iter().collect::<Vec<_>>(), [name("due")]);
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
