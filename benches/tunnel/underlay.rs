//! The cable between the two hosts: what it does with packets longer than its MTU,
//! and how fast it is.

use std::io::Read;
use std::process::{Command, Stdio};

use clap::ValueEnum;
use fastvpn::error::{Error, Result};
use testbed::{Namespace, Pair, UNDERLAY_NAME};

/// What the cable is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Underlay {
    /// Packets cross it one by one, none longer than its MTU, and are merged where they
    /// arrive: as between network cards
    Wire,
    /// As a veth pair is: packets of 64 KiB cross in one piece, which no network does
    Veth,
}

impl Underlay {
    /// What a reader has to know of it.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Wire => "wire-like: packets of its MTU cross it, as between network cards",
            Self::Veth => "plain veth: packets of up to 64 KiB cross it in one piece",
        }
    }

    /// Makes a veth pair such a cable.
    ///
    /// # Errors
    /// When ethtool(8) is missing or refuses.
    pub fn apply(self, pair: &Pair) -> Result<()> {
        if self == Self::Veth {
            return Ok(());
        }
        let off = "tso off gso off tx-udp-segmentation off gro on";
        let words = format!("-K {UNDERLAY_NAME} {off}");
        [&pair.a, &pair.b]
            .into_iter()
            .try_for_each(|host| run(host, "ethtool", &words))
    }
}

/// A cable that is slower for as long as this lives.
pub struct Slow<'a> {
    pair: &'a Pair,
}

impl<'a> Slow<'a> {
    /// So many megabits per second each way, with the queue that comes by default.
    ///
    /// # Errors
    /// When tc(8) is missing or refuses.
    pub fn new(pair: &'a Pair, mbit_per_s: u32) -> Result<Self> {
        let slow = Self { pair };
        for host in [&pair.a, &pair.b] {
            let device = format!("dev {UNDERLAY_NAME}");
            run(
                host,
                "tc",
                &format!("qdisc add {device} root handle 1: htb default 1"),
            )?;
            let class = format!("class add {device} parent 1: classid 1:1 htb");
            run(host, "tc", &format!("{class} rate {mbit_per_s}mbit"))?;
        }
        Ok(slow)
    }
}

impl Drop for Slow<'_> {
    fn drop(&mut self) {
        for host in [&self.pair.a, &self.pair.b] {
            // Where there is none, that is as it should be.
            let _ = run(host, "tc", &format!("qdisc del dev {UNDERLAY_NAME} root"));
        }
    }
}

/// Runs a program in a namespace, with these words.
fn run(host: &Namespace, program: &str, words: &str) -> Result<()> {
    let mut command = Command::new(program);
    command.args(words.split(' ')).stderr(Stdio::piped());
    let mut child = host.spawn(command).map_err(|error| match error.errno() {
        Some(libc::ENOENT) => error.hint("install the packages ethtool and iproute2"),
        _ => error,
    })?;
    let mut said = String::new();
    if let Some(mut stderr) = child.process().stderr.take() {
        let _ = stderr.read_to_string(&mut said);
    }
    match child.process().wait() {
        Ok(status) if status.success() => Ok(()),
        _ => Err(Error::new(format!("{program} {words}: {}", said.trim()))),
    }
}
