//! The terminal: whether it can show a screen, what is typed, and how it is given back
//! however this process ends.

use std::io::{self, IsTerminal};
use std::thread::{Builder, sleep};
use std::time::Duration;

use crossbeam_channel::Sender;
use ratatui::crossterm::event::{self, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::crossterm::terminal::disable_raw_mode;
use ratatui::{DefaultTerminal, Frame};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use super::Event;
use super::draw::Look;
use super::model::Key;
use crate::error::{Error, Result};

/// Exit status after a panic, as Rust's own.
const PANIC_STATUS: i32 = 101;

/// How long a signal waits for a terminal that takes no output.
const SIGNAL_PATIENCE: Duration = Duration::from_secs(10);

/// What comes from the terminal.
pub(super) enum Input {
    /// A key was pressed.
    Key(Key),
    /// It has another size.
    Resized,
    /// Nothing more can be typed.
    Closed(Error),
    /// This process is to end.
    Signal(i32),
}

/// How to draw on this terminal, by the environment.
///
/// # Errors
/// When it can show no screen.
pub(super) fn look(variable: impl Fn(&str) -> Option<String>) -> Result<Look> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return Err(unfit("standard input and output are not a terminal"));
    }
    look_of(variable)
}

fn look_of(variable: impl Fn(&str) -> Option<String>) -> Result<Look> {
    let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
    let term = variable("TERM").unwrap_or_default();
    if ["", "dumb", "unknown"].contains(&term.as_str()) {
        return Err(unfit(&format!(
            "it cannot draw on a terminal with TERM={term:?}"
        )));
    }
    let is_old = term.starts_with("vt");
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
        .into_iter()
        .find_map(&variable);
    let locale = locale.unwrap_or_default().to_lowercase().replace('-', "");
    Ok(Look {
        has_colors: !is_old && variable("NO_COLOR").is_none(),
        // The Linux console has only some of the block elements.
        has_blocks: !is_old && term != "linux" && locale.contains("utf8"),
    })
}

fn unfit(why: &str) -> Error {
    Error::new(format!("top needs a terminal: {why}"))
        .hint("`fastvpn status --watch` is for logs and for terminals of any kind")
}

/// The whole terminal; dropped, it is given back.
pub(super) struct Screen {
    terminal: DefaultTerminal,
}

impl Screen {
    /// Takes the terminal, and sends what comes from it.
    ///
    /// # Errors
    /// When it cannot be had, or there are no more threads.
    pub(super) fn open(events: Sender<Event>) -> Result<Self> {
        let hook = std::panic::take_hook();
        // ratatui's own goes before it, and gives the terminal back.
        std::panic::set_hook(Box::new(move |info| {
            hook(info);
            // Also from threads, without which nothing would be shown any more.
            std::process::exit(PANIC_STATUS);
        }));
        let taken = ratatui::try_init().map_err(|error| {
            // It may have been taken halfway.
            let _ = ratatui::try_restore();
            Error::os("cannot take the terminal", error)
        });
        let screen = Self { terminal: taken? };
        start("signals", wait_for_signals(events.clone())?)?;
        start("input", move || read_input(&events))?;
        Ok(screen)
    }

