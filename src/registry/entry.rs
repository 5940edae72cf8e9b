//! The registry's keys and their values, in flannel's layout, and beside it what fastvpn adds.
//!
//! ```text
//! <prefix>/config                          the network (`network`)
//! <prefix>/subnets/10.50.71.0-24           a host: {"PublicIP":"10.211.77.2","PublicIPv6":null}
//! <prefix>/fastvpn/hosts/10.50.71.0-24     what it has besides: {"Prefixes":["10.60.0.0/24"]}
//! ```
//!
//! Nothing but hosts is ever written under names that begin with `<prefix>/subnets`: one value
//! there that a flanneld cannot read makes it drop all its peers.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use super::network::Backend;
use crate::wire::wireguard::keys::PublicKey;

/// Most prefixes of one host besides its subnet.
pub(crate) const HOST_PREFIXES_MAX: usize = 10_000;

/// The names of one network's keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Keys {
    prefix: String,
}

/// What a key is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// The network's configuration.
    Config,
    /// The host with this subnet.
    Subnet(Ipv4Net),
    /// What the host with this subnet has besides.
    Extra(Ipv4Net),
    /// It should be about a host, and is not.
    Malformed,
    /// Somebody else's.
    Other,
}

impl Keys {
    /// Keys below this prefix, such as `/coreos.com/network`.
    pub(crate) fn new(prefix: &str) -> Self {
        Self {
            prefix: format!("/{}", prefix.trim_matches('/')),
        }
    }

    /// The configuration's key.
    pub(crate) fn config(&self) -> String {
        format!("{}/config", self.prefix)
    }

    /// The key of the host with this subnet.
    pub(crate) fn subnet(&self, subnet: Ipv4Net) -> String {
        format!("{}/subnets/{}", self.prefix, name_of(subnet))
    }

    /// The key of what the host with this subnet has besides.
    pub(crate) fn extra(&self, subnet: Ipv4Net) -> String {
        format!("{}/fastvpn/hosts/{}", self.prefix, name_of(subnet))
    }

    /// The first key that may be this network's, and the first one after all of them.
    pub(crate) fn range(&self) -> (String, String) {
        // '0' follows '/'.
        (format!("{}/", self.prefix), format!("{}0", self.prefix))
    }

    /// What a key is about.
    pub(crate) fn parse(&self, key: &[u8]) -> Key {
        let rest = key.strip_prefix(self.prefix.as_bytes());
        let Some(rest) = rest.map(|rest| String::from_utf8_lossy(rest)) else {
            return Key::Other;
        };
        if rest == "/config" {
            return Key::Config;
        }
        let (name, make): (&str, fn(Ipv4Net) -> Key) = match rest.strip_prefix("/fastvpn/hosts/") {
            Some(name) => (name, Key::Extra),
            // As flanneld looks for them.
            None => match rest.strip_prefix("/subnets") {
                Some(name) => (name.strip_prefix('/').unwrap_or(""), Key::Subnet),
                None => return Key::Other,
            },
        };
        subnet_of(name).map_or(Key::Malformed, make)
    }
}

/// `10.50.71.0-24`.
fn name_of(subnet: Ipv4Net) -> String {
    format!("{}-{}", subnet.network(), subnet.prefix_len())
}

/// The subnet of a name; the IPv4 one, where an IPv6 one follows, as in
/// `10.50.11.0-24&fd00:11::-64`.
fn subnet_of(name: &str) -> Option<Ipv4Net> {
    let (v4, v6) = match name.split_once('&') {
        Some((v4, v6)) => (v4, Some(v6)),
        None => (name, None),
    };
    if let Some(v6) = v6 {
        let (address, length) = v6.rsplit_once('-')?;
        Ipv6Net::new(address.parse::<Ipv6Addr>().ok()?, number(length)?).ok()?;
    }
    let (address, length) = v4.split_once('-')?;
    let subnet = Ipv4Net::new(address.parse::<Ipv4Addr>().ok()?, number(length)?).ok()?;
    // In one form alone, so that no two names are about one subnet.
    (subnet == subnet.trunc() && v4 == name_of(subnet)).then_some(subnet)
}

/// Digits alone: no sign.
fn number(text: &str) -> Option<u8> {
    let is_digits = text.bytes().all(|byte| byte.is_ascii_digit());
    u8::from_str(text).ok().filter(|_| is_digits)
}

/// A host, as its value says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostValue {
    /// Where its datagrams go.
    pub(crate) public_ip: Ipv4Addr,
    /// Its key, if its backend has keys.
    pub(crate) key: Option<PublicKey>,
    /// Its backend.
    pub(crate) backend: String,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
