//! A network namespace for one probe's thread, which nobody else sees.

use nix::sched::{CloneFlags, unshare};

use super::read::Tried;
use crate::host::netlink::Netlink;

/// Why there is none, for [`super::item::Item::unknown`].
pub const REFUSED: &str = "needs root (CAP_SYS_ADMIN), to try it in a network namespace of its own";

/// Moves the calling thread, and only it, into a new network namespace with
/// its loopback interface up. It goes with the thread and the sockets and
/// devices made in it.
///
/// # Errors
/// The errno of the refusal: `EPERM` without CAP_SYS_ADMIN.
pub fn enter() -> Tried<()> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| errno as i32)?;
    let up = || {
        let mut netlink = Netlink::open()?;
        match netlink.link_index("lo")? {
            Some(loopback) => netlink.set_up(loopback),
            None => Ok(()),
        }
    };
    up().map_err(|error| error.errno().unwrap_or(libc::EIO))
}
