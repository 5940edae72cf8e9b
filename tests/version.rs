//! The build script: which commit it finds, what makes cargo run it again, features.

#[allow(dead_code, reason = "cargo runs the rest")]
#[path = "../build.rs"]
mod build_script;

use std::fs;
use std::path::Path;
use std::process::Command;

use build_script::{commit, features};

/// Runs git in a directory.
fn git(directory: &Path, words: &str) -> String {
    let mut command = Command::new("git");
    command.current_dir(directory);
    command.args(["-c", "user.name=test", "-c", "user.email=test@localhost"]);
    let output = command.args(words.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "git {words}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_string()
}

fn repository() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    git(directory.path(), "init -q");
    git(directory.path(), "commit -q --allow-empty -m one");
    directory
}

/// What cargo compares: when each watched file was last written, and its length.
fn watched(directory: &Path) -> Vec<(std::path::PathBuf, u64, std::time::SystemTime)> {
    let commit = commit(directory).unwrap();
    assert!(!commit.watched.is_empty());
    let state = |path: std::path::PathBuf| {
        let data = fs::metadata(&path).unwrap();
        (path, data.len(), data.modified().unwrap())
    };
    commit.watched.into_iter().map(state).collect()
}

#[test]
fn the_commit_is_found_and_a_new_one_noticed() {
    let main = repository();
    let tree = main.path().join("tree");
    git(main.path(), "worktree add -q tree -b other");
    for directory in [main.path(), &tree] {
        let head = || git(directory, "rev-parse HEAD");
        let found = || commit(directory).unwrap().id;
        assert!(found().len() >= 12 && head().starts_with(&found()));
        let before = watched(directory);
        git(directory, "status");
        assert_eq!(watched(directory), before, "nothing has happened");
        git(directory, "commit -q --allow-empty -m two");
        assert_ne!(watched(directory), before);
        assert!(head().starts_with(&found()));
    }
}

#[test]
fn a_changed_work_tree_is_not_the_commit() {
    let directory = repository();
    let source = directory.path().join("src/lib.rs");
    fs::create_dir(source.parent().unwrap()).unwrap();
    fs::write(&source, "old").unwrap();
    fs::write(directory.path().join("notes.txt"), "old").unwrap();
    git(directory.path(), "add .");
    git(directory.path(), "commit -q -m sources");
    let found = || commit(directory.path()).unwrap();
    let clean = found().id;
    // What is no source makes no other program.
    fs::write(directory.path().join("notes.txt"), "longer").unwrap();
    assert_eq!(found().id, clean);
    fs::write(&source, "longer").unwrap();
    assert_eq!(found().id, format!("{clean}-dirty"));
    git(directory.path(), "add .");
    assert_eq!(found().id, format!("{clean}-dirty"));
    // Cargo looks for changes in it.
    assert!(found().watched.contains(&directory.path().join("src")));
    git(directory.path(), "commit -q -m two");
    assert!(!found().id.contains("dirty"));
}

#[test]
fn without_a_log_of_head_a_commit_is_noticed_too() {
    let directory = repository();
    git(directory.path(), "config core.logAllRefUpdates false");
    fs::remove_dir_all(directory.path().join(".git/logs")).unwrap();
    git(directory.path(), "pack-refs --all");
    let before = watched(directory.path());
    git(directory.path(), "commit -q --allow-empty -m two");
    assert_ne!(watched(directory.path()), before);
}

#[test]
fn sources_outside_a_repository_of_their_own_have_no_commit() {
    let plain = tempfile::tempdir().unwrap();
    assert!(commit(plain.path()).is_none());
    // As an unpacked release in a packager's repository.
    let others = repository();
    let inside = others.path().join("fastvpn-0.1.0");
    fs::create_dir(&inside).unwrap();
    assert!(commit(&inside).is_none());
    // Nothing was committed yet.
    git(plain.path(), "init -q");
    assert!(commit(plain.path()).is_none());
}

#[test]
fn features_are_those_that_cargo_names() {
    let names = |list: &[&str]| features(list.iter().map(|name| (*name).to_string()));
    let all = [
        "PATH",
        "CARGO_FEATURE_REGISTRY",
        "CARGO_FEATURE_DEFAULT",
        "CARGO_FEATURE_A_B",
    ];
    assert_eq!(names(&all), "features a-b registry");
    assert_eq!(names(&["CARGO_FEATURE_DEFAULT"]), "no features");
}
