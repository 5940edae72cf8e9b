//! Masquerading for a network's containers: rules of flannel's, in a table of nftables' that
//! ends with the process, however that ends.
//!
//! The kernel lets a table belong to whoever made it and removes it with its owner's netlink
//! socket (`NFT_TABLE_F_OWNER`, Linux 5.12). The owner is nft(8), which takes commands from a
//! pipe, and ends when that is closed.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Error, Result, shortened};

/// How long nft may take at a start, and while packets are carried.
const PATIENCE: Duration = Duration::from_secs(10);
const PATIENCE_LATER: Duration = Duration::from_secs(1);

/// Pauses between attempts to start it again, which grow.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Longest answer that is read.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// Masquerading, as long as this is there.
pub(crate) struct Masquerade {
    network: Ipv4Net,
    subnet: Ipv4Net,
    /// `None` while it cannot be started.
    owner: Option<Owner>,
    /// When to try again, and after which pause if that fails.
    next: Instant,
    pause: Duration,
}

impl Masquerade {
    /// Masquerades what leaves `network`, and what comes into it from elsewhere than by the
    /// tunnel; but not what containers of this host's `subnet` and others of the network say
    /// to each other.
    ///
    /// # Errors
    /// When there is no nft, or it cannot do it; with what it says.
    pub(crate) fn start(network: Ipv4Net, subnet: Ipv4Net) -> Result<Self> {
        Ok(Self {
            network,
            subnet,
            owner: Some(Owner::start(network, subnet, PATIENCE)?),
            next: Instant::now(),
            pause: PAUSE_MIN,
        })
    }

