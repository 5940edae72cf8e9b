//! Each rule of section 6 with its constants, then all of them under random events.

use proptest::prelude::*;

use super::*;

const START_NS: u64 = 1 << 50;
const ALL: Intervals = Intervals::STANDARD;

/// Seconds after the start.
fn at(seconds: f64) -> u64 {
    START_NS + (seconds * SECOND_NS as f64) as u64
}

fn timers() -> Timers {
    Timers::new(ALL, None)
}

fn usable(established_ns: u64, is_initiator: bool) -> Option<Usable> {
    Some(Usable {
        established_ns,
        is_initiator,
        is_worn: false,
    })
}

const NOTHING: Due = Due {
    keepalive: false,
    initiation: false,
    is_over: false,
};
const KEEPALIVE: Due = Due {
    keepalive: true,
    ..NOTHING
};
const INITIATION: Due = Due {
    initiation: true,
    ..NOTHING
};

/// Polls four times a second, and returns when something was due first.
fn first_due(
    timers: &mut Timers,
    from: f64,
    to: f64,
    seen: Activity,
    session: Option<Usable>,
) -> Option<(f64, Due)> {
    let polls = ((to - from) * 4.0) as u32;
    let mut times = (0..=polls).map(|n| from + f64::from(n) / 4.0);
    times.find_map(|seconds| {
        let due = timers.poll(at(seconds), seen, session);
        (due != NOTHING).then_some((seconds, due))
    })
}

#[test]
fn the_constants_are_those_of_the_paper() {
    let seconds = |ns: u64| ns as f64 / SECOND_NS as f64;
    assert_eq!(seconds(ALL.rekey_after_ns), 120.0);
    assert_eq!(seconds(ALL.reject_after_ns), 180.0);
    assert_eq!(seconds(ALL.rekey_attempt_ns), 90.0);
    assert_eq!(seconds(ALL.rekey_timeout_ns), 5.0);
    assert_eq!(seconds(ALL.keepalive_timeout_ns), 10.0);
    assert_eq!(seconds(ALL.late_rekey_ns()), 165.0);
    assert_eq!(seconds(ALL.unanswered_ns()), 15.0);
    const { assert!(ALL.jitter_max_ns <= SECOND_NS / 3) };
    // Sessions have their own copy of it.
    use crate::wire::wireguard::session::REJECT_AFTER_NS;
    assert_eq!(ALL.reject_after_ns, REJECT_AFTER_NS);
}

#[test]
fn nothing_is_due_before_anything_happens() {
    let mut timers = timers();
    let due = first_due(&mut timers, 0.0, 1000.0, Activity::default(), None);
    assert_eq!(due, None);
    assert_eq!(timers.next_ns(), None);
}

#[test]
fn initiations_are_repeated_for_ninety_seconds() {
    let mut timers = timers();
    timers.want(at(0.0));
    let (mut sent, mut now_ns) = (vec![], at(0.0));
    loop {
        let due = timers.poll(now_ns, Activity::default(), None);
        if due.is_over {
            break;
        }
        assert_eq!(due, INITIATION);
        sent.push(now_ns);
        timers.initiated(now_ns, u64::MAX);
        now_ns = timers.next_ns().unwrap();
    }
    for pair in sent.windows(2) {
        let wait_ns = pair[1] - pair[0];
        assert!((ALL.rekey_timeout_ns..at(5.334) - START_NS).contains(&wait_ns));
    }
    assert!(
        (17..=18).contains(&sent.len()),
        "{} initiations",
        sent.len()
    );
    assert!((at(90.0)..at(95.4)).contains(&now_ns));
    assert_eq!(timers.next_ns(), None);
    assert_eq!(timers.poll(at(500.0), Activity::default(), None), NOTHING);
}

#[test]
fn who_asks_again_has_ninety_seconds_more_and_no_initiation_at_once() {
    let mut timers = timers();
    timers.want(at(0.0));
    timers.initiated(at(0.0), 0);
    timers.want(at(1.0));
    assert_eq!(timers.poll(at(4.9), Activity::default(), None), NOTHING);
    timers.want(at(80.0));
    let mut last = 80.0;
    while let Some((seconds, due)) = first_due(&mut timers, last, 300.0, Activity::default(), None)
    {
        if due.is_over {
            last = seconds;
            break;
        }
        timers.initiated(at(seconds), 0);
        last = seconds;
    }
    assert!((170.0..=176.0).contains(&last), "given up after {last}");
}

