//! Takeovers in which one of the two is killed, at each step of what they say to each
//! other: a relay between them, which passes on bytes and descriptors, knows when.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use fastvpn::error::{Error, Result};
use nix::cmsg_space;
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use socket2::SockRef;

use crate::daemon::takeover::{Stage, appearance};
use crate::host::routes::{net, own_routes};
use crate::operator::connect;
use crate::packets::TUNNEL_NAME;
use crate::site::{inside, peer, wait_for_each_other};
use crate::support::{PATIENCE, Tunnel, check, fail, link, stop, tried, wait_until};
use crate::tools::Stream;
use crate::wireguard::wire::NonceWatch;

/// What is said, in this order. Each is a line; the descriptors come with a space before
/// that of the manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Request,
    Descriptors,
    Manifest,
    Ready,
    Go,
    Taken,
}

const STEPS: [Step; 6] = [
    Step::Request,
    Step::Descriptors,
    Step::Manifest,
    Step::Ready,
    Step::Go,
    Step::Taken,
];

/// Descriptors of two workers, and of the control socket.
const DESCRIPTORS_MAX: usize = 7;

impl Step {
    fn is_old_ones(self) -> bool {
        !matches!(self, Self::Request | Self::Ready | Self::Taken)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Old,
    New,
}

/// Bytes, and the descriptors that came with them.
struct Message {
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Message {
    fn receive(mut stream: &UnixStream, step: Step) -> Result<Self> {
        if step != Step::Descriptors {
            let mut bytes = Vec::new();
            while bytes.last() != Some(&b'\n') {
                let mut byte = [0];
                let read = stream.read_exact(&mut byte);
                tried(&format!("hear {step:?}"), read)?;
                bytes.extend(byte);
            }
            let descriptors = Vec::new();
            return Ok(Self { bytes, descriptors });
        }
        let mut byte = [0];
        let mut control = cmsg_space!([RawFd; DESCRIPTORS_MAX]);
        let mut parts = [IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let fd = stream.as_raw_fd();
        let received = recvmsg::<()>(fd, &mut parts, Some(&mut control), flags);
        let message = tried(&format!("hear {step:?}"), received.map_err(Into::into))?;
        check(message.bytes == 1, || format!("{step:?} does not come"))?;
        let mut descriptors = Vec::new();
        let parts = message.cmsgs().map_err(Into::into);
        for part in tried("read a message", parts)? {
            if let ControlMessageOwned::ScmRights(received) = part {
                // SAFETY: the kernel has just made them for us; nobody else knows of them.
                let owned = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
                descriptors.extend(received.into_iter().map(owned));
            }
        }
        let bytes = byte.to_vec();
        Ok(Self { bytes, descriptors })
    }

    fn send(&self, mut stream: &UnixStream) -> Result<()> {
        if self.descriptors.is_empty() {
            return tried("pass a message on", stream.write_all(&self.bytes));
        }
        let raw: Vec<_> = self.descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let parts = [IoSlice::new(&self.bytes)];
        let (fd, flags) = (stream.as_raw_fd(), MsgFlags::MSG_NOSIGNAL);
        let sent = sendmsg::<()>(fd, &parts, &rights, flags, None);
        tried("pass descriptors on", sent.map(drop).map_err(Into::into))
    }
}

/// The two ends of what a relay is between.
struct Relay {
    old: UnixStream,
    new: UnixStream,
    /// What the new process has said already: [`Step::Request`].
    request: Message,
}

impl Relay {
    /// Starts a process that is to take over, and gets between the two.
    fn start(stage: &Stage, flags: &[&str]) -> Result<(Tunnel, Self)> {
        let (path, aside) = (stage.operator.socket(), stage.operator.path("aside.sock"));
        tried("put the socket aside", std::fs::rename(&path, &aside))?;
        let listener = tried("listen", UnixListener::bind(&path))?;
        let timeout = SockRef::from(&listener).set_read_timeout(Some(PATIENCE));
        tried("set a timeout", timeout)?;
        let process = stage.start(&[&["--takeover"], flags].concat())?;
        let (new, _) = tried("wait for the new process", listener.accept())?;
        tried("set a timeout", new.set_read_timeout(Some(PATIENCE)))?;
        let request = Message::receive(&new, Step::Request)?;
        let old = connect(&aside)?;
        // Whoever comes now finds the real one, as without a relay.
        drop(listener);
        tried("put the socket back", std::fs::rename(&aside, &path))?;
        Ok((process, Self { old, new, request }))
    }

    /// Passes everything on until `last` is said: that too, or it is lost. After that
    /// the old process cannot say anything more if it `is_alone`.
    fn pass_until(mut self, last: Step, passes_last: bool, is_alone: bool) -> Result<Self> {
        for step in STEPS {
            let (from, to) = match step.is_old_ones() {
                true => (&self.old, &self.new),
                false => (&self.new, &self.old),
            };
            let message = match step {
                Step::Request => std::mem::replace(
                    &mut self.request,
                    Message {
                        bytes: Vec::new(),
                        descriptors: Vec::new(),
                    },
                ),
                _ => Message::receive(from, step)?,
            };
            if step == last && is_alone && !step.is_old_ones() {
                tried("close one side", self.old.shutdown(Shutdown::Read))?;
            }
            if step != last || passes_last {
                message.send(to)?;
            }
            if step == last {
                break;
            }
        }
        Ok(self)
    }
}

/// Kills one of the two; returns the other, which has the tunnel then.
fn kill_one(
    stage: &Stage,
    old: Tunnel,
    victim: Victim,
    last: Step,
    passes_last: bool,
) -> Result<Tunnel> {
    let (device, ..) = appearance(&stage.near().host)?;
    let (new, relay) = Relay::start(stage, &[])?;
    let relay = relay.pass_until(last, passes_last, victim == Victim::New)?;
    let (mut killed, mut survivor) = match victim {
        Victim::Old => (old, new),
        Victim::New => (new, old),
    };
    killed.child().signal(Signal::SIGKILL);
    killed.wait()?;
    drop(relay);
    stage.operator.wait()?;
    check(stage.pid()? == Some(survivor.pid().into()), || {
        "somebody else answers".into()
    })?;
    check(survivor.child().try_wait()?.is_none(), || {
        "nobody is left".into()
    })?;
    let has_all = last > Step::Manifest || (last == Step::Manifest && passes_last);
    let is_same = link(&stage.near().host, TUNNEL_NAME)?.index == device;
    check(is_same == (victim == Victim::New || has_all), || {
        let what = if is_same { "the same" } else { "another" };
        format!("{what} device")
    })?;
    Ok(survivor)
}

/// Whoever is killed, and whenever: the other has the tunnel, and no byte is lost or
/// wrong. In each round each step is the last one for each of the two, in one round as
/// one that is heard, in the next as one that is lost.
fn kill_at_every_step(stage: &Stage, rounds: usize) -> Result<()> {
    let (mut near, far) = stage.play()?;
    let (a, b) = (stage.near(), stage.far());
    let mut before = appearance(&a.host)?;
    let routes = own_routes(&a.host)?;
    let streams = [
        Stream::start(&a.container, &b.container, inside(2)[0])?,
        Stream::start(&b.container, &a.container, inside(1)[0])?,
    ];
    for round in 0..rounds {
        for (number, last) in STEPS.into_iter().enumerate() {
            for victim in [Victim::Old, Victim::New] {
                // From there on the new process has the tunnel alone.
                if victim == Victim::New && last == Step::Taken {
                    continue;
                }
                let passes_last = (number + round) % 2 == 1;
                let case = format!("{victim:?}, {last:?}, passed on: {passes_last}");
                let mut goes_on = |near| -> Result<Tunnel> {
                    let near = kill_one(stage, near, victim, last, passes_last)?;
                    wait_for_each_other(a, b)?;
                    streams.iter().try_for_each(Stream::wait_for_progress)?;
                    wait_until("all is as before", || {
                        let now = appearance(&a.host)?;
                        if now.0 == before.0 {
                            return Ok(now == before);
                        }
                        // All of it names the device, which is another.
                        let is_complete = own_routes(&a.host)? == routes;
                        if is_complete {
                            before = now;
                        }
                        Ok(is_complete)
                    })?;
                    Ok(near)
                };
                near = goes_on(near).map_err(|error| Error::new(format!("{case}: {error}")))?;
            }
        }
    }
    for stream in streams {
        stream.finish()?;
    }
    // It is a tunnel as any other.
    let (near, _) = stage.take_over(near, &[])?;
    wait_for_each_other(a, b)?;
    stop(near)?;
    check(!stage.operator.socket().exists(), || {
        "the socket is left".into()
    })?;
    stop(far).map(drop)
}

#[testbed::trial(each_engine)]
fn either_side_killed_at_any_step() -> Result<()> {
    kill_at_every_step(&Stage::new()?, 1)
}

#[testbed::trial(each_engine, long)]
fn either_side_killed_twelve_times_at_any_step() -> Result<()> {
    kill_at_every_step(&Stage::new()?, 12)
}

/// Whoever has the tunnel then makes sessions of its own: no key seals with a nonce twice,
/// wherever the other one was.
fn kill_with_keys(rounds: usize) -> Result<()> {
    let stage = Stage::encrypted()?;
    let watches = [
        NonceWatch::at(&stage.near().host)?,
        NonceWatch::at(&stage.far().host)?,
    ];
    kill_at_every_step(&stage, rounds)?;
    for watch in watches {
        let sessions = watch.finish()?;
        // One at the least for each old process that was killed.
        check(sessions > rounds * STEPS.len(), || {
            format!("{sessions} sessions were seen")
        })?;
    }
    Ok(())
}

#[testbed::trial(each_engine)]
fn either_side_killed_at_any_step_with_keys() -> Result<()> {
    kill_with_keys(1)
}

#[testbed::trial(each_engine, long)]
fn either_side_killed_twelve_times_at_any_step_with_keys() -> Result<()> {
    kill_with_keys(12)
}

/// The signal comes when the old process waits for the new one's last word, and when it
/// has heard it, and may have ended.
#[testbed::trial]
fn a_reload_that_only_the_old_process_hears_of_is_not_lost() -> Result<()> {
    let stage = Stage::new()?;
    let write = |route: &str| {
        let text = format!("route = [\"{route}\"]\n");
        stage.operator.write("fastvpn.toml", &text)
    };
    let file = write("10.1.0.0/16")?;
    let flags = ["--config", &file];
    let far = stage.far().start(&[peer(1)], &["--queues", "2"])?;
    let mut near = stage.start(&flags)?;
    stage.operator.wait()?;
    for (route, last) in [("10.2.0.0/16", Step::Go), ("10.3.0.0/16", Step::Taken)] {
        let (new, relay) = Relay::start(&stage, &flags)?;
        let relay = relay.pass_until(last, true, false)?;
        write(route)?;
        near.child().signal(Signal::SIGHUP);
        if last == Step::Go {
            Message::receive(&relay.new, Step::Taken)?.send(&relay.old)?;
        }
        near.wait()?;
        // The new process sees the end of the old one.
        drop(relay);
        near = new;
        let route = net(route)?;
        wait_until("the file is read again", || {
            Ok(own_routes(&stage.near().host)?.contains(&route))
        })?;
        near.wait_for_line("by the takeover")?;
    }
    stop(near)?;
    stop(far).map(drop)
}

/// Again and again, while both directions carry as much as they can.
#[testbed::trial(each_engine)]
fn taken_over_under_full_load() -> Result<()> {
    const TIMES: usize = 6;
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    let (a, b) = (stage.near(), stage.far());
    let before = appearance(&a.host)?;
    let streams = [
        Stream::start_fast(&a.container, &b.container, inside(2)[0])?,
        Stream::start_fast(&b.container, &a.container, inside(1)[1])?,
    ];
    let mut near = Some(near);
    for _ in 0..TIMES {
        streams.iter().try_for_each(Stream::wait_for_progress)?;
        let Some(old) = near.take() else {
            return fail("no tunnel");
        };
        near = Some(stage.take_over(old, &[])?.0);
        let after = appearance(&a.host)?;
        check(after == before, || format!("{before:?}, then {after:?}"))?;
    }
    for stream in streams {
        stream.wait_for_progress()?;
        stream.finish()?;
    }
    near.map_or(Ok(()), |near| stop(near).map(drop))?;
    stop(far).map(drop)
}
