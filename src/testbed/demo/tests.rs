//! The demo with programs that are not tunnels. These tests need root.

use std::sync::atomic::Ordering;

use super::*;

const OPTIONS: DemoOptions = DemoOptions {
    queues: 1,
    streams: 2,
    seconds: 1,
    encrypted: false,
    verbose: false,
};

/// A program as a tunnel end: as soon as the underlay's own addresses count as
/// the tunnel's, one that does nothing is a perfect tunnel.
fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

#[test]
fn plays_to_its_end() {
    let ends = [shell("exec sleep 60"), shell("exec sleep 60")];
    let measured = play(ends, UNDERLAY, &OPTIONS, Watch::default()).unwrap();
    assert!(measured.tunnel.gigabits_per_second > 0.0);
    assert!(measured.veth.ping_p50_us > 0.0);
}

#[test]
fn a_dead_tunnel_end_is_an_error() {
    let ends = [shell("exec sleep 60"), shell("echo boom >&2; exit 3")];
    let error = play(ends, TUNNEL, &OPTIONS, Watch::default())
        .err()
        .unwrap();
    assert_eq!(
        error.to_string(),
        "tunnel end b ended by itself: exit status: 3"
    );
}

#[test]
fn a_tunnel_end_that_dies_during_the_transfer_is_an_error() {
    let ends = [shell("exec sleep 60"), shell("sleep 0.5; exit 3")];
    let error = play(ends, UNDERLAY, &OPTIONS, Watch::default());
    let error = error.err().unwrap().to_string();
    assert!(error.contains("tunnel end b"), "{error}");
}

#[test]
fn a_signal_ends_it_at_once_even_if_an_end_will_not() {
    let stubborn = "trap '' TERM; while :; do sleep 0.1; done";
    let ends = [shell("exec sleep 60"), shell(stubborn)];
    let watch = Watch::default();
    let flag = Arc::clone(&watch.stop);
    let signal = thread::spawn(move || {
        thread::sleep(Duration::from_millis(700));
        flag.store(true, Ordering::Relaxed);
    });
    let options = DemoOptions {
        seconds: 30,
        ..OPTIONS
    };
    let start = Instant::now();
    let error = play(ends, UNDERLAY, &options, watch).err().unwrap();
    assert_eq!(error.to_string(), "interrupted");
    assert!(start.elapsed() < Duration::from_secs(8));
    signal.join().unwrap();
}
