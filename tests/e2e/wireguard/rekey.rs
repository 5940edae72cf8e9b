//! Sessions that end and are followed by others while traffic goes on.

use std::time::{Duration, Instant};

use fastvpn::error::Result;
use testbed::Pair;
use testbed::wireguard::WIREGUARD_GO;

use super::ends::{End, Keys, Kind, Underlay, hosts, inside, stop, tunnel};
use super::wire::NonceWatch;
use crate::support::{PATIENCE, check};
use crate::tools::Stream;

/// Two hosts, and traffic in both directions that is watched.
struct Life {
    _hosts: Pair,
    ends: [End; 2],
    streams: [Stream; 2],
    watches: [NonceWatch; 2],
}

impl Life {
    fn start(kinds: [Kind; 2]) -> Result<Self> {
        let hosts = hosts()?;
        let watches = [NonceWatch::at(&hosts.a)?, NonceWatch::at(&hosts.b)?];
        let ends = tunnel(&hosts, &Keys::new(true)?, kinds, Underlay::V4)?;
        let streams = [
            Stream::start(&hosts.a, &hosts.b, inside(1))?,
            Stream::start(&hosts.b, &hosts.a, inside(0))?,
        ];
        Ok(Self {
            _hosts: hosts,
            ends,
            streams,
            watches,
        })
    }

    fn goes_on(&self) -> Result<()> {
        self.streams.iter().try_for_each(Stream::wait_for_progress)
    }

    /// In how many sessions data has crossed, in the direction with fewer.
    fn sessions(&self) -> usize {
        let [a, b] = self.watches.each_ref().map(NonceWatch::sessions);
        a.min(b)
    }

    /// All that was sent has arrived, and no nonce came twice.
    fn finish(self) -> Result<()> {
        for stream in self.streams {
            stream.finish()?;
        }
        for watch in self.watches {
            watch.finish()?;
        }
        stop(self.ends)
    }
}

/// No connection breaks and no byte is lost, however often it happens.
fn sessions_change(kinds: [Kind; 2]) -> Result<()> {
    const SESSIONS_MIN: usize = 6;
    // The program under test has only the real timers then.
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let life = Life::start(kinds)?;
    let deadline = Instant::now() + PATIENCE;
    while life.sessions() < SESSIONS_MIN {
        let sessions = life.sessions();
        check(Instant::now() < deadline, || {
            format!("{sessions} sessions were seen")
        })?;
        life.goes_on()?;
    }
    life.goes_on()?;
    life.finish()
}

#[testbed::trial(each_engine)]
fn sessions_change_under_load() -> Result<()> {
    sessions_change([Kind::ShortTimers; 2])
}

/// fastvpn has made the session, and renews it.
#[testbed::trial(each_engine, wireguard_go)]
fn sessions_with_wireguard_go_change_under_load() -> Result<()> {
    sessions_change([Kind::ShortTimers, Kind::Other(&WIREGUARD_GO)])
}

/// A session lasts for three minutes at the most, and streams longer than that; it is
/// the caller that renews it.
#[testbed::trial(each_engine, long, wireguard_go)]
fn streams_outlive_their_sessions() -> Result<()> {
    const SESSION_MAX: Duration = Duration::from_secs(180);
    let (own, other) = (Kind::Fastvpn, Kind::Other(&WIREGUARD_GO));
    // Side by side: all are mostly waited for.
    let lives = [[own; 2], [own, other], [other, own]].map(Life::start);
    let lives = lives.into_iter().collect::<Result<Vec<_>>>()?;
    let start = Instant::now();
    while start.elapsed() < SESSION_MAX + Duration::from_secs(15) {
        lives.iter().try_for_each(Life::goes_on)?;
    }
    for life in lives {
        let sessions = life.sessions();
        check(sessions > 1, || format!("{sessions} sessions were seen"))?;
        life.finish()?;
    }
    Ok(())
}
