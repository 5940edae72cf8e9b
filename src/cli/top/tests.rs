//! The model by keys and samples, and what is drawn of it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::style::Color;

use super::draw::{Look, draw};
use super::model::{Key, Model, Outcome, Sample, Update};
use super::table::View;
use crate::control::protocol::{PeerStatus, Peers, Status, WireGuardStatus};

const PLAIN: Look = Look {
    has_colors: false,
    has_blocks: false,
};

const COLORED: Look = Look {
    has_colors: true,
    has_blocks: true,
};

const SECOND_NS: u64 = 1_000_000_000;

fn counters(pairs: &[(&str, u64)]) -> BTreeMap<String, u64> {
    let pairs = pairs.iter();
    pairs
        .map(|(name, count)| ((*name).into(), *count))
        .collect()
}

/// A tunnel after so many seconds, with two workers, of which the second has twice the
/// traffic, and some peers, each with less traffic than the one before.
fn a_sample(pid: u32, seconds: u64, peers: u64) -> Box<Sample> {
    let worker = |packets: u64| {
        counters(&[
            ("packets_sent", packets),
            ("bytes_sent", 1000 * packets),
            ("packets_received", packets / 2),
            ("bytes_received", 100 * packets),
            ("drop_no_route", 3 * seconds),
            ("queue_backlog_bytes", 1500),
        ])
    };
    let peer = |number: u64| PeerStatus {
        peer: format!("10.0.{}.{}:8285", number / 250, number % 250),
        endpoint: format!("10.0.{}.{}:8285", number / 250, number % 250)
            .parse()
            .ok(),
        packets_sent: seconds * (peers - number),
        bytes_sent: 125 * seconds * (peers - number),
        last_seen_seconds: Some(70),
        ..PeerStatus::default()
    };
    let boottime_ns = Some(seconds * SECOND_NS);
    Box::new(Sample {
        status: Status {
            pid,
            tun: "fastvpn0".into(),
            engine: "io_uring".into(),
            mtu_bytes: 1472,
            uptime_seconds: seconds,
            boottime_ns,
            peers: peers as usize,
            counters: worker(3000 * seconds),
            drops: counters(&[("no_route", 6 * seconds), ("queue_aqm", 340)]),
            workers: vec![worker(1000 * seconds), worker(2000 * seconds)],
            ..Status::default()
        },
        peers: Peers {
            boottime_ns,
            peers: (0..peers).map(peer).collect(),
        },
        arrival: Instant::now(),
    })
}

/// A model after two samples, 2 s apart.
fn a_model(peers: u64) -> Model {
    let mut model = Model::new(a_sample(7, 10, peers));
    model.update(Update::Sample(a_sample(7, 12, peers)));
    model
}

/// Presses keys, of which none quits: `\n`, `\t` and `\x1b` are Enter, Tab and Escape.
fn press(model: &mut Model, keys: &str) {
    for key in keys.chars() {
        let key = match key {
            '\n' => Key::Enter,
            '\t' => Key::Next,
            '\x1b' => Key::Escape,
            '\x08' => Key::Backspace,
            key => Key::Char(key),
        };
        assert_eq!(model.key(key), Outcome::GoOn);
    }
}

/// The first cells of the view's rows.
fn names(model: &mut Model) -> Vec<String> {
    let (rows, ..) = model.rows(usize::MAX);
    rows.iter().map(|row| row[0].text.clone()).collect()
}

/// The lines of a screen.
fn screen(model: &mut Model, width: u16, height: u16, look: Look) -> Vec<String> {
    let buffer = drawn(model, width, height, look);
    let line = |y| {
        let cells = (0..width).filter_map(|x| Some(buffer.cell((x, y))?.symbol()));
        cells.collect::<String>().trim_end().to_string()
    };
    (0..height).map(line).collect()
}

fn drawn(model: &mut Model, width: u16, height: u16, look: Look) -> ratatui::buffer::Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, model, look)).unwrap();
    terminal.backend().buffer().clone()
}

