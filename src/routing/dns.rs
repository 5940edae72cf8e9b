//! Peers' names, resolved on threads of their own: a name server that is slow
//! or silent holds up no other work.
//!
//! A name that does not resolve is tried again with growing pauses. A name that
//! has is asked for again when its peer is silent although we send to it, as
//! after a move to another address, and when the operator says so.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[cfg(test)]
use crossbeam_channel::Sender;
use crossbeam_channel::{Receiver, unbounded};

use crate::config::{HostPort, PeerName};
use crate::error::{Error, Result};

/// Names that are asked for at the same time, each by a thread. The others wait until
/// one of these has its answer.
const ASKED_MAX: usize = 8;

/// Pauses between questions about a name: they grow while these change nothing.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// How long a peer that we send to may be silent before its name is asked for
/// again, and how long the answer has to change that.
pub(crate) const SILENCE_MIN: Duration = Duration::from_secs(10);

/// What has become of asking for a name.
#[derive(Debug)]
pub struct Lookup {
    /// The peer's name.
    pub(crate) name: HostPort,
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
    /// Has a name resolved elsewhere, by who keeps the token until it is done.
    ask: Box<dyn Fn(HostPort, Arc<()>) + Send>,
    /// Each lookup under way has a clone, also one about a name that is not watched any
    /// more: a silent name server holds it up all the same.
    token: Arc<()>,
    answers: Receiver<Lookup>,
    watched: HashMap<HostPort, Watched>,
}

/// A name's state.
#[derive(Debug)]
struct Watched {
    /// An answer is under way.
    is_asked: bool,
    asked_at: Instant,
    /// When to ask next; `None` while the answer is good.
    next_at: Option<Instant>,
    pause: Duration,
}

impl Watched {
    fn ask_again(&mut self, at: Instant) {
        self.next_at = Some(at);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }
}

impl Names {
    /// Names that `resolve` resolves: it may take its time.
    pub(crate) fn new(
        resolve: impl Fn(&HostPort) -> Result<Vec<SocketAddr>> + Send + Sync + 'static,
    ) -> Self {
        let resolve = Arc::new(resolve);
        let (answer, answers) = unbounded();
        let ask = move |name: HostPort, token| {
            let (resolve, sender, asked) = (Arc::clone(&resolve), answer.clone(), name.clone());
            let work = move || {
                let result = resolve(&asked);
                // First, so that whoever has the answer finds room for another name.
                drop(token);
                let _ = sender.send(Lookup {
                    name: asked,
                    result,
                });
            };
            let thread = std::thread::Builder::new().name("names".into());
            if let Err(cause) = thread.spawn(work) {
                let what = format!("cannot start a thread to resolve peer {}", name.host);
                let result = Err(Error::os(what, cause));
                let _ = answer.send(Lookup { name, result });
            }
        };
        Self {
            ask: Box::new(ask),
            token: Arc::new(()),
            answers,
            watched: HashMap::new(),
        }
    }

    /// Where answers come in. What came of each goes to [`Self::note_answer`].
    pub(crate) fn answers(&self) -> &Receiver<Lookup> {
        &self.answers
    }

