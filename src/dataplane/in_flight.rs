//! How many bytes a socket may hold: as few as keep the link busy. What waits in a
//! socket waits in the order in which it came, and delays whatever comes next; what
//! waits before it takes turns ([`crate::packet::fq_codel`]).
//!
//! That is two batches: one that is on the link, and one that follows while the worker
//! makes the next one. A batch is what the link takes in less than half a millisecond.
//! The kernel's byte queue limits and TCP small queues are built alike. The rate is known
//! from the times in which the socket was full and nothing was sent: what has gone out of
//! it meanwhile, by the kernel's count, over how long that took. A socket that has run
//! empty before the worker came back gets a longer limit.
//!
//! Workers that share a link have as much in their sockets together. A worker that finds, as
//! a rule, that others hold something while it makes its next batch has one batch in its
//! socket instead of two, and a longer one: the others keep the link busy meanwhile, and a GB
//! takes fewer batches. When all sockets are found empty, or the worker's rate falls by a
//! quarter, as it does if it comes late or the others' link is another one, it has two again.
//!
//! What does not drain at all is not a link that is slow, but datagrams to a neighbour
//! whose link-layer address the kernel is still asking for. They are held by the
//! kernel for seconds, and must not stop what goes elsewhere: after a while they do
//! not count any more.

/// The limit before anything is known: a tenth of a millisecond at 10 Gbit/s. A link
/// that never holds so much is never measured.
const LIMIT_BYTES_START: usize = 128 << 10;

/// Longest batch, as the kernel takes it.
const BATCH_BYTES_MAX: usize = 64 << 10;

/// Batches are no shorter than this for the sake of the time they take on the link
/// ([`BATCH_TIME_MAX_NS`] aside): eight packets of an Ethernet's MTU.
const BATCH_BYTES_MIN: usize = 8 * 1472;

/// Time that a batch takes on the link.
const BATCH_TIME_NS: u64 = 400_000;
/// … and at the most.
const BATCH_TIME_MAX_NS: u64 = 1_000_000;

/// The same, by a worker's share of the rate, for workers that share a link: more packets to a
/// batch, but less than twice as many where few packets take long already.
const SHARED_TIME_NS: u64 = 800_000;
const SHARED_TIME_MAX_NS: u64 = 1_500_000;

/// Added to a batch, this is the limit: there is room for another batch as long as no
/// more than one is left. A packet, and what the kernel counts for its descriptor. With less
/// than this in it the kernel says that a socket has room, however short its buffer is
/// (`SOCK_MIN_SNDBUF`, `net/sock.h`, halved).
const LIMIT_BYTES_EXTRA: usize = 2304;

/// Most that a limit is multiplied by while the socket runs empty.
const STRETCH_MAX: usize = 16;

/// Time over which the rate is measured.
const WINDOW_NS: u64 = 4_000_000;

/// For how long a full socket may drain nothing before what it holds counts as stuck:
/// so many times what it should take to drain it all, and so long at the least; so
/// long while no rate is known.
const PATIENCE_LIMITS: u64 = 4;
const PATIENCE_NS_MIN: u64 = 25_000_000;
const PATIENCE_NS_START: u64 = 250_000_000;

/// For how long bytes count as stuck before it is found out again whether they are.
const STUCK_NS: u64 = 200_000_000;

/// Most bytes that may count as stuck: what the kernel keeps for some forty neighbours
/// (`unres_qlen_bytes`, arp(7)).
const STUCK_BYTES_MAX: usize = 8 << 20;

/// What the kernel counts for a datagram beside its bytes, at the most, once it has cut up a
/// batch (`truesize` of a `struct sk_buff`, `linux/skbuff.h`).
const DATAGRAM_OVERHEAD_BYTES: usize = 832;

