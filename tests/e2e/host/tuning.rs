//! The scripts in `tuning/`: what `host.sh` changes it puts back, and it says
//! what it cannot do.
//!
//! Everything is changed inside namespaces of the test's own, whose sysfs
//! shows their interfaces only; settings of the whole host are looked at by
//! `--dry-run` alone.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fastvpn::error::{Error, Result};
use testbed::{Namespace, UNDERLAY_NAME};

use crate::support::{UNDERLAY, check, fail, fastvpn, hosts, link, stop, tried, wait_until};

const HOST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tuning/host.sh");
const PROFILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tuning/profile.sh");

/// A directory that goes with the test.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Result<Self> {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("tuning-{name}"));
        let _ = fs::remove_dir_all(&path);
        tried("make a directory", fs::create_dir_all(&path))?;
        Ok(Self(path))
    }

    fn state(&self) -> PathBuf {
        self.0.join("state")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What a script said, and its exit status.
struct Said {
    text: String,
    code: Option<i32>,
}

impl Said {
    fn well(self) -> Result<String> {
        check(self.code == Some(0), || {
            format!("exit status {:?}:\n{}", self.code, self.text)
        })?;
        Ok(self.text)
    }
}

/// Runs a command on the host itself.
fn run(mut command: Command) -> Result<Said> {
    let output = tried("run a script", command.stdin(Stdio::null()).output())?;
    let streams = [output.stdout, output.stderr];
    Ok(Said {
        text: String::from_utf8_lossy(&streams.concat()).into_owned(),
        code: output.status.code(),
    })
}

/// Runs a command in a namespace whose sysfs it sees.
fn run_in(namespace: &Namespace, arguments: &[&str]) -> Result<Said> {
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c"])
        .arg("mount -t sysfs sysfs /sys && exec \"$@\" 2>&1")
        .arg("sh")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = namespace.spawn(command)?;
    let stdout = child.process().stdout.take();
    let text = match stdout.map(std::io::read_to_string) {
        Some(text) => tried("read what a script says", text)?,
        None => return fail("no pipe"),
    };
    let status = tried("wait for a script", child.process().wait())?;
    Ok(Said {
        text,
        code: status.code(),
    })
}

/// Runs `host.sh` in a namespace on the underlay's interface.
fn host(namespace: &Namespace, directory: &Directory, arguments: &str) -> Result<Said> {
    let state = directory.state();
    let state = state.to_string_lossy();
    let mut all = vec![HOST, "--dev", UNDERLAY_NAME, "--state", &state];
    all.extend(arguments.split_whitespace());
    run_in(namespace, &all)
}

/// All settings of a namespace that a script could change.
fn settings(namespace: &Namespace) -> Result<String> {
    let files = "/sys/class/net/*/tx_queue_len /sys/class/net/*/queues/*/* /proc/sys/net/core/*";
    let said = run_in(
        namespace,
        &["sh", "-c", &format!("grep -s . {files}; true")],
    )?;
    let text = said.well()?;
    check(text.contains("rps_cpus:"), || {
        format!("no settings:\n{text}")
    })?;
    Ok(text)
}

fn queue_length(namespace: &Namespace, interface: &str) -> Result<String> {
    let file = format!("/sys/class/net/{interface}/tx_queue_len");
    Ok(run_in(namespace, &["cat", &file])?
        .well()?
        .trim()
        .to_string())
}

/// Waits until the TUN is there and as it was asked for.
fn wait_for_queue_length(namespace: &Namespace, length: u32) -> Result<()> {
    wait_until("the TUN is there", || {
        Ok(link(namespace, "fastvpn0").is_ok_and(|link| link.txqueuelen == length))
    })
}

/// Makes the underlay's queue shorter than what is wanted.
fn shorten_queue(namespace: &Namespace) -> Result<()> {
    let file = format!("/sys/class/net/{UNDERLAY_NAME}/tx_queue_len");
    run_in(namespace, &["sh", "-c", &format!("echo 77 >{file}")])?.well()?;
    Ok(())
}

#[testbed::trial(needs_root)]
fn tuning_is_reverted() -> Result<()> {
    let directory = Directory::new("restores")?;
    let hosts = hosts(1500)?;
    shorten_queue(&hosts.a)?;
    let tunnel = fastvpn(&hosts.a, &format!("--peer {} --txqueuelen 55", UNDERLAY[1]))?;
    wait_for_queue_length(&hosts.a, 55)?;
    let before = settings(&hosts.a)?;

    for _ in 0..2 {
        host(&hosts.a, &directory, "apply --with rps,rfs")?.well()?;
        for interface in [UNDERLAY_NAME, "fastvpn0"] {
            let length = queue_length(&hosts.a, interface)?;
            check(length == "1000", || format!("{interface}: {length}"))?;
        }
    }
    let during = settings(&hosts.a)?;
    check(during.contains("rx-0/rps_flow_cnt:32768"), || {
        during.clone()
    })?;
    let shown = host(&hosts.a, &directory, "show")?.well()?;
    check(shown.contains("tx_queue_len = 1000\n"), || shown.clone())?;
    check(shown.contains("former values: "), || shown.clone())?;
    // The test's namespace has this one to look at only.
    let said = host(&hosts.a, &directory, "apply --only buffers")?.well()?;
    check(said.contains("rmem_max"), || said.clone())?;

    host(&hosts.a, &directory, "revert")?.well()?;
    let after = settings(&hosts.a)?;
    check(after == before, || {
        format!("before:\n{before}\nafter:\n{after}")
    })?;
    check(!directory.state().exists(), || "the state is kept".into())?;
    let again = host(&hosts.a, &directory, "revert")?.well()?;
    check(again.contains("nothing to revert"), || again.clone())?;
    stop(tunnel).map(drop)
}

#[testbed::trial(needs_root)]
fn tuning_is_reverted_after_a_partial_apply() -> Result<()> {
    let directory = Directory::new("partial")?;
    let hosts = hosts(1500)?;
    shorten_queue(&hosts.a)?;
    let before = settings(&hosts.a)?;
    host(&hosts.a, &directory, "apply --only rfs")?.well()?;
    // Killed after the old value was kept and before the new one was set.
    let mut state = tried("read the state", fs::read_to_string(directory.state()))?;
    let index = hosts.a.netlink()?.link_index(UNDERLAY_NAME)?;
    let Some(index) = index else {
        return fail("no underlay");
    };
    state += &format!("/sys/class/net/{UNDERLAY_NAME}/tx_queue_len\t{index}\t77\n");
    tried("write the state", fs::write(directory.state(), state))?;
    host(&hosts.a, &directory, "apply --only txqueuelen")?.well()?;
    check(queue_length(&hosts.a, UNDERLAY_NAME)? == "1000", || {
        "it was not applied".into()
    })?;
    host(&hosts.a, &directory, "revert")?.well()?;
    let after = settings(&hosts.a)?;
    check(after == before, || {
        format!("before:\n{before}\nafter:\n{after}")
    })
}

#[testbed::trial(needs_root)]
fn tuning_leaves_what_is_gone() -> Result<()> {
    let directory = Directory::new("gone")?;
    let hosts = hosts(1500)?;
    let start = |length: u32| {
        let flags = format!("--peer {} --txqueuelen {length}", UNDERLAY[1]);
        let tunnel = fastvpn(&hosts.a, &flags)?;
        wait_for_queue_length(&hosts.a, length)?;
        Ok::<_, Error>(tunnel)
    };
    let tunnel = start(55)?;
    host(&hosts.a, &directory, "apply --only txqueuelen")?.well()?;
    // Elsewhere the values would mean nothing.
    let elsewhere = host(&hosts.b, &directory, "revert")?;
    check(
        elsewhere.code == Some(1) && elsewhere.text.contains("another network namespace"),
        || elsewhere.text.clone(),
    )?;
    stop(tunnel)?;
    // An interface of the same name, but not the same.
    let tunnel = start(66)?;
    let said = host(&hosts.a, &directory, "revert")?.well()?;
    check(said.contains("its interface is gone"), || said.clone())?;
    let length = queue_length(&hosts.a, "fastvpn0")?;
    check(length == "66", || format!("a stranger's queue is {length}"))?;
    stop(tunnel).map(drop)
}

/// A veth has no channels to combine, so a stand-in for ethtool has them.
#[testbed::trial(needs_root)]
fn tuning_of_nic_queues_is_reverted() -> Result<()> {
    const ETHTOOL: &str = r#"#!/bin/sh
now="$(dirname "$0")/now"
case "$1" in
-l) printf 'Channel parameters for %s:\nPre-set maximums:\nRX:\t\tn/a\nCombined:\t8\n' "$2"
    printf 'Current hardware settings:\nRX:\t\tn/a\nCombined:\t%s\n' "$(cat "$now")" ;;
-L) [ "$3" = combined ] && echo "$4" >"$now" ;;
esac
"#;
    let directory = Directory::new("channels")?;
    let program = directory.0.join("ethtool");
    let now = directory.0.join("now");
    tried("write a program", fs::write(&program, ETHTOOL))?;
    tried(
        "make it one",
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)),
    )?;
    tried("write a file", fs::write(&now, "1\n"))?;
    let hosts = hosts(1500)?;
    let before = settings(&hosts.a)?;
    let path = format!(
        "PATH={}:{}",
        directory.0.display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let state = directory.state();
    let with_ethtool = |action: &str| {
        let state = state.to_string_lossy();
        let all = [
            "env",
            &path,
            HOST,
            "--dev",
            UNDERLAY_NAME,
            "--state",
            &state,
            action,
        ];
        run_in(&hosts.a, &all)?.well()
    };
    let channels = || tried("read a file", fs::read_to_string(&now));
    let mut count_cpus = Command::new("getconf");
    count_cpus.arg("_NPROCESSORS_ONLN");
    let cpus: usize = run(count_cpus)?.well()?.trim().parse().unwrap_or(1);

    with_ethtool("apply")?;
    with_ethtool("apply")?;
    check(channels()?.trim() == cpus.min(8).to_string(), || {
        format!("{:?} of {cpus} CPUs", channels())
    })?;
    with_ethtool("revert")?;
    check(channels()?.trim() == "1", || format!("{:?}", channels()))?;
    let after = settings(&hosts.a)?;
    check(after == before, || {
        format!("before:\n{before}\nafter:\n{after}")
    })
}

