//! Peers' names, resolved on threads of their own: a name server that is slow
//! or silent holds up nobody else.
//!
//! A name that does not resolve is tried again with growing pauses. A name that
//! has is asked for again when its peer is silent although we send to it, as
//! after a move to another address, and when the operator says so.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::config::PeerName;
use crate::error::{Error, Result};

/// Names that can be asked for at the same time.
const THREADS: usize = 8;

/// Names that can wait for a thread. More wait for the next tick.
const JOBS_MAX: usize = 64;

/// Pauses between attempts at a name that does not resolve.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// How long a peer that we send to may be silent before its name is asked for
/// again, and the longest pause that this grows to while asking changes nothing.
const SILENCE_MIN: Duration = Duration::from_secs(10);
const SILENCE_MAX: Duration = Duration::from_secs(300);

/// What has become of asking for a name.
#[derive(Debug)]
pub struct Lookup {
    /// The peer's name.
    pub(crate) name: PeerName,
    /// Its addresses, the best first, or why there are none.
    pub(crate) result: Result<Vec<SocketAddr>>,
}

/// A peer's `addresses`, of which the best comes first, in the order in which
/// they are to be tried. Name servers rotate their answers, so a peer stays at
/// its `current` address while that is among them. If it `is_silent` there, the
/// others come first, from the next higher address round to the next lower one:
/// this way each has its turn.
pub(crate) fn in_order(
    mut addresses: Vec<SocketAddr>,
    current: Option<SocketAddr>,
    is_silent: bool,
) -> Vec<SocketAddr> {
    if is_silent && current.is_some_and(|current| addresses.contains(&current)) {
        addresses.sort();
        let next = addresses.partition_point(|&address| Some(address) <= current);
        addresses.rotate_left(next);
    } else {
        // Stable: the others stay in order.
        addresses.sort_by_key(|&address| Some(address) != current);
    }
    addresses
}

/// The first address that `check` lets pass, or what it says about the first.
///
/// # Errors
/// When none passes; names the peer.
pub(crate) fn first_usable(
    name: &PeerName,
    addresses: Vec<SocketAddr>,
    mut check: impl FnMut(SocketAddr) -> Result<()>,
) -> Result<SocketAddr> {
    let mut refusal = None;
    for address in addresses {
        match check(address) {
            Ok(()) => return Ok(address),
            Err(error) => refusal = refusal.or(Some(error)),
        }
    }
    let refusal = refusal.unwrap_or_else(|| Error::new("there is no address"));
    Err(cannot_use(name, &refusal))
}

/// That a peer's name resolves, but not to an address that can be used.
pub(crate) fn cannot_use(name: &PeerName, reason: &Error) -> Error {
    Error::new(format!("cannot use peer {name}: {reason}"))
}

/// The names that are to be resolved again.
pub struct Names {
    jobs: Sender<PeerName>,
    answers: Receiver<Lookup>,
    watched: HashMap<PeerName, Watched>,
}

/// A name's state.
#[derive(Debug)]
struct Watched {
    /// With a thread, or waiting for one.
    is_asked: bool,
    /// When to ask next; `None` while the answer is good.
    next_at: Option<Instant>,
    /// When it was last asked for.
    asked_at: Option<Instant>,
    retry: Duration,
    /// How long its peer has to be silent, and the last question to be past,
    /// for another one.
    silence: Duration,
    /// It is asked for because its peer is silent.
    is_silent: bool,
    is_resolved: bool,
}

