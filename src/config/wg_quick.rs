//! The file format of `wg-quick(8)`: `[Interface]`, and a `[Peer]` section for each peer.
//! What it says becomes the same [`Config`] as what a TOML file says.
//!
//! Names of sections and keys may be in any case; `#` begins a comment. What would run a
//! command or write to the file is refused, so that nothing is left undone in silence.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;
use std::str::FromStr;

use ipnet::IpNet;
use zeroize::Zeroizing;

use super::file::{FILE_BYTES_MAX, parse_bytes};
use super::keys::{check_owner_alone, hide_memory, open};
use super::options::Config;
use super::peer::{HostPort, PeerName, PeerSpec, parse_host_port, parse_keepalive};
use super::types::{ParseResult, parse_fwmark, parse_prefix};
use crate::error::{Error, Result, shortened};
use crate::wire::wireguard::keys::{KEY_FORM, PublicKey};

/// The flag that names a file.
const OPTION: &str = "--wg-config";

/// What a file says, and the defaults for the rest.
///
/// # Errors
/// When it cannot be read, when it holds keys and others than its owner have access to it,
/// or `FILE:LINE: what is wrong`.
pub(super) fn read_file(path: &Path) -> Result<Config> {
    let name = path.display();
    let (file, metadata) = open(OPTION, path)?;
    if metadata.len() > FILE_BYTES_MAX {
        let what = format!("{OPTION} {name} has more than {FILE_BYTES_MAX} bytes");
        return Err(Error::new(what));
    }
    hide_memory();
    // With room for more than there is, so that no copy is left behind when it grows.
    let mut bytes = Zeroizing::new(Vec::with_capacity(metadata.len() as usize + 4096));
    file.take(FILE_BYTES_MAX)
        .read_to_end(&mut bytes)
        .map_err(|cause| Error::os(format!("cannot read {OPTION} {name}"), cause))?;
    let config = parse(&name.to_string(), &bytes)?;
    let is_shared = |peer: &PeerSpec| peer.preshared_key.is_set();
    if config.private_key.is_some() || config.peers.iter().any(is_shared) {
        check_owner_alone(OPTION, path, &metadata)?;
    }
    Ok(config)
}

/// What a file with these bytes says. `name`: of the file, for errors.
///
/// # Errors
/// `FILE:LINE: what is wrong`, in one line, which quotes no key.
#[doc(hidden)]
pub fn parse(name: &str, bytes: &[u8]) -> Result<Config> {
    let mut reader = Reader {
        config: parse_bytes("", b"")?,
        section: Section::None,
        first: HashMap::new(),
        dns: Vec::new(),
    };
    let mut last = 0;
    for (number, line) in (1..).zip(bytes.split(|&byte| byte == b'\n')) {
        let read = reader.read_line(number, line);
        read.map_err(|(number, what)| fault(name, number, &what))?;
        last = number;
    }
    let ended = reader.end_section();
    ended.map_err(|(number, what)| fault(name, number.min(last), &what))?;
    let Reader {
        mut config, dns, ..
    } = reader;
    if !dns.is_empty() {
        let servers = printable(&dns.join(", "));
        let note = format!("{name}: DNS {servers} is not set; name servers are left alone");
        config.notes.push(note);
    }
    Ok(config)
}

fn fault(name: &str, line: usize, what: &str) -> Error {
    Error::new(format!("{name}:{line}: {}", printable(what)))
}

/// A text from a file, in one line.
fn printable(text: &str) -> String {
    shortened(&text.replace(char::is_control, " ")).into_owned()
}

/// What is wrong, and the number of the line.
type LineResult = std::result::Result<(), (usize, String)>;

/// Where the line is that is read.
enum Section {
    /// Before the first one.
    None,
    Interface,
    Peer(Box<Peer>),
}

/// A peer as far as it has been read.
struct Peer {
    /// Number of the line where its section begins.
    line: usize,
    key: Option<PublicKey>,
    /// All else that is said of it; the name is filled in at the end.
    spec: PeerSpec,
}

impl Peer {
    fn new(line: usize) -> Self {
        let nobody = PeerName::Key(PublicKey([0; 32]));
        Self {
            line,
            key: None,
            spec: PeerSpec::new(nobody, None),
        }
    }

