//! Which packets are wanted: the part of pcap-filter(7) that a tunnel's packets are told
//! apart by. `docs/capture.md` describes it.

use std::net::IpAddr;

use ipnet::IpNet;

use super::view::View;
use crate::error::shortened;

/// Longest filter in words, so that the depth of one is bounded.
const WORDS_MAX: usize = 1000;

/// How deep parentheses and `not` may be nested.
const DEPTH_MAX: usize = 100;

/// A packet filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Filter {
    /// All of these. Without any: every packet.
    All(Vec<Filter>),
    /// One of these.
    Any(Vec<Filter>),
    /// Not this.
    Not(Box<Filter>),
    /// A protocol.
    Protocol(Protocol),
    /// An address of a host or in a net.
    Net(Side, IpNet),
    /// A port of TCP or UDP.
    Port(Side, u16),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Ip,
    Ip6,
    Tcp,
    Udp,
    Icmp,
    Icmp6,
}

/// Which end of a packet is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
    Either,
}

impl Side {
    fn is<T: Copy>(self, [source, destination]: [T; 2], wanted: impl Fn(T) -> bool) -> bool {
        match self {
            Self::Source => wanted(source),
            Self::Destination => wanted(destination),
            Self::Either => wanted(source) || wanted(destination),
        }
    }
}

/// Reads a filter.
///
/// # Errors
/// What is wrong with it, in one line.
pub(crate) fn parse(text: &str) -> Result<Filter, String> {
    let spaced = text.replace('(', " ( ").replace(')', " ) ");
    let spaced = spaced.replace("&&", " and ").replace("||", " or ");
    let spaced = spaced.replace('!', " not ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    if words.is_empty() || words.len() > WORDS_MAX {
        return Err(format!("a filter has 1 to {WORDS_MAX} words"));
    }
    let mut parser = Parser {
        words: &words,
        depth: 0,
    };
    let filter = parser.any()?;
    match parser.words.first() {
        None => Ok(filter),
        Some(word) => Err(format!(
            "expected `and`, `or` or the end, not {}",
            quoted(word)
        )),
    }
}

fn quoted(word: &str) -> String {
    format!("`{}`", shortened(word).escape_debug())
}

struct Parser<'a> {
    /// Those that follow.
    words: &'a [&'a str],
    depth: usize,
}

impl<'a> Parser<'a> {
    /// Takes the next word if it is this.
    fn takes(&mut self, wanted: &str) -> bool {
        let is_wanted = self.words.first() == Some(&wanted);
        if is_wanted {
            self.words = &self.words[1..];
        }
        is_wanted
    }

