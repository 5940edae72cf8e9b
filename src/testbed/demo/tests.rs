//! The demo with programs that are no tunnel. These tests need root.

use super::*;

const OPTIONS: DemoOptions = DemoOptions {
    queues: 1,
    streams: 2,
    seconds: 1,
    verbose: false,
};

/// A program as a tunnel end: as soon as the underlay's own addresses count as
/// the tunnel's, one that does nothing is a perfect tunnel.
fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

fn never() -> Arc<AtomicBool> {
    Arc::new(AtomicBool::new(false))
}

#[test]
fn plays_to_its_end() {
    let ends = [shell("exec sleep 60"), shell("exec sleep 60")];
    let measured = play(ends, UNDERLAY, &OPTIONS, never()).unwrap();
    assert!(measured.tunnel.gigabits_per_second > 0.0);
    assert!(measured.veth.ping_p50_us > 0.0);
}

#[test]
fn a_dead_tunnel_end_is_an_error() {
    let ends = [shell("exec sleep 60"), shell("echo boom >&2; exit 3")];
    let error = play(ends, TUNNEL, &OPTIONS, never()).err().unwrap();
    assert_eq!(
        error.to_string(),
        "tunnel end b ended by itself: exit status: 3"
    );
}

#[test]
fn a_tunnel_end_that_dies_during_the_transfer_is_an_error() {
    let ends = [shell("exec sleep 60"), shell("sleep 1; exit 3")];
    let options = DemoOptions {
        seconds: 30,
        ..OPTIONS
    };
    let start = Instant::now();
    let error = play(ends, UNDERLAY, &options, never()).err().unwrap();
    assert!(error.to_string().contains("tunnel end b"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_signal_ends_it_at_once_even_if_an_end_will_not() {
    let stubborn = "trap '' TERM; while :; do sleep 0.1; done";
    let ends = [shell("exec sleep 60"), shell(stubborn)];
    let interrupted = never();
    let flag = Arc::clone(&interrupted);
    let signal = thread::spawn(move || {
        thread::sleep(Duration::from_millis(700));
        flag.store(true, Ordering::Relaxed);
    });
    let options = DemoOptions {
        seconds: 30,
        ..OPTIONS
    };
    let start = Instant::now();
    let error = play(ends, UNDERLAY, &options, interrupted).err().unwrap();
    assert_eq!(error.to_string(), "interrupted");
    assert!(start.elapsed() < Duration::from_secs(8));
    signal.join().unwrap();
}
