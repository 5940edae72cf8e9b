//! `--variant NAME[@PROGRAM]=FLAGS`: fastvpn with other flags or of another version.

use std::path::PathBuf;

/// Longest name: the terminal's first column.
const NAME_CHARS_MAX: usize = 24;

/// One variant of fastvpn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variant {
    /// Its key in results.
    pub name: String,
    /// Path of the program; `None` is the one that was built with this bench.
    pub program: Option<PathBuf>,
    /// Flags in addition to `--peer`.
    pub flags: Vec<String>,
}

/// Reads a variant as the command line gives it.
///
/// # Errors
/// One line that says what is wrong.
pub fn parse(text: &str) -> Result<Variant, String> {
    let (head, flags) = text
        .split_once('=')
        .ok_or("expected NAME=FLAGS or NAME@PROGRAM=FLAGS, as in q4=\"--queues 4\"")?;
    let (name, program) = match head.split_once('@') {
        Some((_, "")) => return Err("the path after @ is empty".into()),
        Some((name, program)) => (name, Some(PathBuf::from(program))),
        None => (head, None),
    };
    let usual = |char: char| char.is_ascii_alphanumeric() || "-_.".contains(char);
    if name.is_empty() || name.len() > NAME_CHARS_MAX || !name.chars().all(usual) {
        return Err(format!(
            "a name has 1 to {NAME_CHARS_MAX} letters, digits, '-', '_' and '.', not {name:?}"
        ));
    }
    Ok(Variant {
        name: name.into(),
        program,
        flags: flags.split_whitespace().map(String::from).collect(),
    })
}

/// The first long flag that `help` (the output of `--help`) does not mention.
pub fn unknown_flag<'a>(flags: &'a [String], help: &str) -> Option<&'a str> {
    let known = |flag: &str| {
        help.split(|char: char| !(char.is_ascii_alphanumeric() || char == '-'))
            .any(|word| word == flag)
    };
    flags
        .iter()
        .filter(|flag| flag.starts_with("--"))
        .map(|flag| flag.split_once('=').map_or(flag.as_str(), |(name, _)| name))
        .find(|flag| !known(flag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_are_read() {
        let variant = parse("q4=--queues 4  --mtu=1400").unwrap();
        assert_eq!(variant.name, "q4");
        assert_eq!(variant.program, None);
        assert_eq!(variant.flags, ["--queues", "4", "--mtu=1400"]);
        let variant = parse("old@/opt/a@b/fastvpn=").unwrap();
        assert_eq!(variant.name, "old");
        assert_eq!(variant.program, Some("/opt/a@b/fastvpn".into()));
        assert!(variant.flags.is_empty());
    }

    #[test]
    fn what_is_no_variant_is_refused() {
        for text in [
            "",
            "q4",
            "=--queues 4",
            "a b=",
            "a@=",
            "tab\t=",
            &"x".repeat(40),
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn flags_are_looked_up_whole() {
        let help = "Options:\n      --io <IO>  Engine\n  -q, --queues <N>\n      --without-this";
        let unknown = |flags: &str| {
            let flags: Vec<_> = flags.split(' ').map(String::from).collect();
            unknown_flag(&flags, help).map(String::from)
        };
        assert_eq!(unknown("--io epoll --queues=4 -q"), None);
        assert_eq!(unknown("--queues 4 --without x"), Some("--without".into()));
        assert_eq!(unknown("--queue=4"), Some("--queue".into()));
    }
}
