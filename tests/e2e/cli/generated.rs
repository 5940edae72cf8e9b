//! What the program makes of its command line: completions, manual pages, its version.

use std::path::Path;
use std::process::{Command, Output};

use fastvpn::error::Result;
use testbed::program::MANDOC;

use crate::support::{FASTVPN, check, tried};

/// Runs a command to its end.
fn output(command: &mut Command) -> Result<Output> {
    tried("run a command", command.output())
}

/// What a command prints, which must succeed and print no errors.
fn text(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    let went_well = output.status.success() && output.stderr.is_empty();
    check(went_well, || format!("{command:?}: {output:?}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[testbed::trial]
fn bash_completes_command_lines() -> Result<()> {
    let script = r#"
        source <("$1" completions bash)
        complete -p fastvpn
        # As bash does when Tab is pressed.
        offer() {
            COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
            _fastvpn fastvpn "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
            echo "${COMPREPLY[*]}"
        }
        offer fastvpn rel
        offer fastvpn route li
        offer fastvpn status --js
        offer fastvpn --wg
        offer fastvpn --io ur
        offer fastvpn completions b"#;
    let said = text(Command::new("bash").args(["--norc", "-c", script, "bash", FASTVPN]))?;
    let mut lines = said.lines();
    let set = lines.next().unwrap_or_default();
    let is_set = set.contains(" -F _fastvpn") && set.ends_with(" fastvpn");
    check(is_set, || set.into())?;
    let offered: Vec<_> = lines.collect();
    let expected = ["reload", "list", "--json", "--wg-config", "uring", "bash"];
    check(offered == expected, || said.clone())
}

/// Shells that a test machine may not have get a script, too.
#[testbed::trial]
fn other_shells_have_completions() -> Result<()> {
    for (shell, start) in [("zsh", "#compdef fastvpn"), ("fish", "# Print")] {
        let script = text(Command::new(FASTVPN).args(["completions", shell]))?;
        check(
            script.starts_with(start) && script.contains("reload"),
            || format!("{shell}: {}", script.get(..200).unwrap_or(&script)),
        )?;
    }
    let refused = output(Command::new(FASTVPN).args(["completions", "csh"]))?;
    check(refused.status.code() == Some(2), || format!("{refused:?}"))
}

/// What mandoc warns of in a page, but for the date that it does not have.
fn lint(page: &Path) -> Result<String> {
    let mut mandoc = MANDOC.command()?;
    let said = output(mandoc.args(["-Tlint", "-Wwarning"]).arg(page))?;
    let warnings = String::from_utf8_lossy(&said.stdout);
    let warnings = warnings
        .lines()
        .filter(|line| !line.contains("missing date"));
    Ok(warnings.collect::<Vec<_>>().join("\n"))
}

#[testbed::trial(mandoc)]
fn manual_pages_are_sound() -> Result<()> {
    let directory = tried("make a directory", tempfile::tempdir())?;
    // Made if it is missing.
    let pages = directory.path().join("man1");
    text(Command::new(FASTVPN).arg("man").arg(&pages))?;
    let entries = tried("list the pages", std::fs::read_dir(&pages))?;
    let mut names = Vec::new();
    for entry in entries.map_while(std::io::Result::ok) {
        let warnings = lint(&entry.path())?;
        check(warnings.is_empty(), || warnings)?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    for name in ["fastvpn.1", "fastvpn-status.1", "fastvpn-route-add.1"] {
        check(names.iter().any(|it| it == name), || {
            format!("no {name} in {names:?}")
        })?;
    }
    // Without a directory, the first page alone.
    let page = text(Command::new(FASTVPN).arg("man"))?;
    let written = std::fs::read_to_string(pages.join("fastvpn.1"));
    check(page == tried("read a page", written)?, || page.clone())?;
    let mut mandoc = MANDOC.command()?;
    let shown = text(
        mandoc
            .args(["-Tascii", "-Owidth=80"])
            .arg(pages.join("fastvpn.1")),
    )?;
    let version = concat!("fastvpn ", env!("CARGO_PKG_VERSION"));
    // Bold letters are overstruck.
    let plain: Vec<_> = shown.split_inclusive('\u{8}').collect();
    check(shown.contains(version) && plain.len() > 1, || shown.clone())?;
    // A page for each command that another one refers to.
    let subcommands = page.lines().filter_map(|line| line.strip_suffix("(1)"));
    let mut subcommands = subcommands.map(|name| name.replace('\\', "") + ".1");
    let unwritten = subcommands.find(|name| !names.contains(name));
    check(unwritten.is_none(), || format!("no page {unwritten:?}"))
}

#[testbed::trial]
fn a_directory_that_cannot_be_made_is_named() -> Result<()> {
    let refused = output(Command::new(FASTVPN).args(["man", "/proc/nowhere/man1"]))?;
    let said = String::from_utf8_lossy(&refused.stderr);
    check(
        refused.status.code() == Some(1)
            && said.starts_with("fastvpn: cannot make the directory /proc/nowhere/man1: ")
            && said.lines().count() == 1,
        || format!("{refused:?}"),
    )
}

/// Scripts read the short one, people the long one.
#[testbed::trial]
fn the_version_says_how_it_was_built() -> Result<()> {
    let number = concat!("fastvpn ", env!("CARGO_PKG_VERSION"));
    let short = text(Command::new(FASTVPN).arg("-V"))?;
    check(short.trim_end() == number, || short.clone())?;
    let long = text(Command::new(FASTVPN).arg("--version"))?;
    let features = match cfg!(feature = "registry") {
        true => ["features ", "registry"],
        false => ["features", ""],
    };
    let is_whole = long.starts_with(&format!("{number} ("))
        && features.iter().all(|part| long.contains(part))
        && long.lines().count() == 1;
    check(is_whole, || long.clone())
}
