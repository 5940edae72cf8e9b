//! All readers of what the kernel sends, for fuzzing.

use netlink_packet_route::RouteNetlinkMessage;

use super::device_route::RouteEntry;
use super::{
    Event, HEADER_BYTES, RawHeader, address, link, read_message, route, split_message, watch,
};

/// Reads a datagram as an answer to the request with the number that is in it,
/// and as news. Returns how many messages were understood.
pub fn read_datagram(datagram: &[u8]) -> usize {
    let mut understood = 0;
    let mut rest = datagram;
    while let Some((one, tail)) = split_message(rest) {
        assert!(tail.len() < rest.len());
        rest = tail;
        let is_news = watch::read_news(one).is_some();
        let is_route = RouteEntry::parse(&one[HEADER_BYTES..]).is_some();
        let is_answer = match read_message(one, RawHeader::read(one).sequence) {
            Ok(Event::Object { object, .. }) => read_object(&object),
            Ok(Event::End { .. }) => true,
            Ok(Event::Foreign | Event::NotUnderstood) => false,
            Err(refusal) => !refusal.describe("refused").to_string().is_empty(),
        };
        understood += usize::from(is_news || is_route || is_answer);
    }
    understood
}

fn read_object(object: &RouteNetlinkMessage) -> bool {
    match object {
        RouteNetlinkMessage::NewLink(link) => link::read_link(link).index == link.header.index,
        RouteNetlinkMessage::NewAddress(address) => address::read_address(address).is_some(),
        RouteNetlinkMessage::NewRoute(route) => {
            let mut routes = Vec::new();
            route::read_route(route, &mut routes);
            !routes.is_empty()
        }
        _ => false,
    }
}