#[test]
fn a_finished_handshake_is_not_repeated() {
    let mut timers = timers();
    timers.want(at(0.0));
    timers.initiated(at(0.0), 0);
    timers.completed(at(0.1));
    let session = usable(at(0.1), true);
    let due = first_due(&mut timers, 0.2, 1000.0, Activity::default(), session);
    assert_eq!(due, None);
}

#[test]
fn who_has_responded_waits_before_it_initiates() {
    let mut timers = timers();
    timers.responded(at(0.0), 0);
    timers.want(at(0.5));
    let due = first_due(&mut timers, 0.5, 100.0, Activity::default(), None);
    assert_eq!(due, Some((5.0, INITIATION)));
    // One that initiates already postpones its own.
    timers.initiated(at(5.0), 0);
    timers.responded(at(6.0), 0);
    let due = first_due(&mut timers, 6.0, 100.0, Activity::default(), None);
    assert_eq!(due, Some((11.0, INITIATION)));
}

#[test]
fn data_is_answered_by_a_keepalive_after_ten_seconds() {
    let mut timers = timers();
    let mut seen = Activity {
        received_ns: at(1.0),
        data_received_ns: at(1.0),
        ..Activity::default()
    };
    let session = usable(at(0.0), false);
    assert_eq!(timers.poll(at(1.1), seen, session), NOTHING);
    // More data does not put it off.
    (seen.received_ns, seen.data_received_ns) = (at(9.0), at(9.0));
    assert_eq!(timers.next_ns(), Some(at(11.0)));
    let due = first_due(&mut timers, 1.25, 100.0, seen, session);
    assert_eq!(due, Some((11.0, KEEPALIVE)));
    seen.sent_ns = at(11.0);
    assert_eq!(first_due(&mut timers, 11.0, 119.0, seen, session), None);
}

#[test]
fn whatever_is_sent_spares_the_keepalive() {
    let session = usable(at(0.0), false);
    let mut timers = timers();
    for second in (10..110).step_by(2) {
        let second = f64::from(second);
        let seen = Activity {
            received_ns: at(second),
            data_received_ns: at(second),
            sent_ns: at(second - 0.5),
            ..Activity::default()
        };
        assert_eq!(timers.poll(at(second + 0.1), seen, session), NOTHING);
        let seen = Activity {
            sent_ns: at(second + 0.5),
            ..seen
        };
        assert_eq!(timers.poll(at(second + 0.6), seen, session), NOTHING);
        assert_eq!(timers.next_ns(), None);
    }
}

#[test]
fn keepalives_are_not_answered() {
    let mut timers = timers();
    let seen = Activity {
        received_ns: at(1.0),
        ..Activity::default()
    };
    let session = usable(at(0.0), false);
    assert_eq!(first_due(&mut timers, 1.0, 1000.0, seen, session), None);
}

#[test]
fn a_keepalive_without_a_session_begins_a_handshake() {
    let mut timers = timers();
    let seen = Activity {
        received_ns: at(1.0),
        data_received_ns: at(1.0),
        ..Activity::default()
    };
    let due = first_due(&mut timers, 1.0, 100.0, seen, None);
    assert_eq!(due, Some((11.0, INITIATION)));
}

#[test]
fn silence_after_data_begins_a_handshake_once() {
    let session = usable(at(0.0), false);
    let mut timers = timers();
    let mut seen = Activity {
        sent_ns: at(20.0),
        data_sent_ns: at(20.0),
        received_ns: at(19.0),
        ..Activity::default()
    };
    assert_eq!(timers.poll(at(20.0), seen, session), NOTHING);
    // More data does not put it off.
    (seen.sent_ns, seen.data_sent_ns) = (at(30.0), at(30.0));
    let due = first_due(&mut timers, 20.25, 100.0, seen, session);
    assert_eq!(due, Some((35.0, INITIATION)));
    timers.initiated(at(35.0), 0);
    // It is repeated as any other, and given up.
    let mut last = 35.0;
    while let Some((seconds, due)) = first_due(&mut timers, last, 900.0, seen, session) {
        assert_eq!(due.initiation, !due.is_over);
        timers.initiated(at(seconds), 0);
        last = seconds;
    }
    assert!((125.0..=131.0).contains(&last), "the last after {last}");
}

