//! Peers' names, resolved on threads of their own: a name server that is slow
//! or silent holds up nobody else.
//!
//! A name that does not resolve is tried again with growing pauses. A name that
//! has is asked for again when its peer is silent although we send to it, as
//! after a move to another address, and when the operator says so.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::cli::Endpoint;
use crate::error::{Error, Result};
use crate::transport::path;

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

/// What a name server said.
#[derive(Debug)]
pub struct Answer {
    /// The peer's name.
    pub name: Endpoint,
    /// Its address, or why there is none.
    pub result: Result<SocketAddr>,
}

/// The names that have to be looked after.
pub struct Names {
    jobs: Sender<Endpoint>,
    answers: Receiver<Answer>,
    watched: HashMap<Endpoint, Watched>,
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
    is_resolved: bool,
}

impl Names {
    /// Starts the threads. `listen`: as for [`path::resolve`].
    ///
    /// # Errors
    /// When there are no more threads.
    pub fn start(listen: Option<IpAddr>) -> Result<Self> {
        let (jobs, waiting) = bounded::<Endpoint>(JOBS_MAX);
        let (answer, answers) = bounded(JOBS_MAX + THREADS);
        for _ in 0..THREADS {
            let (waiting, answer) = (waiting.clone(), answer.clone());
            std::thread::Builder::new()
                .name("names".into())
                .spawn(move || {
                    // Ends with the channel; one that waits for a name server
                    // then ends with the process.
                    for name in waiting {
                        let result = path::resolve(&name.host, name.port, listen);
                        if answer.send(Answer { name, result }).is_err() {
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

    /// Where answers come in. Each goes to [`Self::heard`].
    pub fn answers(&self) -> &Receiver<Answer> {
        &self.answers
    }

    /// Looks after these names and no others. New ones are asked for at the
    /// next [`Self::tick`].
    pub fn watch<'a>(&mut self, names: impl Iterator<Item = &'a Endpoint>, now: Instant) {
        let mut old = std::mem::take(&mut self.watched);
        for name in names {
            let watched = old.remove(name).unwrap_or(Watched {
                is_asked: false,
                next_at: Some(now),
                asked_at: None,
                retry: RETRY_MIN,
                silence: SILENCE_MIN,
                is_resolved: false,
            });
            self.watched.insert(name.clone(), watched);
        }
    }

    /// Asks for all names anew.
    pub fn ask_all(&mut self, now: Instant) {
        for watched in self.watched.values_mut() {
            watched.next_at = Some(now);
            watched.retry = RETRY_MIN;
            watched.silence = SILENCE_MIN;
        }
        self.tick(now);
    }

    /// Asks for the names whose time has come.
    pub fn tick(&mut self, now: Instant) {
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
    pub fn is_expected(&self, name: &Endpoint, now: Instant) -> bool {
        self.watched.get(name).is_some_and(|watched| {
            watched.is_asked || watched.next_at.is_some_and(|next_at| next_at <= now)
        })
    }

    /// The peer of this name has been silent for `silence`, although we send
    /// to it.
    pub fn silent(&mut self, name: &Endpoint, silence: Duration, now: Instant) {
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
                watched.silence = silence.clamp(SILENCE_MIN, SILENCE_MAX);
            }
        }
    }

    /// The peer of this name answers.
    pub fn answered(&mut self, name: &Endpoint) {
        if let Some(watched) = self.watched.get_mut(name) {
            watched.silence = SILENCE_MIN;
        }
    }

    /// Takes note of an answer. The name is asked for again later if that was
    /// no address. `false`: nobody wants to know any more.
    pub fn heard(&mut self, answer: &Answer, now: Instant) -> bool {
        let Some(watched) = self.watched.get_mut(&answer.name) else {
            return false;
        };
        watched.is_asked = false;
        if answer.result.is_ok() {
            watched.retry = RETRY_MIN;
            watched.is_resolved = true;
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
    pub(crate) fn without_threads() -> (Self, Receiver<Endpoint>, Sender<Answer>) {
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

    fn name(host: &str) -> Endpoint {
        Endpoint {
            host: host.to_string(),
            port: 8285,
        }
    }

    fn answer(host: &str, address: Option<&str>) -> Answer {
        Answer {
            name: name(host),
            result: match address {
                Some(address) => Ok(address.parse().unwrap()),
                None => Err(Error::new("no such name")),
            },
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
            assert!(names.heard(&answer("a", None), now));
        }
        assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 32, 60, 60]);
        // It resolves at last: no more questions.
        now += Duration::from_secs(60);
        names.tick(now);
        assert_eq!(asked.try_recv(), Ok(name("a")));
        names.heard(&answer("a", Some("10.0.0.1:1")), now);
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
        names.heard(&answer("a", Some("10.0.0.1:1")), start);
        for second in 1..=2000 {
            let silence = Duration::from_secs(second);
            let now = start + silence;
            names.silent(&name("a"), silence, now);
            names.tick(now);
            if asked.try_recv().is_ok() {
                asked_at.push(second);
                names.heard(&answer("a", Some("10.0.0.1:1")), now);
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

    #[test]
    fn who_is_gone_is_not_asked_for_nor_listened_to() {
        let (mut names, asked, _) = Names::without_threads();
        let now = Instant::now();
        names.watch([name("a"), name("b")].iter(), now);
        names.watch([name("b")].iter(), now);
        names.tick(now);
        assert_eq!(asked.try_iter().collect::<Vec<_>>(), [name("b")]);
        assert!(!names.heard(&answer("a", Some("10.0.0.1:1")), now));
        // The operator insists.
        names.heard(&answer("b", Some("10.0.0.1:1")), now);
        names.ask_all(now);
        assert_eq!(asked.try_recv(), Ok(name("b")));
    }

    #[test]
    fn threads_answer() {
        let mut names = Names::start(None).unwrap();
        let now = Instant::now();
        names.watch(
            [name("localhost"), name("no-such-host.invalid")].iter(),
            now,
        );
        names.tick(now);
        for _ in 0..2 {
            let answer = names.answers().recv().unwrap();
            assert_eq!(answer.result.is_ok(), answer.name == name("localhost"));
        }
    }
}
