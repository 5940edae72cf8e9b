//! Text from elsewhere, made safe for a terminal.

/// Whether a terminal may act on it, or show what follows out of order: control
/// characters, separators of lines and paragraphs, and directional formatting
/// (Unicode Standard Annex #9, section 2).
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

/// Text on one line, with escapes as in `\u{1b}` for what a terminal would not
/// show as it is.
pub(crate) fn printable(text: &str) -> String {
    replace(text, |c| c.escape_default().to_string())
}

/// A JSON text on one line that says the same, with escapes as in `\u009b` for
/// what a terminal would not show as it is.
pub(crate) fn printable_json(text: &str) -> String {
    replace(text, |c| match u32::from(c) {
        // RFC 8259 has them between tokens only, where a space does as well.
        0..0x20 => " ".into(),
        code => format!("\\u{code:04x}"),
    })
}

fn replace(text: &str, escape: impl Fn(char) -> String) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match is_unsafe(c) {
            true => safe += &escape(c),
            false => safe.push(c),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_acts_on_is_escaped() {
        for (text, shown) in [
            ("vpn.example:8285", "vpn.example:8285"),
            ("zürich", "zürich"),
            ("a\x1b[2Jb", "a\\u{1b}[2Jb"),
            ("two\nlines\r", "two\\nlines\\r"),
            ("\u{9b}31m\u{7f}", "\\u{9b}31m\\u{7f}"),
            ("\u{202e}txt", "\\u{202e}txt"),
        ] {
            assert_eq!(printable(text), shown);
        }
    }

    #[test]
    fn escaped_json_means_the_same() {
        let text = "{\"a\":\t\"\u{9b}31m\u{7f}\u{2028}é\\u001b\"}\r";
        let safe = printable_json(text);
        assert!(!safe.contains(is_unsafe), "{safe}");
        let parsed = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(parsed(&safe), parsed(text));
        assert_eq!(printable_json("{\"ok\": true}"), "{\"ok\": true}");
    }
}
