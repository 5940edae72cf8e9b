//! Trains that wait until the UDP socket has room for them.

use std::collections::VecDeque;
use std::net::SocketAddr;

use crate::packet::train::Train;

/// Most trains that wait: what a batch leaves when the socket's buffer fills.
/// The buffer itself holds far more ([`crate::transport::socket`]), and while
/// trains wait here, packets wait in the TUN queue.
pub const HELD_TRAINS_MAX: usize = 8;

/// The trains, oldest first.
pub struct Held {
    trains: VecDeque<(Train, SocketAddr)>,
}

impl Held {
    pub fn new() -> Self {
        Self {
            trains: VecDeque::with_capacity(HELD_TRAINS_MAX),
        }
    }

    /// Takes a train, or gives it back if there are too many.
    pub fn push(&mut self, train: Train, to: SocketAddr) -> Result<(), Train> {
        if self.trains.len() == HELD_TRAINS_MAX {
            return Err(train);
        }
        self.trains.push_back((train, to));
        Ok(())
    }

    /// The oldest.
    pub fn pop(&mut self) -> Option<(Train, SocketAddr)> {
        self.trains.pop_front()
    }

    /// Puts back what [`Self::pop`] has returned last.
    pub fn put_back(&mut self, train: Train, to: SocketAddr) {
        self.trains.push_front((train, to));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TO: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9);

    #[derive(Clone, Debug)]
    enum Step {
        Push,
        Pop,
        PopAndPutBack,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![Just(Step::Push), Just(Step::Pop), Just(Step::PopAndPutBack)];
        prop::collection::vec(step, 0..100)
    }

    proptest! {
        /// Trains leave in the order in which they were taken, and no more are
        /// taken than may wait.
        #[test]
        fn keeps_order_and_bound(steps in steps()) {
            let mut held = Held::new();
            let mut expected: Vec<u16> = Vec::new();
            for (id, step) in (0..).zip(steps) {
                match step {
                    Step::Push => match held.push(Train::new(id), TO) {
                        Ok(()) => expected.push(id),
                        Err(back) => {
                            prop_assert_eq!(back.id(), id);
                            prop_assert_eq!(expected.len(), HELD_TRAINS_MAX);
                        }
                    },
                    Step::Pop => {
                        let oldest = (!expected.is_empty()).then(|| expected.remove(0));
                        prop_assert_eq!(held.pop().map(|(train, _)| train.id()), oldest);
                    }
                    Step::PopAndPutBack => {
                        if let Some((train, to)) = held.pop() {
                            held.put_back(train, to);
                        }
                    }
                }
                prop_assert!(expected.len() <= HELD_TRAINS_MAX);
            }
            let rest = std::iter::from_fn(|| held.pop()).map(|(train, _)| train.id());
            prop_assert_eq!(rest.collect::<Vec<_>>(), expected);
        }
    }
}