#[test]
fn a_small_screen_has_all_that_matters() {
    let mut model = a_model(2);
    let lines = screen(&mut model, 80, 24, PLAIN);
    assert_eq!(
        lines[0],
        "fastvpn0  io_uring  MTU 1472  2 peers  process 7, up 12 s"
    );
    // 3000 packets of 1000 bytes a second.
    assert!(
        lines[2].starts_with("sent             24.0 Mbit/s "),
        "{}",
        lines[2]
    );
    assert!(
        lines[3].trim_start().starts_with("3.0 k packets/s "),
        "{}",
        lines[3]
    );
    assert!(
        lines[4].starts_with("received          2.4 Mbit/s "),
        "{}",
        lines[4]
    );
    assert!(
        lines[6].starts_with("dropped        6.0 packets/s "),
        "{}",
        lines[6]
    );
    assert!(
        lines[2].ends_with('#') && lines[6].ends_with('#'),
        "history"
    );
    assert_eq!(lines[7], " workers  peers  drops");
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(
        words(&lines[8]),
        "WORKER^ SENT bit/s PACKETS/s RECV bit/s PACKETS/s DROPS/s"
    );
    assert_eq!(words(&lines[9]), "0 8.0 M 1.0 k 800.0 k 500 3.0");
    assert_eq!(words(&lines[10]), "1 16.0 M 2.0 k 1.6 M 1.0 k 3.0");
    assert!(lines[8].ends_with("DROPS/s") && lines[9].ends_with("3.0"));
    assert_eq!(lines[8].chars().count(), 79);
    assert_eq!(lines[9].chars().count(), 79);
    assert_eq!(lines[11], "");
    assert!(lines[23].starts_with("q quit  ? help") && lines[23].ends_with("1-2 of 2"));

    press(&mut model, "\t");
    let lines = screen(&mut model, 80, 24, PLAIN);
    assert!(
        lines[8].starts_with("PEER ") && lines[8].contains(" SENT bit/sv"),
        "{}",
        lines[8]
    );
    assert!(
        lines[9].starts_with("10.0.0.0:8285 ") && lines[9].ends_with("1 min"),
        "{}",
        lines[9]
    );
    press(&mut model, "\t");
    let lines = screen(&mut model, 80, 24, PLAIN);
    assert!(
        lines[9].starts_with("no-route ") && lines[9].contains(" 6.0 "),
        "{}",
        lines[9]
    );
    assert!(
        lines[10].starts_with("queue-aqm ") && lines[10].contains(" 0 "),
        "{}",
        lines[10]
    );
}

#[test]
fn a_large_screen_has_more_and_a_tiny_one_says_what_it_needs() {
    let mut model = a_model(1000);
    press(&mut model, "v");
    let lines = screen(&mut model, 200, 60, COLORED);
    let headline = lines.iter().find(|line| line.starts_with("PEER")).unwrap();
    assert!(
        headline.contains("SENT bit/s▼") && headline.contains("ENDPOINT"),
        "{headline}"
    );
    assert!(lines[59].ends_with("1-40 of 1000"), "{}", lines[59]);
    for (width, height) in [(40, 10), (80, 23), (79, 24), (200, 5)] {
        let text = screen(&mut model, width, height, COLORED).join(" ");
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let here = format!("fastvpn top needs 80x24 characters; here are {width}x{height}");
        assert_eq!(text, here);
    }
}

#[test]
fn there_is_no_color_where_none_is_wanted() {
    let mut model = a_model(2);
    let colors = |model: &mut Model, look| {
        let buffer = drawn(model, 80, 24, look);
        buffer
            .content()
            .iter()
            .filter(|cell| cell.fg != Color::Reset)
            .count()
    };
    assert_eq!(colors(&mut model, PLAIN), 0);
    assert_ne!(colors(&mut model, COLORED), 0);
    let text = screen(&mut model, 80, 24, PLAIN).concat();
    assert!(text.is_ascii(), "{text}");
}

#[test]
fn rows_are_sorted_and_reversed() {
    let mut model = a_model(3);
    assert_eq!(names(&mut model), ["0", "1"]);
    press(&mut model, "r");
    assert_eq!(names(&mut model), ["1", "0"]);
    // The second worker sends most; then by the name again.
    press(&mut model, "s");
    assert_eq!(names(&mut model), ["1", "0"]);
    press(&mut model, "r");
    assert_eq!(names(&mut model), ["0", "1"]);
    press(&mut model, "S");
    assert_eq!((model.sort().column, model.sort().is_reversed), (0, false));
    press(&mut model, "<");
    assert_eq!(model.sort().column, View::Workers.columns().len() - 1);
    // Each view has its own.
    press(&mut model, "v");
    assert_eq!(model.sort().column, 1);
    let most_first = ["10.0.0.0:8285", "10.0.0.1:8285", "10.0.0.2:8285"];
    assert_eq!(names(&mut model), most_first);
    press(&mut model, "Vv");
    assert_eq!(model.view, View::Peers);
}

