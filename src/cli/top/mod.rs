//! `fastvpn top`: a running tunnel on the whole terminal.
//!
//! - `source`: asks the tunnel once a second.
//! - `table`: the rows of each view; pure.
//! - `model`: what is shown, and what keys do to it; pure, too.
//! - `draw`: the same on a screen of any size.
//! - `screen`: the terminal, and how it is given back.

mod draw;
mod model;
mod screen;
mod source;
mod table;

use std::path::PathBuf;

use self::model::{Model, Outcome, Update};
use self::screen::{Input, Screen};
use crate::cli::commands;
use crate::config::{default_control_path, parse_tun_name};
use crate::error::{Error, Result};

/// Events that wait to be shown.
const EVENTS_MAX: usize = 64;

/// Options of `fastvpn top`.
#[derive(Clone, Debug, clap::Args)]
pub struct TopOptions {
    /// Name of the tunnel's TUN device [default: that of the only one that runs]
    #[arg(value_name = "NAME", value_parser = parse_tun_name)]
    pub name: Option<String>,

    /// Path of the tunnel's control socket [default: /run/fastvpn/, named after the TUN]
    #[arg(long, value_name = "PATH", conflicts_with = "name")]
    pub control: Option<PathBuf>,
}

/// What happens while the screen is there.
enum Event {
    /// Something about the tunnel.
    Tunnel(Update),
    /// Something about the terminal.
    Terminal(Input),
}

/// Shows a tunnel until somebody has seen enough.
///
/// # Errors
/// When there is no tunnel at first, or no terminal that can show it.
pub fn run(options: &TopOptions) -> Result<()> {
    let look = screen::look(|name| std::env::var(name).ok())?;
    let path = match (&options.control, &options.name) {
        (Some(path), _) => path.clone(),
        (None, Some(name)) => default_control_path(name),
        (None, None) => commands::only_tunnel()?,
    };
    let mut source = source::Source::new(path);
    // What is wrong now is better said without a screen.
    let mut model = Model::new(source.sample()?);
    let (sender, events) = crossbeam_channel::bounded(EVENTS_MAX);
    let mut screen = Screen::open(sender.clone())?;
    source::start(source, sender)?;
    loop {
        screen.draw(|frame| draw::draw(frame, &mut model, look))?;
        let next = events.recv();
        let next = next.map_err(|_| Error::new("nothing is left to wait for"))?;
        for event in std::iter::once(next).chain(events.try_iter()) {
            match event {
                Event::Tunnel(update) => model.update(update),
                Event::Terminal(Input::Resized) => {}
                Event::Terminal(Input::Key(key)) => match model.key(key) {
                    Outcome::GoOn => {}
                    Outcome::Quit => return Ok(()),
                },
                Event::Terminal(Input::Closed(error)) => return Err(error),
                Event::Terminal(Input::Signal(signal)) => return screen.end_by(signal),
            }
        }
    }
}

#[cfg(test)]
mod tests;
