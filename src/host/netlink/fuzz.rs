//! All readers of what the kernel sends, for fuzzing.

use netlink_packet_route::RouteNetlinkMessage;

use super::{Reply, Route, address, link, read_reply, split_message, watch};

/// Reads a datagram as an answer and as events. Returns how many messages were
/// understood.
pub fn read_datagram(mut rest: &[u8]) -> usize {
    let mut understood = 0;
    while let Some((one, tail)) = split_message(rest) {
        assert!(tail.len() < rest.len());
        rest = tail;
        let is_understood = match read_reply(one) {
            Some((_, Reply::Object(RouteNetlinkMessage::NewLink(link)))) => {
                link::read_link(&link).index == link.header.index
            }
            Some((_, Reply::Object(RouteNetlinkMessage::NewAddress(address)))) => {
                address::read_address(&address).is_some()
            }
            Some((_, Reply::Object(RouteNetlinkMessage::NewRoute(route)))) => {
                Route::read(&route).is_some()
            }
            Some((_, Reply::Refused(error))) => !error.to_string().is_empty(),
            Some((_, Reply::Done)) => true,
            _ => false,
        };
        let is_event = watch::read_event(one).is_some();
        understood += usize::from(is_understood || is_event);
    }
    understood
}
