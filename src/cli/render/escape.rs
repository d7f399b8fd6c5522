//! Text from files on its way to a terminal or into JSON. Control characters, C1, bidirectional marks, zero-width characters and
//! lone combining marks are shown as `\u{…}`: what is printed is what is there, and no file can drive the terminal.

/// Escapes everything that does not print, line breaks too.
pub(in super::super) fn inline(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    // `str::escape_debug` decides what prints. It would also escape quotes and backslashes, which are harmless, and which would be
    // doubled in messages that quote a name already.
    for part in text.split_inclusive(['"', '\'', '\\']) {
        let (body, quote) = part.split_at(part.trim_end_matches(['"', '\'', '\\']).len());
        out.extend(body.escape_debug());
        out.push_str(quote);
    }
    out
}

/// [`inline`] for each line of a text that consists of lines.
pub(in super::super) fn lines(text: &str) -> String {
    text.split_inclusive('\n')
        .map(|line| match line.strip_suffix('\n') {
            Some(line) => inline(line) + "\n",
            None => inline(line),
        })
        .collect()
}

/// Escapes in a JSON text what does not print. JSON itself demands it for U+0000 to U+001F only; such characters occur in strings
/// alone, so the value stays the same.
pub(super) fn json(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() && c != '\x7f' || is_plain(c) {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    out
}

fn is_plain(c: char) -> bool {
    c.escape_debug().eq([c])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_print_is_escaped() {
        for (raw, shown) in [
            ("plain \"quoted\" C:\\x", "plain \"quoted\" C:\\x"),
            ("\x1b[31mred", "\\u{1b}[31mred"),
            ("a\u{9b}31mb", "a\\u{9b}31mb"),
            ("x\r\ny\0\x7f", "x\\r\\ny\\0\\u{7f}"),
            ("\u{202e}cba\u{2066}", "\\u{202e}cba\\u{2066}"),
            ("a\u{200b}b\u{feff}", "a\\u{200b}b\\u{feff}"),
            ("\u{301}lone, e\u{301} not", "\\u{301}lone, e\u{301} not"),
            ("größe 重み", "größe 重み"),
            ("\"\"\u{1b}\\", "\"\"\\u{1b}\\"),
        ] {
            assert_eq!(inline(raw), shown);
        }
        assert_eq!(lines("a\u{1b}\nb\n"), "a\\u{1b}\nb\n");
    }

    #[test]
    fn json_keeps_its_value() {
        let value = serde_json::json!({"k\u{9b}": "\u{202e}\u{7f}\u{e0041}ü\u{1b}\"\\"});
        let text = json(&value.to_string());
        assert!(text.chars().all(|c| !c.is_control() && c != '\u{202e}'), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}
