//! `fastvpn top` as a picture: that of README.md, which `tests/picture.sh` makes.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use anstyle_svg::Term;
use fastvpn::error::{Error, Result};

use super::top::{Terminal, UTF8};
use crate::operator::Operator;
use crate::site::{Site, peer, sites, tunnel, wait_for_each_other};
use crate::support::{Tunnel, check, fail, stop, tried};
use crate::tools::Stream;
use crate::wireguard::secrets::SECRETS;

/// Where to write the picture. Without it, it is made all the same, but soon.
const FILE_VARIABLE: &str = "FASTVPN_PICTURE";

const PEERS: usize = 4;

/// Columns and rows of the terminal.
const SIZE: (usize, usize) = (106, 24);

/// Columns that the graphs leave to what stands before them.
const LABEL_COLUMNS: usize = 29;

const BYTES_MAX: usize = 60_000;

/// Streams by the numbers of their sites, in the order in which they begin: from, to, and
/// whether as fast as it goes.
const STREAMS: [(usize, usize, bool); 6] = [
    (1, 2, false),
    (3, 1, false),
    (1, 4, true),
    (5, 1, false),
    (1, 3, false),
    (4, 1, false),
];

#[testbed::trial(tmux)]
fn top_is_made_a_picture() -> Result<()> {
    let file = std::env::var_os(FILE_VARIABLE).map(PathBuf::from);
    // The graphs have a column for each second.
    let seconds = file.as_ref().map_or(0, |_| SIZE.0 - LABEL_COLUMNS);
    let pause = Duration::from_secs(seconds as u64) / STREAMS.len() as u32;
    let (operator, network) = (Operator::new()?, sites(1 + PEERS as u8)?);
    let tunnels = start_tunnels(&operator, &network.all)?;
    let terminal = Terminal::start(&operator, &[UTF8])?;
    let (width, height) = (SIZE.0.to_string(), SIZE.1.to_string());
    terminal.tmux(&["resize-window", "-x", &width, "-y", &height])?;
    terminal.press(&["v"])?;
    terminal.wait_for("HANDSHAKE")?;
    let mut streams = Vec::new();
    for (from, to, is_fast) in STREAMS {
        streams.push(start_stream(&network.all, from, to, is_fast)?);
        sleep(pause);
    }
    terminal.wait("traffic with each peer", |screen| {
        let peers = screen.lines().filter(|line| line.starts_with("10.211.55."));
        let busy = peers.filter(|line| line.contains(" M ") || line.contains(" G "));
        screen.contains('█') && busy.count() == PEERS
    })?;
    let screen = terminal.tmux(&["capture-pane", "-p", "-e", "-N"])?;
    let svg = Term::new().render_svg(screen.trim_end());
    is_picture(&svg)?;
    if let Some(file) = file {
        tried("write the picture", std::fs::write(file, svg))?;
    }

    terminal.press(&["q"])?;
    terminal.ends_with("status 0")?;
    for stream in streams {
        stream.finish()?;
    }
    tunnels.into_iter().try_for_each(|it| stop(it).map(drop))
}

/// An encrypted tunnel from the first site, the operator's, to each of the others.
fn start_tunnels(operator: &Operator, sites: &[Site]) -> Result<Vec<Tunnel>> {
    let secret = operator.write("secret", SECRETS[0])?;
    let protected = std::fs::set_permissions(&secret, Permissions::from_mode(0o600));
    tried("protect a file", protected)?;
    let socket = operator.socket_text();
    let flags = ["--secret-file", &secret, "--queues", "2"];
    let [near, others @ ..] = sites else {
        return fail("no sites");
    };
    let peers: Vec<_> = others.iter().map(|site| peer(site.number)).collect();
    let mut tunnels = vec![near.start(&peers, &[&flags[..], &["--control", &socket]].concat())?];
    for site in others {
        tunnels.push(site.start(&[peer(near.number)], &flags)?);
        wait_for_each_other(near, site)?;
    }
    Ok(tunnels)
}

fn start_stream(sites: &[Site], from: usize, to: usize, is_fast: bool) -> Result<Stream> {
    let [from, to] = [from, to].map(|number| &sites[number - 1]);
    let address = tunnel(to.number)[0];
    match is_fast {
        true => Stream::start_fast(&from.host, &to.host, address),
        false => Stream::start(&from.host, &to.host, address),
    }
}

/// Whether it is a picture of top, in colors, that may go onto a page.
fn is_picture(svg: &str) -> Result<()> {
    let document = roxmltree::Document::parse(svg);
    let document = document.map_err(|error| Error::new(format!("{error} in {svg}")))?;
    let root = document.root_element();
    let texts = root.descendants().filter(|node| node.is_text());
    let text: String = texts.filter_map(|node| node.text()).collect();
    let is_all_there = ["4 peers, 4 sessions", "bit/s", "HANDSHAKE", "q quit"];
    let is_all_there = is_all_there.iter().all(|part| text.contains(part));
    // Green and cyan, as top asks for them.
    let colors = ["fg-ansi256-002", "fg-ansi256-006"];
    let has_colors = colors.iter().all(|class| svg.contains(class));
    let is_small = svg.len() < BYTES_MAX;
    check(is_all_there && has_colors && is_small, || svg.to_string())
}
