//! What a network interface says of itself (`SIOCETHTOOL`, `linux/ethtool.h`).
//! The questions asked here need no rights, and concern the network namespace
//! of the socket, which sysfs does not.

use std::ffi::c_char;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;

mod ioctl {
    // SIOCETHTOOL, `linux/sockios.h`.
    nix::ioctl_readwrite_bad!(ethtool, 0x8946, libc::ifreq);
}

// Commands.
const GET_DRIVER_INFO: u32 = 0x03;
const GET_STRINGS: u32 = 0x1b;
const GET_STRING_SET_INFO: u32 = 0x37;
const GET_FEATURES: u32 = 0x3a;
const GET_CHANNELS: u32 = 0x3c;

/// `ETH_SS_FEATURES`: the string set with the features' names.
const FEATURE_NAMES: u32 = 4;

/// Bytes of a name in a string set (`ETH_GSTRING_LEN`).
const NAME_BYTES: usize = 32;

/// More features than any kernel has had; a string set that is longer is not
/// asked for.
const FEATURES_MAX: usize = 1024;

/// A socket to ask on, in the network namespace of the thread that made it.
pub struct Ethtool(UdpSocket);

/// What drives an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Driver {
    /// The driver's name.
    pub name: String,
    /// Where the device is on its bus; empty for one of software alone.
    pub bus: String,
}

/// How many queues an interface uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channels {
    /// For receiving.
    pub receive: u32,
    /// For sending.
    pub send: u32,
    /// How many there may be for receiving.
    pub receive_max: u32,
}

/// A feature that an interface may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// As `ethtool -k` names it.
    pub name: String,
    /// It can be switched on.
    pub is_available: bool,
    /// It is on.
    pub is_active: bool,
}

impl Ethtool {
    /// # Errors
    /// When there are no more descriptors.
    pub fn open() -> io::Result<Self> {
        // Nothing is ever sent or received on it.
        UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map(Self)
    }

    /// # Errors
    /// `EOPNOTSUPP` when the interface does not say.
    pub fn driver(&self, interface: &str) -> io::Result<Driver> {
        // struct ethtool_drvinfo: command, four strings of 32 bytes (driver,
        // version, firmware, bus), and 64 bytes that do not matter here.
        let mut words = [0; 49];
        words[0] = GET_DRIVER_INFO;
        self.ask(interface, &mut words)?;
        let bytes = to_bytes(&words[1..]);
        Ok(Driver {
            name: text(&bytes[..NAME_BYTES]),
            bus: text(&bytes[3 * NAME_BYTES..4 * NAME_BYTES]),
        })
    }

    /// # Errors
    /// `EOPNOTSUPP` when the interface does not say.
    pub fn channels(&self, interface: &str) -> io::Result<Channels> {
        // struct ethtool_channels: command; the most of receive, send, other
        // and combined; how many there are of these.
        let mut words = [0; 9];
        words[0] = GET_CHANNELS;
        self.ask(interface, &mut words)?;
        let [
            _,
            receive_max,
            _,
            _,
            combined_max,
            receive,
            send,
            _,
            combined,
        ] = words;
        Ok(Channels {
            receive: receive.saturating_add(combined),
            send: send.saturating_add(combined),
            receive_max: receive_max.saturating_add(combined_max),
        })
    }

    /// # Errors
    /// As the others.
    pub fn features(&self, interface: &str) -> io::Result<Vec<Feature>> {
        let count = self.feature_count(interface)?;
        // struct ethtool_gstrings: command, set, count, names.
        let mut names = vec![0; 3 + count * NAME_BYTES / 4];
        names[..3].copy_from_slice(&[GET_STRINGS, FEATURE_NAMES, count as u32]);
        self.ask(interface, &mut names)?;
        // struct ethtool_gfeatures: command, blocks of 32 features each, and
        // per block four words: available, requested, active, never changed.
        let blocks = count.div_ceil(32);
        let mut states = vec![0; 2 + blocks * 4];
        states[..2].copy_from_slice(&[GET_FEATURES, blocks as u32]);
        self.ask(interface, &mut states)?;
        Ok(parse_features(&to_bytes(&names[3..]), &states[2..]))
    }

