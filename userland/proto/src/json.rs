// SPDX-License-Identifier: MIT OR Apache-2.0
//! JSON: an object built field by field, and the fields of a flat object read back.

use std::fmt::{Display, Write};

/// A JSON object in the making.
#[derive(Default)]
pub struct Object(String);

impl Object {
    /// An event of this name.
    #[must_use]
    pub fn event(name: &str) -> Self {
        Self::default().text("event", name)
    }

    fn key(&mut self, key: &str) {
        self.0.push(if self.0.is_empty() { '{' } else { ',' });
        quote(&mut self.0, key);
        self.0.push(':');
    }

    /// Adds a string.
    #[must_use]
    pub fn text(mut self, key: &str, value: &str) -> Self {
        self.key(key);
        quote(&mut self.0, value);
        self
    }

    /// Adds a number or a truth value.
    #[must_use]
    pub fn value(mut self, key: &str, value: impl Display) -> Self {
        self.key(key);
        self.0.push_str(&value.to_string());
        self
    }

    /// Adds an address, as a string of hex digits.
    #[must_use]
    pub fn hex(self, key: &str, value: u64) -> Self {
        self.text(key, &format!("{value:#x}"))
    }

    /// Adds a list of addresses.
    #[must_use]
    pub fn hex_list(mut self, key: &str, values: &[u64]) -> Self {
        self.key(key);
        let items: Vec<String> = values.iter().map(|v| format!("\"{v:#x}\"")).collect();
        self.0.push('[');
        self.0.push_str(&items.join(","));
        self.0.push(']');
        self
    }

    /// The text of the object.
    #[must_use]
    pub fn finish(mut self) -> String {
        if self.0.is_empty() {
            self.0.push('{');
        }
        self.0.push('}');
        self.0
    }
}

fn quote(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => {
                // Writing to a String can't fail.
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// The raw text of a field of a flat object as [`Object`] writes it: a string without its quotes
/// (escapes as they are), a number, or a list with its brackets.
#[must_use]
pub fn field<'a>(object: &'a str, key: &str) -> Option<&'a str> {
    let mark = format!("\"{key}\":");
    let at = object.find(&mark)?;
    let rest = object.get(at + mark.len()..)?;
    if let Some(text) = rest.strip_prefix('"') {
        let mut escaped = false;
        for (i, c) in text.char_indices() {
            match c {
                '"' if !escaped => return text.get(..i),
                '\\' => escaped = !escaped,
                _ => escaped = false,
            }
        }
        return None;
    }
    let end = match rest.strip_prefix('[') {
        Some(_) => rest.find(']')? + 1,
        None => rest.find([',', '}'])?,
    };
    rest.get(..end)
}

/// A number field.
#[must_use]
pub fn number(object: &str, key: &str) -> Option<u64> {
    let text = field(object, key)?;
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// A list of addresses.
#[must_use]
pub fn hex_list(object: &str, key: &str) -> Option<Vec<u64>> {
    let list = field(object, key)?.strip_prefix('[')?.strip_suffix(']')?;
    list.split(',')
        .filter(|item| !item.is_empty())
        .map(|item| {
            let hex = item.trim().trim_matches('"').strip_prefix("0x")?;
            u64::from_str_radix(hex, 16).ok()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let text = Object::event("x")
            .text("t", "a \"b\" \\ c\n\u{1}")
            .value("n", 12)
            .value("b", true)
            .hex("h", 0x4000_0000)
            .hex_list("l", &[1, 0xff])
            .finish();
        assert_eq!(
            text,
            r#"{"event":"x","t":"a \"b\" \\ c\n\u0001","n":12,"b":true,"h":"0x40000000","l":["0x1","0xff"]}"#
        );
        assert_eq!(field(&text, "event"), Some("x"));
        assert_eq!(number(&text, "n"), Some(12));
        assert_eq!(field(&text, "b"), Some("true"));
        assert_eq!(number(&text, "h"), Some(0x4000_0000));
        assert_eq!(hex_list(&text, "l"), Some(vec![1, 0xff]));
        assert_eq!(field(&text, "nothing"), None);
    }

    #[test]
    fn broken_lines_are_none_or_short_never_a_panic() {
        for text in ["", "{", "{\"a\":", "{\"a\":\"x", "{\"a\":[1", "{\"a\":1"] {
            assert_eq!(field(text, "a"), None, "{text}");
        }
        assert_eq!(Object::default().finish(), "{}");
    }
}
