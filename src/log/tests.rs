use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};

use super::*;

#[test]
fn text_has_the_message_alone_and_json_has_fields() {
    let work = || {
        let peer = "10.0.0.2:8285";
        tracing::warn!(peer, count = 7, what = ?Some(1), "peer {peer} is late");
    };
    assert_eq!(captured(work), ["WARN peer 10.0.0.2:8285 is late"]);
    let [line] = &captured_json(work)[..] else {
        panic!("one line");
    };
    assert_eq!(line["level"], "WARN");
    assert_eq!(line["message"], "peer 10.0.0.2:8285 is late");
    assert_eq!(
        (&line["peer"], &line["count"]),
        (&"10.0.0.2:8285".into(), &7.into())
    );
    assert!(line["timestamp"].is_string());
}

#[test]
fn a_message_stays_on_its_line() {
    let lines = captured(|| tracing::info!("evil\n<3>forged \u{1b}[31mred\u{9b} ä"));
    assert_eq!(lines, ["INFO evil\\n<3>forged \\u{1b}[31mred\\u{9b} ä"]);
}

#[test]
fn the_last_line_is_one_line() {
    let error = "cannot read /etc/a\n<6>forged";
    let line = end_line(&error, true);
    assert_eq!(line, "<3>fastvpn: cannot read /etc/a\\n<6>forged");
    assert!(end_line(&error, false).starts_with("fastvpn: cannot"));
}

#[test]
fn priorities_are_those_of_syslog() {
    let levels = [
        Level::ERROR,
        Level::WARN,
        Level::INFO,
        Level::DEBUG,
        Level::TRACE,
    ];
    assert_eq!(levels.map(priority), [3, 4, 6, 7, 7]);
}

/// Messages of a source file that users see without asking for more.
#[derive(Default)]
struct Messages(BTreeSet<String>);

impl<'ast> Visit<'ast> for Messages {
    fn visit_macro(&mut self, item: &'ast syn::Macro) {
        let path: Vec<_> = item
            .path
            .segments
            .iter()
            .map(|part| part.ident.to_string())
            .collect();
        if let [room, level] = &path[..]
            && room == "tracing"
            && ["info", "warn", "error"].contains(&level.as_str())
        {
            self.0.extend(message(item));
        }
        // Macros of our own may hold others.
        visit::visit_macro(self, item);
    }
}

/// The format of the message: the first string that is not a field's value.
fn message(item: &syn::Macro) -> Option<String> {
    let mut is_value = false;
    for token in item.tokens.clone() {
        let text = token.to_string();
        if let Ok(literal) = syn::parse_str::<syn::LitStr>(&text)
            && !is_value
        {
            return Some(literal.value());
        }
        is_value = text == "=";
    }
    None
}

/// The longest part of a message that is always the same, if that says something.
fn fixed_part(format: &str) -> Option<String> {
    let parts = format.split(['{', '}']).step_by(2);
    let longest = parts.max_by_key(|part| part.len())?.trim();
    let letters = longest.chars().filter(|it| it.is_alphabetic()).count();
    (letters >= 5).then(|| longest.to_string())
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, found),
            false => found.push(path),
        }
    }
}

#[test]
fn every_kind_of_message_is_documented() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/log.md")).unwrap();
    let mut files = Vec::new();
    sources(&root.join("src"), &mut files);
    let mut messages = Messages::default();
    for file in files.iter().filter(|file| !file.ends_with("log/tests.rs")) {
        let code = std::fs::read_to_string(file).unwrap();
        messages.visit_file(&syn::parse_file(&code).unwrap());
    }
    let fixed: BTreeSet<_> = messages.0.iter().filter_map(|it| fixed_part(it)).collect();
    assert!(fixed.len() > 60, "{fixed:?}");
    let words = |text: &str| -> String {
        let text = text.replace('`', "");
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let page = words(&page);
    let missing = |part: &&String| !page.contains(&words(part));
    let missing: Vec<_> = fixed.iter().filter(missing).collect();
    assert!(missing.is_empty(), "docs/log.md lacks {missing:#?}");
}