/// The state of one socket. Times are in nanoseconds since the same start; bytes are
/// the kernel's count (`SIOCOUTQ`), which is a little more than what was sent.
#[derive(Debug)]
pub struct InFlight {
    is_auto: bool,
    limit_bytes: usize,
    /// More than that the kernel does not let it hold.
    limit_bytes_max: usize,
    batch_bytes: usize,
    /// What the socket holds and does not drain; beside the limit.
    stuck_bytes: usize,
    /// When half of them are to count again.
    stuck_until_ns: u64,
    patience_ns: u64,
    /// At least what the socket holds.
    held_bytes_max: usize,
    /// When the socket was found full, and what it held.
    full: Option<(u64, usize)>,
    /// Drained since the window began, and in how much time.
    drained_bytes: u64,
    drained_ns: u64,
    has_run_empty: bool,
    stretch: usize,
    /// How often it was asked since the window began whether other workers hold anything, and
    /// how often they did.
    asked: u32,
    others_held: u32,
    /// While the link counts as shared: the highest rate since, in bytes per millisecond.
    shared_rate: Option<usize>,
}

impl InFlight {
    /// The socket holds nothing. `limit_bytes`: the limit, unless it is to follow the rate.
    pub fn new(limit_bytes: Option<usize>) -> Self {
        let is_auto = limit_bytes.is_none();
        let limit_bytes = limit_bytes.unwrap_or(LIMIT_BYTES_START);
        Self {
            is_auto,
            limit_bytes,
            limit_bytes_max: usize::MAX,
            batch_bytes: (limit_bytes / 2).clamp(1, BATCH_BYTES_MAX),
            stuck_bytes: 0,
            stuck_until_ns: 0,
            patience_ns: PATIENCE_NS_START,
            held_bytes_max: 0,
            full: None,
            drained_bytes: 0,
            drained_ns: 0,
            has_run_empty: false,
            stretch: 1,
            asked: 0,
            others_held: 0,
            shared_rate: None,
        }
    }

    /// Bytes that the socket may hold before it counts as full.
    #[inline]
    pub fn limit_bytes(&self) -> usize {
        let limit_bytes = self.limit_bytes.saturating_add(self.stuck_bytes);
        limit_bytes.min(self.limit_bytes_max)
    }

    /// The kernel does not let the socket hold more than this.
    pub fn cap(&mut self, bytes: usize) {
        self.limit_bytes_max = bytes;
    }

    /// Longest batch that may be sent, unless it is a single packet.
    #[inline]
    pub fn batch_bytes(&self) -> usize {
        self.batch_bytes
    }

