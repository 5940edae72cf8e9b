use std::sync::Barrier;
use std::thread;

use zeroize::Zeroizing;

use super::super::REJECT_AFTER_NS;
use super::*;
use crate::wire::wireguard::handshake::TransportKeys;

fn session(peer: &Arc<PeerSessions>, established_ns: u64) -> Arc<Session> {
    let keys = TransportKeys {
        send: Zeroizing::new([1; 32]),
        receive: Zeroizing::new([2; 32]),
        remote_index: 1,
    };
    Arc::new(Session::new(
        keys,
        1,
        false,
        established_ns,
        Arc::clone(peer),
    ))
}

fn is(found: &Option<Arc<Session>>, wanted: &Arc<Session>) -> bool {
    found
        .as_ref()
        .is_some_and(|found| Arc::ptr_eq(found, wanted))
}

#[test]
fn the_next_session_is_current_once_it_was_used() {
    let peer = Arc::<PeerSessions>::default();
    let (old, new) = (session(&peer, 1), session(&peer, 2));
    peer.current.store(Some(Arc::clone(&old)));
    peer.next.store(Some(Arc::clone(&new)));
    assert!(!peer.confirm(&old));
    assert!(is(&peer.usable(2), &old));

    assert!(peer.confirm(&new));
    assert!(is(&peer.usable(2), &new));
    assert!(peer.next.load().is_none());
    assert!(!peer.confirm(&new));
    assert!(!peer.confirm(&old));
    assert!(is(&peer.usable(2), &new));
    peer.clear();
}

#[test]
fn a_session_is_confirmed_by_one_thread() {
    const THREADS: usize = 4;
    let peer = Arc::<PeerSessions>::default();
    for round in 0..200 {
        let new = session(&peer, round);
        peer.next.store(Some(Arc::clone(&new)));
        let start = Barrier::new(THREADS);
        let confirm = || {
            start.wait();
            usize::from(peer.confirm(&new))
        };
        let confirmed: usize = thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(confirm)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .sum()
        });
        assert_eq!(confirmed, 1);
        assert!(is(&peer.usable(round), &new));
    }
    peer.clear();
}

/// A worker may open the last message of a session while its peer is removed: the session
/// must not come back, or neither would ever be freed.
#[test]
fn a_removed_peer_is_not_confirmed_again() {
    let peer = Arc::<PeerSessions>::default();
    for round in 0..200 {
        let new = session(&peer, round);
        peer.next.store(Some(Arc::clone(&new)));
        let start = Barrier::new(2);
        thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                peer.confirm(&new);
            });
            start.wait();
            peer.clear();
        });
        assert!(peer.current.load().is_none() && peer.next.load().is_none());
    }
}

#[test]
fn a_later_session_stays_current() {
    let peer = Arc::<PeerSessions>::default();
    let (earlier, later) = (session(&peer, 1), session(&peer, 2));
    peer.next.store(Some(Arc::clone(&earlier)));
    peer.current.store(Some(Arc::clone(&later)));
    assert!(peer.confirm(&earlier));
    assert!(is(&peer.usable(2), &later));
    peer.clear();
}

#[test]
fn an_old_session_is_not_usable() {
    let peer = Arc::<PeerSessions>::default();
    assert!(peer.usable(1).is_none());
    peer.current.store(Some(session(&peer, 5)));
    assert!(peer.usable(5 + REJECT_AFTER_NS - 1).is_some());
    assert!(peer.usable(5 + REJECT_AFTER_NS).is_none());
    peer.clear();
}

#[test]
fn a_removed_peer_is_freed_with_its_sessions() {
    let peer = Arc::<PeerSessions>::default();
    let (current, next) = (session(&peer, 1), session(&peer, 2));
    let freed = [Arc::downgrade(&current), Arc::downgrade(&next)];
    peer.current.store(Some(current));
    peer.next.store(Some(next));
    let peer_freed = Arc::downgrade(&peer);
    peer.clear();
    drop(peer);
    assert!(freed.iter().all(|freed| freed.upgrade().is_none()));
    assert!(peer_freed.upgrade().is_none());
}

#[test]
fn the_endpoint_follows_the_peer() {
    let peer = PeerSessions::default();
    let calls = [
        ("10.0.0.1:51820", None),
        ("10.0.0.1:51821", None),
        ("10.0.0.1:51821", Some([10, 0, 0, 8].into())),
        ("10.0.0.1:51821", Some([10, 0, 0, 9].into())),
        (
            "[fd00::1]:51821",
            Some([0xfd00, 0, 0, 0, 0, 0, 0, 9].into()),
        ),
    ];
    for (text, source) in calls {
        let address: SocketAddr = text.parse().unwrap();
        let from = Endpoint { address, source };
        peer.note_sender(from);
        let noted = peer.endpoint.load_full().unwrap();
        assert_eq!(*noted, from);
        // Nothing is allocated while it stays the same.
        peer.note_sender(from);
        assert!(Arc::ptr_eq(&noted, &peer.endpoint.load_full().unwrap()));
    }
    // The address that it called may be lost without it.
    peer.forget_source();
    assert_eq!(peer.endpoint.load_full().unwrap().source, None);
    assert_eq!(peer.address(), "[fd00::1]:51821".parse().ok());
    // It is no better while the peer goes on to call it, but another one is.
    let source = || peer.endpoint.load_full().unwrap().source;
    let from = |source: u8| Endpoint {
        address: "10.0.0.1:1".parse().unwrap(),
        source: Some([10, 0, 0, source].into()),
    };
    peer.note_sender(from(8));
    peer.forget_source();
    peer.note_sender(from(8));
    assert_eq!((source(), peer.address()), (None, Some(from(8).address)));
    peer.note_sender(from(9));
    assert_eq!(source(), from(9).source);
    peer.note_sender(from(8));
    assert_eq!(source(), None);
    peer.note_handshake(from(8));
    assert_eq!(source(), from(8).source);
    peer.endpoint.store(None);
    peer.forget_source();
    assert_eq!(peer.address(), None);
}

#[test]
fn times_only_move_on() {
    let peer = PeerSessions::default();
    peer.note_sent(5, true);
    peer.note_sent(7, false);
    peer.note_sent(6, true);
    peer.note_received(9, true);
    peer.note_received(8, true);
    peer.note_received(11, false);
    let times = [
        &peer.sent_ns,
        &peer.data_sent_ns,
        &peer.received_ns,
        &peer.data_received_ns,
    ];
    assert_eq!(
        times.map(|time| time.load(Ordering::Relaxed)),
        [7, 6, 11, 9]
    );
}
