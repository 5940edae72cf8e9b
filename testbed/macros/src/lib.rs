//! `#[testbed::trial]`: see there.

use proc_macro::{TokenStream, TokenTree};

/// Makes a function `fn() -> Result<()>` an end-to-end test of that name. What it
/// is run on, and when, stands in parentheses:
///
/// - `each_engine`: with tunnels on io_uring, and again with tunnels on epoll.
/// - `mixed`: with io_uring at one end and epoll at the other.
/// - `needs_root`: not in a user namespace.
/// - `long`: in the long tier alone.
/// - `etcd`: where etcd and etcdctl are installed.
/// - `systemd`: where systemd is installed, and can be started in namespaces.
/// - `package`: where Debian packages can be made besides.
/// - `wireguard_go`, `boringtun`, `gotatun`, `wg`, `mandoc`, `tmux`, `tshark`, `promtool`: where
///   that program is installed.
///
/// Without the first two it is run once, on whatever engine a tunnel chooses.
#[proc_macro_attribute]
pub fn trial(attribute: TokenStream, function: TokenStream) -> TokenStream {
    let mut words = Vec::new();
    for token in attribute {
        match token {
            TokenTree::Ident(word) => words.push(word.to_string()),
            TokenTree::Punct(_) => {}
            other => panic!("{other} is not a word of a trial"),
        }
    }
    let mut flags = String::new();
    for flag in ["each_engine", "mixed", "needs_root", "long"] {
        let is_set = words.iter().any(|word| word == flag);
        words.retain(|word| word != flag);
        flags += &format!("{flag}: {is_set}, ");
    }
    let mut needs = Vec::new();
    for (module, program) in [
        ("wireguard", "wireguard_go"),
        ("wireguard", "boringtun"),
        ("wireguard", "gotatun"),
        ("wireguard", "wg"),
        ("program", "mandoc"),
        ("program", "tmux"),
        ("program", "tshark"),
        ("program", "promtool"),
    ] {
        if words.iter().any(|word| word == program) {
            let constant = program.to_uppercase();
            needs.push(format!("::testbed::{module}::{constant}.missing()"));
            words.retain(|word| word != program);
        }
    }
    for module in ["etcd", "systemd", "package"] {
        if words.iter().any(|word| word == module) {
            needs.push(format!("::testbed::{module}::missing()"));
            words.retain(|word| word != module);
        }
    }
    assert!(words.is_empty(), "{words:?} are not words of a trial");
    let needs = match needs.is_empty() {
        true => "None".to_string(),
        false => format!("Some(|| None.or_else(|| {}))", needs.join(").or_else(|| ")),
    };
    let mut tokens = function.clone().into_iter();
    let is_fn =
        |token: &TokenTree| matches!(token, TokenTree::Ident(word) if word.to_string() == "fn");
    let name = tokens.find(is_fn).and_then(|_| tokens.next());
    let name = name.expect("a trial is a function");
    let entry = format!(
        "::testbed::inventory::submit! {{
            ::testbed::Trial {{ name: \"{name}\", run: {name}, {flags} needs: {needs} }}
        }}"
    );
    let entry: TokenStream = entry.parse().expect("an entry is Rust");
    function.into_iter().chain(entry).collect()
}
