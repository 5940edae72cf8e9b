//! From the first line to the last: what a tunnel says, how it ends, and that
//! nothing stays behind.

use std::fs;
use std::io::BufReader;
use std::net::Ipv4Addr;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use fastvpn::error::{Error, Result};
use nix::sys::signal::Signal;
use testbed::traffic::ping;
use testbed::{Child, Namespace};

use crate::support::{
    FASTVPN, TUNNEL, answers, bulk, check, engine_name, fail, fastvpn, hosts, stop, tried,
    tunnel_between, udp, wait_for, wait_until,
};
use crate::tools::{Stream, inventory, nothing_left, wait_for_line};

#[testbed::trial(each_engine)]
fn signals_end_it_in_order() -> Result<()> {
    let hosts = hosts(1500)?;
    let before = inventory(&hosts.a)?;
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let [mut a, b] = tunnel_between(&hosts, &["--queues", "2", "--route", "172.20.0.0/16"])?;
        check(inventory(&hosts.a)?.len() > before.len() + 4, || {
            "no inventory".into()
        })?;
        a.child().signal(signal);
        let ended = a.wait()?;
        check(ended.status.code() == Some(0), || {
            format!("{signal}: {}", ended.status)
        })?;
        nothing_left(&hosts.a, &before)?;
        // Nobody has to tell a tunnel twice, and nobody else has to either.
        udp(&hosts.a, Ipv4Addr::UNSPECIFIED, 8285)?;
        stop(b)?;
    }
    Ok(())
}

#[testbed::trial(each_engine)]
fn killed_it_leaves_nothing() -> Result<()> {
    let hosts = hosts(1500)?;
    let before = inventory(&hosts.a)?;
    let flags = "--queues 2 --peer 10.211.55.123 --route 172.20.0.0/16";
    let b = fastvpn(&hosts.b, "--queues 2 --peer 10.211.55.122")?;
    for _ in 0..3 {
        let mut a = fastvpn(&hosts.a, flags)?;
        wait_for(&hosts.a, TUNNEL[1].into())?;
        a.child().signal(Signal::SIGKILL);
        let ended = a.wait()?;
        check(ended.status.signal() == Some(9), || {
            ended.status.to_string()
        })?;
        // The next one starts at once, whatever the kernel is still busy with.
    }
    // io_uring's own end comes a moment after that of its process.
    wait_until("all of it goes", || {
        Ok(nothing_left(&hosts.a, &before).is_ok())
    })?;
    stop(b).map(drop)
}

#[testbed::trial(each_engine)]
fn it_says_what_it_does() -> Result<()> {
    let hosts = hosts(1500)?;
    let [a, b] = tunnel_between(&hosts, &["--queues", "2"])?;
    answers(&hosts.a, TUNNEL[1].into(), 56)?;
    let engine = format!("engine: {}", engine_name().unwrap_or_default());
    for (end, own, far, far_inner) in [
        (a, "10.244.55.122/16", "10.211.55.123:8285", "10.244.55.123"),
        (b, "10.244.55.123/16", "10.211.55.122:8285", "10.244.55.122"),
    ] {
        let ended = stop(end)?;
        let says = |words: &[&str]| {
            let found = ended
                .log
                .lines()
                .any(|line| words.iter().all(|word| line.contains(word)));
            check(found, || {
                format!("no line with {words:?} in:\n{}", ended.log)
            })
        };
        says(&["fastvpn0", own, "MTU 1472", "queues: 2"])?;
        says(&["peer", far, far_inner])?;
        says(&["TSO ", "USO ", "UDP_SEGMENT ", "UDP_GRO ", &engine])?;
        says(&["dropped: "])?;
        let (sent, received) = ended.packets("total")?;
        let queues = [ended.packets("queue 0")?, ended.packets("queue 1")?];
        check(sent > 0 && received > 0, || ended.log.clone())?;
        check(
            sent == queues[0].0 + queues[1].0 && received == queues[0].1 + queues[1].1,
            || ended.log.clone(),
        )?;
    }
    Ok(())
}