    fn finish(mut self) -> std::result::Result<PeerSpec, (usize, String)> {
        let refused = |what: String| Err((self.line, what));
        let Some(key) = self.key else {
            return refused("this peer has no PublicKey".into());
        };
        if self.spec.prefixes.is_empty() {
            // Other than in WireGuard's own tools, a peer without would take all the rest.
            return refused(format!(
                "peer {key} has no AllowedIPs, so no packet could be sent to it or taken from it"
            ));
        }
        self.spec.name = PeerName::Key(key);
        self.spec.prefixes.sort_unstable();
        self.spec.prefixes.dedup();
        Ok(self.spec)
    }
}

struct Reader {
    config: Config,
    section: Section,
    /// Where each key that may be there once was seen first: in the interface, or in the
    /// peer that is read.
    first: HashMap<&'static str, usize>,
    dns: Vec<String>,
}

impl Reader {
    fn read_line(&mut self, number: usize, line: &[u8]) -> LineResult {
        let here = |what: String| (number, what);
        let text = std::str::from_utf8(line).map_err(|_| here("this is not UTF-8".into()))?;
        let text = text.split('#').next().unwrap_or_default().trim();
        if text.is_empty() {
            return Ok(());
        }
        if let Some(section) = text.strip_prefix('[') {
            return self.begin_section(number, section);
        }
        // No line is quoted as a whole: it may be a key that has lost its name.
        let (key, value) = text
            .split_once('=')
            .ok_or_else(|| here("expected KEY = VALUE or [SECTION]".into()))?;
        let (key, value) = (key.trim().to_ascii_lowercase(), value.trim());
        let read = match &self.section {
            Section::None => Err("expected [Interface] or [Peer] first".into()),
            Section::Interface => self.read_interface(&key, value, number),
            Section::Peer(_) => self.read_peer(&key, value, number),
        };
        read.map_err(here)
    }

    fn begin_section(&mut self, number: usize, name: &str) -> LineResult {
        self.end_section()?;
        let name = name.strip_suffix(']').unwrap_or_default().trim();
        if name.eq_ignore_ascii_case("peer") {
            self.first.clear();
            self.section = Section::Peer(Box::new(Peer::new(number)));
        } else if name.eq_ignore_ascii_case("interface") {
            self.once("[Interface]", number)
                .map_err(|what| (number, what))?;
            self.section = Section::Interface;
        } else {
            return Err((number, "expected [Interface] or [Peer]".into()));
        }
        Ok(())
    }

    /// Takes in the peer whose section has ended.
    fn end_section(&mut self) -> LineResult {
        if let Section::Peer(peer) = std::mem::replace(&mut self.section, Section::None) {
            self.config.peers.push(peer.finish()?);
        }
        Ok(())
    }

    /// Makes sure that a key is there once: which of two is meant nobody knows.
    fn once(&mut self, key: &'static str, number: usize) -> ParseResult<()> {
        match self.first.insert(key, number) {
            None => Ok(()),
            Some(first) => Err(format!("{key} is there already, in line {first}")),
        }
    }

    fn read_interface(&mut self, key: &str, value: &str, number: usize) -> ParseResult<()> {
        match key {
            "privatekey" => {
                self.once("PrivateKey", number)?;
                self.config.private_key = Some(secret("PrivateKey", value)?);
            }
            "listenport" => {
                self.once("ListenPort", number)?;
                let port: u16 = self::number("ListenPort", value, "a UDP port")?;
                self.config.listen_port = Some(port).filter(|port| *port > 0);
            }
            "fwmark" => {
                self.once("FwMark", number)?;
                self.config.fwmark =
                    parse_fwmark(value).map_err(|why| of("FwMark", value, &why))?;
            }
            "address" => {
                let nets = list(value).map(|text| prefix("Address", text));
                let nets: ParseResult<Vec<_>> = nets.collect();
                self.config.addresses.extend(nets?);
            }
            "mtu" => {
                self.once("MTU", number)?;
                self.config.mtu_bytes = Some(self::number("MTU", value, "a number of bytes")?);
            }
            "table" => {
                self.once("Table", number)?;
                self.config.no_routes = match &value.to_ascii_lowercase()[..] {
                    "off" => true,
                    "auto" => false,
                    _ => {
                        let why = "expected off or auto: fastvpn's routes are in the main table";
                        return Err(of("Table", value, why));
                    }
                };
            }
            "dns" => self.dns.extend(list(value).map(ToString::to_string)),
            "saveconfig" if value.eq_ignore_ascii_case("false") => {}
            "saveconfig" => {
                return Err("SaveConfig: fastvpn does not write to the file; leave it out".into());
            }
            "preup" | "postup" | "predown" | "postdown" => {
                return Err(
                    "fastvpn runs no commands: take PreUp, PostUp, PreDown and PostDown out, and \
                     run them around fastvpn, as by ExecStartPost in a systemd unit"
                        .into(),
                );
            }
            "publickey" | "presharedkey" | "allowedips" | "endpoint" | "persistentkeepalive" => {
                return Err("this belongs below [Peer]".into());
            }
            _ => return Err(unknown(key, "[Interface]")),
        }
        Ok(())
    }

