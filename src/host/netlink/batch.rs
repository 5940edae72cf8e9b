//! Many requests in one system call.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST};
use netlink_packet_route::RouteNetlinkMessage;

use super::{Event, Netlink, RawHeader, Refusal, append_request, read_message, split_message};

/// Requests per datagram. Each may be refused, and all refusals wait in the
/// socket's receive buffer until the kernel has been through the datagram: 100
/// take up about half of the usual 208 KiB (`net.core.rmem_default`).
const REQUESTS_PER_SEND_MAX: usize = 100;

/// Where the flags stand in `struct nlmsghdr`.
const FLAGS_AT: usize = 6;

impl Netlink {
    /// Sends many requests that change something and waits until all are done.
    /// A refusal does not stop the others; `refused` gets the request's place
    /// and the kernel's reason.
    ///
    /// The kernel acknowledges the last request of each datagram only: of the
    /// others silence means success (`netlink_rcv_skb()` in
    /// net/netlink/af_netlink.c).
    pub(super) fn execute_batch(
        &mut self,
        requests: impl Iterator<Item = (RouteNetlinkMessage, u16)>,
        refused: &mut dyn FnMut(usize, Refusal),
    ) -> io::Result<()> {
        let mut requests = requests.peekable();
        let mut done = 0;
        let mut bytes = Vec::new();
        while requests.peek().is_some() {
            bytes.clear();
            let first = self.sequence.wrapping_add(1);
            let mut count = 0;
            let mut last_at = 0;
            for (message, flags) in requests.by_ref().take(REQUESTS_PER_SEND_MAX) {
                self.sequence = self.sequence.wrapping_add(1);
                last_at = bytes.len();
                append_request(&mut bytes, message, NLM_F_REQUEST | flags, self.sequence);
                count += 1;
            }
            let flags = RawHeader::read(&bytes[last_at..]).flags | NLM_F_ACK;
            bytes[last_at + FLAGS_AT..last_at + FLAGS_AT + 2].copy_from_slice(&flags.to_ne_bytes());
            self.send_bytes(&bytes)?;
            self.read_answers(first, count, &mut |index, refusal| {
                refused(done + index, refusal);
            })?;
            done += count;
        }
        Ok(())
    }

    /// Reads answers to the `count` requests from sequence number `first` on,
    /// up to that to the last.
    fn read_answers(
        &mut self,
        first: u32,
        count: usize,
        refused: &mut dyn FnMut(usize, Refusal),
    ) -> io::Result<()> {
        loop {
            let length = self.receive()?;
            let mut rest = &self.buffer[..length];
            while let Some((one, tail)) = split_message(rest) {
                rest = tail;
                let sequence = RawHeader::read(one).sequence;
                let index = sequence.wrapping_sub(first) as usize;
                if index >= count {
                    continue;
                }
                match read_message(one, sequence) {
                    Err(refusal) => refused(index, refusal),
                    Ok(Event::End { .. }) => {}
                    Ok(_) => continue,
                }
                if index + 1 == count {
                    self.is_unread = false;
                    return Ok(());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::netlink::{DeviceRoute, RouteChange};
    use crate::testbed::Namespace;

    #[test]
    fn answers_that_were_given_up_do_not_hold_up_later_ones() {
        let namespace = Namespace::new().unwrap();
        let mut netlink = namespace.netlink().unwrap();
        let ours = DeviceRoute {
            oif: netlink.link_index("lo").unwrap().unwrap(),
            protocol: 99,
        };
        netlink.set_up(ours.oif).unwrap();
        netlink.shrink();
        let there = RouteChange::Add("10.1.0.0/16".parse().unwrap());
        let mut change = |changes: &[RouteChange]| netlink.change_device_routes(ours, changes);
        assert!(change(&[there]).unwrap().is_empty());
        for third in 0..3 {
            // More refusals than there is room for.
            let error = change(&[there; REQUESTS_PER_SEND_MAX]).unwrap_err();
            assert_eq!(error.errno(), Some(libc::ENOBUFS), "{error}");
            let other = RouteChange::Add(format!("10.2.{third}.0/24").parse().unwrap());
            assert!(change(&[other]).unwrap().is_empty());
        }
    }
}
