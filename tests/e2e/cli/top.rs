//! `fastvpn top` on a real terminal, tmux's: keys are pressed and the screen is read.

use std::process::{Command, Stdio};

use fastvpn::error::{Error, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use testbed::program::TMUX;
use testbed::{Child, Namespace};

use crate::daemon::takeover::Stage;
use crate::operator::{Operator, is_refusal};
use crate::site::{tunnel, underlay};
use crate::support::{FASTVPN, check, fail, tried, wait_until};
use crate::tools::Stream;

/// Runs top, says how that ended and how it has left the terminal, and goes on.
const SCRIPT: &str = r#"
"$@"
echo "status $?"
stty -a | tr ' ;' '\n\n' | grep -x -e '-\?icanon' -e '-\?echo' | tr '\n' ' '
echo; cat
"#;

/// A terminal, gone when this is.
pub struct Terminal {
    directory: TempDir,
    _server: Child,
    desk: Namespace,
}

impl Terminal {
    /// Starts `fastvpn top` on a terminal of 80 columns and 24 rows, with this environment.
    pub fn start(operator: &Operator, environment: &[&str]) -> Result<Self> {
        let directory = tried("make a directory", tempfile::tempdir())?;
        let (script, desk) = (directory.path().join("run.sh"), Namespace::new()?);
        tried("write a script", std::fs::write(&script, SCRIPT))?;
        let mut server = TMUX.command()?;
        // It stays in the foreground, so that it ends with this.
        server.arg("-S").arg(directory.path().join("tmux"));
        server
            .args(["-u", "-f", "/dev/null", "-D"])
            .env("LC_ALL", "C.UTF-8");
        server
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let terminal = Self {
            _server: desk.spawn(server)?,
            directory,
            desk,
        };
        let script = script.display().to_string();
        let mut words = vec![
            "new-session",
            "-d",
            "-x",
            "80",
            "-y",
            "24",
            "sh",
            &script,
            "env",
        ];
        words.extend(environment);
        let socket = operator.socket_text();
        words.extend([FASTVPN, "top", "--control", &socket]);
        wait_until("tmux starts", || Ok(terminal.tmux(&words).is_ok()))?;
        Ok(terminal)
    }

    /// Tells tmux something, and returns what it prints.
    pub fn tmux(&self, words: &[&str]) -> Result<String> {
        let mut command = TMUX.command()?;
        command.arg("-S").arg(self.directory.path().join("tmux"));
        // No other server, which would not end, before there is this one.
        command.args(["-N", "-u"]).args(words);
        let said = crate::operator::said(&self.desk, command)?;
        check(said.status.success(), || {
            format!("tmux {words:?}: {said:?}")
        })?;
        Ok(said.stdout)
    }

    pub fn press(&self, keys: &[&str]) -> Result<()> {
        self.tmux(&[&["send-keys"][..], keys].concat()).map(drop)
    }

    pub fn screen(&self) -> Result<String> {
        self.tmux(&["capture-pane", "-p"])
    }

    /// Waits until the screen is so.
    pub fn wait(&self, what: &str, is_so: impl Fn(&str) -> bool) -> Result<String> {
        let mut screen = String::new();
        let waited = wait_until(what, || {
            screen = self.screen()?;
            Ok(is_so(&screen))
        });
        match waited {
            Ok(()) => Ok(screen),
            Err(error) => Err(Error::new(format!("{error}; the screen is\n{screen}"))),
        }
    }

    /// Waits until the screen has this.
    pub fn wait_for(&self, part: &str) -> Result<String> {
        self.wait(part, |screen| screen.contains(part))
    }

    /// Waits until top has ended with this status, and checks that it has left the terminal as
    /// it found it.
    pub fn ends_with(&self, status: &str) -> Result<()> {
        let screen = self.wait_for("icanon")?;
        let is_sane = screen.contains("icanon echo") && !screen.contains("-icanon");
        let is_clean = screen.contains(status) && !screen.contains("q quit");
        check(is_sane && is_clean, || screen)?;
        let flags = self.tmux(&["display", "-p", "#{alternate_on} #{cursor_flag}"])?;
        check(flags.trim() == "0 1", || format!("screen, cursor: {flags}"))?;
        self.press(&["typed"])?;
        self.wait_for("typed").map(drop)
    }

    /// The process of top.
    fn pid(&self) -> Result<Pid> {
        let shell = self.tmux(&["display", "-p", "#{pane_pid}"])?;
        let shell = shell.trim();
        let path = format!("/proc/{shell}/task/{shell}/children");
        let children = tried("read a process's children", std::fs::read_to_string(path))?;
        let pid = children
            .split_whitespace()
            .next()
            .and_then(|pid| pid.parse().ok());
        pid.map_or_else(|| fail("top does not run"), |pid| Ok(Pid::from_raw(pid)))
    }
}

pub const UTF8: &str = "LC_ALL=C.UTF-8";

#[testbed::trial(tmux)]
fn top_shows_a_tunnel_through_takeover_and_restart() -> Result<()> {
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    let stream = Stream::start(&stage.near().host, &stage.far().host, tunnel(2)[0])?;
    let terminal = Terminal::start(&stage.operator, &[UTF8])?;
    let screen = terminal.wait("traffic is drawn", |screen| {
        let mut lines = screen.lines();
        lines.any(|line| line.starts_with("sent") && line.contains("Mbit/s") && line.contains('█'))
    })?;
    let process = |pid: u32| format!("process {pid}, up");
    for part in [
        "fastvpn0  ",
        "MTU 1472  1 peer  ",
        &process(near.pid()),
        "WORKER",
        "1-2 of 2",
    ] {
        check(screen.contains(part), || format!("no {part} in\n{screen}"))?;
    }

    terminal.press(&["v"])?;
    let peer = format!("{}:8285", underlay(2));
    terminal.wait("a peer and its rates", |screen| {
        let mut lines = screen.lines();
        lines.any(|line| line.starts_with(&peer) && line.contains(" M "))
    })?;
    terminal.press(&["/", "nobody", "Enter"])?;
    terminal.wait("no row", |screen| screen.trim_end().ends_with(" none"))?;
    terminal.press(&["Escape"])?;
    terminal.wait_for("1-1 of 1")?;
    terminal.press(&["s", "r"])?;
    terminal.wait_for("PACKETS/s▲")?;
    terminal.press(&["?"])?;
    terminal.wait_for("reverse the order")?;
    terminal.press(&["x"])?;
    terminal.wait_for("1-1 of 1")?;
    terminal.press(&["p"])?;
    terminal.wait_for("paused")?;
    terminal.press(&["p"])?;
    terminal.tmux(&["resize-window", "-x", "40", "-y", "10"])?;
    terminal.wait_for("needs 80x24")?;
    terminal.tmux(&["resize-window", "-x", "120", "-y", "30"])?;
    terminal.wait_for("DROPPED")?;

    let old = near.pid();
    let (near, _) = stage.take_over(near, &[])?;
    terminal.wait_for(&format!("now process {}, before {old}", near.pid()))?;
    terminal.wait_for(&process(near.pid()))?;
    stream.finish()?;
    near.stop()?;
    terminal.wait_for("no answer: no fastvpn answers at ")?;
    let near = stage.start(&[])?;
    terminal.wait("the new tunnel", |screen| {
        screen.contains(&process(near.pid())) && !screen.contains("no answer")
    })?;
    terminal.press(&["q"])?;
    terminal.ends_with("status 0")?;
    near.stop()?;
    far.stop().map(drop)
}

#[testbed::trial(tmux)]
fn top_gives_the_terminal_back_however_it_ends() -> Result<()> {
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    let operator = &stage.operator;
    let terminal = Terminal::start(operator, &[UTF8])?;
    terminal.wait_for("q quit")?;
    terminal.press(&["C-c"])?;
    terminal.ends_with("status 0")?;
    for (signal, status) in [
        (Signal::SIGTERM, "status 143"),
        (Signal::SIGINT, "status 130"),
    ] {
        let terminal = Terminal::start(operator, &[UTF8])?;
        terminal.wait_for("q quit")?;
        let sent = kill(terminal.pid()?, signal).map_err(std::io::Error::from);
        tried("send a signal", sent)?;
        terminal.ends_with(status)?;
    }
    near.stop()?;
    far.stop()?;
    // Without a tunnel, there is nothing to show from the start.
    let terminal = Terminal::start(operator, &[UTF8])?;
    terminal.wait_for("fastvpn: no fastvpn answers at ")?;
    terminal.ends_with("status 1")
}

#[testbed::trial(tmux)]
fn top_is_drawn_as_the_terminal_can() -> Result<()> {
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    let operator = &stage.operator;
    let stream = Stream::start(&stage.near().host, &stage.far().host, tunnel(2)[0])?;
    for (environment, has_colors, full) in [
        ([UTF8, "TERM=screen"], true, '█'),
        ([UTF8, "NO_COLOR=1"], false, '█'),
        (["LC_ALL=C", "TERM=screen"], true, '#'),
        ([UTF8, "TERM=vt100"], false, '#'),
    ] {
        let terminal = Terminal::start(operator, &environment)?;
        let drawn = terminal.wait("traffic is drawn", |screen| {
            screen.contains(full) && screen.contains("Mbit/s")
        })?;
        check(full != '#' || drawn.is_ascii(), || drawn.clone())?;
        // Select Graphic Rendition: 30 to 37, or 38 and more, but 39 is the default.
        let escapes = terminal.tmux(&["capture-pane", "-p", "-e"])?;
        let mut colors = (30..38).map(|color| format!("\u{1b}[{color}m"));
        let is_colored =
            colors.any(|color| escapes.contains(&color)) || escapes.contains("\u{1b}[38;");
        check(is_colored == has_colors, || {
            format!("{environment:?}: {escapes:?}")
        })?;
        terminal.press(&["q"])?;
        terminal.ends_with("status 0")?;
    }
    let terminal = Terminal::start(operator, &["TERM=dumb"])?;
    let screen = terminal.wait_for("status 1")?;
    check(screen.contains("fastvpn: top needs a terminal: "), || {
        screen.clone()
    })?;
    let mut command = Command::new(FASTVPN);
    command.arg("top").arg("--control").arg(operator.socket());
    let said = crate::operator::said(&stage.near().host, command)?;
    is_refusal(&said, &["top needs a terminal", "status --watch"])?;
    stream.finish()?;
    near.stop()?;
    far.stop().map(drop)
}
