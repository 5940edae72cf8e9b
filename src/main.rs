//! The command line: see `fastvpn --help`.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use fastvpn::cli::{Cli, Command};
use fastvpn::cli::{check, commands};
use fastvpn::config::Config;
use fastvpn::{daemon, log};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.command {
        Some(Command::Demo(options)) => commands::demo(options),
        Some(Command::Check(options)) => {
            return if check::run(options) {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            };
        }
        Some(Command::Client(command)) => commands::run(command),
        None => Config::from_args(&cli.tunnel).and_then(|config| {
            let wanted = config.log;
            log::init(wanted.verbose, wanted.quiet, wanted.format);
            daemon::run(config)
        }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not eprintln!, which panics when standard error is closed.
            let _ = writeln!(std::io::stderr(), "fastvpn: {error}");
            ExitCode::FAILURE
        }
    }
}