    fn read_peer(&mut self, key: &str, value: &str, number: usize) -> ParseResult<()> {
        let name = match key {
            "publickey" => "PublicKey",
            "presharedkey" => "PresharedKey",
            "allowedips" => "AllowedIPs",
            "endpoint" => "Endpoint",
            "persistentkeepalive" => "PersistentKeepalive",
            "privatekey" | "listenport" | "fwmark" | "address" | "mtu" | "table" | "dns"
            | "saveconfig" | "preup" | "postup" | "predown" | "postdown" => {
                return Err("this belongs below [Interface]".into());
            }
            _ => return Err(unknown(key, "[Peer]")),
        };
        if name != "AllowedIPs" {
            self.once(name, number)?;
        }
        let Section::Peer(peer) = &mut self.section else {
            return Ok(());
        };
        match name {
            // It may be the private key, taken for the other.
            "PublicKey" => peer.key = Some(secret(name, value)?),
            "PresharedKey" => peer.spec.preshared_key = secret(name, value)?,
            "AllowedIPs" => {
                // What is beyond the prefix is left aside, as wg(8) does.
                let nets = list(value).map(|text| Ok(prefix(name, text)?.trunc()));
                let nets: ParseResult<Vec<_>> = nets.collect();
                peer.spec.prefixes.extend(nets?);
            }
            "Endpoint" => peer.spec.endpoint = Some(endpoint(value)?),
            _ => {
                let keepalive: ParseResult<_> = parse_keepalive(&value.to_ascii_lowercase());
                peer.spec.persistent_keepalive = keepalive.map_err(|why| of(name, value, &why))?;
            }
        }
        Ok(())
    }
}

/// The parts of a list with commas. Empty ones count as none.
fn list(value: &str) -> impl Iterator<Item = &str> {
    value
        .split(',')
        .map(str::trim)
        .filter(|text| !text.is_empty())
}

/// What is wrong with a value.
fn of(key: &str, value: &str, why: &str) -> String {
    format!("{key} {:?}: {why}", shortened(value))
}

/// A key that there is not. One that is not a word may be a secret, and is not quoted.
fn unknown(key: &str, section: &str) -> String {
    const WORD_CHARS_MAX: usize = 24;
    let is_word = key.len() <= WORD_CHARS_MAX && key.chars().all(|c| c.is_ascii_alphabetic());
    match is_word {
        true => format!("{section} has no key {key:?}"),
        false => format!("{section} has no such key"),
    }
}

/// A key of WireGuard's, which is not quoted if it is not one.
fn secret<K: FromStr>(name: &str, value: &str) -> ParseResult<K> {
    let key = value.parse();
    key.map_err(|_| format!("{name} is not a key: expected {KEY_FORM}"))
}

fn number<N: FromStr>(name: &str, value: &str, what: &str) -> ParseResult<N> {
    let digits = Some(value).filter(|value| value.bytes().all(|byte| byte.is_ascii_digit()));
    let number = digits.and_then(|digits| digits.parse().ok());
    number.ok_or_else(|| of(name, value, &format!("expected {what}")))
}

fn prefix(name: &str, text: &str) -> ParseResult<IpNet> {
    parse_prefix(text).map_err(|why| of(name, text, &why))
}

/// `HOST:PORT`; unlike elsewhere there is no default port.
fn endpoint(value: &str) -> ParseResult<HostPort> {
    let has_port = match value.strip_prefix('[') {
        Some(rest) => rest
            .split_once(']')
            .is_some_and(|(_, port)| !port.is_empty()),
        None => value.matches(':').count() == 1,
    };
    match parse_host_port(value) {
        Ok(_) if !has_port => {
            let why = "the port is missing, as in vpn.example.org:51820 or [fd00::1]:51820";
            Err(of("Endpoint", value, why))
        }
        parsed => parsed.map_err(|why| of("Endpoint", value, &why)),
    }
}

#[cfg(test)]
#[path = "wg_quick_tests.rs"]
mod tests;