impl Names {
    /// Starts the threads, which call `resolve`: it may take its time.
    ///
    /// # Errors
    /// When there are no more threads.
    pub(crate) fn start(
        resolve: impl Fn(&PeerName) -> Result<Vec<SocketAddr>> + Send + Sync + 'static,
    ) -> Result<Self> {
        let resolve = Arc::new(resolve);
        let (jobs, waiting) = bounded::<PeerName>(JOBS_MAX);
        let (answer, answers) = bounded(JOBS_MAX + THREADS);
        for _ in 0..THREADS {
            let (waiting, answer) = (waiting.clone(), answer.clone());
            let resolve = Arc::clone(&resolve);
            std::thread::Builder::new()
                .name("names".into())
                .spawn(move || {
                    // Ends with the channel; one that waits for a name server
                    // then ends with the process.
                    for name in waiting {
                        let result = resolve(&name);
                        if answer.send(Lookup { name, result }).is_err() {
                            return;
                        }
                    }
                })
                .map_err(|error| Error::os("cannot start a thread for names", error))?;
        }
        Ok(Self {
            jobs,
            answers,
            watched: HashMap::new(),
        })
    }

    /// Where answers come in. What came of each goes to [`Self::heard`].
    pub(crate) fn answers(&self) -> &Receiver<Lookup> {
        &self.answers
    }

    /// Looks after these names and no others. New ones are asked for at the
    /// next [`Self::tick`].
    pub(crate) fn watch<'a>(&mut self, names: impl Iterator<Item = &'a PeerName>, now: Instant) {
        let mut old = std::mem::take(&mut self.watched);
        for name in names {
            let watched = old.remove(name).unwrap_or(Watched {
                is_asked: false,
                next_at: Some(now),
                asked_at: None,
                retry: RETRY_MIN,
                silence: SILENCE_MIN,
                is_silent: false,
                is_resolved: false,
            });
            self.watched.insert(name.clone(), watched);
        }
    }

    /// Asks for all names anew.
    pub(crate) fn ask_all(&mut self, now: Instant) {
        for watched in self.watched.values_mut() {
            watched.next_at = Some(now);
            watched.retry = RETRY_MIN;
            watched.silence = SILENCE_MIN;
            watched.is_silent = false;
        }
        self.tick(now);
    }

    /// Asks for the names whose time has come.
    pub(crate) fn tick(&mut self, now: Instant) {
        for (name, watched) in &mut self.watched {
            let is_due = watched.next_at.is_some_and(|at| at <= now);
            if is_due && !watched.is_asked && self.jobs.try_send(name.clone()).is_ok() {
                watched.is_asked = true;
                watched.asked_at = Some(now);
                watched.next_at = None;
            }
        }
    }

    /// Whether an answer about this name will come: it has been asked for, or
    /// will be at a [`Self::tick`] now.
    pub(crate) fn is_expected(&self, name: &PeerName, now: Instant) -> bool {
        self.watched.get(name).is_some_and(|watched| {
            watched.is_asked || watched.next_at.is_some_and(|next_at| next_at <= now)
        })
    }

    /// The peer of this name has been silent for `silence`, although we send
    /// to it.
    pub(crate) fn silent(&mut self, name: &PeerName, silence: Duration, now: Instant) {
        if let Some(watched) = self.watched.get_mut(name)
            && watched.is_resolved
            && !watched.is_asked
            && watched.next_at.is_none()
        {
            // The silence alone would say so for ever once it is long.
            let unasked = watched
                .asked_at
                .map_or(silence, |at| now.saturating_duration_since(at));
            if silence.min(unasked) >= watched.silence {
                watched.next_at = Some(now);
                watched.is_silent = true;
                watched.silence = silence.clamp(SILENCE_MIN, SILENCE_MAX);
            }
        }
    }

    /// The peer of this name answers.
    pub(crate) fn answered(&mut self, name: &PeerName) {
        if let Some(watched) = self.watched.get_mut(name) {
            watched.silence = SILENCE_MIN;
            watched.is_silent = false;
        }
    }

    /// Whether the name is asked for because its peer is silent, until the
    /// answer has been [`Self::heard`].
    pub(crate) fn is_for_silence(&self, name: &PeerName) -> bool {
        self.watched
            .get(name)
            .is_some_and(|watched| watched.is_silent)
    }

    /// Takes note of an answer. The name is asked for again later if there was
    /// no address that is good. `false`: nobody wants to know any more.
    pub(crate) fn heard(&mut self, name: &PeerName, is_good: bool, now: Instant) -> bool {
        let Some(watched) = self.watched.get_mut(name) else {
            return false;
        };
        watched.is_asked = false;
        if is_good {
            watched.retry = RETRY_MIN;
            watched.is_resolved = true;
            watched.is_silent = false;
        } else {
            watched.next_at = Some(now + watched.retry);
            watched.retry = (watched.retry * 2).min(RETRY_MAX);
        }
        true
    }
}

