//! The registry: etcd, in which hosts find each other, in the layout that flannel has.
//!
//! - `network`: the network's configuration.
//! - `entry`: keys and values.
//! - `claim`: which subnet a host is to have.
//! - `view`: what is known of the registry, and the peers that follow from it.
//! - `cache`: the same on disk.
//! - `subnet_env`: the file that container tools read.
//! - `access`: how etcd is reached.
//! - `shared`, `status`: what the registry's thread and the rest of the process share.
//! - `agent`: the thread that keeps up with the registry, and what comes of it.
//! - `worker`: what that thread does.
//! - `client`, `proto`: etcd's API.
//! - `load`: hosts that are not there, for measurements.
//! - `commands`: what operators do to a registry.
//!
//! All but those from `worker` on is pure or plain, and there in every build. Those need the feature
//! `registry`, and with it tokio, whose runtime has one thread and is used there alone.

// A build without the feature uses little of it.
#![cfg_attr(not(feature = "registry"), allow(dead_code))]

pub(crate) mod access;
pub(crate) mod agent;
mod cache;
mod claim;
#[cfg(feature = "registry")]
mod client;
#[cfg(feature = "registry")]
pub(crate) mod commands;
pub(crate) mod entry;
mod key;
#[cfg(feature = "registry")]
#[doc(hidden)]
pub mod load;
pub(crate) mod network;
#[cfg(feature = "registry")]
mod proto;
pub(crate) mod shared;
pub(crate) mod status;
pub(crate) mod subnet_env;
pub(crate) mod view;
#[cfg(feature = "registry")]
mod worker;

/// That this program cannot do what is asked for.
#[cfg(not(feature = "registry"))]
pub(crate) fn left_out() -> crate::error::Error {
    let what = "this fastvpn was built without the feature `registry`";
    crate::error::Error::new(what).hint("build it with `cargo build --release`")
}
