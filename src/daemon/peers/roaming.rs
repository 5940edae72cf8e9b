//! Where a peer with a key is: its sessions follow it wherever it sends from, and tell it
//! here once a second; what a name resolves to, or an operator says, goes to the sessions.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use super::Peers;

/// Which of the two has changed.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    /// Neither.
    None,
    /// The peer is to be found elsewhere: its sessions have to know.
    Ours,
    /// The peer has sent from elsewhere.
    Theirs(SocketAddr),
}

/// Compares what this thread and a peer's sessions say with what they `agreed` on last. If
/// both say something new, this thread has the last word: a peer that is elsewhere says so
/// again with its next packet.
fn compare(
    agreed: Option<SocketAddr>,
    ours: Option<SocketAddr>,
    theirs: Option<SocketAddr>,
) -> Change {
    match theirs {
        _ if ours != agreed => Change::Ours,
        Some(new) if theirs != agreed => Change::Theirs(new),
        _ => Change::None,
    }
}

impl Peers {
    /// Has the overlay and the sessions of each peer agree on where it is.
    pub(in crate::daemon) fn follow_endpoints(&mut self, now: Instant) {
        let mut roamed = Vec::new();
        for (hop, peer) in self.overlay.peers() {
            let Some((secure, state)) = peer.secure.as_ref().zip(self.states.get_mut(&hop)) else {
                continue;
            };
            let (ours, shared) = (peer.endpoint, &secure.sessions.endpoint);
            let theirs = secure.sessions.address();
            match compare(state.agreed_endpoint, ours, theirs) {
                Change::None => {}
                Change::Ours => {
                    shared.store(ours.map(|address| Arc::new(address.into())));
                    state.agreed_endpoint = ours;
                }
                Change::Theirs(theirs) => {
                    state.agreed_endpoint = Some(theirs);
                    roamed.push((hop, ours, theirs));
                }
            }
        }
        for (hop, old, new) in roamed {
            self.overlay.set_roamed(hop, new);
            self.note_move(hop, old, new, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse_peer;
    use crate::daemon::peers::probe_channel;
    use crate::routing::dns::Names;
    use crate::routing::overlay::{Origin, Overlay, Peer};

    const KEY: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";

    fn at(port: u16) -> Option<SocketAddr> {
        Some(([10, 0, 0, 1], port).into())
    }

    #[test]
    fn whoever_has_something_new_is_believed() {
        assert_eq!(compare(None, None, None), Change::None);
        assert_eq!(compare(at(1), at(1), at(1)), Change::None);
        assert_eq!(compare(at(1), at(1), None), Change::None);
        for theirs in [None, at(1), at(3)] {
            assert_eq!(compare(at(1), at(2), theirs), Change::Ours);
            assert_eq!(compare(at(1), None, theirs), Change::Ours);
        }
        assert_eq!(compare(at(1), at(1), at(2)), Change::Theirs(at(2).unwrap()));
        assert_eq!(compare(None, None, at(2)), Change::Theirs(at(2).unwrap()));
    }

    /// What is configured goes to the sessions, and what they have seen comes back.
    #[test]
    fn the_overlay_and_the_sessions_agree() {
        let mut overlay = Overlay::default();
        let spec = parse_peer(&format!("{KEY}@10.0.0.1:1=10.1.0.0/16")).unwrap();
        overlay.add_peer(&spec, false, Origin::Config).unwrap();
        let (names, ..) = Names::without_threads();
        let now = Instant::now();
        let mut peers = Peers::new(overlay, names, probe_channel().1);
        let only = |peers: &Peers| peers.overlay.peer(0).unwrap().clone();
        let shared = |peer: &Peer| {
            let sessions = &peer.secure.as_ref().unwrap().sessions;
            Arc::clone(sessions)
        };
        let sessions = shared(&only(&peers));
        assert_eq!(sessions.address(), at(1));
        assert!(!peers.has_changed);
        sessions.endpoint.store(at(2).map(|to| Arc::new(to.into())));
        peers.follow_endpoints(now);
        assert_eq!(only(&peers).endpoint, at(2));
        assert!(only(&peers).has_roamed() && std::mem::take(&mut peers.has_changed));
        // A plan that is thrown away changes nothing.
        let mut plan = peers.overlay.clone();
        plan.set_endpoint(0, at(3));
        peers.follow_endpoints(now);
        assert_eq!(sessions.address(), at(2));
        peers.replace(plan, now);
        assert_eq!(sessions.address(), at(3));
        assert!(!only(&peers).has_roamed() && !peers.has_changed);
        // The same peer after a reload that says nothing new.
        let mut plan = peers.overlay.clone();
        plan.configure(std::slice::from_ref(&spec)).unwrap();
        peers.replace(plan, now);
        assert_eq!(only(&peers).endpoint, at(3));
        assert!(Arc::ptr_eq(&shared(&only(&peers)), &sessions));
    }
}