    /// Starts again what somebody has ended, if it is time for that. Takes a second at most.
    pub(crate) fn poll(&mut self, now: Instant) {
        if self.owner.as_mut().is_some_and(Owner::has_ended) {
            self.owner = None;
            (self.next, self.pause) = (now, PAUSE_MIN);
        }
        if self.owner.is_some() || now < self.next {
            return;
        }
        match Owner::start(self.network, self.subnet, PATIENCE_LATER) {
            Ok(owner) => {
                tracing::warn!("nft has ended, and masquerades again (--ip-masq)");
                self.owner = Some(owner);
            }
            Err(error) => {
                // Once for all attempts.
                match self.pause == PAUSE_MIN {
                    true => {
                        tracing::error!(%error, "no longer masquerading (--ip-masq), trying again: {error}")
                    }
                    false => tracing::debug!("not masquerading: {error}"),
                }
                self.next = now + self.pause;
                self.pause = (self.pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

/// The process that has the rules.
struct Owner {
    nft: Child,
    /// It ends when this is closed.
    commands: Option<ChildStdin>,
}

impl Owner {
    fn start(network: Ipv4Net, subnet: Ipv4Net, patience: Duration) -> Result<Self> {
        let mut command = Command::new("nft");
        let command = command
            .arg("-i")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let started = command.stderr(Stdio::inherit()).spawn();
        let mut nft = started.map_err(|cause| {
            let error = Error::os("cannot start nft for --ip-masq", cause);
            error.hint("install nftables")
        })?;
        let commands = nft.stdin.take();
        let mut owner = Self { nft, commands };
        let added = owner.add(&table_name(), (network, subnet), patience);
        if added.is_err() {
            // Nobody waits for one that does not answer.
            let _ = owner.nft.kill();
        }
        added.map(|()| owner)
    }

    fn add(
        &mut self,
        table: &str,
        (network, subnet): (Ipv4Net, Ipv4Net),
        patience: Duration,
    ) -> Result<()> {
        let cannot = |cause| Error::os("cannot add --ip-masq's rules by nft", cause);
        let text = commands(table, network, subnet);
        if let Some(commands) = &mut self.commands {
            commands.write_all(text.as_bytes()).map_err(cannot)?;
        }
        let (mut said, deadline) = (String::new(), Instant::now() + patience);
        while !is_listed(&said, table) {
            let Some(stdout) = &mut self.nft.stdout else {
                break;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut ready = [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)];
            let is_late = poll(&mut ready, timeout).is_ok_and(|count| count == 0);
            let mut buffer = [0; 4096];
            let count = match is_late {
                true => 0,
                false => stdout.read(&mut buffer).map_err(cannot)?,
            };
            if count == 0 || said.len() > ANSWER_BYTES_MAX {
                let said = said.replace(char::is_control, " ");
                let what = format!("nft does not take --ip-masq's rules: {}", shortened(&said));
                return Err(Error::new(what).hint("it takes nftables 0.9.9 and Linux 5.12"));
            }
            said += &String::from_utf8_lossy(&buffer[..count]);
        }
        Ok(())
    }

    /// Whether somebody has ended nft, and the rules with it.
    fn has_ended(&mut self) -> bool {
        !matches!(self.nft.try_wait(), Ok(None))
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.commands = None;
        // It ends by itself, unless it is stuck.
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.nft.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = self.nft.kill();
        let _ = self.nft.wait();
    }
}

/// Another process of this host's may have one, too, as in a takeover.
fn table_name() -> String {
    format!("fastvpn_{}", std::process::id())
}

/// The rules, and a look at them: the order is flannel's.
fn commands(table: &str, network: Ipv4Net, subnet: Ipv4Net) -> String {
    let mut text = format!(
        "add table ip {table} {{ flags owner; }}\n\
         add chain ip {table} postrouting {{ type nat hook postrouting priority srcnat; }}\n"
    );
    for rule in [
        // What somebody else has marked for masquerading, such as kube-proxy.
        "meta mark & 0x4000 == 0x4000 return".to_string(),
        format!("ip saddr {subnet} ip daddr {network} return"),
        format!("ip saddr {network} ip daddr {subnet} return"),
        format!("ip saddr != {network} ip daddr {subnet} return"),
        format!("ip saddr {network} ip daddr != 224.0.0.0/4 masquerade fully-random"),
        format!("ip saddr != {network} ip daddr {network} masquerade fully-random"),
    ] {
        text += &format!("add rule ip {table} postrouting {rule}\n");
    }
    text + &format!("list table ip {table}\n")
}

/// Whether nft has shown all of the rules.
fn is_listed(said: &str, table: &str) -> bool {
    let listed = said.split_once(&format!("table ip {table} {{"));
    listed.is_some_and(|(_, rules)| {
        rules.matches("masquerade fully-random").count() == 2 && rules.contains("\n}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::Namespace;

    fn rules() -> String {
        let output = Command::new("nft")
            .args(["list", "ruleset"])
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    #[ignore = "needs nft"]
    fn rules_last_as_long_as_their_owner() {
        let namespace = Namespace::new().unwrap();
        namespace.run(|| {
            let (network, subnet) = ("10.50.0.0/16", "10.50.7.0/24");
            let (network, subnet) = (network.parse().unwrap(), subnet.parse().unwrap());
            let mut one = Masquerade::start(network, subnet).unwrap();
            let text = rules();
            assert_eq!(text.matches("return").count(), 4, "{text}");
            assert_eq!(text.matches("masquerade fully-random").count(), 2, "{text}");
            assert!(
                text.contains("ip saddr 10.50.7.0/24 ip daddr 10.50.0.0/16 return"),
                "{text}"
            );
            // It comes back, at a later time if it cannot be started now.
            let owner = |one: &mut Masquerade| one.owner.as_mut().unwrap().nft.id();
            let (now, first) = (Instant::now(), owner(&mut one));
            one.poll(now);
            assert_eq!(owner(&mut one), first);
            one.owner = None;
            (one.next, one.pause) = (now + PAUSE_MAX, PAUSE_MAX);
            one.poll(now);
            assert_eq!(rules(), "");
            one.poll(now + PAUSE_MAX);
            assert_eq!(rules().matches("masquerade fully-random").count(), 2);
            let ended = &mut one.owner.as_mut().unwrap().nft;
            ended.kill().unwrap();
            ended.wait().unwrap();
            one.poll(now);
            assert_eq!(rules().matches("masquerade fully-random").count(), 2);
            drop(one);
            assert_eq!(rules(), "");
        });
    }
}
