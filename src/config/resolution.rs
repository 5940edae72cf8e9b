//! Flags over file over defaults.
//!
//! [`Config`] is what can be said without a look at the network. Names may not
//! resolve yet and links may not be up yet; `daemon::settings` adds what follows
//! from the peers that can be reached now.

use std::path::{Path, PathBuf};

use ipnet::IpNet;

use super::file::{Parsed, parse_file};
use super::options::{TUN_NAME_DEFAULT, TunnelArgs};
use super::peers::check_peers;
use super::types::{BusyPoll, CoreList, Feature, Io, Listen, Log, PeerSpec, Wanted};
use crate::error::{Error, Result};

/// Queues that are used unless more are asked for.
const QUEUES_DEFAULT_MAX: usize = 4;

/// Packets that may wait in a TUN queue unless it is said how many.
const TXQUEUELEN_DEFAULT: u32 = 1000;

/// What is wanted of a tunnel, checked, with the defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The command line's flags, which a file read again does not override.
    pub(super) args: TunnelArgs,
    /// The file that the rest came from.
    pub config_file: Option<PathBuf>,
    /// Workers.
    pub queues: u16,
    /// The peers, not resolved. No prefix is there twice, no peer either, and
    /// one peer at most is without prefixes.
    pub peers: Vec<PeerSpec>,
    /// Whether the file says that there are none, by an empty list.
    pub(super) has_no_peers: bool,
    /// Address and port to listen on, if given.
    pub listen: Option<Listen>,
    /// Name of the TUN device.
    pub tun: String,
    /// MTU of the TUN device in bytes, if given.
    pub mtu_bytes: Option<u32>,
    /// Addresses of the TUN device; none to derive one.
    pub addresses: Vec<IpNet>,
    /// Routes through the TUN device besides the peers' prefixes.
    pub routes: Vec<IpNet>,
    /// Packets that may wait in a TUN queue.
    pub txqueuelen: u32,
    /// Whether the kernel's routes are left alone.
    pub no_routes: bool,
    /// Whether the tunnel counts as an IP hop.
    pub hop: bool,
    /// How long to look for arrivals without sleeping.
    pub busy_poll: BusyPoll,
    /// Cores to pin workers to, in turn.
    pub cores: Option<Vec<usize>>,
    /// The I/O engine asked for.
    pub io: Io,
    /// Kernel features to try.
    pub wanted: Wanted,
    /// Path of the control socket.
    pub control: PathBuf,
    /// Whether that is the default path rather than one that was given.
    pub control_is_default: bool,
    /// Whether to take over from the running process.
    pub takeover: bool,
    /// What to log, and how.
    pub log: Log,
}

impl Config {
    /// Reads the file that the flags name, if any; checks both, and fills in
    /// what can be known without a look at the network.
    ///
    /// # Errors
    /// One line that names the flag, or the place in the file.
    pub fn from_args(args: &TunnelArgs) -> Result<Self> {
        let file = match &args.config {
            Some(path) => parse_file(path)?,
            None => Parsed::default(),
        };
        let [route_place, no_routes_place, cores_place] = [
            ("route", !args.route.is_empty()),
            ("no-routes", args.no_routes.is_some()),
            ("cores", args.cores.is_some()),
        ]
        .map(|(key, is_flag)| file.places.get(key).filter(|_| !is_flag));
        let all = args.over(file.args);
        check_peers(&all.peer)?;
        let no_routes = all.no_routes.unwrap_or(false);
        if let Some(route) = all.route.first().filter(|_| no_routes) {
            return Err(routes_contradict(route, route_place, no_routes_place));
        }
        let cores = all.cores.map(|list| checked_cores(list, cores_place));
        let tun = all.tun.unwrap_or_else(|| TUN_NAME_DEFAULT.into());
        Ok(Self {
            args: args.clone(),
            config_file: args.config.clone(),
            queues: all.queues.unwrap_or_else(default_queues),
            peers: all.peer,
            has_no_peers: file.has_no_peers,
            listen: all.listen,
            mtu_bytes: all.mtu,
            addresses: all.address,
            routes: all.route,
            txqueuelen: all.txqueuelen.unwrap_or(TXQUEUELEN_DEFAULT),
            no_routes,
            hop: all.hop.unwrap_or(false),
            busy_poll: all.busy_poll.unwrap_or(BusyPoll::Off),
            cores: cores.transpose()?,
            io: all.io.unwrap_or_default(),
            wanted: wanted(&all.without),
            control_is_default: all.control.is_none(),
            control: all.control.unwrap_or_else(|| default_control_path(&tun)),
            tun,
            takeover: all.takeover.unwrap_or(false),
            log: Log {
                verbose: all.verbose,
                quiet: all.quiet,
                format: all.log_format.unwrap_or_default(),
            },
        })
    }

    /// The configuration as it would be at a start now: the same flags, and the
    /// file as it is today.
    ///
    /// # Errors
    /// As [`Self::from_args`]; and when there were peers, and the file says nothing
    /// of any: it is more likely half written, or another one, than meant.
    pub(crate) fn reread(&self) -> Result<Self> {
        let new = Self::from_args(&self.args)?;
        let file = new.config_file.as_deref().unwrap_or(Path::new(""));
        match self.peers.len() {
            count if count > 0 && new.peers.is_empty() && !new.has_no_peers => {
                let file = file.display();
                let what = format!("{file} has no peers any more, and {count} would be removed");
                Err(Error::new(what).hint("if that is meant, write `peer = []`"))
            }
            _ => Ok(new),
        }
    }
}