    /// Draws all of it.
    ///
    /// # Errors
    /// When the terminal has gone.
    pub(super) fn draw(&mut self, draw: impl FnOnce(&mut Frame<'_>)) -> Result<()> {
        let drawn = self.terminal.draw(draw);
        let failed = |error| Error::os("cannot draw on the terminal", error);
        drawn.map(drop).map_err(failed)
    }

    /// Gives the terminal back, and ends as the signal would have ended it.
    ///
    /// # Errors
    /// When that cannot be.
    pub(super) fn end_by(self, signal: i32) -> Result<()> {
        drop(self);
        let failed = |error| Error::os(format!("cannot end by signal {signal}"), error);
        emulate_default_handler(signal).map_err(failed)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // One that has gone cannot be given back.
        let _ = ratatui::try_restore();
    }
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let started = Builder::new().name(name.into()).spawn(work);
    let failed = |error| Error::os("cannot start a thread", error);
    started.map(drop).map_err(failed)
}

fn wait_for_signals(events: Sender<Event>) -> Result<impl FnOnce() + Send> {
    let signals = Signals::new([SIGTERM, SIGHUP, SIGINT, SIGQUIT]);
    let failed = |error| Error::os("cannot wait for signals", error);
    let mut signals = signals.map_err(failed)?;
    Ok(move || {
        for signal in signals.forever() {
            let _ = events.try_send(Event::Terminal(Input::Signal(signal)));
            sleep(SIGNAL_PATIENCE);
            // It is stuck in a write. What needs no write is put right.
            let _ = disable_raw_mode();
            let _ = emulate_default_handler(signal);
        }
    })
}

fn read_input(events: &Sender<Event>) {
    loop {
        let input = match event::read() {
            Ok(event::Event::Key(key)) => key_of(key).map(Input::Key),
            Ok(event::Event::Resize(..)) => Some(Input::Resized),
            Ok(_) => None,
            Err(error) => {
                let error = Error::os("cannot read the terminal", error);
                let _ = events.send(Event::Terminal(Input::Closed(error)));
                return;
            }
        };
        let sent = input.map_or(Ok(()), |input| events.send(Event::Terminal(input)));
        if sent.is_err() {
            return;
        }
    }
}

/// What a key means, if anything.
fn key_of(key: KeyEvent) -> Option<Key> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
    Some(match key.code {
        KeyCode::Char('c') if is_control => Key::Interrupt,
        KeyCode::Char('h') if is_control => Key::Backspace,
        KeyCode::Char(_) if is_control || key.modifiers.contains(KeyModifiers::ALT) => return None,
        KeyCode::Char(c) => Key::Char(c),
        KeyCode::Enter => Key::Enter,
        KeyCode::Esc => Key::Escape,
        KeyCode::Backspace => Key::Backspace,
        KeyCode::Tab | KeyCode::Right => Key::Next,
        KeyCode::BackTab | KeyCode::Left => Key::Previous,
        KeyCode::Up => Key::Up,
        KeyCode::Down => Key::Down,
        KeyCode::PageUp => Key::PageUp,
        KeyCode::PageDown => Key::PageDown,
        KeyCode::Home => Key::Home,
        KeyCode::End => Key::End,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The look with an environment such as `TERM=xterm LANG=C`.
    fn look_with(environment: &str) -> Result<Look> {
        look_of(|name| {
            let mut pairs = environment.split_whitespace();
            let value = pairs.find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
            value.map(Into::into)
        })
    }

    #[test]
    fn the_environment_says_what_a_terminal_can_do() {
        for (environment, has_colors, has_blocks) in [
            ("TERM=xterm-256color LANG=en_US.UTF-8", true, true),
            ("TERM=xterm LANG=en_US.UTF-8 LC_ALL=C", true, false),
            ("TERM=xterm LC_ALL= LC_CTYPE=C.utf8", true, true),
            ("TERM=xterm", true, false),
            ("TERM=screen NO_COLOR=1 LANG=C.UTF-8", false, true),
            ("TERM=screen NO_COLOR= LANG=C.UTF-8", true, true),
            ("TERM=linux LANG=C.UTF-8", true, false),
            ("TERM=vt100 LANG=C.UTF-8", false, false),
        ] {
            let look = look_with(environment).unwrap();
            let found = (look.has_colors, look.has_blocks);
            assert_eq!(found, (has_colors, has_blocks), "{environment}");
        }
        for environment in ["", "TERM=", "TERM=dumb LANG=C.UTF-8", "TERM=unknown"] {
            let error = look_with(environment).unwrap_err().to_string();
            assert!(
                error.contains("TERM=\"") && error.contains("--watch"),
                "{error}"
            );
        }
    }

    /// What the tests below run on a terminal: takes it, and panics in this thread or another, or
    /// cannot take it.
    #[test]
    fn on_a_terminal() {
        let Some(what) = std::env::var_os("FASTVPN_TEST_SCREEN") else {
            return;
        };
        let (sender, _events) = crossbeam_channel::bounded(1);
        if what == "full" {
            let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
            let stdout = nix::unistd::dup(io::stdout()).unwrap();
            nix::unistd::dup2_stdout(full.unwrap()).unwrap();
            let opened = Screen::open(sender);
            nix::unistd::dup2_stdout(stdout).unwrap();
            eprintln!("{}", opened.err().unwrap());
            return;
        }
        let _screen = Screen::open(sender).unwrap();
        if what == "thread" {
            let _ = std::thread::spawn(|| panic!("elsewhere")).join();
        }
        panic!("here");
    }

    /// Runs the above on a terminal: its settings before, what is said, and its settings after.
    fn on_terminal(what: &str) -> [String; 3] {
        let test = std::env::current_exe().unwrap();
        let name = "cli::top::screen::tests::on_a_terminal";
        let words = format!("'{}' --exact {name} --nocapture", test.display());
        let words = format!("stty -a; {words}; echo status $?; stty -a");
        let mut terminal = std::process::Command::new("script");
        terminal.args(["-qec", &words, "/dev/null"]);
        terminal.env("FASTVPN_TEST_SCREEN", what);
        let terminal = terminal.stdin(std::process::Stdio::null());
        let output = terminal.output().unwrap();
        let output = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        let parts: Vec<_> = output.split("speed ").collect();
        let [_, before, after] = parts[..] else {
            panic!("{output}");
        };
        let (before, said) = before.split_once("\n\n").unwrap();
        [before, said, after].map(|part| part.trim_end().into())
    }

    #[test]
    fn after_a_panic_the_terminal_is_as_before() {
        for (place, panic) in [("main", "here"), ("thread", "elsewhere")] {
            let [before, said, after] = on_terminal(place);
            let (_, said) = said.split_once("\x1b[?1049h").unwrap();
            // What was wrong stands where it can be read.
            let (_, said) = said.split_once("\x1b[?1049l").unwrap();
            assert!(
                said.contains(panic) && said.contains("status 101"),
                "{said}"
            );
            assert_eq!(after, before);
        }
    }

    #[test]
    fn a_terminal_that_cannot_be_taken_is_as_before() {
        let [before, said, after] = on_terminal("full");
        assert!(said.contains("cannot take the terminal: "), "{said}");
        assert_eq!(after, before);
    }

    #[test]
    fn keys_are_understood() {
        let key = |code, modifiers| key_of(KeyEvent::new(code, modifiers));
        let (none, control) = (KeyModifiers::NONE, KeyModifiers::CONTROL);
        assert_eq!(key(KeyCode::Char('c'), none), Some(Key::Char('c')));
        assert_eq!(key(KeyCode::Char('c'), control), Some(Key::Interrupt));
        assert_eq!(key(KeyCode::Char('x'), control), None);
        assert_eq!(
            key(KeyCode::Char('S'), KeyModifiers::SHIFT),
            Some(Key::Char('S'))
        );
        assert_eq!(key(KeyCode::F(1), none), None);
    }
}
