//! All readers of what the kernel sends, for fuzzing.

use netlink_packet_route::RouteNetlinkMessage;

use super::{Reply, Route, address, link, parse_object, read_reply, split_message, watch};

/// Reads a datagram as an answer and as events. Returns how many messages were
/// understood.
pub fn read_datagram(datagram: &[u8]) -> usize {
    let mut understood = 0;
    let mut rest = datagram;
    while let Some((one, tail)) = split_message(rest) {
        assert!(tail.len() < rest.len());
        rest = tail;
        let is_event = watch::read_event(one).is_some();
        let is_answer = match read_reply(one) {
            Some(Reply::Object(message)) => parse_object(message).is_some_and(read_object),
            Some(Reply::Refused(refusal)) => !refusal.describe("refused").to_string().is_empty(),
            Some(Reply::Done) => true,
            None => false,
        };
        understood += usize::from(is_event || is_answer);
    }
    understood
}

fn read_object(object: RouteNetlinkMessage) -> bool {
    match object {
        RouteNetlinkMessage::NewLink(link) => link::read_link(&link).index == link.header.index,
        RouteNetlinkMessage::NewAddress(address) => address::read_address(&address).is_some(),
        RouteNetlinkMessage::NewRoute(route) => Route::read(&route).is_some(),
        _ => false,
    }
}
