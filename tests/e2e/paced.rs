//! Numbered datagrams at a pace at which nothing on the way is ever short of
//! room: each must arrive, once, at one of those who wait for it.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use fastvpn::error::{Error, Result};

use crate::support::{check, enlarge_receive_buffer, fail, tried, wait_until};

/// Time between two datagrams.
const PACE: Duration = Duration::from_millis(1);

/// Bytes of each.
const BYTES: usize = 200;

/// A sender and its receivers, at work until they are told to end.
pub struct Paced {
    go_on: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    sender: JoinHandle<io::Result<u64>>,
    receivers: Vec<JoinHandle<Vec<u64>>>,
}

/// What came of it.
#[derive(Debug)]
pub struct Report {
    /// Datagrams that were sent.
    pub sent: u64,
    /// How many each receiver got.
    pub received: Vec<u64>,
    /// Numbers of those that nobody got.
    pub lost: Vec<u64>,
    /// How many came more than once, or to more than one.
    pub repeated: u64,
}

impl Paced {
    /// Sends from `sender` to `to`, where each of `receivers` may be meant.
    pub fn start(sender: UdpSocket, to: SocketAddr, receivers: Vec<UdpSocket>) -> Result<Self> {
        let go_on = Arc::new(AtomicBool::new(true));
        let sent = Arc::new(AtomicU64::new(0));
        let mut threads = Vec::new();
        for receiver in receivers {
            enlarge_receive_buffer(&receiver, 4 << 20);
            let timeout = Some(Duration::from_millis(300));
            tried("set a timeout", receiver.set_read_timeout(timeout))?;
            let going_on = Arc::clone(&go_on);
            threads.push(std::thread::spawn(move || receive(&receiver, &going_on)));
        }
        let (going_on, counting) = (Arc::clone(&go_on), Arc::clone(&sent));
        let sender = std::thread::spawn(move || {
            let mut datagram = [7; BYTES];
            let mut number = 0_u64;
            while going_on.load(Ordering::Relaxed) {
                datagram[..8].copy_from_slice(&number.to_le_bytes());
                // Refusals that ICMP brings are for earlier ones.
                if sender.send_to(&datagram, to).is_err() {
                    sender.send_to(&datagram, to)?;
                }
                number += 1;
                counting.store(number, Ordering::Relaxed);
                std::thread::sleep(PACE);
            }
            Ok(number)
        });
        Ok(Self {
            go_on,
            sent,
            sender,
            receivers: threads,
        })
    }

    /// Waits until so many more have been sent.
    pub fn wait_for(&self, more: u64) -> Result<()> {
        let target = self.sent.load(Ordering::Relaxed) + more;
        wait_until("datagrams are sent", || {
            check(!self.sender.is_finished(), || "the sender failed".into())?;
            Ok(self.sent.load(Ordering::Relaxed) >= target)
        })
    }

    /// Ends it.
    pub fn finish(self) -> Result<Report> {
        self.go_on.store(false, Ordering::Relaxed);
        let sent = match self.sender.join() {
            Ok(sent) => tried("send", sent)?,
            Err(_) => return fail("the sender panicked"),
        };
        let mut seen = vec![0_u64; sent as usize];
        let mut received = Vec::new();
        for receiver in self.receivers {
            let numbers = receiver
                .join()
                .map_err(|_| Error::new("a receiver panicked"))?;
            received.push(numbers.len() as u64);
            for number in numbers {
                match seen.get_mut(number as usize) {
                    Some(count) => *count += 1,
                    None => return fail(format!("number {number} was never sent")),
                }
            }
        }
        let numbers = || seen.iter().zip(0_u64..);
        Ok(Report {
            sent,
            received,
            lost: numbers()
                .filter(|(count, _)| **count == 0)
                .map(|(_, number)| number)
                .collect(),
            repeated: numbers().map(|(count, _)| count.saturating_sub(1)).sum(),
        })
    }
}

impl Report {
    /// Nothing was lost and nothing came twice.
    pub fn is_whole(&self) -> Result<()> {
        check(self.lost.is_empty() && self.repeated == 0, || {
            let first: Vec<_> = self.lost.iter().take(20).collect();
            format!(
                "of {} datagrams {} lost (the first {first:?}), {} repeated; received {:?}",
                self.sent,
                self.lost.len(),
                self.repeated,
                self.received
            )
        })
    }
}

/// Takes in numbers until nothing comes any more.
fn receive(socket: &UdpSocket, go_on: &AtomicBool) -> Vec<u64> {
    let mut numbers = Vec::new();
    let mut datagram = [0; BYTES + 1];
    loop {
        match socket.recv(&mut datagram) {
            Ok(BYTES) => {
                if let Some(number) = datagram.first_chunk() {
                    numbers.push(u64::from_le_bytes(*number));
                }
            }
            Ok(_) => {}
            Err(_) if go_on.load(Ordering::Relaxed) => {}
            Err(_) => return numbers,
        }
    }
}