impl TunnelArgs {
    /// These, and those of `file` for what is not given here.
    fn over(&self, file: Self) -> Self {
        let flags = self.clone();
        let says_how_much = flags.quiet || flags.verbose > 0;
        let volume = if says_how_much { &flags } else { &file };
        Self {
            verbose: volume.verbose,
            quiet: volume.quiet,
            config: flags.config,
            queues: flags.queues.or(file.queues),
            peer: list(flags.peer, file.peer),
            listen: flags.listen.or(file.listen),
            tun: flags.tun.or(file.tun),
            mtu: flags.mtu.or(file.mtu),
            address: list(flags.address, file.address),
            route: list(flags.route, file.route),
            no_routes: flags.no_routes.or(file.no_routes),
            hop: flags.hop.or(file.hop),
            cores: flags.cores.or(file.cores),
            busy_poll: flags.busy_poll.or(file.busy_poll),
            txqueuelen: flags.txqueuelen.or(file.txqueuelen),
            io: flags.io.or(file.io),
            without: list(flags.without, file.without),
            control: flags.control.or(file.control),
            takeover: flags.takeover.or(file.takeover),
            log_format: flags.log_format.or(file.log_format),
        }
    }
}

/// A list that is given replaces the file's as a whole.
fn list<T>(flags: Vec<T>, file: Vec<T>) -> Vec<T> {
    if flags.is_empty() { file } else { flags }
}

pub(crate) fn default_queues() -> u16 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    cores.min(QUEUES_DEFAULT_MAX) as u16
}

/// Names each where it is: in the file, if it has a place there, or a flag.
fn routes_contradict(
    route: &IpNet,
    route_place: Option<&String>,
    no_routes_place: Option<&String>,
) -> Error {
    let dashes = |place: Option<&String>| if place.is_none() { "--" } else { "" };
    let place = route_place.or(no_routes_place);
    let place = place.map(|place| format!("{place}: ")).unwrap_or_default();
    let (of_route, of_no_routes) = (dashes(route_place), dashes(no_routes_place));
    Error::new(format!(
        "{place}{of_route}route {route} contradicts {of_no_routes}no-routes"
    ))
    .hint("leave one of them out")
}

fn checked_cores(list: CoreList, place: Option<&String>) -> Result<Vec<usize>> {
    let available: Vec<usize> = core_affinity::get_core_ids()
        .unwrap_or_default()
        .iter()
        .map(|core| core.id)
        .collect();
    if let Some(missing) = list.0.iter().find(|core| !available.contains(core)) {
        let place = place.map_or("--cores", String::as_str);
        return Err(
            Error::new(format!("{place}: core {missing} is not available"))
                .hint(format!("this process may use {available:?}")),
        );
    }
    Ok(list.0)
}

fn wanted(without: &[Feature]) -> Wanted {
    let with = |feature| !without.contains(&feature);
    Wanted {
        tso: with(Feature::Tso),
        uso: with(Feature::Uso),
        udp_segment: with(Feature::UdpSegment),
        udp_gro: with(Feature::UdpGro),
    }
}

/// Where control sockets are, unless something else is asked for.
pub(crate) const CONTROL_DIRECTORY: &str = "/run/fastvpn";

/// `/run/fastvpn/NAME.sock`; in another network namespace than the host's also
/// with the namespace's number, since `/run` may be shared and the name is
/// unique in its namespace only.
pub(crate) fn default_control_path(tun: &str) -> PathBuf {
    let name = match namespace_of_its_own() {
        Some(inode) => format!("{tun}-{inode}.sock"),
        None => format!("{tun}.sock"),
    };
    Path::new(CONTROL_DIRECTORY).join(name)
}

/// The sockets in [`CONTROL_DIRECTORY`] that are named as [`default_control_path`]
/// names them in this network namespace.
pub(crate) fn default_control_paths() -> Vec<PathBuf> {
    let suffix = default_control_path("");
    let suffix = suffix.file_name().unwrap_or_default().as_encoded_bytes();
    let entries = std::fs::read_dir(CONTROL_DIRECTORY).into_iter().flatten();
    let names = entries.flatten().map(|entry| entry.file_name());
    let mut paths: Vec<PathBuf> = names
        .filter(|name| name.as_encoded_bytes().ends_with(suffix))
        .map(|name| Path::new(CONTROL_DIRECTORY).join(name))
        .collect();
    paths.sort();
    paths
}

/// The number of this process' network namespace, unless it is the host's: that
/// of the first process, for whoever may look at it (ptrace(2)), as in a
/// container of its own. For others the kernel's first namespace, the only one
/// with the settings of net/core/sysctl_net_core.c's `net_core_table`.
fn namespace_of_its_own() -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    let inode = |path: &str| std::fs::metadata(path).map(|metadata| metadata.ino());
    let own = inode("/proc/self/ns/net").ok()?;
    let is_the_hosts = match inode("/proc/1/ns/net") {
        Ok(first) => own == first,
        Err(_) => Path::new("/proc/sys/net/core/netdev_budget").exists(),
    };
    (!is_the_hosts).then_some(own)
}

#[cfg(test)]
#[path = "resolution_tests.rs"]
mod tests;