#[test]
fn a_filter_leaves_the_rows_that_have_it() {
    let mut model = a_model(300);
    press(&mut model, "v/0.1.4");
    assert!(model.is_filtering);
    assert_eq!(names(&mut model).len(), 11, "10.0.1.4 and 10.0.1.40 to .49");
    // Keys are text meanwhile.
    press(&mut model, "q\x08");
    let lines = screen(&mut model, 80, 24, PLAIN);
    assert!(lines[7].ends_with("filter: 0.1.4_"), "{}", lines[7]);
    press(&mut model, "\n");
    assert_eq!(names(&mut model).len(), 11);
    assert_eq!(model.view, View::Peers);
    press(&mut model, "\x1b");
    assert_eq!(names(&mut model).len(), 300);
    press(&mut model, "/nobody\n");
    let lines = screen(&mut model, 80, 24, PLAIN);
    assert!(lines[23].ends_with(" none"), "{}", lines[23]);
    press(&mut model, &format!("/{}", "x".repeat(1000)));
    assert!(model.filter.len() < 100);
}

#[test]
fn long_tables_are_scrolled() {
    let mut model = a_model(100);
    press(&mut model, "v");
    let first = |model: &mut Model| model.rows(15).1;
    for (key, row) in [
        (Key::Up, 0),
        (Key::Down, 1),
        (Key::PageDown, 16),
        (Key::End, 85),
        (Key::Down, 85),
        (Key::Up, 84),
        (Key::PageUp, 69),
        (Key::Home, 0),
    ] {
        model.key(key);
        assert_eq!(first(&mut model), row, "{key:?}");
    }
}

#[test]
fn quit_is_quit_except_in_a_text() {
    let mut model = a_model(1);
    assert_eq!(model.key(Key::Interrupt), Outcome::Quit);
    assert_eq!(model.key(Key::Char('q')), Outcome::Quit);
    press(&mut model, "/q");
    assert_eq!(model.key(Key::Interrupt), Outcome::Quit);
    press(&mut model, "\x1b?");
    let help = screen(&mut model, 80, 24, PLAIN).join("\n");
    assert!(
        help.contains("Ctrl-C") && help.contains("reverse the order"),
        "{help}"
    );
    assert_eq!(model.key(Key::Char('q')), Outcome::Quit);
    press(&mut model, "x");
    assert!(!model.shows_help);
}

#[test]
fn while_it_is_paused_nothing_moves() {
    let mut model = a_model(1);
    press(&mut model, "p");
    let before = screen(&mut model, 80, 24, PLAIN);
    assert!(before[1].starts_with("paused"), "{}", before[1]);
    model.update(Update::Sample(a_sample(7, 20, 1)));
    assert_eq!(screen(&mut model, 80, 24, PLAIN), before);
    press(&mut model, "p");
    // Rates are those since the last sample, not since the pause.
    model.update(Update::Sample(a_sample(7, 21, 1)));
    let after = screen(&mut model, 80, 24, PLAIN);
    assert!(
        after[0].ends_with("up 21 s") && after[2].contains(" 24.0 Mbit/s "),
        "{after:#?}"
    );
}

#[test]
fn a_tunnel_that_is_lost_or_taken_over_is_told_of() {
    let mut model = a_model(1);
    model.update(Update::Lost("no fastvpn answers at /x: no\x1b[2J".into()));
    let (text, is_bad) = model.message().unwrap();
    assert!(is_bad && text.contains("no fastvpn answers at /x") && !text.contains('\x1b'));
    let lines = screen(&mut model, 80, 24, PLAIN);
    assert!(
        lines[1].starts_with("no answer: no fastvpn"),
        "{}",
        lines[1]
    );
    // Counters that begin anew are no rates.
    model.update(Update::Sample(a_sample(8, 13, 1)));
    assert!(
        model
            .message()
            .unwrap()
            .0
            .starts_with("now process 8, before 7")
    );
    assert!(model.shown.rates.is_none() && model.history.len() == 1);
    assert!(screen(&mut model, 80, 24, PLAIN)[2].contains(" - "));
    for seconds in 14..40 {
        model.update(Update::Sample(a_sample(8, seconds, 1)));
    }
    assert!(model.message().is_none());
    assert_eq!(model.history.len(), 27);
}

