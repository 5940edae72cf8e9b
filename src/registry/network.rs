//! The network's configuration, as it stands in the registry under `<prefix>/config`: JSON,
//! with the fields and defaults that flannel has.

use std::fmt;
use std::net::Ipv4Addr;
use std::time::Duration;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::config::DEFAULT_PORT;
use crate::error::{Error, Result, shortened};
use crate::wire::Mode;
use crate::wire::wireguard::keys::PresharedKey;

/// UDP port of flannel's wireguard backend, unless the configuration has another.
pub(crate) const WIREGUARD_PORT: u16 = 51820;

/// A host needs an address for the tunnel and one for its bridge.
const SUBNET_LENGTH_MAX: u8 = 30;

/// How hosts carry packets to each other.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Backend {
    /// Plain datagrams.
    Udp {
        /// All hosts' port.
        port: u16,
    },
    /// WireGuard.
    WireGuard {
        /// All hosts' port.
        port: u16,
        /// A secret that all hosts share besides their keys; zeros for none.
        preshared_key: PresharedKey,
        /// How often something is sent, to keep a NAT's mapping alive.
        keepalive: Option<Duration>,
    },
}

impl Backend {
    /// As the configuration names it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Udp { .. } => "udp",
            Self::WireGuard { .. } => "wireguard",
        }
    }

    /// All hosts' UDP port.
    pub(crate) fn port(&self) -> u16 {
        match self {
            Self::Udp { port } | Self::WireGuard { port, .. } => *port,
        }
    }

    /// How datagrams are made.
    pub(crate) fn mode(&self) -> Mode {
        Mode::with_keys(matches!(self, Self::WireGuard { .. }))
    }
}

// A preshared key is not shown.
impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} port {}", self.name(), self.port())
    }
}