struct HostJson {
    #[serde(rename = "PublicIP")]
    public_ip: Ipv4Addr,
    #[serde(rename = "PublicIPv6")]
    public_ipv6: Option<Ipv6Addr>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    backend_type: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    backend_data: Option<BackendData>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
struct BackendData {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    public_key: Option<String>,
}

impl HostValue {
    /// A host with this address and, with keys, this key.
    pub(crate) fn new(public_ip: Ipv4Addr, key: Option<PublicKey>) -> Self {
        let backend = key.map_or("udp", |_| "wireguard").to_string();
        Self {
            public_ip,
            key,
            backend,
        }
    }

    /// Reads a host's value; `None` if it is not one.
    pub(crate) fn parse(value: &[u8]) -> Option<Self> {
        let json: HostJson = serde_json::from_slice(value).ok()?;
        let is_host = |ip: Ipv4Addr| !ip.is_unspecified() && !ip.is_multicast();
        if !is_host(json.public_ip) || json.public_ip.is_broadcast() {
            return None;
        }
        let key = match json.backend_data.unwrap_or_default().public_key {
            Some(text) if json.backend_type == "wireguard" => Some(text.parse().ok()?),
            _ => None,
        };
        Some(Self {
            public_ip: json.public_ip,
            key,
            backend: match json.backend_type.is_empty() {
                true => "udp".into(),
                false => json.backend_type,
            },
        })
    }

    /// The value as flanneld writes it: with the udp backend nothing names it.
    pub(crate) fn to_json(&self) -> String {
        let json = HostJson {
            public_ip: self.public_ip,
            public_ipv6: None,
            backend_type: match &self.backend[..] {
                "udp" => String::new(),
                other => other.into(),
            },
            backend_data: self.key.map(|key| BackendData {
                public_key: Some(key.to_string()),
            }),
        };
        // Nothing in it has no JSON.
        serde_json::to_string(&json).unwrap_or_default()
    }

    /// Whether packets can be sent to it with this backend.
    pub(crate) fn has(&self, backend: &Backend) -> bool {
        self.backend == backend.name()
            && self.key.is_some() == matches!(backend, Backend::WireGuard { .. })
    }
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
struct ExtraJson {
    prefixes: Vec<IpNet>,
}

/// The prefixes that a host has besides its subnet; `None` if the value is none. Bits beyond
/// the prefix length are cut off.
pub(crate) fn parse_extra(value: &[u8]) -> Option<Vec<IpNet>> {
    let json: ExtraJson = serde_json::from_slice(value).ok()?;
    let prefixes = json.prefixes.iter().map(IpNet::trunc).collect();
    (json.prefixes.len() <= HOST_PREFIXES_MAX).then_some(prefixes)
}

/// The value for these prefixes.
pub(crate) fn extra_to_json(prefixes: &[IpNet]) -> String {
    let prefixes = prefixes.to_vec();
    // Nothing in it has no JSON.
    serde_json::to_string(&ExtraJson { prefixes }).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    #[test]
    fn keys_are_flannels() {
        let keys = Keys::new("/coreos.com/network/");
        let subnet = net("10.50.71.0/24");
        assert_eq!(keys, Keys::new("coreos.com/network"));
        assert_eq!(keys.config(), "/coreos.com/network/config");
        assert_eq!(
            keys.subnet(subnet),
            "/coreos.com/network/subnets/10.50.71.0-24"
        );
        assert_eq!(
            keys.extra(subnet),
            "/coreos.com/network/fastvpn/hosts/10.50.71.0-24"
        );
        let (first, end) = keys.range();
        for key in [keys.config(), keys.subnet(subnet), keys.extra(subnet)] {
            assert!(first <= key && key < end);
        }
        assert!(!(first..end).contains(&"/coreos.com/network2/config".to_string()));
    }

    #[test]
    fn keys_are_told_apart() {
        let keys = Keys::new("/n");
        for (key, expected) in [
            ("/n/config", Key::Config),
            (
                "/n/subnets/10.50.71.0-24",
                Key::Subnet(net("10.50.71.0/24")),
            ),
            (
                "/n/subnets/10.50.11.0-24&fd00:11::-64",
                Key::Subnet(net("10.50.11.0/24")),
            ),
            (
                "/n/fastvpn/hosts/10.50.9.0-24",
                Key::Extra(net("10.50.9.0/24")),
            ),
            ("/n/subnets", Key::Malformed),
            ("/n/subnets/", Key::Malformed),
            ("/n/subnets-of-mine/10.50.71.0-24", Key::Malformed),
            ("/n/subnets/10.50.71.1-24", Key::Malformed),
            ("/n/subnets/10.50.71.0-33", Key::Malformed),
            ("/n/subnets/10.50.71.0-+24", Key::Malformed),
            ("/n/subnets/10.50.71.0-024", Key::Malformed),
            ("/n/subnets/10.50.71.0/24", Key::Malformed),
            ("/n/subnets/10.50.11.0-24&fd00:11::", Key::Malformed),
            ("/n/fastvpn/hosts/x", Key::Malformed),
            ("/n/fastvpn/other", Key::Other),
            ("/m/config", Key::Other),
            ("/n", Key::Other),
        ] {
            assert_eq!(keys.parse(key.as_bytes()), expected, "{key}");
        }
    }

    #[test]
    fn values_are_flannels() {
        let ip = Ipv4Addr::new(10, 211, 77, 2);
        let udp = HostValue::new(ip, None);
        assert_eq!(
            udp.to_json(),
            r#"{"PublicIP":"10.211.77.2","PublicIPv6":null}"#
        );
        let key: PublicKey = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="
            .parse()
            .unwrap();
        let wireguard = HostValue::new(ip, Some(key));
        assert_eq!(
            wireguard.to_json(),
            r#"{"PublicIP":"10.211.77.2","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="}}"#
        );
        for value in [udp, wireguard] {
            assert_eq!(HostValue::parse(value.to_json().as_bytes()), Some(value));
        }
        // Other backends' data is theirs.
        let vxlan = br#"{"PublicIP":"10.0.0.2","PublicIPv6":null,"BackendType":"vxlan",
            "BackendData":{"VNI":1,"VtepMAC":"82:4b:b6:2f:54:4e"}}"#;
        let vxlan = HostValue::parse(vxlan).unwrap();
        assert_eq!((vxlan.key, &vxlan.backend[..]), (None, "vxlan"));
        assert!(!vxlan.has(&Backend::Udp { port: 1 }));
    }

