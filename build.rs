//! What `fastvpn --version` says besides the number: the commit and the features.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The commit that a directory is checked out at.
pub struct Commit {
    /// Its abbreviated object name; with `-dirty` if the sources are others than its.
    pub id: String,
    /// What git writes to when another one is checked out, and the sources.
    pub watched: Vec<PathBuf>,
}

/// What the program is made of. A change of anything else makes no other program.
const SOURCES: [&str; 5] = ["Cargo.toml", "Cargo.lock", "build.rs", "src", "simd"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let directory = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let version = env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let commit = commit(&directory).filter(|_| !is_debug());
    for path in commit.iter().flat_map(|commit| &commit.watched) {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    let commit = commit.map(|commit| format!("commit {}", commit.id));
    let build = if is_debug() {
        Some("debug build".into())
    } else {
        commit
    };
    let features = features(env::vars_os().filter_map(|(name, _)| name.into_string().ok()));
    let parts: Vec<_> = build.into_iter().chain([features]).collect();
    println!(
        "cargo::rustc-env=FASTVPN_VERSION={version} ({})",
        parts.join(", ")
    );
}

/// A commit has cargo build everything again, which is too much for a build that is made after
/// each: a debug build does not say which one it is of.
fn is_debug() -> bool {
    env::var_os("PROFILE").is_some_and(|profile| profile == "debug")
}

/// The features that are on, by what cargo has put into the environment.
pub fn features(variables: impl Iterator<Item = String>) -> String {
    let names =
        variables.filter_map(|name| Some(name.strip_prefix("CARGO_FEATURE_")?.to_lowercase()));
    let mut names: Vec<_> = names.filter(|name| name != "default").collect();
    names.sort();
    match names.is_empty() {
        true => "no features".into(),
        false => format!("features {}", names.join(" ").replace('_', "-")),
    }
}

/// The commit of a directory that is the root of a git work tree. Sources without a
/// repository have none, also where they lie in somebody else's.
pub fn commit(directory: &Path) -> Option<Commit> {
    let git = |words: &[&str]| {
        let output = Command::new("git")
            .current_dir(directory)
            .args(words)
            .output()
            .ok()?;
        let text = output.status.success().then_some(output.stdout)?;
        Some(String::from_utf8(text).ok()?.trim().to_string())
    };
    let root = PathBuf::from(git(&["rev-parse", "--show-toplevel"])?);
    if root.canonicalize().ok()? != directory.canonicalize().ok()? {
        return None;
    }
    let id = git(&["rev-parse", "--short=12", "HEAD"])?;
    let path = |name: &str| Some(directory.join(git(&["rev-parse", "--git-path", name])?));
    let exists = |name: &&str| path(name).is_some_and(|path| path.exists());
    // Whatever moves HEAD is in its log, if git keeps one. Cargo takes a path that is not
    // there for one that has changed.
    let names: &[&str] = match exists(&"logs/HEAD") {
        true => &["HEAD", "logs/HEAD"],
        false => &["HEAD", "refs/heads", "packed-refs"],
    };
    let names = names.iter().copied().filter(exists);
    let sources = SOURCES.iter().map(|name| directory.join(name));
    let sources = sources.filter(|path| path.exists());
    let watched = names.filter_map(path).chain(sources).collect();
    // Files that git does not know are not modules of a source that has not changed.
    let mut status = vec!["--no-optional-locks", "status", "--porcelain", "-uno", "--"];
    status.extend(SOURCES);
    let is_dirty = !git(&status)?.is_empty();
    let id = id + if is_dirty { "-dirty" } else { "" };
    Some(Commit { id, watched })
}
