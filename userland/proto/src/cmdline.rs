// SPDX-License-Identifier: MIT OR Apache-2.0
//! Our words (`havmsi.key=value`) on a kernel command line.

/// The value of the last `havmsi.KEY=value` word.
#[must_use]
pub fn value<'a>(cmdline: &'a str, key: &str) -> Option<&'a str> {
    cmdline
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix("havmsi.")?.split_once('='))
        .filter(|(k, _)| *k == key)
        .map(|(_, v)| v)
        .next_back()
}

/// A number on the command line, or `default` where the word is missing.
///
/// # Errors
/// A text that names the word and the range when the value is no number in the range.
pub fn number(cmdline: &str, key: &str, default: u64, min: u64, max: u64) -> Result<u64, String> {
    let Some(text) = value(cmdline, key) else {
        return Ok(default);
    };
    match text.parse() {
        Ok(n) if (min..=max).contains(&n) => Ok(n),
        _ => Err(format!("havmsi.{key}={text}: want a number from {min} to {max}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_last_word_of_a_key() {
        let line = "console=ttyAMA0 havmsi.job=run havmsi.mib=16 havmsi.job=smp4\n";
        assert_eq!(value(line, "job"), Some("smp4"));
        assert_eq!(value(line, "jo"), None);
        assert_eq!(number(line, "mib", 1, 1, 64), Ok(16));
        assert_eq!(number(line, "seconds", 7, 1, 64), Ok(7));
    }

    #[test]
    fn a_bad_number_says_what_is_wanted() {
        let e = number("havmsi.mib=x", "mib", 1, 1, 64).unwrap_err();
        assert_eq!(e, "havmsi.mib=x: want a number from 1 to 64");
        assert!(number("havmsi.mib=65", "mib", 1, 1, 64).is_err());
    }
}
