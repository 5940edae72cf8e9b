//! The command line: see `fastvpn --help`.

use std::io::Write;
use std::process::ExitCode;

use clap::FromArgMatches;
use fastvpn::cli::{self, Cli, Command, check, commands, keys};
use fastvpn::config::Config;
use fastvpn::{daemon, log};

fn main() -> ExitCode {
    let flags = cli::command().get_matches();
    let cli = Cli::from_arg_matches(&flags).unwrap_or_else(|error| error.exit());
    let result = match &cli.command {
        Some(Command::Demo(options)) => commands::demo(options),
        Some(Command::Check(options)) => match check::run(options) {
            Ok(false) => return ExitCode::FAILURE,
            result => result.map(drop),
        },
        Some(Command::Key(command)) => keys::run(*command),
        Some(Command::Client(command)) => commands::run(command),
        None => Config::from_flags(&flags).and_then(|config| {
            log::init(config.verbose, config.quiet, config.log_format);
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