    /// Whether there is room for sure. If not, [`Self::refresh`] tells.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.held_bytes_max < self.limit_bytes()
    }

    /// The kernel has counted what the socket holds. Whether there is room.
    pub fn refresh(&mut self, held_bytes: usize) -> bool {
        self.held_bytes_max = held_bytes;
        self.stuck_bytes = self.stuck_bytes.min(held_bytes);
        self.has_room()
    }

    /// A batch of so many bytes and datagrams is sent.
    #[inline]
    pub fn sent(&mut self, batch_bytes: usize, datagrams: usize) {
        self.held_bytes_max += batch_bytes + datagrams * DATAGRAM_OVERHEAD_BYTES;
        // What drains from now on cannot be told from what comes.
        self.full = None;
    }

    /// There is no room, and nothing is sent until there is.
    pub fn found_full(&mut self, now_ns: u64) {
        self.full.get_or_insert((now_ns, self.held_bytes_max));
    }

    /// The socket was full, and holds so much now. `others_hold`: the sockets of other workers
    /// hold something. Whether the limit or the length of batches has changed.
    pub fn drained(&mut self, held_bytes: usize, others_hold: bool, now_ns: u64) -> bool {
        let Some((since_ns, before_bytes)) = self.full.take() else {
            return false;
        };
        self.refresh(held_bytes);
        let (bytes, ns) = (
            before_bytes.saturating_sub(held_bytes),
            now_ns.saturating_sub(since_ns),
        );
        if bytes == 0 {
            let is_stuck = ns >= self.patience_ns && held_bytes <= STUCK_BYTES_MAX;
            match is_stuck {
                true => {
                    self.stuck_bytes = held_bytes;
                    self.stuck_until_ns = now_ns + STUCK_NS;
                }
                false => self.full = Some((since_ns, before_bytes)),
            }
            return is_stuck;
        }
        if self.stuck_bytes > 0 && now_ns >= self.stuck_until_ns {
            self.stuck_bytes /= 2;
            self.stuck_until_ns = now_ns + STUCK_NS;
        }
        self.drained_bytes += bytes as u64;
        self.drained_ns += ns;
        self.has_run_empty |= held_bytes == 0 && !(self.shared_rate.is_some() && others_hold);
        self.asked += 1;
        self.others_held += u32::from(others_hold);
        self.is_auto && self.drained_ns >= WINDOW_NS && self.adapt()
    }

    /// Ends a window. Whether limit or batches have changed by more than a quarter.
    fn adapt(&mut self) -> bool {
        let (bytes, ns) = (self.drained_bytes, self.drained_ns);
        let bytes_in =
            |time_ns: u64| (u128::from(bytes) * u128::from(time_ns) / u128::from(ns)) as usize;
        self.stretch = match self.has_run_empty {
            // Two batches may do.
            true if self.shared_rate.is_some() => 1,
            true => (self.stretch * 2).min(STRETCH_MAX),
            false => (self.stretch / 2).max(1),
        };
        let (rate, rate_before) = (bytes_in(1_000_000), self.shared_rate.unwrap_or(0));
        let is_shared = !self.has_run_empty
            && self.stretch == 1
            && self.others_held * 2 > self.asked
            && rate >= rate_before / 4 * 3
            // The kernel has to take batches as long as that.
            && bytes_in(SHARED_TIME_NS) <= BATCH_BYTES_MAX;
        self.shared_rate = is_shared.then_some(rate.max(rate_before));
        let (time_ns, time_max_ns) = match is_shared {
            true => (SHARED_TIME_NS, SHARED_TIME_MAX_NS),
            false => (BATCH_TIME_NS, BATCH_TIME_MAX_NS),
        };
        let batch_bytes = BATCH_BYTES_MIN
            .min(bytes_in(time_max_ns))
            .max(bytes_in(time_ns))
            .clamp(1, BATCH_BYTES_MAX);
        let limit_bytes = match is_shared {
            // Less than a batch, so that there is room when it is gone; and the socket, which
            // takes twice as much, has room for a probe meanwhile.
            true => (batch_bytes / 4 * 3).max(LIMIT_BYTES_EXTRA),
            false => batch_bytes * self.stretch + LIMIT_BYTES_EXTRA,
        };
        (self.drained_bytes, self.drained_ns, self.has_run_empty) = (0, 0, false);
        (self.asked, self.others_held) = (0, 0);
        let drain_ns = u128::from(ns) * (limit_bytes + batch_bytes) as u128 / u128::from(bytes);
        self.patience_ns = (PATIENCE_LIMITS * drain_ns as u64).max(PATIENCE_NS_MIN);
        let is_changed = |new: usize, old: usize| new.abs_diff(old) > old / 4;
        let has_changed =
            is_changed(limit_bytes, self.limit_bytes) || is_changed(batch_bytes, self.batch_bytes);
        if has_changed {
            (self.limit_bytes, self.batch_bytes) = (limit_bytes, batch_bytes);
        }
        has_changed
    }

    /// No limit any more: all that waits shall go.
    pub fn lift(&mut self) {
        self.is_auto = false;
        (self.limit_bytes, self.limit_bytes_max) = (usize::MAX, usize::MAX);
        self.batch_bytes = BATCH_BYTES_MAX;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// A link of so many bytes per millisecond, behind a socket that is always full
    /// and a worker that comes back after `late_ns` more.
    fn settle(in_flight: &mut InFlight, bytes_per_ms: u64, late_ns: u64) -> usize {
        let mut now_ns = 0;
        let mut held: usize = 0;
        for _ in 0..400 {
            in_flight.refresh(held);
            while in_flight.has_room() {
                in_flight.sent(in_flight.batch_bytes(), 1);
                held += in_flight.batch_bytes();
            }
            in_flight.refresh(held);
            in_flight.found_full(now_ns);
            let over = held.saturating_sub(in_flight.limit_bytes()) + 1;
            let ns = over as u64 * 1_000_000 / bytes_per_ms + late_ns;
            now_ns += ns;
            held = held.saturating_sub((ns * bytes_per_ms / 1_000_000) as usize);
            in_flight.drained(held, false, now_ns);
        }
        in_flight.limit_bytes()
    }

    #[test]
    fn the_limit_follows_the_rate_of_the_link() {
        let mut in_flight = InFlight::new(None);
        for (bytes_per_ms, least_us, most_us) in [
            // 100 Mbit/s, 1 Gbit/s, 10 Gbit/s, 10 Mbit/s.
            (12_500, 900, 1_300),
            (125_000, 350, 500),
            (1_250_000, 20, 120),
            (1_250, 2_000, 3_500),
        ] {
            let limit_bytes = settle(&mut in_flight, bytes_per_ms, 10_000);
            let us = limit_bytes as u64 * 1_000 / bytes_per_ms;
            assert!((least_us..most_us).contains(&us), "{bytes_per_ms}: {us} µs");
        }
    }

    /// A link of so many bytes per millisecond that two workers share, each of which comes back
    /// so long after its socket has room, and makes batches of `batch_bytes_max` at the most.
    /// The bytes of each that went in the last half, in percent of what the link could have
    /// taken; the most bytes that both sockets held then; and their batches, added up.
    fn share(
        bytes_per_ms: u64,
        late_ns: [u64; 2],
        batch_bytes_max: usize,
    ) -> ([u64; 2], usize, usize) {
        struct Worker {
            state: InFlight,
            held: usize,
            /// When it comes back; it is away until then.
            back_ns: Option<u64>,
        }
        const STEP_NS: u64 = 10_000;
        let worker = |_| Worker {
            state: InFlight::new(None),
            held: 0,
            back_ns: None,
        };
        let mut workers: Vec<_> = (0..2).map(worker).collect();
        // Batches on the link: whose, how much of it is left, and how long it was.
        let mut link: VecDeque<(usize, usize, usize)> = VecDeque::new();
        let (steps, mut sent, mut held_most) = (400_000, [0; 2], 0);
        for step in 0..steps {
            let now_ns = step * STEP_NS;
            for index in 0..2 {
                let others_hold = workers[1 - index].held > 0;
                let worker = &mut workers[index];
                if worker.back_ns.is_none() && worker.held < worker.state.limit_bytes() {
                    worker.back_ns = Some(now_ns + late_ns[index]);
                }
                if worker.back_ns.is_none_or(|back_ns| now_ns < back_ns) {
                    continue;
                }
                worker.back_ns = None;
                worker.state.drained(worker.held, others_hold, now_ns);
                worker.state.refresh(worker.held);
                while worker.state.has_room() {
                    let batch_bytes = worker.state.batch_bytes().min(batch_bytes_max);
                    link.push_back((index, batch_bytes, batch_bytes));
                    worker.held += batch_bytes;
                    worker.state.refresh(worker.held);
                }
                worker.state.found_full(now_ns);
            }
            if step >= steps / 2 {
                held_most = held_most.max(workers.iter().map(|worker| worker.held).sum());
            }
            let mut room = (bytes_per_ms * STEP_NS / 1_000_000) as usize;
            while let Some((index, left, batch_bytes)) = link.front_mut().filter(|_| room > 0) {
                let bytes = room.min(*left);
                (*left, room) = (*left - bytes, room - bytes);
                if step >= steps / 2 {
                    sent[*index] += bytes as u64;
                }
                if *left == 0 {
                    // The kernel counts all of a batch until all of it is gone.
                    workers[*index].held -= *batch_bytes;
                    link.pop_front();
                }
            }
        }
        let most = bytes_per_ms * STEP_NS * (steps / 2) / 1_000_000;
        let batches_bytes = workers
            .iter()
            .map(|worker| worker.state.batch_bytes())
            .sum();
        (
            sent.map(|bytes| bytes * 100 / most),
            held_most,
            batches_bytes,
        )
    }

    #[test]
    fn workers_that_share_a_link_have_longer_batches_and_no_more_in_their_sockets() {
        // 1 Gbit/s, 100 Mbit/s.
        for (bytes_per_ms, late_ns) in [(125_000, 50_000), (12_500, 50_000)] {
            let alone = settle(&mut InFlight::new(None), bytes_per_ms, late_ns);
            let (percent, held_bytes, batches_bytes) =
                share(bytes_per_ms, [late_ns; 2], usize::MAX);
            let all: u64 = percent.iter().sum();
            assert!(all >= 97, "{percent:?} % of {bytes_per_ms} bytes/ms");
            // One alone has two batches in its socket; each of them has a longer one.
            assert!(
                held_bytes < 2 * alone * 5 / 4,
                "{held_bytes}, alone {alone}"
            );
            let halves = alone - LIMIT_BYTES_EXTRA;
            assert!(batches_bytes > halves * 5 / 4, "{batches_bytes}");
        }
    }

    #[test]
    fn workers_that_share_a_link_and_come_late_keep_it_busy() {
        let (percent, ..) = share(125_000, [2_000_000; 2], usize::MAX);
        assert!(percent.iter().sum::<u64>() >= 90, "{percent:?} %");
    }

    #[test]
    fn who_comes_late_to_a_link_that_is_shared_keeps_a_part_of_it() {
        for late_ns in [500_000, 1_000_000, 3_000_000] {
            let (percent, ..) = share(125_000, [late_ns, 50_000], usize::MAX);
            assert!(percent[0] >= 15, "{percent:?} % after {late_ns} ns");
            assert!(percent.iter().sum::<u64>() >= 90, "{percent:?} %");
        }
    }

    #[test]
    fn short_batches_keep_a_link_that_is_shared_busy() {
        let (percent, ..) = share(125_000, [100_000; 2], 1500);
        assert!(percent.iter().sum::<u64>() >= 95, "{percent:?} %");
    }

    #[test]
    fn a_worker_that_comes_late_gets_more() {
        let on_time = settle(&mut InFlight::new(None), 125_000, 10_000);
        let late = settle(&mut InFlight::new(None), 125_000, 1_000_000);
        assert!(late > on_time * 3 / 2, "{late} after {on_time}");
        assert!(late <= on_time * STRETCH_MAX + LIMIT_BYTES_EXTRA);
    }

    #[test]
    fn what_never_drains_stops_nothing_else() {
        let mut in_flight = InFlight::new(None);
        let limit_bytes = settle(&mut in_flight, 12_500, 10_000);
        assert!(!in_flight.refresh(40_000));
        in_flight.found_full(0);
        for ms in 1..25 {
            assert!(!in_flight.drained(40_000, false, ms * 1_000_000));
            assert!(!in_flight.has_room());
            in_flight.found_full(ms * 1_000_000);
        }
        assert!(in_flight.drained(40_000, false, 25_000_000));
        assert!(in_flight.has_room());
        assert_eq!(in_flight.limit_bytes(), 40_000 + limit_bytes);
        // Some of it has gone after all, and then the rest.
        in_flight.refresh(30_000);
        assert_eq!(in_flight.limit_bytes(), 30_000 + limit_bytes);
        in_flight.refresh(0);
        assert_eq!(in_flight.limit_bytes(), limit_bytes);
    }

    #[test]
    fn the_limit_is_no_longer_than_the_kernel_lets_it_be() {
        let mut in_flight = InFlight::new(None);
        in_flight.cap(20_000);
        settle(&mut in_flight, 125_000, 10_000);
        assert_eq!(in_flight.limit_bytes(), 20_000);
        assert!(!in_flight.refresh(20_000));
    }

    #[test]
    fn a_limit_that_is_given_stays() {
        let mut in_flight = InFlight::new(Some(10_000));
        assert_eq!(settle(&mut in_flight, 125_000, 0), 10_000);
        assert_eq!(in_flight.batch_bytes(), 5_000);
        in_flight.refresh(1 << 20);
        assert!(!in_flight.has_room());
        in_flight.lift();
        assert!(in_flight.has_room());
    }
}