    /// Resolves these names and no others from now on. New ones are asked for at the
    /// next [`Self::tick`].
    pub(crate) fn watch<'a>(&mut self, names: impl Iterator<Item = &'a HostPort>, now: Instant) {
        let mut old = std::mem::take(&mut self.watched);
        for name in names {
            let watched = old.remove(name).unwrap_or(Watched {
                is_asked: false,
                asked_at: now,
                next_at: Some(now),
                pause: PAUSE_MIN,
            });
            self.watched.insert(name.clone(), watched);
        }
    }

    /// Asks for all names anew.
    pub(crate) fn ask_all(&mut self, now: Instant) {
        for watched in self.watched.values_mut() {
            watched.next_at = Some(now);
            watched.pause = PAUSE_MIN;
        }
        self.tick(now);
    }

    /// Asks for the names whose time has come, as far as there is room: first for those
    /// that have been due for the longest time.
    pub(crate) fn tick(&mut self, now: Instant) {
        // One is our own.
        let room = (ASKED_MAX + 1).saturating_sub(Arc::strong_count(&self.token));
        if room == 0 {
            return;
        }
        let is_due = |watched: &Watched| watched.next_at.is_some_and(|at| at <= now);
        let due = self.watched.iter_mut();
        let due = due.filter(|(_, watched)| is_due(watched) && !watched.is_asked);
        let mut due: Vec<_> = due.collect();
        due.sort_unstable_by_key(|(_, watched)| watched.next_at);
        for (name, watched) in due.into_iter().take(room) {
            (self.ask)(name.clone(), Arc::clone(&self.token));
            watched.is_asked = true;
            watched.asked_at = now;
            watched.next_at = None;
        }
    }

    /// Whether an answer about this name will come: it has been asked for, or
    /// will be at a [`Self::tick`] now.
    pub(crate) fn is_expected(&self, name: &HostPort, now: Instant) -> bool {
        self.watched.get(name).is_some_and(|watched| {
            watched.is_asked || watched.next_at.is_some_and(|next_at| next_at <= now)
        })
    }

    /// The peer of this name has been silent for `silence`, although we send
    /// to it.
    pub(crate) fn note_silence(&mut self, name: &HostPort, silence: Duration, now: Instant) {
        if let Some(watched) = self.watched.get_mut(name)
            && silence >= SILENCE_MIN
            && !watched.is_asked
            && watched.next_at.is_none()
            && now >= watched.asked_at + watched.pause.max(SILENCE_MIN)
        {
            watched.ask_again(now);
        }
    }

    /// Packets come from the peer of this name.
    pub(crate) fn note_traffic(&mut self, name: &HostPort) {
        if let Some(watched) = self.watched.get_mut(name) {
            watched.pause = PAUSE_MIN;
        }
    }

    /// Takes note of an answer. The name is asked for again later if there was
    /// no address that is good. `false`: the name is not watched any more.
    pub(crate) fn note_answer(&mut self, name: &HostPort, is_good: bool, now: Instant) -> bool {
        let Some(watched) = self.watched.get_mut(name) else {
            return false;
        };
        watched.is_asked = false;
        if !is_good {
            watched.ask_again(now + watched.pause);
        }
        true
    }
}