    #[test]
    fn what_is_no_host_is_none() {
        for value in [
            "",
            "null",
            "{}",
            "[]",
            r#"{"PublicIP":"bogus"}"#,
            r#"{"PublicIP":"0.0.0.0"}"#,
            r#"{"PublicIP":"255.255.255.255"}"#,
            r#"{"PublicIP":"224.0.0.1"}"#,
            r#"{"PublicIP":"10.0.0.1","BackendType":"wireguard","BackendData":{"PublicKey":"x"}}"#,
            r#"{"PublicIP":"10.0.0.1","BackendData":7}"#,
        ] {
            assert_eq!(HostValue::parse(value.as_bytes()), None, "{value}");
        }
    }

    #[test]
    fn more_prefixes_are_read_as_they_are_written() {
        let prefixes: Vec<IpNet> = ["10.60.0.0/24", "fd00:60::/64"]
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        let json = extra_to_json(&prefixes);
        assert_eq!(json, r#"{"Prefixes":["10.60.0.0/24","fd00:60::/64"]}"#);
        assert_eq!(parse_extra(json.as_bytes()), Some(prefixes));
        assert_eq!(parse_extra(b"{}"), None);
        let many = vec!["10.0.0.0/8".parse().unwrap(); HOST_PREFIXES_MAX + 1];
        assert_eq!(parse_extra(extra_to_json(&many).as_bytes()), None);
    }

    proptest! {
        #[test]
        fn any_subnet_comes_back(address in any::<u32>(), length in 0u8..=32) {
            let subnet = Ipv4Net::new(address.into(), length).unwrap().trunc();
            let keys = Keys::new("/a/b");
            prop_assert_eq!(keys.parse(keys.subnet(subnet).as_bytes()), Key::Subnet(subnet));
            prop_assert_eq!(keys.parse(keys.extra(subnet).as_bytes()), Key::Extra(subnet));
        }

        /// What is written has one form that means one host, as flanneld reads it.
        #[test]
        fn what_is_written_is_a_host(ip in any::<u32>(), key in any::<Option<[u8; 32]>>()) {
            let value = HostValue::new(ip.into(), key.map(PublicKey));
            let read = HostValue::parse(value.to_json().as_bytes());
            prop_assert!(read.is_none_or(|read| read == value));
        }

        #[test]
        fn any_bytes_can_be_read(bytes in any::<Vec<u8>>()) {
            let keys = Keys::new("/a");
            let _ = (keys.parse(&bytes), HostValue::parse(&bytes), parse_extra(&bytes));
        }

        #[test]
        fn any_name_can_be_read(name in "(/a)?/(subnets|fastvpn/hosts)/[0-9a-f.&:-]{0,40}") {
            Keys::new("/a").parse(name.as_bytes());
        }
    }
}
