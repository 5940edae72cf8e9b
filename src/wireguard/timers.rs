//! What is due for one peer, and when: section 6 of the WireGuard paper, without a clock
//! and without I/O. Whoever owns a [`Timers`] tells it what has happened, polls it, and does
//! what it says.
//!
//! All times are nanoseconds of one monotonic clock; 0 stands for never.
//!
//! Workers note only when something *last* happened ([`Activity`]), so a timer that starts
//! with the first of several events starts with the last one before a poll instead. It is
//! late by a poll's interval at the most.

const SECOND_NS: u64 = 1_000_000_000;

/// The protocol's constants (section 6.1), in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Intervals {
    /// `Rekey-After-Time`: the initiator of a session that is older than this makes a new
    /// one when it sends.
    pub rekey_after_ns: u64,
    /// `Reject-After-Time`: nothing is sent or received in a session that is older.
    pub reject_after_ns: u64,
    /// `Rekey-Attempt-Time`: how long initiations are repeated.
    pub rekey_attempt_ns: u64,
    /// `Rekey-Timeout`: how long a response is waited for.
    pub rekey_timeout_ns: u64,
    /// What is added to that by chance, so that two ends that start at the same time do not
    /// do so again and again (section 6.1: a third of a second at the most).
    pub jitter_max_ns: u64,
    /// `Keepalive-Timeout`: data that is not answered for so long is answered by a keepalive.
    pub keepalive_timeout_ns: u64,
    /// How often the workers' notes are compared with all this while there are sessions.
    pub tick_ns: u64,
    /// The same while nothing happens in any of them. It delays what the first thing to happen
    /// brings with it, which is due many times later.
    pub quiet_tick_ns: u64,
}

impl Intervals {
    /// As in the paper.
    pub(crate) const STANDARD: Self = Self {
        rekey_after_ns: 120 * SECOND_NS,
        reject_after_ns: 180 * SECOND_NS,
        rekey_attempt_ns: 90 * SECOND_NS,
        rekey_timeout_ns: 5 * SECOND_NS,
        jitter_max_ns: SECOND_NS / 3,
        keepalive_timeout_ns: 10 * SECOND_NS,
        tick_ns: SECOND_NS / 4,
        quiet_tick_ns: SECOND_NS,
    };

    /// Those of the paper. A build with debug assertions, as tests run it, divides them by what
    /// the environment says in `FASTVPN_SHORTEN_TIMERS`; a release build has no such thing.
    pub(crate) fn of_this_build() -> Self {
        #[cfg(debug_assertions)]
        if let Ok(factor) = std::env::var("FASTVPN_SHORTEN_TIMERS") {
            return factor.parse().map_or(Self::STANDARD, Self::shortened);
        }
        Self::STANDARD
    }

    /// All of them shorter by a factor, so that a test sees sessions change in seconds.
    #[cfg(any(test, debug_assertions))]
    pub(crate) fn shortened(factor: u64) -> Self {
        let (all, factor) = (Self::STANDARD, factor.max(1));
        Self {
            rekey_after_ns: all.rekey_after_ns / factor,
            reject_after_ns: all.reject_after_ns / factor,
            rekey_attempt_ns: all.rekey_attempt_ns / factor,
            rekey_timeout_ns: all.rekey_timeout_ns / factor,
            jitter_max_ns: all.jitter_max_ns / factor,
            keepalive_timeout_ns: all.keepalive_timeout_ns / factor,
            tick_ns: all.tick_ns / factor,
            quiet_tick_ns: all.quiet_tick_ns / factor,
        }
    }

    /// How old a session is when its initiator replaces it because it has received, not
    /// sent: late enough that the other end, had it anything to send, would have had its
    /// turn, and early enough for a whole handshake before the session is rejected.
    fn late_rekey_ns(&self) -> u64 {
        self.reject_after_ns - self.keepalive_timeout_ns - self.rekey_timeout_ns
    }

    /// How long data may go unanswered before the session is taken for lost: the other end
    /// sends a keepalive before that (section 6.5).
    fn unanswered_ns(&self) -> u64 {
        self.keepalive_timeout_ns + self.rekey_timeout_ns
    }
}

/// When something last happened in any session of the peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Activity {
    /// Anything was sent.
    pub sent_ns: u64,
    /// What was sent was no keepalive.
    pub data_sent_ns: u64,
    /// Anything authentic was received.
    pub received_ns: u64,
    /// What was received was no keepalive.
    pub data_received_ns: u64,
}

/// The session that may be sent in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Usable {
    /// When it was established.
    pub established_ns: u64,
    /// Whether this host has initiated it.
    pub is_initiator: bool,
    /// Whether `Rekey-After-Messages` have been sent in it.
    pub is_worn: bool,
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Due {
    /// Send a keepalive. There is a session to do so in.
    pub keepalive: bool,
    /// Send an initiation, and say so with [`Timers::initiated`].
    pub initiation: bool,
    /// Nobody has answered for `Rekey-Attempt-Time`: forget the handshake.
    pub is_over: bool,
}

