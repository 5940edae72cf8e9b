use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::packet::codel::{INTERVAL_NS, TARGET_NS};

/// What was dropped, by tag, and how many were marked.
#[derive(Default)]
struct Seen {
    dropped: RefCell<Vec<(u32, Reason)>>,
    marked: Cell<usize>,
}

impl Observer<u32> for Seen {
    fn dropped(&self, tag: &u32, head: &[u8], packet_bytes: usize, reason: Reason) {
        assert_eq!(head.len(), packet_bytes.min(CELL_BYTES));
        assert!(packet_bytes >= 20);
        self.dropped.borrow_mut().push((*tag, reason));
    }

    fn marked(&self) {
        self.marked.set(self.marked.get() + 1);
    }
}

/// A packet of this flow.
fn packet(flow: u8, bytes: usize, tos: u8) -> Vec<u8> {
    let mut packet = vec![flow; bytes];
    packet[..20].fill(0);
    packet[0] = 0x45;
    packet[1] = tos;
    packet[2..4].copy_from_slice(&(bytes as u16).to_be_bytes());
    packet[15] = flow;
    packet[19] = 1;
    packet
}

fn push(queue: &mut FqCodel<u32>, seen: &Seen, packet: &[u8], tag: u32, now_ns: u64) {
    queue.push(Version::V4, packet, tag, now_ns, seen);
}

/// Takes the next packet: its tag and bytes.
fn take(queue: &mut FqCodel<u32>, seen: &Seen, now_ns: u64) -> Option<(u32, Vec<u8>)> {
    let (tag, packet_bytes) = queue.peek(now_ns, seen)?;
    assert_eq!(queue.peek(now_ns, seen), Some((tag, packet_bytes)));
    let mut packet = vec![0; packet_bytes];
    queue.take(&mut packet, now_ns);
    Some((tag, packet))
}

#[test]
fn a_flow_with_little_to_send_goes_first() {
    let (mut queue, seen) = (FqCodel::new(Aqm::FqCodel), Seen::default());
    for tag in 0..30 {
        push(&mut queue, &seen, &packet(tag as u8 % 3, 1500, 0), tag, 0);
    }
    // Each of the three has had its first turn, and is an old flow now.
    for _ in 0..6 {
        take(&mut queue, &seen, 0);
    }
    for tag in 100..103 {
        push(&mut queue, &seen, &packet(9, 100, 0), tag, 0);
        assert_eq!(take(&mut queue, &seen, 0).unwrap().0, tag);
        // It waits out a round before it is new again: one of each other flow.
        for _ in 0..6 {
            assert!(take(&mut queue, &seen, 0).unwrap().0 < 30);
        }
    }
}

#[test]
fn flows_get_the_same_number_of_bytes() {
    let (mut queue, seen) = (FqCodel::new(Aqm::FqCodel), Seen::default());
    for tag in 0..1000 {
        push(&mut queue, &seen, &packet(1, 1500, 0), tag, 0);
        push(&mut queue, &seen, &packet(2, 300, 0), tag, 0);
    }
    let mut bytes = [0; 3];
    while bytes[1] + bytes[2] < 500_000 {
        let (_, packet) = take(&mut queue, &seen, 0).unwrap();
        bytes[usize::from(packet[15])] += packet.len();
    }
    // Less of the second is there: 300 000 bytes.
    assert!(bytes[1].abs_diff(bytes[2]) <= 2 * 1514, "{bytes:?}");
    queue.set_quantum(30_000);
    let runs: Vec<u8> = (0..400)
        .map(|_| take(&mut queue, &seen, 0).unwrap().1[15])
        .collect();
    let changes = runs.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(changes < 10, "a turn of 30 000 bytes: {runs:?}");
}

#[test]
fn the_flow_that_holds_most_makes_room() {
    let (mut queue, seen) = (FqCodel::new(Aqm::FqCodel), Seen::default());
    for tag in 0..50 {
        push(&mut queue, &seen, &packet(1, 1000, 0), 10_000 + tag, 0);
    }
    let count = 2 * CELLS as u32;
    for tag in 0..count {
        push(&mut queue, &seen, &packet(2, 1000, 0), tag, 0);
    }
    let dropped = seen.dropped.borrow();
    assert!(
        dropped
            .iter()
            .all(|&(tag, reason)| tag < count && reason == Reason::Overlimit)
    );
    // From its head, and no more than a batch too many.
    let tags: Vec<u32> = dropped.iter().map(|(tag, _)| *tag).collect();
    assert_eq!(tags, (0..tags.len() as u32).collect::<Vec<_>>());
    let kept = 50 + count as usize - tags.len();
    assert!(
        (CELLS - OVERLIMIT_DROPS_MAX..=CELLS).contains(&kept),
        "{kept}"
    );
    assert_eq!(queue.total_bytes(), 1000 * kept as u64);
}