    fn next(&mut self, wanted: &str) -> Result<&'a str, String> {
        let (word, rest) = self
            .words
            .split_first()
            .ok_or_else(|| format!("expected {wanted} at the end"))?;
        self.words = rest;
        Ok(word)
    }

    fn any(&mut self) -> Result<Filter, String> {
        let mut some = vec![self.all()?];
        while self.takes("or") {
            some.push(self.all()?);
        }
        Ok(one_or(some, Filter::Any))
    }

    fn all(&mut self) -> Result<Filter, String> {
        let mut some = vec![self.one()?];
        while self.takes("and") {
            some.push(self.one()?);
        }
        Ok(one_or(some, Filter::All))
    }

    fn one(&mut self) -> Result<Filter, String> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(format!("nested more than {DEPTH_MAX} times"));
        }
        let filter = if self.takes("not") {
            Filter::Not(Box::new(self.one()?))
        } else if self.takes("(") {
            let inner = self.any()?;
            match self.next("`)`")? {
                ")" => inner,
                word => return Err(format!("expected `)`, not {}", quoted(word))),
            }
        } else {
            self.primitive()?
        };
        self.depth -= 1;
        Ok(filter)
    }

    /// `[PROTOCOL] [src|dst] host|net|port VALUE`, or a protocol alone.
    fn primitive(&mut self) -> Result<Filter, String> {
        const PROTOCOLS: [(&str, Protocol); 6] = [
            ("ip", Protocol::Ip),
            ("ip6", Protocol::Ip6),
            ("tcp", Protocol::Tcp),
            ("udp", Protocol::Udp),
            ("icmp", Protocol::Icmp),
            ("icmp6", Protocol::Icmp6),
        ];
        let mut protocols = PROTOCOLS.iter();
        let protocol = protocols.find(|(name, _)| self.takes(name));
        let protocol = protocol.map(|(_, protocol)| Filter::Protocol(*protocol));
        let side = if self.takes("src") {
            Side::Source
        } else if self.takes("dst") {
            Side::Destination
        } else {
            Side::Either
        };
        let ends = [None, Some("and"), Some("or"), Some(")")];
        let is_alone = ends.contains(&self.words.first().copied());
        match protocol {
            Some(protocol) if side == Side::Either && is_alone => Ok(protocol),
            Some(protocol) => Ok(Filter::All(vec![protocol, self.end_of(side)?])),
            None => self.end_of(side),
        }
    }

    /// `host|net|port VALUE`.
    fn end_of(&mut self, side: Side) -> Result<Filter, String> {
        let kind = self.next("`host`, `net` or `port`")?;
        match kind {
            "host" => {
                let text = self.next("an address")?;
                let address: Result<IpAddr, _> = text.parse();
                let address = address.map_err(|_| format!("{} is not an address", quoted(text)))?;
                Ok(Filter::Net(side, address.into()))
            }
            "net" => {
                let text = self.next("a prefix")?;
                let net: Result<IpNet, _> = text.parse();
                let no_net = |_| format!("{} is not a prefix, such as 10.1.0.0/16", quoted(text));
                Ok(Filter::Net(side, net.map_err(no_net)?))
            }
            "port" => {
                let text = self.next("a number")?;
                let port = text.parse();
                let port = port.map_err(|_| format!("{} is not a port", quoted(text)))?;
                Ok(Filter::Port(side, port))
            }
            word => Err(format!(
                "expected a protocol (ip, ip6, tcp, udp, icmp, icmp6), `src`, `dst`, `host`, \
                 `net`, `port`, `not` or `(`, not {}",
                quoted(word)
            )),
        }
    }
}

fn one_or(mut some: Vec<Filter>, many: impl Fn(Vec<Filter>) -> Filter) -> Filter {
    match some.pop() {
        Some(only) if some.is_empty() => only,
        last => many(some.into_iter().chain(last).collect()),
    }
}

impl Filter {
    /// Whether a packet is wanted. What is none of IP is if the filter wants everything.
    pub(super) fn wants(&self, packet: Option<&View<'_>>) -> bool {
        match (self, packet) {
            (Self::All(all), _) => all.iter().all(|filter| filter.wants(packet)),
            (Self::Any(some), _) => some.iter().any(|filter| filter.wants(packet)),
            (Self::Not(filter), _) => !filter.wants(packet),
            (_, None) => false,
            (Self::Protocol(protocol), Some(view)) => match protocol {
                Protocol::Ip => view.source.is_ipv4(),
                Protocol::Ip6 => view.source.is_ipv6(),
                Protocol::Tcp => view.is_tcp(),
                Protocol::Udp => view.is_udp(),
                Protocol::Icmp => view.is_icmp(),
                Protocol::Icmp6 => view.is_icmp6(),
            },
            (Self::Net(side, net), Some(view)) => {
                let is_in = |address: IpAddr| net.contains(&address);
                side.is([view.source, view.destination], is_in)
            }
            (Self::Port(side, port), Some(view)) => view
                .ports()
                .is_some_and(|ports| side.is(ports, |other| other == *port)),
        }
    }
}

#[cfg(test)]
#[path = "filter_tests.rs"]
mod tests;
