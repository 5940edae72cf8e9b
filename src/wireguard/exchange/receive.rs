//! What becomes of a message.
//!
//! # Cost of a stranger's message
//!
//! The length, then one MAC over the message: that is all before it is known that the sender
//! has this host's public key. An initiation then costs Diffie-Hellman operations, so under
//! load ([`Load`]) its sender must have proven its address by a cookie, and may send so many
//! initiations only ([`Limiter`]). A response is looked at only if it names a handshake under
//! way by its index, which is random: that proves as much as a cookie does.
//!
//! [`Load`]: crate::wireguard::limiter::Load
//! [`Limiter`]: crate::wireguard::limiter::Limiter

use std::sync::Arc;

use super::{Exchange, State, random};
use crate::counters::Counter;
use crate::wire::Endpoint;
use crate::wire::wireguard::handshake::Incoming;
use crate::wire::wireguard::message::{CookieReply, Initiation, Message, Response};
use crate::wire::wireguard::session::Session;
use crate::wireguard::counters::HandshakeCounters;
use crate::wireguard::outside::{Now, Outside};
use crate::wireguard::peers::Peer;

/// How far apart initiations of one peer must be: the kernel takes fifty a second.
const INITIATION_INTERVAL_NS: u64 = 20_000_000;

/// What became of a message: the counter of what was done, or of what was dropped.
type Outcome<'a> = Result<&'a Counter, &'a Counter>;

impl Exchange {
    /// A datagram has come to the handshake socket, or a worker has passed it on.
    pub(crate) fn receive(
        &mut self,
        now: Now,
        from: Endpoint,
        datagram: &mut [u8],
        out: &mut impl Outside,
    ) {
        let counters = Arc::clone(&self.state.counters);
        let outcome = match Message::parse(datagram) {
            Some(Message::Initiation(message)) => {
                self.receive_initiation(now, from, message, &counters, out)
            }
            Some(Message::Response(message)) => {
                self.receive_response(now, from, message, &counters, out)
            }
            Some(Message::CookieReply(message)) => {
                self.receive_cookie_reply(now, message, &counters)
            }
            Some(Message::Data(_)) => {
                out.pass_on(from, datagram);
                Ok(&counters.data_passed_on)
            }
            None => Err(&counters.drop_malformed),
        };
        let (Ok(counter) | Err(counter)) = outcome;
        counter.add(1);
    }

    fn receive_initiation<'a>(
        &mut self,
        now: Now,
        from: Endpoint,
        message: Initiation<'_>,
        counters: &'a HandshakeCounters,
        out: &mut impl Outside,
    ) -> Outcome<'a> {
        let state = &mut self.state;
        let identity = state.identity.as_mut().ok_or(&counters.drop_no_key)?;
        if !identity.checker.has_mac1(message) {
            self.mismatches
                .note_other_key(&mut self.peers, from.address, now.ns);
            return Err(&counters.drop_mac1);
        }
        state.load.note(now.ns);
        if state.load.is_high(now.ns) {
            if !identity.checker.has_mac2(message, from.address, now.ns) {
                out.send(from, &identity.checker.reply(message, from.address, now.ns));
                return Ok(&counters.cookie_replies_sent);
            }
            if !state.limiter.admits(from.address, now.ns) {
                return Err(&counters.drop_rate_limited);
            }
        }
        let incoming = Incoming::read(&identity.key, message).map_err(|_| &counters.drop_forged)?;
        let key = incoming.public_key();
        let is_own = key == identity.key.public();
        if self.peers.get_mut(&key).is_none() {
            self.mismatches
                .note_stranger(&mut self.peers, from.address, now.ns);
        }
        let peer = self.peers.get_mut(&key).filter(|_| !is_own);
        let peer = peer.ok_or(&counters.drop_unknown_peer)?;
        if let Some((timestamp, at_ns)) = peer.initiation_received {
            if incoming.timestamp() <= timestamp {
                return Err(&counters.drop_replayed);
            }
            if now.ns < at_ns + INITIATION_INTERVAL_NS {
                return Err(&counters.drop_too_soon);
            }
        }
        peer.initiation_received = Some((incoming.timestamp(), now.ns));
        state.respond(peer, now, from, incoming, counters, out)
    }

    fn receive_response<'a>(
        &mut self,
        now: Now,
        from: Endpoint,
        message: Response<'_>,
        counters: &'a HandshakeCounters,
        out: &mut impl Outside,
    ) -> Outcome<'a> {
        let state = &mut self.state;
        let index = message.receiver_index();
        let in_flight = state.in_flight.get_mut(&index);
        let in_flight = in_flight.ok_or(&counters.drop_unknown_index)?;
        let identity = state.identity.as_ref().ok_or(&counters.drop_no_key)?;
        if !identity.checker.has_mac1(message) {
            return Err(&counters.drop_mac1);
        }
        let keys = in_flight.initiator.finish(message);
        let keys = keys.map_err(|_| &counters.drop_forged)?;
        let peer = self.peers.get_mut(&in_flight.peer);
        let peer = peer.ok_or(&counters.drop_unknown_peer)?;
        state.in_flight.remove(&index);
        peer.in_flight = None;
        let shared = Arc::clone(&peer.shared);
        let session = Arc::new(Session::new(keys, index, true, now.ns, shared));
        peer.shared.note_handshake(from);
        peer.begin_as_initiator(session, &state.map);
        state.complete(peer, now, out);
        state.attend(peer, now, out);
        Ok(&counters.responses_received)
    }

    fn receive_cookie_reply<'a>(
        &mut self,
        now: Now,
        message: CookieReply<'_>,
        counters: &'a HandshakeCounters,
    ) -> Outcome<'a> {
        let index = message.receiver_index();
        let session = self.state.map.get(index);
        let peer = match (self.state.in_flight.get(&index), session.as_ref()) {
            (Some(in_flight), _) => self.peers.get_mut(&in_flight.peer),
            // It answers a response.
            (None, Some(session)) => self.peers.of_shared(session.peer()),
            (None, None) => None,
        };
        let peer = peer.ok_or(&counters.drop_unknown_index)?;
        let received = peer.macs.receive(message, now.ns);
        received.map_err(|_| &counters.drop_forged)?;
        Ok(&counters.cookie_replies_received)
    }
}

impl State {
    /// Answers an initiation that is authentic and new.
    fn respond<'a>(
        &mut self,
        peer: &mut Peer,
        now: Now,
        from: Endpoint,
        incoming: Incoming,
        counters: &'a HandshakeCounters,
        out: &mut impl Outside,
    ) -> Outcome<'a> {
        let index = self.map.reserve().ok_or(&counters.drop_no_index)?;
        let Ok((mut response, keys)) = incoming.respond(&peer.preshared_key, index) else {
            self.map.remove(index);
            return Err(&counters.drop_forged);
        };
        let shared = Arc::clone(&peer.shared);
        let session = Arc::new(Session::new(keys, index, false, now.ns, shared));
        // Before the response leaves: what it brings may come to any worker.
        peer.begin_as_responder(session, &self.map);
        peer.shared.note_handshake(from);
        peer.macs.fill(&mut response, now.ns);
        out.send(from, &response);
        counters.responses_sent.add(1);
        peer.timers.responded(now.ns, random());
        self.attend(peer, now, out);
        Ok(&counters.initiations_received)
    }
}