#[test]
fn what_stands_is_marked_or_else_dropped() {
    for tos in [0, 2] {
        let (mut queue, seen) = (FqCodel::new(Aqm::FqCodel), Seen::default());
        let mut marked = 0;
        // A packet each millisecond, that waits for 50 ms: a queue of 50 packets.
        for tag in 0..3 * INTERVAL_NS / 1_000_000 {
            let now_ns = tag * 1_000_000;
            push(&mut queue, &seen, &packet(1, 1000, tos), tag as u32, now_ns);
            if tag >= 50 {
                let (_, packet) = take(&mut queue, &seen, now_ns).unwrap();
                marked += usize::from(packet[1] & 3 == 3);
            }
        }
        const { assert!(50_000_000 > TARGET_NS) };
        let dropped = seen.dropped.borrow();
        assert!(dropped.iter().all(|(_, reason)| *reason == Reason::Aqm));
        let counts = (dropped.len(), seen.marked.get(), marked);
        match tos {
            0 => assert!(
                counts.0 >= 2 && counts.1 == 0 && counts.2 == 0,
                "{counts:?}"
            ),
            _ => assert!(
                counts.0 == 0 && counts.1 >= 2 && counts.2 == counts.1,
                "{counts:?}"
            ),
        }
    }
}

#[test]
fn without_aqm_all_packets_leave_as_they_came() {
    let (mut queue, seen) = (FqCodel::new(Aqm::Off), Seen::default());
    let hour_ns = 3_600_000_000_000;
    for tag in 0..1000 {
        push(&mut queue, &seen, &packet(tag as u8, 1000, 0), tag, 0);
    }
    let left: Vec<u32> = std::iter::from_fn(|| take(&mut queue, &seen, hour_ns))
        .map(|(tag, _)| tag)
        .collect();
    assert_eq!(left, (0..1000).collect::<Vec<_>>());
    assert!(seen.dropped.borrow().is_empty());
}

#[derive(Clone, Debug)]
enum Step {
    Push { flow: u8, bytes: usize },
    Take,
    Wait { ms: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..5_u8, 20..9000_usize).prop_map(|(flow, bytes)| Step::Push { flow, bytes }),
        1 => (0..5_u8, 60_000..65_508_usize).prop_map(|(flow, bytes)| Step::Push { flow, bytes }),
        3 => Just(Step::Take),
        1 => (0..200_u64).prop_map(|ms| Step::Wait { ms }),
    ]
}

proptest! {
    /// Each packet leaves whole and in the order of its flow, or is reported as
    /// dropped, and all memory comes back.
    #[test]
    fn nothing_is_lost_unseen(
        steps in proptest::collection::vec(step(), 0..2000),
        aqm in prop_oneof![Just(Aqm::FqCodel), Just(Aqm::Off)],
    ) {
        let (mut queue, seen) = (FqCodel::new(aqm), Seen::default());
        let mut expected: Vec<VecDeque<(u32, usize)>> = vec![VecDeque::new(); 5];
        let (mut now_ns, mut tag) = (0, 0);
        let ends = std::iter::repeat_n(Step::Take, steps.len());
        for step in steps.iter().cloned().chain(ends) {
            match step {
                Step::Push { flow, bytes } => {
                    push(&mut queue, &seen, &packet(flow, bytes, 0), tag, now_ns);
                    expected[usize::from(flow)].push_back((tag, bytes));
                    tag += 1;
                }
                Step::Wait { ms } => now_ns += ms * 1_000_000,
                Step::Take => {
                    let Some((tag, bytes)) = take(&mut queue, &seen, now_ns) else {
                        continue;
                    };
                    let flow = bytes[15];
                    let dropped = seen.dropped.take();
                    for queue in &mut expected {
                        queue.retain(|(tag, _)| !dropped.iter().any(|(other, _)| other == tag));
                    }
                    let first = expected[usize::from(flow)].pop_front();
                    prop_assert_eq!(first, Some((tag, bytes.len())));
                    prop_assert!(bytes == packet(flow, bytes.len(), 0));
                }
            }
        }
        let dropped = seen.dropped.take();
        let kept = expected.iter().flatten().filter(|(tag, _)| !dropped.iter().any(|(other, _)| other == tag));
        prop_assert_eq!(kept.count(), 0);
        prop_assert!(queue.is_empty());
        prop_assert_eq!((queue.total_bytes(), queue.free), (0, CELLS));
        let mut cells: Vec<u16> = std::iter::successors(Some(queue.first_free), |&cell| {
            Some(queue.next_cells[usize::from(cell)]).filter(|&next| next != NONE)
        }).collect();
        cells.sort_unstable();
        cells.dedup();
        prop_assert_eq!(cells.len(), CELLS);
    }
}