/// A handshake that this host wants.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    /// When it was last asked for.
    wanted_ns: u64,
    /// When the next initiation is due.
    next_ns: u64,
}

/// Data that was sent, and has not been answered.
#[derive(Clone, Copy, Debug)]
struct Unanswered {
    sent_ns: u64,
    deadline_ns: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Timers {
    intervals: Intervals,
    persistent_ns: Option<u64>,
    attempt: Option<Attempt>,
    /// When this host last sent an initiation or a response.
    handshake_sent_ns: u64,
    /// When a valid one last came.
    handshake_received_ns: u64,
    /// When data came to which nothing has been sent since.
    owed_since_ns: Option<u64>,
    unanswered: Option<Unanswered>,
    /// Data sent until then does not count as unanswered any more: a handshake was begun.
    unanswered_until_ns: u64,
    /// Which session a late rekey was made for, by its birth.
    late_rekey_of_ns: u64,
    /// The last jitter drawn.
    jitter_ns: u64,
    /// The persistent keepalive was turned on, and none was due yet.
    is_persistent_new: bool,
    /// When the next one is due, as of the last poll.
    persistent_at_ns: Option<u64>,
}

impl Timers {
    /// Those of a peer of whom nothing is known. `persistent_ns`: how long it may be silent
    /// on the path before a keepalive is sent whatever else (section 6.5, `wg(8)`).
    pub(crate) fn new(intervals: Intervals, persistent_ns: Option<u64>) -> Self {
        Self {
            intervals,
            persistent_ns,
            attempt: None,
            handshake_sent_ns: 0,
            handshake_received_ns: 0,
            owed_since_ns: None,
            unanswered: None,
            unanswered_until_ns: 0,
            late_rekey_of_ns: 0,
            jitter_ns: 0,
            is_persistent_new: persistent_ns.is_some(),
            persistent_at_ns: None,
        }
    }

    /// Changes the interval of persistent keepalives. The next poll acts on it.
    pub(crate) fn set_persistent(&mut self, persistent_ns: Option<u64>) {
        self.is_persistent_new |= self.persistent_ns.is_none() && persistent_ns.is_some();
        self.persistent_ns = persistent_ns;
    }

    /// A session is wanted to send in. Handshakes that are under way are repeated for
    /// `Rekey-Attempt-Time` from now on (section 6.4).
    pub(crate) fn want(&mut self, now_ns: u64) {
        let next_ns = match self.handshake_sent_ns {
            0 => now_ns,
            sent_ns => now_ns.max(sent_ns + self.intervals.rekey_timeout_ns),
        };
        let attempt = self.attempt.get_or_insert(Attempt {
            wanted_ns: now_ns,
            next_ns,
        });
        attempt.wanted_ns = now_ns;
    }

    /// An initiation was sent.
    pub(crate) fn initiated(&mut self, now_ns: u64, random: u64) {
        self.handshake_sent_ns = now_ns;
        self.postpone(now_ns, random);
    }

    /// A response to a valid initiation was sent. This host waits for what follows, before
    /// it initiates a handshake of its own.
    pub(crate) fn responded(&mut self, now_ns: u64, random: u64) {
        self.handshake_sent_ns = now_ns;
        self.handshake_received_ns = now_ns;
        self.postpone(now_ns, random);
    }

    fn postpone(&mut self, now_ns: u64, random: u64) {
        self.jitter_ns = random % self.intervals.jitter_max_ns.max(1);
        let next_ns = now_ns + self.intervals.rekey_timeout_ns + self.jitter_ns;
        if let Some(attempt) = &mut self.attempt {
            attempt.next_ns = next_ns;
        }
    }

    /// A session is in force that may be sent in: as the initiator upon a response, as the
    /// responder upon the first message in it.
    pub(crate) fn completed(&mut self, now_ns: u64) {
        self.attempt = None;
        self.unanswered = None;
        self.handshake_received_ns = now_ns;
    }

    /// Whether this host wants a session: a handshake is due or under way, or there are
    /// keepalives to send in one.
    pub(crate) fn wants_session(&self) -> bool {
        self.attempt.is_some() || self.persistent_ns.is_some()
    }

    /// Forgets handshakes under way.
    pub(crate) fn cancel(&mut self) {
        self.attempt = None;
        self.unanswered = None;
        self.handshake_sent_ns = 0;
    }