#[test]
fn anything_authentic_ends_the_wait_for_an_answer() {
    let session = usable(at(0.0), false);
    let mut timers = timers();
    let mut seen = Activity {
        sent_ns: at(20.0),
        data_sent_ns: at(20.0),
        ..Activity::default()
    };
    assert_eq!(timers.poll(at(20.0), seen, session), NOTHING);
    seen.received_ns = at(34.9);
    assert_eq!(first_due(&mut timers, 34.9, 1000.0, seen, session), None);
}

#[test]
fn the_initiator_renews_a_session_of_two_minutes_when_it_sends() {
    for (sent, is_initiator, expected) in [
        (119.9, true, None),
        (120.0, true, Some((120.0, INITIATION))),
        (150.0, false, None),
    ] {
        let mut timers = timers();
        let seen = Activity {
            sent_ns: at(sent),
            ..Activity::default()
        };
        let session = usable(at(0.0), is_initiator);
        assert_eq!(first_due(&mut timers, sent, 900.0, seen, session), expected);
    }
}

#[test]
fn a_renewal_that_nobody_answers_is_given_up_until_more_is_sent() {
    let session = usable(at(0.0), true);
    let mut timers = timers();
    let mut seen = Activity {
        sent_ns: at(120.0),
        ..Activity::default()
    };
    let mut last = 120.0;
    while let Some((seconds, _)) = first_due(&mut timers, last, 900.0, seen, session) {
        timers.initiated(at(seconds), 0);
        last = seconds;
    }
    assert!((210.0..=216.0).contains(&last), "the last after {last}");
    seen.sent_ns = at(400.0);
    let due = first_due(&mut timers, 400.0, 900.0, seen, session);
    assert_eq!(due, Some((400.0, INITIATION)));
}

#[test]
fn a_worn_session_is_renewed_by_either_end() {
    let mut timers = timers();
    let seen = Activity {
        sent_ns: at(3.0),
        ..Activity::default()
    };
    let session = Some(Usable {
        established_ns: at(0.0),
        is_initiator: false,
        is_worn: true,
    });
    assert_eq!(timers.poll(at(3.0), seen, session), INITIATION);
}

#[test]
fn the_initiator_renews_a_session_on_receipt_after_165_seconds() {
    for (received, is_initiator, expected) in [
        (164.9, true, None),
        (165.0, true, Some((165.0, INITIATION))),
        (165.0, false, None),
    ] {
        let mut timers = timers();
        let seen = Activity {
            received_ns: at(received),
            ..Activity::default()
        };
        let session = usable(at(0.0), is_initiator);
        let due = first_due(&mut timers, received, 180.0, seen, session);
        assert_eq!(due, expected);
        if expected.is_none() {
            continue;
        }
        // Once for each session.
        timers.completed(at(166.0));
        let seen = Activity {
            received_ns: at(170.0),
            ..Activity::default()
        };
        assert_eq!(first_due(&mut timers, 170.0, 180.0, seen, session), None);
    }
}

#[test]
fn persistent_keepalives_are_sent_in_silence_only() {
    let mut timers = Timers::new(ALL, Some(25 * SECOND_NS));
    let session = usable(at(0.0), true);
    let mut seen = Activity {
        sent_ns: at(1.0),
        ..Activity::default()
    };
    // One to begin with.
    assert_eq!(timers.poll(at(1.0), seen, session), KEEPALIVE);
    let due = first_due(&mut timers, 1.25, 100.0, seen, session);
    assert_eq!(due, Some((26.0, KEEPALIVE)));
    seen.sent_ns = at(26.0);
    assert_eq!(timers.poll(at(26.0), seen, session), NOTHING);
    assert_eq!(timers.next_ns(), Some(at(51.0)));
    seen.received_ns = at(40.0);
    let due = first_due(&mut timers, 40.0, 100.0, seen, session);
    assert_eq!(due, Some((65.0, KEEPALIVE)));
    timers.set_persistent(None);
    assert_eq!(first_due(&mut timers, 65.0, 119.0, seen, session), None);
    assert_eq!(timers.next_ns(), None);
}