#[test]
fn sessions_are_counted_and_identities_shown() {
    let mut sample = a_sample(7, 10, 4);
    for (peer, handshake) in sample
        .peers
        .peers
        .iter_mut()
        .zip([Some(5), Some(500), None])
    {
        peer.wireguard = Some(WireGuardStatus {
            identity: Some("berlin".into()),
            latest_handshake_seconds: handshake,
            ..WireGuardStatus::default()
        });
    }
    let mut model = Model::new(sample);
    press(&mut model, "v/berlin");
    assert_eq!(names(&mut model).len(), 3);
    let lines = screen(&mut model, 80, 24, PLAIN);
    assert!(lines[0].contains("  4 peers, 1 session  "), "{}", lines[0]);
}

#[test]
fn rates_are_by_the_tunnels_clock() {
    let (mut before, after) = (a_sample(7, 10, 1), a_sample(7, 12, 1));
    before.arrival = after
        .arrival
        .checked_sub(Duration::from_millis(10))
        .unwrap();
    let mut model = Model::new(before.clone());
    model.update(Update::Sample(after.clone()));
    assert_eq!(model.shown.rates.unwrap().packets_sent, 3000.0);
    // Of an older tunnel, by when the answers came.
    before.status.boottime_ns = None;
    let mut model = Model::new(before);
    model.update(Update::Sample(after));
    let rate = model.shown.rates.unwrap().packets_sent;
    assert!((rate - 600_000.0).abs() < 1.0, "{rate}");
}

fn any_counters() -> impl Strategy<Value = BTreeMap<String, u64>> {
    let names = prop_oneof!["(drop_)?[a-z_]{0,12}", "packets_sent|bytes_sent", ".{0,8}"];
    btree_map(names, any::<u64>(), 0..6)
}

prop_compose! {
    fn any_peer()(
        peer in ".{0,50}",
        numbers in any::<[u64; 4]>(),
        ages in any::<[Option<u64>; 2]>(),
        has_key in any::<bool>(),
        drops in any_counters(),
    ) -> PeerStatus {
        let wireguard = WireGuardStatus {
            identity: ages[0].map(|_| peer.clone()),
            latest_handshake_seconds: ages[1],
            ..WireGuardStatus::default()
        };
        PeerStatus {
            peer,
            packets_sent: numbers[0],
            bytes_sent: numbers[1],
            packets_received: numbers[2],
            bytes_received: numbers[3],
            last_seen_seconds: ages[0],
            wireguard: has_key.then_some(wireguard),
            drops,
            ..PeerStatus::default()
        }
    }
}

prop_compose! {
    fn any_sample()(
        text in ".{0,100}",
        pid in 1..3_u32,
        numbers in any::<[u64; 3]>(),
        times in any::<[Option<u64>; 2]>(),
        counters in any_counters(),
        drops in any_counters(),
        workers in vec(any_counters(), 0..4),
        peers in vec(any_peer(), 0..30),
    ) -> Box<Sample> {
        Box::new(Sample {
            status: Status {
                pid,
                tun: text.clone(),
                engine: text,
                uptime_seconds: numbers[0],
                tun_queue_drops: Some(numbers[1]),
                peers: numbers[2] as usize,
                boottime_ns: times[0],
                counters,
                drops,
                workers,
                ..Status::default()
            },
            peers: Peers { boottime_ns: times[1], peers },
            arrival: Instant::now(),
        })
    }
}

fn any_key() -> impl Strategy<Value = Key> {
    prop_oneof![
        any::<char>().prop_map(Key::Char),
        prop::sample::select("?hp vVsS<>r/kj".chars().map(Key::Char).collect::<Vec<_>>()),
        prop::sample::select(vec![
            Key::Enter,
            Key::Escape,
            Key::Backspace,
            Key::Next,
            Key::Previous,
            Key::Up,
            Key::Down,
            Key::PageUp,
            Key::PageDown,
            Key::Home,
            Key::End,
        ]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a tunnel answers, whatever is typed, on a screen of any size.
    #[test]
    fn nothing_makes_it_panic_and_nothing_is_shown_raw(
        first in any_sample(),
        samples in vec(any_sample(), 1..4),
        keys in vec(any_key(), 0..20),
        width in 0..250_u16,
        height in 0..80_u16,
        has_colors: bool,
        has_blocks: bool,
    ) {
        let look = Look { has_colors, has_blocks };
        let mut model = Model::new(first);
        let mut keys = keys.into_iter();
        for sample in samples {
            model.update(Update::Sample(sample));
            for key in keys.by_ref().take(7) {
                model.key(key);
            }
            let text = screen(&mut model, width, height, look).concat();
            prop_assert!(!text.chars().any(char::is_control), "{text:?}");
        }
    }
}
