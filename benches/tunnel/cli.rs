//! The command line of `cargo bench --bench tunnel -- …`.

use std::path::PathBuf;

use clap::Parser;

use crate::underlay::Underlay;
use crate::variant::{self, Variant};

/// Compare fastvpn with other ways to link two hosts, in one interleaved run.
///
/// Makes two hosts of network namespaces, links them in one way after the
/// other, round after round, and measures the same traffic over each link.
/// Shows medians with their spread and the ratio to kernel VXLAN.
#[derive(Debug, Parser)]
#[command(
    name = "cargo bench --bench tunnel --",
    bin_name = "cargo bench --bench tunnel --"
)]
pub struct Cli {
    /// Kinds of traffic to measure, as in tcp-1,udp-64 [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub rows: Vec<String>,

    /// What to compare, as in vxlan,uring; variants come on top [default: all that is there]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub targets: Vec<String>,

    /// What the cable between the hosts is like
    #[arg(long, value_enum, default_value_t = Underlay::Wire)]
    pub underlay: Underlay,

    /// fastvpn with other flags, or another program; repeatable, as in q4="--queues 4"; with
    /// keys if NAME ends in -encrypted, with all packets captured if in -captured, with
    /// metrics scraped and top open if in -watched
    #[arg(long, value_name = "NAME[@PROGRAM]=FLAGS", value_parser = variant::parse)]
    pub variant: Vec<Variant>,

    /// Show what can be measured and compared, and end
    #[arg(long)]
    pub list: bool,

    /// How often each sample is taken
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub rounds: u16,

    /// How long traffic goes on in each sample
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = parse_seconds)]
    pub seconds: f64,

    /// Only count TCP's bytes instead of comparing each with what was sent
    #[arg(long)]
    pub no_verify: bool,

    /// The target that ratios are taken to [default: vxlan, or else the first]
    #[arg(long, value_name = "KEY")]
    pub baseline: Option<String>,

    /// Where the results go, for --compare and for programs
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/tunnel-bench/results.json"
    )]
    pub json: PathBuf,

    /// Where the results go, for people
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/tunnel-bench/results.html"
    )]
    pub html: PathBuf,

    /// Where the chart of the first figure goes, as a picture for a page elsewhere [default: nowhere]
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,

    /// Results of an earlier run (its --json): show what has changed since
    #[arg(long, value_name = "FILE")]
    pub compare: Option<PathBuf>,

    /// What cargo adds; without a meaning here
    #[arg(long, hide = true)]
    pub bench: bool,
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_string())?;
    if (0.1..=600.0).contains(&seconds) {
        Ok(seconds)
    } else {
        Err("expected 0.1 to 600".into())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("bench").chain(line.split_whitespace()))
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn lists_and_variants_are_read() {
        let cli =
            parse("--bench --rows tcp-1,udp-64 --variant q4=--queues --variant b@/x=").unwrap();
        assert_eq!(cli.rows, ["tcp-1", "udp-64"]);
        assert_eq!(cli.variant.len(), 2);
        assert_eq!((cli.rounds, cli.seconds), (5, 2.0));
    }

    #[test]
    fn out_of_bounds_is_refused() {
        for line in [
            "--rounds 0",
            "--seconds 0",
            "--seconds NaN",
            "--seconds 1e9",
            "--variant q",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