#[cfg(test)]
impl Names {
    /// Names whose threads are the caller: what is asked for, and where the
    /// answers go.
    pub(crate) fn without_threads() -> (Self, Receiver<PeerName>, Sender<Lookup>) {
        let (jobs, asked) = bounded(JOBS_MAX);
        let (answer, answers) = bounded(JOBS_MAX);
        let names = Self {
            jobs,
            answers,
            watched: HashMap::new(),
        };
        (names, asked, answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(host: &str) -> PeerName {
        PeerName {
            host: host.to_string(),
            port: 8285,
        }
    }

    #[test]
    fn what_does_not_resolve_is_asked_for_with_growing_pauses() {
        let (mut names, asked, _) = Names::without_threads();
        let start = Instant::now();
        names.watch([name("a")].iter(), start);
        let mut now = start;
        let mut pauses = Vec::new();
        for _ in 0..9 {
            let from = now;
            loop {
                names.tick(now);
                // Once only, however often it is looked at.
                names.tick(now);
                if asked.try_recv().is_ok() {
                    break;
                }
                now += Duration::from_secs(1);
            }
            assert!(asked.is_empty());
            pauses.push((now - from).as_secs());
            assert!(names.heard(&name("a"), false, now));
        }
        assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 32, 60, 60]);
        // It resolves at last: no more questions.
        now += Duration::from_secs(60);
        names.tick(now);
        assert_eq!(asked.try_recv(), Ok(name("a")));
        names.heard(&name("a"), true, now);
        names.tick(now + Duration::from_secs(3600));
        assert!(asked.is_empty());
    }

    #[test]
    fn a_silent_peers_name_is_asked_for_again_but_not_all_the_time() {
        let (mut names, asked, _) = Names::without_threads();
        let start = Instant::now();
        names.watch([name("a")].iter(), start);
        names.tick(start);
        assert_eq!(asked.try_recv(), Ok(name("a")));
        let mut asked_at = Vec::new();
        names.heard(&name("a"), true, start);
        for second in 1..=2000 {
            let silence = Duration::from_secs(second);
            let now = start + silence;
            names.silent(&name("a"), silence, now);
            names.tick(now);
            if asked.try_recv().is_ok() {
                asked_at.push(second);
                names.heard(&name("a"), true, now);
            }
        }
        let expected = [10, 20, 40, 80, 160, 320, 620, 920, 1220, 1520, 1820];
        assert_eq!(asked_at, expected);
        names.answered(&name("a"));
        let later = start + Duration::from_secs(2010);
        names.silent(&name("a"), SILENCE_MIN, later);
        names.tick(later);
        assert_eq!(asked.try_recv(), Ok(name("a")));
    }

    /// Only the question that silence has brought about, and only while the
    /// peer is silent.
    #[test]
    fn a_silent_peer_is_looked_for_elsewhere() {
        let (mut names, asked, _) = Names::without_threads();
        let start = Instant::now();
        let a = name("a");
        names.watch([a.clone()].iter(), start);
        names.tick(start);
        assert!(!names.is_for_silence(&a));
        names.heard(&a, true, start);
        let ask_for_silence = |names: &mut Names, now| {
            names.silent(&a, SILENCE_MIN, now);
            names.tick(now);
            assert!(names.is_for_silence(&a));
        };
        let mut now = start + SILENCE_MIN;
        ask_for_silence(&mut names, now);
        // No answer is no reason to give up.
        names.heard(&name("a"), false, now);
        assert!(names.is_for_silence(&a));
        names.heard(&a, true, now);
        assert!(!names.is_for_silence(&a));
        for who_ends_it in [Names::answered, |names: &mut Names, _: &PeerName| {
            names.ask_all(Instant::now());
        }] {
            names.ask_all(now);
            names.heard(&a, true, now);
            now += SILENCE_MIN;
            ask_for_silence(&mut names, now);
            who_ends_it(&mut names, &a);
            assert!(!names.is_for_silence(&a));
            names.heard(&a, true, now);
        }
        assert!(asked.try_iter().count() > 3);
    }

