//! What memory a process has got since a certain moment.

use std::io;
use std::num::ParseIntError;
use std::ops::Range;

use fastvpn::error::Result;

use crate::support::{check, tried};

/// A mapping of a process that it may use (proc_pid_smaps(5)).
struct Mapping {
    addresses: Range<u64>,
    rss_bytes: u64,
}

/// All that a process has mapped.
pub struct Mappings(Vec<Mapping>);

impl Mappings {
    /// Those of a process now.
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        let text = tried(&path, std::fs::read_to_string(&path))?;
        let mut all: Vec<Mapping> = Vec::new();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (first, second) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
            if let Some((start, end)) = first.split_once('-') {
                let number = |text| tried(line, u64::from_str_radix(text, 16).map_err(no_number));
                all.push(Mapping {
                    // Allocators reserve addresses that they may not use yet.
                    addresses: match second.starts_with("---") {
                        true => 0..0,
                        false => number(start)?..number(end)?,
                    },
                    rss_bytes: 0,
                });
            } else if let (Some(last), "Rss:") = (all.last_mut(), first) {
                last.rss_bytes = tried(line, second.parse::<u64>().map_err(no_number))? << 10;
            }
        }
        let rss_bytes: u64 = all.iter().map(|mapping| mapping.rss_bytes).sum();
        check(rss_bytes > 0, || format!("{path} has no memory"))?;
        Ok(Self(all))
    }

    /// Memory that the process has got since `before`, less what it has given
    /// back. What was mapped before and has been touched since, as packet buffers
    /// are when a backlog first reaches them, is bounded by that mapping and does
    /// not count.
    pub fn growth_bytes(&self, before: &Self) -> u64 {
        let got = self.resident_outside(before);
        got.saturating_sub(before.resident_outside(self))
    }

    /// Resident bytes, at most, of what is mapped in none of `others`.
    fn resident_outside(&self, others: &Self) -> u64 {
        let resident = |one: &Mapping| one.rss_bytes.min(one.bytes_outside(others));
        self.0.iter().map(resident).sum()
    }
}

impl Mapping {
    fn bytes_outside(&self, others: &Mappings) -> u64 {
        let overlap = |other: &Self| {
            let start = self.addresses.start.max(other.addresses.start);
            let end = self.addresses.end.min(other.addresses.end);
            end.saturating_sub(start)
        };
        let bytes = self.addresses.end - self.addresses.start;
        bytes - others.0.iter().map(overlap).sum::<u64>()
    }
}

fn no_number(error: ParseIntError) -> io::Error {
    io::Error::other(error)
}