/// See the module's documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Network {
    /// All hosts' containers are in it.
    pub(crate) network: Ipv4Net,
    /// Length of each host's subnet.
    pub(crate) subnet_length: u8,
    /// The first subnet's address, and the last one's.
    pub(crate) subnets: (Ipv4Addr, Ipv4Addr),
    /// How hosts carry packets to each other.
    pub(crate) backend: Backend,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NetworkJson {
    #[serde(default = "yes", rename = "EnableIPv4")]
    enable_ipv4: bool,
    #[serde(default, rename = "EnableIPv6")]
    enable_ipv6: bool,
    network: Ipv4Net,
    subnet_len: Option<u8>,
    subnet_min: Option<Ipv4Addr>,
    subnet_max: Option<Ipv4Addr>,
    backend: Option<BackendJson>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct BackendJson {
    r#type: Option<String>,
    port: Option<u16>,
    listen_port: Option<u16>,
    #[serde(default, rename = "PSK")]
    psk: String,
    #[serde(default)]
    persistent_keepalive_interval: u16,
}

fn yes() -> bool {
    true
}

impl Network {
    /// Reads the configuration's value.
    ///
    /// # Errors
    /// What is wrong with it, or what of it fastvpn cannot do.
    pub(crate) fn parse(value: &[u8]) -> Result<Self> {
        let json: NetworkJson = serde_json::from_slice(value).map_err(|error| {
            let what = error.to_string().replace(char::is_control, " ");
            Error::new(format!("it cannot be read: {}", shortened(&what)))
        })?;
        if json.enable_ipv6 || !json.enable_ipv4 {
            let what = "EnableIPv6, and networks without IPv4, are not supported";
            return Err(Error::new(what).hint("use flanneld for them"));
        }
        let network = json.network.trunc();
        let subnet_length = subnet_length(network, json.subnet_len)?;
        let step = 1u32 << (32 - subnet_length);
        let (first, last) = (
            u32::from(network.network()),
            u32::from(network.broadcast()) - (step - 1),
        );
        let bound = |name: &str, given: Option<Ipv4Addr>, default: u32| {
            let given = given.filter(|address| !address.is_unspecified());
            let address = given.map_or(default, u32::from);
            if !(first..=last).contains(&address) || !address.is_multiple_of(step) {
                let shown = Ipv4Addr::from(address);
                return Err(Error::new(format!(
                    "{name} {shown} is not the address of a /{subnet_length} in {network}"
                )));
            }
            Ok(address)
        };
        // The first one's address would be the network's own.
        let min = bound("SubnetMin", json.subnet_min, first + step)?;
        let max = bound("SubnetMax", json.subnet_max, last)?;
        if min > max {
            return Err(Error::new("SubnetMin is above SubnetMax"));
        }
        Ok(Self {
            network,
            subnet_length,
            subnets: (min.into(), max.into()),
            backend: backend(json.backend)?,
        })
    }

    /// How many subnets hosts can have.
    pub(crate) fn subnet_count(&self) -> u32 {
        let (min, max) = self.subnets;
        ((u32::from(max) - u32::from(min)) >> (32 - self.subnet_length)) + 1
    }

    /// The subnet of this number, from 0; those beyond the last begin again.
    pub(crate) fn subnet(&self, number: u32) -> Ipv4Net {
        let shift = 32 - self.subnet_length;
        let offset = (number % self.subnet_count()) << shift;
        let address = Ipv4Addr::from(u32::from(self.subnets.0) + offset);
        Ipv4Net::new_assert(address, self.subnet_length)
    }

    /// Whether a host may claim this subnet.
    pub(crate) fn has_subnet(&self, subnet: Ipv4Net) -> bool {
        let (min, max) = self.subnets;
        subnet.prefix_len() == self.subnet_length
            && subnet == subnet.trunc()
            && (min..=max).contains(&subnet.network())
    }
}

/// # Errors
/// When there is no room for hosts.
fn subnet_length(network: Ipv4Net, given: Option<u8>) -> Result<u8> {
    let length = network.prefix_len();
    let subnet_length = match given.filter(|given| *given > 0) {
        Some(given) => given,
        None if length > 28 => {
            let what = format!("Network {network} is too small: a /28 is the least");
            return Err(Error::new(what));
        }
        None if length <= 22 => 24,
        None => length + 2,
    };
    if subnet_length > SUBNET_LENGTH_MAX || subnet_length < length + 2 {
        return Err(Error::new(format!(
            "SubnetLen {subnet_length} does not fit {network}: it takes {} to {SUBNET_LENGTH_MAX}",
            length + 2
        )));
    }
    Ok(subnet_length)
}

fn backend(json: Option<BackendJson>) -> Result<Backend> {
    let Some(json) = json else {
        return Ok(Backend::Udp { port: DEFAULT_PORT });
    };
    let port = |given: Option<u16>, default| given.filter(|port| *port > 0).unwrap_or(default);
    match json.r#type.as_deref() {
        None | Some("" | "udp") => Ok(Backend::Udp {
            port: port(json.port, DEFAULT_PORT),
        }),
        Some("wireguard") => Ok(Backend::WireGuard {
            port: port(json.listen_port, WIREGUARD_PORT),
            preshared_key: match json.psk.is_empty() {
                true => PresharedKey::default(),
                false => json.psk.parse().map_err(|_| {
                    Error::new("Backend's PSK is not a key: expected 44 characters of base64")
                })?,
            },
            keepalive: (json.persistent_keepalive_interval > 0)
                .then(|| Duration::from_secs(json.persistent_keepalive_interval.into())),
        }),
        Some(other) => {
            let other = shortened(other);
            let what = format!("the backend {other:?} is not supported");
            Err(Error::new(what).hint("fastvpn has udp and wireguard"))
        }
    }
}