#[test]
fn a_persistent_keepalive_makes_a_session_at_once_and_never_gives_up() {
    let mut timers = Timers::new(ALL, Some(25 * SECOND_NS));
    let (mut now, mut last) = (0.0, 0.0);
    while let Some((seconds, due)) = first_due(&mut timers, now, 3600.0, Activity::default(), None)
    {
        assert!(seconds - last <= 31.0, "silent from {last} to {seconds}");
        if due.initiation {
            timers.initiated(at(seconds), 0);
            last = seconds;
        }
        now = seconds + 0.25;
    }
    assert!(last > 3560.0);
}

/// What may happen between two polls.
#[derive(Clone, Copy, Debug)]
enum Event {
    Want,
    Sent { is_data: bool },
    Received { is_data: bool },
    Responded,
    Completed,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Want),
        any::<bool>().prop_map(|is_data| Event::Sent { is_data }),
        any::<bool>().prop_map(|is_data| Event::Received { is_data }),
        Just(Event::Responded),
        Just(Event::Completed),
    ]
}

proptest! {
    /// Whatever happens: initiations keep their distance, end ninety seconds after the last
    /// reason for one, and a data packet is answered within ten seconds and a tick.
    #[test]
    fn the_bounds_hold_whatever_happens(
        events in prop::collection::vec((0_u64..20_000, event(), any::<u64>()), 1..60),
    ) {
        let mut timers = timers();
        let (mut seen, mut session) = (Activity::default(), None);
        let (mut handshake_ns, mut reason_ns, mut owed_ns) = (0, START_NS, None);
        let mut now_ns = START_NS;
        for (wait_ms, event, random) in events.into_iter().chain([(500_000, Event::Want, 0)]) {
            let until_ns = now_ns + wait_ms * 1_000_000;
            while now_ns < until_ns {
                now_ns += ALL.tick_ns;
                session = session.filter(|session: &Usable| {
                    now_ns - session.established_ns < ALL.reject_after_ns
                });
                let due = timers.poll(now_ns, seen, session);
                if due.keepalive {
                    prop_assert!(session.is_some());
                    prop_assert!(owed_ns.is_some(), "a keepalive that nobody waits for");
                    seen.sent_ns = now_ns;
                    owed_ns = None;
                }
                if due.initiation {
                    prop_assert!(now_ns - handshake_ns >= ALL.rekey_timeout_ns);
                    // The longest reason: data sent, unanswered for 15 s.
                    prop_assert!(now_ns - reason_ns < (90 + 16) * SECOND_NS);
                    timers.initiated(now_ns, random);
                    handshake_ns = now_ns;
                    owed_ns = None;
                }
                let limit_ns = match session {
                    Some(_) => ALL.keepalive_timeout_ns,
                    None => ALL.keepalive_timeout_ns + ALL.rekey_timeout_ns + SECOND_NS,
                } + ALL.tick_ns;
                prop_assert!(owed_ns.is_none_or(|owed_ns| now_ns - owed_ns <= limit_ns));
            }
            now_ns += 1;
            match event {
                Event::Want => {
                    timers.want(now_ns);
                    reason_ns = now_ns;
                }
                Event::Sent { is_data } if session.is_some() => {
                    seen.sent_ns = now_ns;
                    if is_data {
                        seen.data_sent_ns = now_ns;
                    }
                    (reason_ns, owed_ns) = (now_ns, None);
                }
                Event::Received { is_data } if session.is_some() => {
                    seen.received_ns = now_ns;
                    if is_data {
                        seen.data_received_ns = now_ns;
                        owed_ns = owed_ns.or(Some(now_ns));
                    }
                    reason_ns = now_ns;
                }
                Event::Responded => {
                    timers.responded(now_ns, random);
                    handshake_ns = now_ns;
                    owed_ns = None;
                }
                Event::Completed => {
                    timers.completed(now_ns);
                    session = usable(now_ns, random % 2 == 0);
                }
                _ => {}
            }
        }
    }
}