    #[test]
    fn a_peer_stays_where_it_is_unless_it_is_silent() {
        let address = |last: u8| SocketAddr::from(([10, 0, 0, last], 1));
        let all = |lasts: &[u8]| lasts.iter().map(|&last| address(last)).collect::<Vec<_>>();
        let order = |lasts: &[u8], current: Option<u8>, is_silent| {
            in_order(all(lasts), current.map(address), is_silent)
        };
        // However the answer is rotated.
        assert_eq!(order(&[3, 1, 2], Some(2), false), all(&[2, 3, 1]));
        assert_eq!(order(&[1, 2, 3], Some(2), false), all(&[2, 1, 3]));
        for answer in [[3, 1, 2], [1, 2, 3]] {
            assert_eq!(order(&answer, Some(1), true), all(&[2, 3, 1]));
            assert_eq!(order(&answer, Some(2), true), all(&[3, 1, 2]));
            assert_eq!(order(&answer, Some(3), true), all(&[1, 2, 3]));
        }
        assert_eq!(order(&[1], Some(1), true), all(&[1]));
        // One that is elsewhere now is at the best address.
        for is_silent in [false, true] {
            assert_eq!(order(&[3, 1, 2], None, is_silent), all(&[3, 1, 2]));
            assert_eq!(order(&[3, 1, 2], Some(9), is_silent), all(&[3, 1, 2]));
        }
    }

    #[test]
    fn addresses_that_cannot_be_the_peers_are_passed_over() {
        let all: Vec<SocketAddr> = (1..=3u8).map(|last| ([10, 0, 0, last], 1).into()).collect();
        let refuse = |address: SocketAddr| Err(Error::new(format!("not {address}")));
        let found = first_usable(&name("a"), all.clone(), |address| match address == all[1] {
            true => Ok(()),
            false => refuse(address),
        });
        assert_eq!(found.unwrap(), all[1]);
        let none = first_usable(&name("a"), all, refuse)
            .unwrap_err()
            .to_string();
        assert_eq!(none, "cannot use peer a:8285: not 10.0.0.1:1");
    }

    #[test]
    fn who_is_gone_is_not_asked_for_nor_listened_to() {
        let (mut names, asked, _) = Names::without_threads();
        let now = Instant::now();
        names.watch([name("a"), name("b")].iter(), now);
        names.watch([name("b")].iter(), now);
        names.tick(now);
        assert_eq!(asked.try_iter().collect::<Vec<_>>(), [name("b")]);
        assert!(!names.heard(&name("a"), true, now));
        // The operator insists.
        names.heard(&name("b"), true, now);
        names.ask_all(now);
        assert_eq!(asked.try_recv(), Ok(name("b")));
    }

    #[test]
    fn threads_answer() {
        let known = SocketAddr::from(([10, 0, 0, 1], 1));
        let resolve = move |asked: &PeerName| match *asked == name("known") {
            true => Ok(vec![known]),
            false => Err(Error::new("unknown")),
        };
        let mut names = Names::start(resolve).unwrap();
        let now = Instant::now();
        names.watch([name("known"), name("unknown")].iter(), now);
        names.tick(now);
        for _ in 0..2 {
            let answer = names.answers().recv().unwrap();
            assert_eq!(answer.result.is_ok(), answer.name == name("known"));
        }
    }
}
