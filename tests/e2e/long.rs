//! The long tier: what takes minutes, or needs more than Rust and a C compiler.
//!
//! To move a test here, register it as any other and add its name below. It
//! is then shown as ignored by `cargo test`, and runs with
//! `cargo test --test e2e -- --ignored`, as `tests/long.sh` does.

/// Names as `--list` prints them; without an engine in front, on every engine.
const TRIALS: &[&str] = &[
    // Soak and stress.
    "mixed::a_minute_of_everything",
    "ten_thousand_prefixes_move_under_load",
    "ten_thousand_prefixes_reloaded_under_load",
    "either_side_killed_twelve_times_at_any_step",
    // With nft.
    "masquerade_and_dnat",
    "a_firewall_of_the_kernel",
    "a_nat_of_the_kernel",
    "nested_datagrams_behind_nat",
    // With curl, ip, nft, ping, python3 and socat.
    "guide_two_hosts",
    "guide_containers",
    "guide_site_to_site",
    "guide_plain_peer",
];

/// Whether a trial is in the long tier.
pub fn has(trial: &str) -> bool {
    TRIALS.iter().any(|name| is(trial, name))
}

/// Names that no trial has: misspelt here, or renamed there.
pub fn unknown<'a>(trials: impl Iterator<Item = &'a str> + Clone) -> Vec<&'static str> {
    let is_unknown = |name: &&str| !trials.clone().any(|trial| is(trial, name));
    TRIALS.iter().copied().filter(is_unknown).collect()
}

fn is(trial: &str, name: &str) -> bool {
    let (_, without_engine) = trial.split_once("::").unwrap_or(("", trial));
    trial == name || without_engine == name
}
