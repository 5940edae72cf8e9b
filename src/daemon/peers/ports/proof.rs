//! Whether a worker's own port reaches a peer: asked for by requests, each with
//! a nonce that only those can return who have seen it.

use std::time::{Duration, Instant};

/// How long an answer is good for, while packets flow.
const RENEWAL: Duration = Duration::from_secs(10);

/// Pause before the second request, in both states.
const RETRY: Duration = Duration::from_secs(1);

/// Longest pause between requests that are never answered: there may be a plain
/// peer, which minds them little but should not be bothered.
const RETRY_MAX: Duration = Duration::from_secs(300);

/// Shortest pause between requests, whatever happens.
const PAUSE_MIN: Duration = Duration::from_millis(100);

/// Requests in a row without an answer after which a port counts as blocked.
/// Some are lost wherever the far end is overloaded, and there it would not help
/// to send everything from one port.
const UNANSWERED_MAX: u32 = 5;

/// What is known of one worker's own port toward one peer.
#[derive(Clone, Debug, Default)]
pub struct Proof {
    asked_at: Option<Instant>,
    /// Of the requests that have no answer yet.
    nonce: Option<u64>,
    /// Requests since the last answer.
    unanswered: u32,
}

impl Proof {
    /// Whether to ask now. `is_proven`: an earlier request was answered; `used`: when
    /// something came from the peer, or was sent to it from a port that is proven.
    pub fn is_due(&self, now: Instant, is_proven: bool, used: Option<Instant>) -> bool {
        let Some(asked_at) = self.asked_at else {
            return true;
        };
        let is_in_doubt = is_proven && self.unanswered > 0;
        let is_used = used.is_some_and(|used| used > asked_at);
        let pause = match (is_proven, self.unanswered) {
            (true, 0) => RENEWAL,
            (true, _) => RETRY,
            (false, 0) => PAUSE_MIN,
            (false, count) => (RETRY * (1 << (count - 1).min(16))).min(RETRY_MAX),
        };
        (is_in_doubt || is_used) && now >= asked_at + pause
    }

    /// Notes a request; returns its nonce, which is `fresh` unless an earlier one
    /// may still be answered.
    pub fn ask(&mut self, now: Instant, fresh: u64) -> u64 {
        self.asked_at = Some(now);
        self.unanswered = self.unanswered.saturating_add(1);
        *self.nonce.get_or_insert(fresh)
    }

    /// Whether a reply with this nonce answers a request, which is then over.
    pub fn is_answer(&mut self, nonce: u64) -> bool {
        let is_answer = self.nonce == Some(nonce);
        if is_answer {
            self.nonce = None;
            self.unanswered = 0;
        }
        is_answer
    }

    /// Whether a port that was proven does not reach the peer any more. Asking begins
    /// anew then.
    pub fn is_lost(&mut self) -> bool {
        let is_lost = self.unanswered >= UNANSWERED_MAX;
        if is_lost {
            self.unanswered = 1;
        }
        is_lost
    }

    /// The peer can answer: it has asked something itself.
    pub fn hurry(&mut self) {
        self.unanswered = 0;
    }

    /// There is little use in asking again.
    pub fn give_up(&mut self) {
        self.unanswered = u32::MAX;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks at each second of `seconds` at which it is due, while packets come from the
    /// peer all the time; returns these seconds.
    fn asked(proof: &mut Proof, start: Instant, seconds: u64, is_proven: bool) -> Vec<u64> {
        let due = |second: &u64| {
            let now = start + Duration::from_secs(*second);
            let is_due = proof.is_due(now, is_proven, Some(now));
            if is_due {
                proof.ask(now, *second);
            }
            is_due
        };
        (0..seconds).filter(due).collect()
    }

    #[test]
    fn a_peer_that_never_answers_is_asked_ever_more_rarely() {
        let mut proof = Proof::default();
        let hour = asked(&mut proof, Instant::now(), 3600, false);
        assert_eq!(hour[..6], [0, 1, 3, 7, 15, 31]);
        assert!(hour.len() < 25, "{hour:?}");
    }

    #[test]
    fn a_silent_peer_is_asked_once() {
        let (mut proof, now) = (Proof::default(), Instant::now());
        assert!(proof.is_due(now, false, None));
        proof.ask(now, 1);
        let later = now + RETRY_MAX;
        assert!(!proof.is_due(later, false, None));
        assert!(!proof.is_due(later, false, Some(now)));
        assert!(proof.is_due(later, false, Some(later)));
    }

    #[test]
    fn only_the_nonce_of_the_last_request_is_an_answer_and_only_once() {
        let (mut proof, now) = (Proof::default(), Instant::now());
        assert!(!proof.is_answer(0));
        assert_eq!(proof.ask(now, 7), 7);
        // The first one may be on its way still.
        assert_eq!(proof.ask(now, 8), 7);
        for wrong in [0, 6, 8, u64::MAX] {
            assert!(!proof.is_answer(wrong));
        }
        assert!(proof.is_answer(7));
        assert!(!proof.is_answer(7));
        assert_eq!(proof.ask(now, 9), 9);
        assert!(!proof.is_answer(7));
    }

    #[test]
    fn a_proof_is_renewed_while_packets_flow_and_lost_after_some_silence() {
        let (mut proof, now) = (Proof::default(), Instant::now());
        let nonce = proof.ask(now, 1);
        assert!(proof.is_answer(nonce));
        assert!(!proof.is_due(now + RENEWAL, true, Some(now)));
        let mut seconds = asked(&mut proof, now, 100, true);
        assert_eq!(seconds[..3], [10, 11, 12]);
        assert!(proof.is_lost());
        seconds = asked(&mut proof, now + Duration::from_secs(100), 10, false);
        assert_eq!(seconds, [0, 2, 6]);
        proof.hurry();
        let now = now + Duration::from_secs(106) + PAUSE_MIN;
        assert!(proof.is_due(now, false, Some(now)));
    }
}
