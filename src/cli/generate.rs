//! What is made of the command line's definition: completions for shells, and manual pages.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap_complete::Shell;
use clap_mangen::Man;

use crate::error::{Error, Result};

/// Commands that packages are made with.
#[derive(Clone, Debug, clap::Subcommand)]
#[allow(missing_docs, reason = "each says what it is in its help")]
pub enum GenerateCommand {
    /// Print a script that completes fastvpn's command lines in a shell, as in
    /// . <(fastvpn completions bash)
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Print fastvpn's manual page, as in fastvpn man | man -l -
    Man {
        /// Write the pages of fastvpn and of all its commands there instead
        #[arg(value_name = "DIR")]
        directory: Option<PathBuf>,
    },
}

/// Carries out one command for a command line of this definition.
///
/// # Errors
/// When what is made cannot be written. Not when standard output is closed.
pub fn run(command: &GenerateCommand, mut definition: clap::Command) -> Result<()> {
    let mut text = Vec::new();
    match command {
        GenerateCommand::Completions { shell } => {
            clap_complete::generate(*shell, &mut definition, "fastvpn", &mut text);
        }
        GenerateCommand::Man { directory } => {
            // The same for all builds of a version.
            definition = definition
                .long_version(env!("CARGO_PKG_VERSION"))
                .disable_help_subcommand(true);
            definition.build();
            if let Some(directory) = directory {
                let made = fs::create_dir_all(directory);
                let what = || format!("cannot make the directory {}", directory.display());
                made.map_err(|error| Error::os(what(), error))?;
                return write_pages(&definition, directory);
            }
            write_page(definition, &mut text).map_err(cannot_write)?;
        }
    }
    match io::stdout().write_all(&text) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(cannot_write(error)),
        _ => Ok(()),
    }
}

fn cannot_write(error: io::Error) -> Error {
    Error::os("cannot write to standard output", error)
}

/// A file for a command, and one for each below it.
fn write_pages(definition: &clap::Command, directory: &Path) -> Result<()> {
    for command in definition.get_subcommands().filter(|it| !it.is_hide_set()) {
        write_pages(command, directory)?;
    }
    let name = definition.get_display_name();
    let path = directory.join(format!("{}.1", name.unwrap_or(definition.get_name())));
    let mut text = Vec::new();
    let written = write_page(definition.clone(), &mut text).and_then(|()| fs::write(&path, text));
    written.map_err(|error| Error::os(format!("cannot write {}", path.display()), error))
}

/// A command's page, without what mandoc's lint warns of in clap_mangen's.
fn write_page(definition: clap::Command, out: &mut impl Write) -> io::Result<()> {
    let version = concat!("fastvpn ", env!("CARGO_PKG_VERSION"));
    let page = Man::new(definition)
        .source(version)
        .manual("fastvpn manual");
    let mut text = Vec::new();
    page.render(&mut text)?;
    let text = String::from_utf8(text).map_err(io::Error::other)?;
    // Without a date, the version would be taken for one.
    let text = text.replacen(" 1  \"", " 1 \"\" \"", 1);
    out.write_all(text.replace(".br\n\n.br\n", ".sp\n").as_bytes())
}
