//! Hosts that find each other in a registry: real fastvpn processes, and a real etcd.

mod files;
mod joining;
mod keys;
pub mod network;
mod secure;
mod trouble;