#[testbed::trial(each_engine)]
fn quiet_is_quiet() -> Result<()> {
    let hosts = hosts(1500)?;
    // With more queues it warns where it may not load eBPF.
    let ends = tunnel_between(&hosts, &["--quiet", "--queues", "1"])?;
    bulk(&hosts.a, &hosts.b, TUNNEL[1].into(), 5)?;
    for end in ends {
        let ended = stop(end)?;
        // But for what nobody may miss.
        let said = ended.log.lines().count();
        check(said == 1 && ended.warnings().is_empty(), || {
            format!("said:\n{}", ended.log)
        })?;
    }
    Ok(())
}

#[testbed::trial(each_engine)]
fn logs_can_be_json() -> Result<()> {
    let hosts = hosts(1500)?;
    let [a, b] = tunnel_between(&hosts, &["--log-format", "json", "-v"])?;
    let ended = stop(a)?;
    let mut messages = Vec::new();
    for line in ended.log.lines() {
        let object: serde_json::Value = serde_json::from_str(line)
            .map_err(|error| Error::new(format!("{error} in {line:?}")))?;
        for key in ["timestamp", "level"] {
            check(object[key].is_string(), || format!("no {key} in {line:?}"))?;
        }
        messages.extend(object["message"].as_str().map(String::from));
        if object["interface"] == "fastvpn0" {
            let (mtu, addresses) = (&object["mtu_bytes"], &object["addresses"]);
            check(mtu == 1472 && addresses == "10.244.55.122/16", || {
                line.into()
            })?;
        }
    }
    check(ended.log.contains("\"interface\":\"fastvpn0\""), || {
        ended.log.clone()
    })?;
    for part in [
        "fastvpn0: 10.244.55.122/16",
        "peer 10.211.55.123:8285",
        "dropped: ",
    ] {
        check(
            messages.iter().any(|message| message.contains(part)),
            || format!("no {part:?} in:\n{}", ended.log),
        )?;
    }
    stop(b).map(drop)
}

#[testbed::trial(each_engine)]
fn the_interface_is_deleted() -> Result<()> {
    for queues in ["1", "2"] {
        let hosts = hosts(1500)?;
        let before = inventory(&hosts.a)?;
        let [a, b] = tunnel_between(&hosts, &["--queues", queues, "--quiet"])?;
        testbed::ip(&hosts.a, "link delete fastvpn0")?;
        let ended = a.wait()?;
        check(ended.status.code() == Some(1), || ended.status.to_string())?;
        // Behind what it warned of at its start, if it did.
        let mut lines = ended.log.lines();
        let said = lines.find(|line| !line.contains(" WARN "));
        let is_clear = |line: &str| line.starts_with("fastvpn: ") && line.contains("interface");
        check(said.is_some_and(is_clear) && lines.next().is_none(), || {
            ended.log.clone()
        })?;
        nothing_left(&hosts.a, &before)?;
        stop(b)?;
    }
    Ok(())
}

