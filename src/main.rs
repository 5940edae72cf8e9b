//! The command line: see `fastvpn --help`.

use std::io::Write;
use std::process::ExitCode;

use fastvpn::cli::{Cli, Command};
use fastvpn::config::Config;
use fastvpn::control::logging;
use fastvpn::{check, client, demo, tunnel};

fn main() -> ExitCode {
    let cli = Cli::from_command_line();
    let result = match &cli.command {
        Some(Command::Demo(options)) => demo::run(options.clone()),
        Some(Command::Check(options)) => {
            return if check::run(options) {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            };
        }
        Some(Command::Client(command)) => client::run(command),
        None => Config::from_args(&cli.tunnel).and_then(|config| {
            let log = config.log;
            logging::init(log.verbose, log.quiet, log.format);
            tunnel::run(config)
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
