//! The command line: see `fastvpn --help`.

use std::process::ExitCode;

use clap::{ArgMatches, FromArgMatches};
use fastvpn::cli::{self, Cli, Command, capture, check, commands, generate, keys, registry, top};
use fastvpn::config::Config;
use fastvpn::daemon;
use fastvpn::error::Result;
use fastvpn::log::{self, LogFormat};

/// Runs a tunnel, or starts a process that does. `false`: that has failed, and has said why.
fn run(flags: &ArgMatches) -> Result<bool> {
    let mut config = Config::from_flags(flags)?;
    cli::check_interface_name(&config)?;
    config.use_environment(|name| std::env::var_os(name))?;
    if config.is_launcher() {
        return daemon::launch(&config);
    }
    let format = config.log_format;
    log::init(config.log_level(), format);
    match daemon::run(config) {
        Err(error) if format == LogFormat::Json => {
            // Whoever reads objects reads nothing else.
            tracing::error!(%error, "fastvpn has ended: {error}");
            Ok(false)
        }
        result => result.map(|()| true),
    }
}

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
        Some(Command::Generate(command)) => generate::run(command, cli::command()),
        Some(Command::Registry(command)) => registry::run(command),
        Some(Command::Top(options)) => top::run(options),
        Some(Command::Capture(options)) => capture::run(options),
        Some(Command::Client(command)) => commands::run(command),
        None => match run(&flags) {
            Ok(false) => return ExitCode::FAILURE,
            result => result.map(drop),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::report_end(&error);
            ExitCode::FAILURE
        }
    }
}
