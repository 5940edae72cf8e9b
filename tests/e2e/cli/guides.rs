//! The guides in docs/guides, executed as they are printed.
//!
//! A block of commands says in its first line where it is typed: `sh a` on host
//! A, `sh b` on host B, `sh pc-a` on a computer behind host A. Each host has a
//! shell of its own, in its network namespace and with its own /run.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use fastvpn::error::{Error, Result};
use testbed::{Child, Namespace};

use crate::support::{FASTVPN, PATIENCE, fail, hosts};

#[testbed::trial(long)]
fn guide_two_hosts() -> Result<()> {
    follow("two-hosts", "")
}

#[testbed::trial(long)]
fn guide_containers() -> Result<()> {
    follow("containers", "")
}

#[testbed::trial(long)]
fn guide_site_to_site() -> Result<()> {
    follow("site-to-site", SITE)
}

#[testbed::trial(long)]
fn guide_plain_peer() -> Result<()> {
    follow("plain-peer", "")
}

/// The network behind a gateway, which a guide takes for granted. `N`: the site.
const SITE: &str = "
    ip netns add pc
    ip link add lan0 type veth peer name eth0 netns pc
    ip address add 192.168.N.1/24 dev lan0
    ip link set lan0 up
    ip -n pc address add 192.168.N.10/24 dev eth0
    ip -n pc link set eth0 up
    ip -n pc route add default via 192.168.N.1
";

/// Starts of commands that may come too early, and do no harm twice.
const AGAIN: [&str; 5] = [
    "ping ",
    "curl ",
    "ip netns exec box ping ",
    "ip netns exec pc ping ",
    "ip link set flannel0 mtu ",
];

/// Follows a guide from its first block to its last, after `before` on each host.
fn follow(guide: &str, before: &str) -> Result<()> {
    let hosts = hosts(1500)?;
    let (mut a, mut b) = (Shell::start(&hosts.a)?, Shell::start(&hosts.b)?);
    a.run(&before.replace('N', "1"))?;
    b.run(&before.replace('N', "2"))?;
    let blocks = blocks(guide)?;
    for (place, commands) in &blocks {
        match place.as_str() {
            "a" => a.type_in(commands)?,
            "b" => b.type_in(commands)?,
            "pc-a" => a.type_in(&format!("ip netns exec pc {commands}"))?,
            _ => return fail(format!("{guide}: no such place: {place}")),
        }
    }
    match blocks.len() {
        0..3 => fail(format!("{guide} has few commands: {}", blocks.len())),
        _ => Ok(()),
    }
}

/// The blocks of commands in a guide, with the places where they are typed.
fn blocks(guide: &str) -> Result<Vec<(String, String)>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("docs/guides/{guide}.md"));
    let text = std::fs::read_to_string(&path)
        .map_err(|cause| Error::os(format!("cannot read {}", path.display()), cause))?;
    let fenced = text.split("\n```").skip(1).step_by(2);
    let blocks = fenced.filter_map(|block| {
        let (info, commands) = block.split_once('\n')?;
        let place = info.strip_prefix("sh ")?;
        Some((place.to_string(), commands.to_string()))
    });
    Ok(blocks.collect())
}

/// A root shell on a host. What it has started ends with it.
struct Shell {
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    /// Last, so that it is killed when nothing is typed any more.
    _process: Child,
}

impl Shell {
    fn start(host: &Namespace) -> Result<Self> {
        let mut command = Command::new("unshare");
        command
            .args([
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let programs = Path::new(FASTVPN).parent().unwrap_or(Path::new("/"));
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", programs.display()));
        let mut process = host.spawn(command)?;
        let (Some(stdin), Some(stdout)) = (
            process.process().stdin.take(),
            process.process().stdout.take(),
        ) else {
            return fail("the shell has no standard input and output");
        };
        let mut shell = Self {
            stdin,
            stdout: BufReader::new(stdout),
            _process: process,
        };
        // One mount, so that neither sees the other's namespaces and sockets.
        shell.run("mount -t tmpfs none /run; mount -t sysfs none /sys")?;
        Ok(shell)
    }

    /// Types a block of a guide. What needs something that is still starting is
    /// typed again, as anybody would.
    fn type_in(&mut self, commands: &str) -> Result<()> {
        let may_be_early = AGAIN.iter().any(|start| commands.starts_with(start));
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.run(commands) {
                Err(_) if may_be_early && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(100));
                }
                result => return result,
            }
        }
    }

    /// Runs commands up to the first that fails.
    fn run(&mut self, commands: &str) -> Result<()> {
        const END: &str = "end of block:";
        let text = format!("(set -e\n{commands}\n) 2>&1\necho \"\n{END} $?\"\n");
        let failed = |cause| Error::os("the shell has ended", cause);
        self.stdin.write_all(text.as_bytes()).map_err(failed)?;
        let mut said = String::new();
        loop {
            let start = said.len();
            if self.stdout.read_line(&mut said).map_err(failed)? == 0 {
                return fail(format!("the shell has ended:\n{said}"));
            }
            match said[start..].trim().strip_prefix(END) {
                Some(" 0") => return Ok(()),
                Some(status) => return fail(format!("status{status} of\n{commands}\n{said}")),
                None => {}
            }
        }
    }
}