#[testbed::trial]
fn tuning_dry_run_changes_nothing() -> Result<()> {
    let directory = Directory::new("dry")?;
    let state = directory.state();
    let every = "rps,rfs,busy-poll";
    let snapshot = || {
        let files =
            "/proc/sys/net/core/* /sys/class/net/lo/queues/*/* /proc/irq/*/smp_affinity_list";
        let mut command = Command::new("sh");
        command.args(["-c", &format!("grep -s . {files}; true")]);
        run(command)?.well()
    };
    let before = snapshot()?;
    let mut command = Command::new(HOST);
    command.args(["apply", "--dry-run", "--dev", "lo", "--with", every]);
    command.arg("--state").arg(&state);
    let said = run(command)?.well()?;
    for group in ["buffers: ", "backlog: ", "irq: ", "rps: ", "busy-poll: "] {
        check(said.contains(group), || format!("no {group}in:\n{said}"))?;
    }
    check(said.contains("netdev_max_backlog = "), || said.clone())?;
    check(snapshot()? == before, || "something was changed".into())?;
    check(!state.exists(), || "it kept a state".into())
}

#[testbed::trial]
fn tuning_refuses_wrong_usage() -> Result<()> {
    let cases = [
        (HOST, "", 2, "one of show, apply, revert"),
        (HOST, "show apply", 2, "one of show, apply, revert"),
        (HOST, "show --only backlog,turbo", 2, "no group turbo"),
        (HOST, "show --dev", 2, "takes a value"),
        (
            HOST,
            "show --dev no-such-nic",
            2,
            "no interface no-such-nic",
        ),
        (HOST, "show --frobnicate", 2, "what is --frobnicate"),
        (PROFILE, "--seconds 0", 2, "--seconds takes 1 to 300"),
        (PROFILE, "--seconds 301", 2, "--seconds takes 1 to 300"),
        (PROFILE, "--call-graph x", 2, "--call-graph takes"),
        (PROFILE, "--pid 0", 1, "no process 0"),
        (PROFILE, "--pid x", 1, "no process x"),
    ];
    for (script, arguments, code, text) in cases {
        let mut command = Command::new(script);
        command.args(arguments.split_whitespace());
        let said = run(command)?;
        check(said.code == Some(code) && said.text.contains(text), || {
            format!("{arguments:?}: {:?}\n{}", said.code, said.text)
        })?;
    }
    Ok(())
}

#[testbed::trial]
fn tuning_scripts_are_sound() -> Result<()> {
    for script in [HOST, PROFILE] {
        let mut command = Command::new("bash");
        command.args(["-n", script]);
        run(command)?.well()?;
        let mut help = Command::new(script);
        help.arg("--help");
        let said = run(help)?;
        check(
            said.text.contains("Exit status") || said.text.contains("--seconds"),
            || said.text.clone(),
        )?;
    }
    Ok(())
}
