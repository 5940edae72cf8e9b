use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use proptest::prelude::*;
use zeroize::Zeroizing;

use super::*;
use crate::wire::wireguard::handshake::TransportKeys;

fn session(index: u32) -> Arc<Session> {
    let keys = TransportKeys {
        send: Zeroizing::new([1; 32]),
        receive: Zeroizing::new([2; 32]),
        remote_index: 1,
    };
    Arc::new(Session::new(keys, index, false, 1, Arc::default()))
}

#[test]
fn a_session_is_found_by_its_index_until_it_is_removed() {
    let map = SessionMap::new(1 << 16);
    let index = map.reserve().unwrap();
    assert!(map.get(index).is_none());
    let stored = session(index);
    assert!(map.store(Arc::clone(&stored)));
    assert!(Arc::ptr_eq(map.get(index).as_ref().unwrap(), &stored));
    // The same slot, and other ones.
    for bit in 0..32 {
        assert!(map.get(index ^ 1 << bit).is_none());
    }
    assert!(Arc::ptr_eq(&map.remove(index).unwrap(), &stored));
    assert!(map.get(index).is_none());
    assert!(map.remove(index).is_none());
    assert!(!map.store(stored));
}

#[test]
fn an_index_that_was_given_back_does_nothing_to_its_slot() {
    let map = SessionMap::new(CHUNK);
    let indices: Vec<_> = (0..CHUNK).map(|_| map.reserve().unwrap()).collect();
    let old = indices[7];
    map.remove(old);
    // All other slots are taken.
    let new = map.reserve().unwrap();
    assert_eq!(map.slot(new), map.slot(old));
    assert_ne!(new, old, "comes once in eight million runs");
    assert!(!map.store(session(old)));
    assert!(map.store(session(new)));
    assert!(map.get(old).is_none() && map.remove(old).is_none());
    assert!(map.get(new).is_some());
}

#[test]
fn the_map_gives_out_each_slot_once_and_no_more() {
    for capacity in [1, CHUNK, 4 * CHUNK] {
        let map = SessionMap::new(capacity);
        let indices: Vec<_> = std::iter::from_fn(|| map.reserve()).collect();
        assert_eq!(indices.len(), capacity.max(CHUNK));
        let slots: BTreeSet<_> = indices.iter().map(|index| map.slot(*index)).collect();
        assert_eq!(slots.len(), indices.len());
        map.remove(indices[3]);
        let again = map.reserve().unwrap();
        assert_eq!(map.slot(again), map.slot(indices[3]));
        assert_eq!(map.reserve(), None);
    }
}

#[test]
fn few_sessions_take_little_memory() {
    let map = SessionMap::new(1 << 20);
    for _ in 0..100 {
        let index = map.reserve().unwrap();
        assert!(map.store(session(index)));
    }
    let chunks = map.chunks.iter().filter(|chunk| chunk.get().is_some());
    assert_eq!(chunks.count(), 1);
}

#[test]
fn indices_are_random() {
    let map = SessionMap::new(CHUNK);
    let indices: BTreeSet<_> = (0..64)
        .map(|_| {
            let index = map.reserve().unwrap();
            map.remove(index);
            index
        })
        .collect();
    // 64 of 2^32: two that are equal come once in two million runs.
    assert!(indices.len() >= 63);
    for bit in 0..32 {
        assert!(indices.iter().any(|index| index >> bit & 1 == 0), "{bit}");
        assert!(indices.iter().any(|index| index >> bit & 1 == 1), "{bit}");
    }
}

/// Readers see a session with the index that they ask for, or none.
#[test]
fn workers_look_up_while_sessions_come_and_go() {
    let map = SessionMap::new(CHUNK);
    let indices: Vec<_> = (0..4).map(|_| map.reserve().unwrap()).collect();
    let is_done = AtomicBool::new(false);
    let read = || {
        let mut found = 0;
        while !is_done.load(Ordering::Relaxed) {
            for index in &indices {
                if let Some(session) = map.get(*index).as_ref() {
                    assert_eq!(session.local_index(), *index);
                    found += 1;
                }
            }
        }
        found
    };
    thread::scope(|scope| {
        let readers = [scope.spawn(read), scope.spawn(read)];
        for round in 0..2000 {
            let index = indices[round % indices.len()];
            // Not by way of reserve: the index has to stay the same.
            let chunk = map.chunks[0].get_or_init(|| (0..CHUNK).map(|_| Slot::empty()).collect());
            chunk[map.slot(index)].store(Some(session(index)));
            chunk[map.slot(index)].store(None);
        }
        is_done.store(true, Ordering::Relaxed);
        for reader in readers {
            let _: u64 = reader.join().unwrap();
        }
    });
    assert!(indices.iter().all(|index| map.get(*index).is_none()));
}

/// What is done with the map, on indices that it gave out.
#[derive(Clone, Copy, Debug)]
enum Step {
    Reserve,
    Store(prop::sample::Index),
    Remove(prop::sample::Index),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => Just(Step::Reserve),
        2 => any::<prop::sample::Index>().prop_map(Step::Store),
        2 => any::<prop::sample::Index>().prop_map(Step::Remove),
    ];
    proptest::collection::vec(step, 1..300)
}

proptest! {
    #[test]
    fn the_map_agrees_with_a_model(steps in steps()) {
        let map = SessionMap::new(CHUNK);
        // All indices that were ever given out, and whether they are taken and stored.
        let mut given: Vec<(u32, bool, bool)> = Vec::new();
        for step in steps {
            match step {
                Step::Reserve => {
                    let index = map.reserve().unwrap();
                    prop_assert!(given.iter().all(|(old, taken, _)| *old != index || !taken));
                    given.retain(|(old, ..)| *old != index);
                    given.push((index, true, false));
                }
                Step::Store(which) if !given.is_empty() => {
                    let one = which.index(given.len());
                    let (index, taken, stored) = &mut given[one];
                    prop_assert_eq!(map.store(session(*index)), *taken);
                    *stored |= *taken;
                }
                Step::Remove(which) if !given.is_empty() => {
                    let one = which.index(given.len());
                    let (index, taken, stored) = &mut given[one];
                    prop_assert_eq!(map.remove(*index).is_some(), *stored);
                    (*taken, *stored) = (false, false);
                }
                _ => {}
            }
            for (index, _, stored) in &given {
                prop_assert_eq!(map.get(*index).is_some(), *stored);
            }
        }
    }
}