    /// What is due now. `usable`: the current session, if it may still be sent in.
    pub(crate) fn poll(&mut self, now_ns: u64, seen: Activity, usable: Option<Usable>) -> Due {
        let sent_ns = seen.sent_ns.max(self.handshake_sent_ns);
        let received_ns = seen.received_ns.max(self.handshake_received_ns);
        let is_owed = self.poll_keepalive(now_ns, sent_ns, seen.data_received_ns);
        let is_persistent = self.poll_persistent(now_ns, sent_ns.max(received_ns));
        let is_lost = self.poll_unanswered(now_ns, seen.data_sent_ns, received_ns);
        let is_old = usable.is_some_and(|session| self.poll_age(session, seen));
        let is_silent = is_owed || is_persistent;
        if is_lost || is_old || (is_silent && usable.is_none()) {
            self.want(now_ns);
        }
        let mut due = Due {
            keepalive: is_silent && usable.is_some(),
            ..Due::default()
        };
        if let Some(attempt) = self.attempt.filter(|attempt| attempt.next_ns <= now_ns) {
            if now_ns.saturating_sub(attempt.wanted_ns) < self.intervals.rekey_attempt_ns {
                due.initiation = true;
            } else {
                self.attempt = None;
                due.is_over = true;
            }
        }
        due
    }

    /// When something will be due if nothing happens until then. What happens in sessions
    /// is only seen by a poll.
    pub(crate) fn next_ns(&self) -> Option<u64> {
        let keepalive_ns = self.intervals.keepalive_timeout_ns;
        let all = [
            self.attempt.map(|attempt| attempt.next_ns),
            self.owed_since_ns.map(|since_ns| since_ns + keepalive_ns),
            self.unanswered.map(|unanswered| unanswered.deadline_ns),
            self.persistent_at_ns,
        ];
        all.into_iter().flatten().min()
    }

    /// The passive keepalive (section 6.5): data has come, and nothing was sent for
    /// `Keepalive-Timeout`. Keepalives are no data, so they are never answered by others.
    ///
    /// What was sent at the very time of the data's arrival is no answer: better one
    /// keepalive too many than a peer that takes the session for lost.
    fn poll_keepalive(&mut self, now_ns: u64, sent_ns: u64, data_received_ns: u64) -> bool {
        if data_received_ns == 0 || data_received_ns < sent_ns {
            self.owed_since_ns = None;
            return false;
        }
        let since_ns = match self.owed_since_ns {
            Some(since_ns) if since_ns >= sent_ns => since_ns,
            _ => data_received_ns,
        };
        let is_due = now_ns >= since_ns + self.intervals.keepalive_timeout_ns;
        self.owed_since_ns = (!is_due).then_some(since_ns);
        is_due
    }

    /// The persistent keepalive: nothing was sent or received for as long as `wg(8)` was told.
    /// When it is turned on, the first one is due at once.
    fn poll_persistent(&mut self, now_ns: u64, last_ns: u64) -> bool {
        let Some(persistent_ns) = self.persistent_ns else {
            self.persistent_at_ns = None;
            return false;
        };
        let at_ns = last_ns + persistent_ns;
        let is_due = at_ns <= now_ns || std::mem::take(&mut self.is_persistent_new);
        self.persistent_at_ns = Some(if is_due {
            now_ns + persistent_ns
        } else {
            at_ns
        });
        is_due
    }

    /// Whether the other end seems to have lost the session: data was sent, and nothing has
    /// come for longer than a passive keepalive takes (section 6.2).
    fn poll_unanswered(&mut self, now_ns: u64, data_sent_ns: u64, received_ns: u64) -> bool {
        self.unanswered = self
            .unanswered
            .filter(|unanswered| received_ns < unanswered.sent_ns);
        if data_sent_ns > received_ns.max(self.unanswered_until_ns) {
            let wait_ns = self.intervals.unanswered_ns() + self.jitter_ns;
            self.unanswered.get_or_insert(Unanswered {
                sent_ns: data_sent_ns,
                deadline_ns: data_sent_ns + wait_ns,
            });
        }
        let is_due = self
            .unanswered
            .is_some_and(|unanswered| unanswered.deadline_ns <= now_ns);
        if is_due {
            self.unanswered = None;
            self.unanswered_until_ns = data_sent_ns;
        }
        is_due
    }

    /// Whether a session is to be replaced on account of its age or use (section 6.2). A
    /// responder leaves that to the initiator, so that not both of them do it.
    fn poll_age(&mut self, session: Usable, seen: Activity) -> bool {
        let established_ns = session.established_ns;
        let rekey_ns = established_ns + self.intervals.rekey_after_ns;
        let is_old = session.is_initiator && seen.sent_ns >= rekey_ns;
        // What was sent before the last handshake message has had its handshake.
        let is_sending = seen.sent_ns > self.handshake_sent_ns;
        let late_ns = established_ns + self.intervals.late_rekey_ns();
        let is_late = session.is_initiator
            && seen.received_ns >= late_ns
            && self.late_rekey_of_ns != established_ns;
        if is_late {
            self.late_rekey_of_ns = established_ns;
        }
        is_late || (is_sending && (is_old || session.is_worn))
    }
}

#[cfg(test)]
#[path = "timers_tests.rs"]
mod tests;
