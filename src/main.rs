//! The command line: see `fastvpn --help`.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use fastvpn::cli::{Cli, Command};
use fastvpn::config::Config;
use fastvpn::control::logging;
use fastvpn::{check, demo, tunnel};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.command {
        Some(Command::Demo(options)) => demo::run(options.clone()),
        Some(Command::Check(options)) => {
            return if check::run(options) {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            };
        }
        None => {
            let args = &cli.tunnel;
            logging::init(args.verbose, args.quiet, args.log_format);
            Config::from_args(args).and_then(|config| tunnel::run(&config))
        }
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
