//! The cable between the two hosts: what it does with packets longer than its MTU,
//! and how fast it is.

use clap::ValueEnum;
use fastvpn::error::Result;
use testbed::{Pair, UNDERLAY_NAME, tool};

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
            .try_for_each(|host| tool(host, "ethtool", &words))
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
        let qdisc = format!("qdisc add dev {UNDERLAY_NAME} root handle 1: htb default 1");
        for host in [&pair.a, &pair.b] {
            tool(host, "tc", &qdisc)?;
        }
        slow.set_rate(mbit_per_s)?;
        Ok(slow)
    }

    /// Goes on with another rate.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn set_rate(&self, mbit_per_s: u32) -> Result<()> {
        let class = format!("class replace dev {UNDERLAY_NAME} parent 1: classid 1:1");
        [&self.pair.a, &self.pair.b]
            .into_iter()
            .try_for_each(|host| tool(host, "tc", &format!("{class} htb rate {mbit_per_s}mbit")))
    }
}

impl Drop for Slow<'_> {
    fn drop(&mut self) {
        for host in [&self.pair.a, &self.pair.b] {
            // Where there is none, that is as it should be.
            let _ = tool(host, "tc", &format!("qdisc del dev {UNDERLAY_NAME} root"));
        }
    }
}
