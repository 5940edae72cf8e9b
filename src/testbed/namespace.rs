//! One network namespace, held by a descriptor and nothing else.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic;
use std::process::Command;
use std::thread::{self, ScopedJoinHandle};

use nix::sched::{CloneFlags, unshare};

use super::enter;
use super::process::Child;
use crate::error::{Error, Result};
use crate::host::netlink::Netlink;

/// An anonymous network namespace: no file in /run/netns, no process that
/// keeps it. It is gone when this value, the threads and the children in it
/// are, however they end.
pub struct Namespace {
    fd: OwnedFd,
}

impl Namespace {
    /// Makes a namespace with its loopback interface up.
    ///
    /// # Errors
    /// When rights are missing; see
    /// [`enter_user_namespace_if_needed`](super::enter_user_namespace_if_needed).
    pub fn new() -> Result<Self> {
        // unshare(2) moves only the calling thread, so it is one of its own.
        let fd = thread::scope(|scope| result_of(scope.spawn(Self::create)))?;
        let namespace = Self { fd };
        // Lets us use ping sockets (icmp(7)), which match answers to the asker,
        // instead of raw ones, which see everybody's. In a user namespace the
        // only group that can be named is the one that is mapped.
        let groups = "net/ipv4/ping_group_range";
        namespace
            .sysctl(groups, "0 2147483647")
            .or_else(|_| namespace.sysctl(groups, "0 0"))?;
        Ok(namespace)
    }

    fn create() -> Result<OwnedFd> {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| {
            Error::os("cannot create a network namespace", errno.into())
                .hint("run as root or grant CAP_SYS_ADMIN")
        })?;
        let file = File::open("/proc/thread-self/ns/net")
            .map_err(|cause| Error::os("cannot hold on to a network namespace", cause))?;
        let mut netlink = Netlink::open()?;
        if let Some(loopback) = netlink.link_index("lo")? {
            netlink.set_up(loopback)?;
        }
        Ok(file.into())
    }

    /// The descriptor that stands for the namespace (setns(2), `IFLA_NET_NS_FD`).
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Runs a closure on a thread inside the namespace and waits for it.
    /// Sockets it opens belong to the namespace for good and may be returned.
    ///
    /// # Panics
    /// With the closure's own panic, and never otherwise: who made a namespace
    /// may enter it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            result_of(scope.spawn(|| {
                enter(self.fd()).expect("the process that made the namespace may enter it");
                work()
            }))
        })
    }

    /// Starts a program inside the namespace. It is killed when the [`Child`]
    /// is dropped and when this process dies.
    ///
    /// # Errors
    /// When the program cannot be started; the error names it.
    pub fn spawn(&self, command: Command) -> Result<Child> {
        Child::start(self.fd(), command)
    }

    /// An rtnetlink socket of the namespace, for use on any thread.
    ///
    /// # Errors
    /// As [`Netlink::open`].
    pub fn netlink(&self) -> Result<Netlink> {
        self.run(Netlink::open)
    }

    /// Sets a kernel parameter of the namespace: `path` is below /proc/sys,
    /// with slashes, and /proc/sys/net shows each thread its own namespace.
    ///
    /// # Errors
    /// When there is no such parameter or it does not take the value.
    pub fn sysctl(&self, path: &str, value: &str) -> Result<()> {
        self.run(|| fs::write(format!("/proc/sys/{path}"), value))
            .map_err(|cause| Error::os(format!("cannot set {path} to {value}"), cause))
    }
}

/// A thread's result; its panic goes on in the caller.
pub fn result_of<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread
        .join()
        .unwrap_or_else(|payload| panic::resume_unwind(payload))
}