#[cfg(test)]
impl Names {
    /// Names whose threads are the caller: what is asked for, and where the
    /// answers go.
    pub(crate) fn without_threads() -> (Self, Receiver<HostPort>, Sender<Lookup>) {
        let (question, asked) = unbounded();
        let (answer, answers) = unbounded();
        let names = Self {
            ask: Box::new(move |name, _| {
                let _ = question.send(name);
            }),
            token: Arc::new(()),
            answers,
            watched: HashMap::new(),
        };
        (names, asked, answer)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn name(host: &str) -> HostPort {
        HostPort {
            host: host.to_string(),
            port: 8285,
        }
    }

    #[test]
    fn a_name_that_does_not_resolve_is_asked_for_with_growing_pauses() {
        let (mut names, asked, _) = Names::without_threads();
        let start = Instant::now();
        names.watch([name("a")].iter(), start);
        let mut now = start;
        let mut pauses = Vec::new();
        for _ in 0..9 {
            let from = now;
            loop {
                names.tick(now);
                // Once only.
                names.tick(now);
                if asked.try_recv().is_ok() {
                    break;
                }
                now += Duration::from_secs(1);
            }
            assert!(asked.is_empty());
            pauses.push((now - from).as_secs());
            assert!(names.note_answer(&name("a"), false, now));
        }
        assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 32, 60, 60]);
        // It resolves at last: no more questions.
        now += Duration::from_secs(60);
        names.tick(now);
        assert_eq!(asked.try_recv(), Ok(name("a")));
        names.note_answer(&name("a"), true, now);
        names.tick(now + Duration::from_secs(3600));
        assert!(asked.is_empty());
    }

    #[test]
    fn a_silent_peers_name_is_asked_for_with_growing_pauses() {
        let (mut names, asked, _) = Names::without_threads();
        let start = Instant::now();
        names.watch([name("a")].iter(), start);
        names.tick(start);
        assert_eq!(asked.try_recv(), Ok(name("a")));
        let mut asked_at = Vec::new();
        names.note_answer(&name("a"), true, start);
        for second in 1..=300 {
            let silence = Duration::from_secs(second);
            let now = start + silence;
            names.note_silence(&name("a"), silence, now);
            names.tick(now);
            if asked.try_recv().is_ok() {
                asked_at.push(second);
                names.note_answer(&name("a"), true, now);
            }
        }
        assert_eq!(asked_at, [10, 20, 30, 40, 56, 88, 148, 208, 268]);
        names.note_traffic(&name("a"));
        let later = start + Duration::from_secs(300);
        names.note_silence(&name("a"), SILENCE_MIN, later);
        names.tick(later);
        assert_eq!(asked.try_recv(), Ok(name("a")));
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
        let found = first_usable(&PeerName::Host(name("a")), all.clone(), |address| {
            match address == all[1] {
                true => Ok(()),
                false => refuse(address),
            }
        });
        assert_eq!(found.unwrap(), all[1]);
        let none = first_usable(&PeerName::Host(name("a")), all, refuse)
            .unwrap_err()
            .to_string();
        assert_eq!(none, "cannot use peer a:8285: not 10.0.0.1:1");
    }

    #[test]
    fn a_name_that_has_gone_is_not_asked_for_nor_listened_to() {
        let (mut names, asked, _) = Names::without_threads();
        let now = Instant::now();
        names.watch([name("a"), name("b")].iter(), now);
        names.watch([name("b")].iter(), now);
        names.tick(now);
        assert_eq!(asked.try_iter().collect::<Vec<_>>(), [name("b")]);
        assert!(!names.note_answer(&name("a"), true, now));
        // The operator insists.
        names.note_answer(&name("b"), true, now);
        names.ask_all(now);
        assert_eq!(asked.try_recv(), Ok(name("b")));
    }

    /// Names that are resolved when the caller says so: what is being asked for, and
    /// where to send for each answer.
    fn held_names() -> (Names, Receiver<HostPort>, Sender<()>) {
        let (question, asked) = unbounded();
        let (release, released) = unbounded();
        let resolve = move |name: &HostPort| {
            question.send(name.clone()).unwrap();
            let _ = released.recv();
            Err(Error::new("no"))
        };
        (Names::new(resolve), asked, release)
    }

    #[test]
    fn names_that_fail_keep_no_other_from_being_asked_for() {
        let (mut names, asked, release) = held_names();
        let all: Vec<_> = (0..30).map(|number| name(&number.to_string())).collect();
        let mut now = Instant::now();
        names.watch(all.iter(), now);
        names.tick(now);
        let mut seen = HashSet::new();
        // A thread may be slow to start: its name is seen later, and the others more often.
        for _ in 0..10_000 {
            if seen.len() == all.len() {
                break;
            }
            // So long that those that have failed are due again.
            now += PAUSE_MAX;
            seen.insert(asked.recv().unwrap());
            release.send(()).unwrap();
            let answer = names.answers().recv().unwrap();
            names.note_answer(&answer.name, false, now);
            names.tick(now);
        }
        assert_eq!(seen.len(), all.len());
    }

    #[test]
    fn names_that_come_and_go_leave_few_threads() {
        let (mut names, asked, release) = held_names();
        let now = Instant::now();
        for number in 0..20 {
            names.watch([name(&number.to_string())].iter(), now);
            names.tick(now);
        }
        for _ in 0..ASKED_MAX {
            asked.recv().unwrap();
        }
        assert_eq!(Arc::strong_count(&names.token), ASKED_MAX + 1);
        assert!(names.is_expected(&name("19"), now));
        // One who has an answer makes room.
        release.send(()).unwrap();
        names.answers().recv().unwrap();
        names.tick(now);
        assert_eq!(asked.recv(), Ok(name("19")));
    }

    #[test]
    fn threads_answer() {
        let known = SocketAddr::from(([10, 0, 0, 1], 1));
        let resolve = move |asked: &HostPort| match *asked == name("known") {
            true => Ok(vec![known]),
            false => Err(Error::new("unknown")),
        };
        let mut names = Names::new(resolve);
        let now = Instant::now();
        names.watch([name("known"), name("unknown")].iter(), now);
        names.tick(now);
        for _ in 0..2 {
            let answer = names.answers().recv().unwrap();
            assert_eq!(answer.result.is_ok(), answer.name == name("known"));
        }
    }
}