/// The value of a new network's configuration.
///
/// # Errors
/// When it would be none.
pub(crate) fn new_value(
    network: Ipv4Net,
    subnet_length: Option<u8>,
    backend: &str,
    port: Option<u16>,
) -> Result<String> {
    #[derive(Serialize)]
    #[serde(rename_all = "PascalCase")]
    struct NewBackend<'a> {
        r#type: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        port: Option<u16>,
        #[serde(skip_serializing_if = "Option::is_none")]
        listen_port: Option<u16>,
    }
    #[derive(Serialize)]
    #[serde(rename_all = "PascalCase")]
    struct NewNetwork<'a> {
        network: Ipv4Net,
        #[serde(skip_serializing_if = "Option::is_none")]
        subnet_len: Option<u8>,
        backend: NewBackend<'a>,
    }
    let is_udp = backend == "udp";
    let value = NewNetwork {
        network: network.trunc(),
        subnet_len: subnet_length,
        backend: NewBackend {
            r#type: backend,
            port: is_udp.then(|| port.unwrap_or(DEFAULT_PORT)),
            listen_port: port.filter(|_| !is_udp),
        },
    };
    let text = serde_json::to_string(&value)
        .map_err(|error| Error::new(format!("cannot write the configuration: {error}")))?;
    Network::parse(text.as_bytes())?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Network> {
        Network::parse(text.as_bytes())
    }

    fn fault(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn what_is_left_out_is_as_in_flannel() {
        let full = r#"{"Network":"10.50.0.0/16","SubnetLen":24,"SubnetMin":"10.50.1.0",
            "SubnetMax":"10.50.255.0","Backend":{"Type":"udp","Port":8285}}"#;
        let short = parse(r#"{"Network":"10.50.0.0/16"}"#).unwrap();
        assert_eq!(parse(full).unwrap(), short);
        assert_eq!(short.subnet_count(), 255);
        for (network, length, first, count) in [
            ("10.50.0.0/22", 24, "10.50.1.0/24", 3),
            ("10.50.0.0/23", 25, "10.50.0.128/25", 3),
            ("10.50.0.0/28", 30, "10.50.0.4/30", 3),
            ("10.0.0.0/8", 24, "10.0.1.0/24", 65535),
        ] {
            let read = parse(&format!(r#"{{"Network":"{network}"}}"#)).unwrap();
            assert_eq!(read.subnet_length, length, "{network}");
            assert_eq!(read.subnet(0), first.parse().unwrap(), "{network}");
            assert_eq!(read.subnet_count(), count, "{network}");
        }
        let wireguard = parse(
            r#"{"Network":"10.50.0.0/16","EnableIPv4":true,"Backend":{"Type":"wireguard",
               "PersistentKeepaliveInterval":25,"Mode":"separate"}}"#,
        );
        let Backend::WireGuard {
            port,
            preshared_key,
            keepalive,
        } = wireguard.unwrap().backend
        else {
            panic!("it is wireguard");
        };
        assert_eq!(port, 51820);
        assert!(!preshared_key.is_set());
        assert_eq!(keepalive, Some(Duration::from_secs(25)));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (text, part) in [
            ("", "cannot be read"),
            ("{}", "Network"),
            (r#"{"Network":"10.50.0.0"}"#, "cannot be read"),
            (r#"{"Network":"10.50.0.0/29"}"#, "too small"),
            (r#"{"Network":"10.50.0.0/16","SubnetLen":17}"#, "18 to 30"),
            (r#"{"Network":"10.50.0.0/16","SubnetLen":31}"#, "18 to 30"),
            (r#"{"Network":"10.50.0.0/16","SubnetLen":255}"#, "18 to 30"),
            (
                r#"{"Network":"10.50.0.0/16","SubnetMin":"10.51.0.0"}"#,
                "SubnetMin 10.51.0.0",
            ),
            (
                r#"{"Network":"10.50.0.0/16","SubnetMax":"10.50.1.1"}"#,
                "SubnetMax 10.50.1.1",
            ),
            (
                r#"{"Network":"10.50.0.0/16","SubnetMin":"10.50.3.0","SubnetMax":"10.50.2.0"}"#,
                "above",
            ),
            (
                r#"{"Network":"10.50.0.0/16","EnableIPv6":true}"#,
                "EnableIPv6",
            ),
            (
                r#"{"Network":"10.50.0.0/16","Backend":{"Type":"vxlan"}}"#,
                "\"vxlan\"",
            ),
            (
                r#"{"Network":"10.50.0.0/16","Backend":{"Type":"wireguard","PSK":"secret"}}"#,
                "PSK",
            ),
        ] {
            let fault = fault(text);
            assert!(
                fault.contains(part) && !fault.contains("secret"),
                "{text}: {fault}"
            );
        }
    }

    #[test]
    fn a_new_configuration_is_one() {
        let net = "10.50.0.0/16".parse().unwrap();
        let udp = new_value(net, None, "udp", None).unwrap();
        assert_eq!(
            udp,
            r#"{"Network":"10.50.0.0/16","Backend":{"Type":"udp","Port":8285}}"#
        );
        let wireguard = new_value(net, Some(26), "wireguard", Some(7)).unwrap();
        let read = parse(&wireguard).unwrap();
        assert_eq!((read.subnet_length, read.backend.port()), (26, 7));
        assert!(new_value(net, None, "vxlan", None).is_err());
    }

    proptest! {
        /// Whatever the bytes are, reading them ends, and what is read holds together.
        #[test]
        fn any_bytes_can_be_read(bytes in any::<Vec<u8>>()) {
            let _ = Network::parse(&bytes);
        }

        #[test]
        fn subnets_are_in_the_network(
            address in any::<u32>(),
            length in 0u8..=32,
            subnet_length in 0u8..=34,
            number in any::<u32>(),
        ) {
            let network = Ipv4Net::new(address.into(), length).unwrap();
            let text = format!(r#"{{"Network":"{network}","SubnetLen":{subnet_length}}}"#);
            if let Ok(read) = parse(&text) {
                let subnet = read.subnet(number);
                prop_assert!(read.network.contains(&subnet));
                prop_assert!(read.has_subnet(subnet));
                prop_assert_ne!(subnet.network(), read.network.network());
                let last = read.subnet(read.subnet_count() - 1);
                prop_assert_eq!(last.broadcast(), read.network.broadcast());
            }
        }
    }
}