#[testbed::trial(each_engine)]
fn the_interface_goes_down_and_up() -> Result<()> {
    let hosts = hosts(1500)?;
    let ends = tunnel_between(&hosts, &[])?;
    let streams = [
        Stream::start(&hosts.a, &hosts.b, TUNNEL[1].into())?,
        Stream::start(&hosts.b, &hosts.a, TUNNEL[0].into())?,
    ];
    for _ in 0..3 {
        streams.iter().try_for_each(Stream::wait_for_progress)?;
        testbed::ip(&hosts.a, "link set fastvpn0 down")?;
        let silence = ping(&hosts.b, TUNNEL[0].into(), 56, Duration::from_millis(100));
        check(silence.is_err(), || "it answers while it is down".into())?;
        testbed::ip(&hosts.a, "link set fastvpn0 up")?;
    }
    streams.iter().try_for_each(Stream::wait_for_progress)?;
    for stream in streams {
        stream.finish()?;
    }
    ends.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// Starts `fastvpn demo`, anywhere.
fn demo(flags: &[&str]) -> Result<(Namespace, Child)> {
    let namespace = Namespace::new()?;
    let mut command = Command::new(FASTVPN);
    command.arg("demo").args(flags);
    command.stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = namespace.spawn(command)?;
    Ok((namespace, child))
}

#[testbed::trial]
fn the_demo_plays() -> Result<()> {
    play_demo(&["--seconds", "1"])
}

#[testbed::trial]
fn the_encrypted_demo_plays() -> Result<()> {
    play_demo(&["--seconds", "1", "--encrypted"])
}

fn play_demo(flags: &[&str]) -> Result<()> {
    let (_namespace, mut child) = demo(flags)?;
    let process = child.process();
    let (stdout, stderr) = (process.stdout.take(), process.stderr.take());
    let [table, story] = std::thread::scope(|scope| {
        let story = scope.spawn(|| stderr.map(std::io::read_to_string));
        let table = stdout.map(std::io::read_to_string);
        [table, story.join().ok().flatten()]
            .map(|text| text.and_then(|text| text.ok()).unwrap_or_default())
    });
    let status = tried("wait for the demo", child.process().wait())?;
    check(status.success(), || format!("{status}:\n{story}"))?;
    let whole = story.matches("every byte intact").count();
    check(whole == 2, || format!("not intact:\n{story}"))?;
    for row in ["TCP throughput", "ping p50", "CPU seconds per GB"] {
        check(table.contains(row), || format!("no {row:?} in:\n{table}"))?;
    }
    Ok(())
}

/// Processes as /proc lists them: number, and the namespace they are in.
fn processes() -> Result<Vec<(u32, Option<u64>)>> {
    use std::os::unix::fs::MetadataExt;
    let entries = tried("list the processes", fs::read_dir("/proc"))?;
    let numbers = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let namespace = |pid| {
        let path = format!("/proc/{pid}/ns/net");
        fs::metadata(path).map(|metadata| metadata.ino()).ok()
    };
    Ok(numbers.map(|pid| (pid, namespace(pid))).collect())
}

fn children(parent: u32) -> Result<Vec<(u32, Option<u64>)>> {
    let is_child = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // Behind the name in parentheses: state and parent.
        let fields = stat
            .rsplit_once(')')
            .map(|(_, fields)| fields.split_whitespace());
        fields.and_then(|mut fields| fields.nth(1)?.parse().ok()) == Some(parent)
    };
    Ok(processes()?
        .into_iter()
        .filter(|(pid, _)| is_child(*pid))
        .collect())
}

#[testbed::trial]
fn the_demo_is_interrupted() -> Result<()> {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let (_namespace, mut child) = demo(&["--seconds", "600"])?;
        let Some(stderr) = child.process().stderr.take() else {
            return fail("no pipe");
        };
        let mut story = BufReader::new(stderr);
        wait_for_line(&mut story, "ping 10.244.55.123")?;
        let ends = children(child.pid())?;
        check(ends.len() == 2, || {
            format!("the demo has children {ends:?}")
        })?;
        child.signal(signal);
        let mut status = None;
        // What it still says has to go somewhere.
        let rest = std::thread::spawn(move || std::io::read_to_string(story));
        wait_until("the demo ends", || {
            status = child.try_wait()?;
            Ok(status.is_some())
        })?;
        check(status.is_some_and(|status| !status.success()), || {
            format!("{signal}: {status:?}, {:?}", rest.join())
        })?;
        // After SIGKILL the kernel ends them, a moment later.
        wait_until("the demo and its namespaces go", || {
            Ok(!processes()?.iter().any(|(pid, namespace)| {
                ends.iter()
                    .any(|(end, home)| pid == end || namespace.is_some() && namespace == home)
            }))
        })?;
    }
    Ok(())
}
