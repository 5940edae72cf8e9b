//! A tunnel's life: start, reload, takeover, end.

pub mod handover;
pub mod killed;
pub mod life;
pub mod package;
pub mod reload;
pub mod reload_device;
pub mod sandbox;
pub mod service;
pub mod settings;
pub mod soak;
pub mod systemd;
pub mod takeover;
pub mod trouble;