    fn feature_count(&self, interface: &str) -> io::Result<usize> {
        // struct ethtool_sset_info: command, reserved, 64 bits of which sets
        // are asked for, and their counts.
        let mut words = [GET_STRING_SET_INFO, 0, 0, 0, 0];
        let [low, high] = halves(1 << FEATURE_NAMES);
        (words[2], words[3]) = (low, high);
        self.ask(interface, &mut words)?;
        match usize::try_from(words[4]) {
            Ok(count) if (1..=FEATURES_MAX).contains(&count) => Ok(count),
            _ => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        }
    }

    /// Has the kernel fill in a command's structure, given as words. The
    /// callers above make each as long as the kernel writes: of fixed size, or
    /// as long as the count that the kernel gave, which is the same for all
    /// interfaces and fixed when the kernel is built.
    fn ask(&self, interface: &str, words: &mut [u32]) -> io::Result<()> {
        // SAFETY: all-zero is a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // One byte stays for the terminating zero.
        if interface.len() >= request.ifr_name.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (place, byte) in request.ifr_name.iter_mut().zip(interface.bytes()) {
            *place = byte as c_char;
        }
        request.ifr_ifru.ifru_data = words.as_mut_ptr().cast();
        // SAFETY: the request and the words it points to are live for the call,
        // and the kernel writes no further than the command's structure goes.
        unsafe { ioctl::ethtool(self.0.as_raw_fd(), &raw mut request) }?;
        Ok(())
    }
}

/// A 64-bit field as it lies in two words.
fn halves(value: u64) -> [u32; 2] {
    let bytes = value.to_ne_bytes();
    let word =
        |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    [word(0), word(4)]
}

fn to_bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// A string that ends with a zero or with its field.
fn text(field: &[u8]) -> String {
    let end = field.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(&field[..end.unwrap_or(field.len())]).into_owned()
}

/// Names of [`NAME_BYTES`] each, and four words for every 32 of them.
fn parse_features(names: &[u8], states: &[u32]) -> Vec<Feature> {
    let names = names.chunks_exact(NAME_BYTES).map(text).enumerate();
    let feature = |(index, name): (usize, String)| {
        let block = states.get(index / 32 * 4..index / 32 * 4 + 4)?;
        let bit = |word: u32| word >> (index % 32) & 1 == 1;
        Some(Feature {
            is_available: bit(block[0]),
            is_active: bit(block[2]),
            name,
        })
    };
    names.filter_map(feature).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_bits_by_place() {
        let mut names = vec![0; 34 * NAME_BYTES];
        names[..5].copy_from_slice(b"first");
        names[33 * NAME_BYTES..33 * NAME_BYTES + 4].copy_from_slice(b"last");
        let states = [1, 0, 0, 0, 0, 0, 1 << 1, 0];
        let features = parse_features(&names, &states);
        assert_eq!(features.len(), 34);
        assert_eq!(
            features[0],
            Feature {
                name: "first".into(),
                is_available: true,
                is_active: false
            }
        );
        assert_eq!(
            features[33],
            Feature {
                name: "last".into(),
                is_available: false,
                is_active: true
            }
        );
        // Fewer states than names: no state, no feature.
        assert_eq!(parse_features(&names, &states[..4]).len(), 32);
    }

    #[test]
    fn texts_end_at_zero_or_at_the_end() {
        assert_eq!(text(b"veth\0junk"), "veth");
        assert_eq!(text(b"full"), "full");
        assert_eq!(halves(u64::from_ne_bytes([1, 0, 0, 0, 2, 0, 0, 0])), {
            let one = u32::from_ne_bytes([1, 0, 0, 0]);
            [one, u32::from_ne_bytes([2, 0, 0, 0])]
        });
    }

    #[test]
    fn the_loopback_interface_answers() {
        let ethtool = Ethtool::open().unwrap();
        let features = ethtool.features("lo").unwrap();
        let checksum = features
            .iter()
            .find(|feature| feature.name == "tx-checksum-ip-generic");
        assert!(
            checksum.is_some_and(|feature| feature.is_active),
            "{features:?}"
        );
        assert!(ethtool.features("no-such-if").is_err());
        assert!(ethtool.driver("a-name-that-is-too-long").is_err());
    }
}
