// SPDX-License-Identifier: MIT OR Apache-2.0
//! Package sources of the machine: read in both formats of apt, derive what we add.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

/// One entry of a package source list.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Source {
    /// Where the archive is.
    pub uris: Vec<String>,
    /// Suites (`bookworm`, `bookworm-updates`).
    pub suites: Vec<String>,
    /// Components (`main`).
    pub components: Vec<String>,
    /// Other fields, as in the deb822 format (`Signed-By`).
    pub options: Vec<(String, String)>,
}

impl Source {
    /// The entry in deb822 format with other suites.
    pub fn deb822(&self, suites: &[String]) -> String {
        let mut text =
            format!("Types: deb\nURIs: {}\nSuites: {}\n", self.uris.join(" "), suites.join(" "));
        if !self.components.is_empty() {
            text.push_str(&format!("Components: {}\n", self.components.join(" ")));
        }
        for (name, value) in &self.options {
            text.push_str(&format!("{name}: {value}\n"));
        }
        text
    }
}

/// Parses a deb822 file (`*.sources`).
pub fn parse_deb822(text: &str) -> Vec<Source> {
    let mut found = Vec::new();
    for stanza in
        text.lines().filter(|l| !l.starts_with('#')).collect::<Vec<_>>().join("\n").split("\n\n")
    {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in stanza.lines() {
            if line.starts_with([' ', '\t']) {
                if let Some(last) = fields.last_mut() {
                    last.1.push('\n');
                    last.1.push_str(line);
                }
            } else if let Some((name, value)) = line.split_once(':') {
                fields.push((name.trim().to_owned(), value.trim().to_owned()));
            }
        }
        let mut source = Source::default();
        let (mut deb, mut enabled) = (false, true);
        let words = |v: &str| v.split_whitespace().map(str::to_owned).collect();
        for (name, value) in fields {
            match name.to_ascii_lowercase().as_str() {
                "types" => deb = value.split_whitespace().any(|t| t == "deb"),
                "uris" => source.uris = words(&value),
                "suites" => source.suites = words(&value),
                "components" => source.components = words(&value),
                "enabled" => enabled = value != "no",
                "architectures" => {}
                _ => source.options.push((name, value)),
            }
        }
        if deb && enabled && !source.uris.is_empty() {
            found.push(source);
        }
    }
    found
}

/// Parses a one-line-style file (`*.list`).
pub fn parse_list(text: &str) -> Vec<Source> {
    let mut found = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some(rest) = line.strip_prefix("deb ").or_else(|| line.strip_prefix("deb\t")) else {
            continue;
        };
        let mut rest = rest.trim_start();
        let mut source = Source::default();
        if let Some(inner) = rest.strip_prefix('[')
            && let Some((options, after)) = inner.split_once(']')
        {
            for (name, value) in options.split_whitespace().filter_map(|o| o.split_once('=')) {
                let name = match name {
                    "arch" => continue,
                    "signed-by" => "Signed-By",
                    "trusted" => "Trusted",
                    other => other,
                };
                source.options.push((name.to_owned(), value.replace(',', " ")));
            }
            rest = after.trim_start();
        }
        let mut words = rest.split_whitespace().map(str::to_owned);
        let (Some(uri), Some(suite)) = (words.next(), words.next()) else { continue };
        source.uris.push(uri);
        source.suites.push(suite);
        source.components = words.collect();
        found.push(source);
    }
    found
}

/// All enabled binary sources of this machine.
pub fn machine_sources() -> Result<Vec<Source>> {
    let mut found = Vec::new();
    let main = Path::new("/etc/apt/sources.list");
    if main.is_file() {
        found.extend(parse_list(&fs::read_to_string(main)?));
    }
    let parts = Path::new("/etc/apt/sources.list.d");
    if parts.is_dir() {
        let mut paths: Vec<_> =
            fs::read_dir(parts)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
        paths.sort();
        for path in paths {
            match path.extension().and_then(|e| e.to_str()) {
                Some("list") => found.extend(parse_list(&fs::read_to_string(&path)?)),
                Some("sources") => found.extend(parse_deb822(&fs::read_to_string(&path)?)),
                _ => {}
            }
        }
    }
    Ok(found)
}

/// Release code name of this machine (`bookworm`).
pub fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let field = |name: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix('='))
            .map(|v| v.trim_matches('"').to_owned())
    };
    if field("ID").as_deref() != Some("debian") {
        bail!(
            "this is not Debian: packages can't be installed here; install what is missing by hand"
        );
    }
    field("VERSION_CODENAME").context("/etc/os-release has no VERSION_CODENAME")
}

/// The suite that offers QEMU 10 and Linux 6.12: backports on Debian 12, the release itself later.
pub fn new_suite(codename: &str) -> String {
    if codename == "bookworm" { "bookworm-backports".to_owned() } else { codename.to_owned() }
}

fn has_suite(source: &Source, suite: &str) -> bool {
    source.suites.iter().any(|s| s == suite) && source.components.iter().any(|c| c == "main")
}

/// Entries for other suites, one each, derived from the release's own entry.
pub fn entry_for(sources: &[Source], codename: &str, suites: &[&str]) -> Result<String> {
    let base = sources.iter().find(|s| has_suite(s, codename)).with_context(|| {
        format!("no package source with suite `{codename}` and component `main` in /etc/apt: add one, then `cargo xtask setup`")
    })?;
    let base = Source { components: vec!["main".to_owned()], ..base.clone() };
    let entries = suites.iter().map(|suite| base.deb822(&[(*suite).to_owned()]));
    Ok(entries.collect::<Vec<_>>().join("\n"))
}

/// What to write for the backports suite, derived from the release's own entry; `None` if it is configured already.
pub fn backports_entry(sources: &[Source], codename: &str) -> Result<Option<String>> {
    let suite = new_suite(codename);
    if suite == codename || sources.iter().any(|s| has_suite(s, &suite)) {
        return Ok(None);
    }
    entry_for(sources, codename, &[&suite]).map(Some)
}

/// Sources for a separate apt: the release with its updates, nothing newer.
pub fn release_sources(sources: &[Source], codename: &str) -> Result<String> {
    let newer = format!("{codename}-backports");
    let is_own = |s: &&String| {
        s.as_str() == codename || (s.starts_with(&format!("{codename}-")) && **s != newer)
    };
    let mut text = String::new();
    for source in sources.iter().filter(|s| s.components.iter().any(|c| c == "main")) {
        let suites: Vec<String> = source.suites.iter().filter(is_own).cloned().collect();
        if !suites.is_empty() {
            let base = Source { components: vec!["main".to_owned()], ..source.clone() };
            text.push_str(&base.deb822(&suites));
            text.push('\n');
        }
    }
    if text.is_empty() {
        bail!(
            "no package source with a suite of `{codename}` and component `main` in /etc/apt: add one"
        );
    }
    Ok(text)
}

/// Sources for a separate apt of another architecture: the release and its backports.
pub fn foreign_sources(sources: &[Source], codename: &str) -> Result<String> {
    let mut text = String::new();
    let suite = new_suite(codename);
    for source in sources {
        let suites: Vec<String> = source
            .suites
            .iter()
            .filter(|s| {
                s.as_str() == codename || (s.starts_with(&format!("{codename}-")) && **s != suite)
            })
            .cloned()
            .collect();
        if !suites.is_empty() && source.components.iter().any(|c| c == "main") {
            text.push_str(&source.deb822(&suites));
            text.push('\n');
        }
    }
    if let Some(entry) = backports_entry(sources, codename)? {
        text.push_str(&entry);
    } else if let Some(source) = sources.iter().find(|s| has_suite(s, &suite)) {
        text.push_str(&source.deb822(&[suite]));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "Types: deb\n# a comment\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n\
        Components: main contrib\nSigned-By: /usr/share/keyrings/k.gpg\n\nTypes: deb-src\nURIs: http://x\nSuites: bookworm\n";
    const LIST: &str = "# old\ndeb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib\n\
        deb-src http://mirror.example/debian bookworm main\n";

    #[test]
    fn backports_are_derived_from_both_formats() {
        for sources in [parse_deb822(DEB822), parse_list(LIST)] {
            assert_eq!(sources.len(), 1);
            let entry = backports_entry(&sources, "bookworm").unwrap().unwrap();
            assert!(entry.contains("URIs: http://mirror.example/debian\nSuites: bookworm-backports\nComponents: main\n"), "{entry}");
            assert!(entry.contains("Signed-By: /"), "{entry}");
        }
    }

    #[test]
    fn configured_backports_are_left_alone() {
        let mut sources = parse_list(LIST);
        sources.extend(parse_list("deb http://m/debian bookworm-backports main"));
        assert_eq!(backports_entry(&sources, "bookworm").unwrap(), None);
        let text = foreign_sources(&sources, "bookworm").unwrap();
        assert_eq!(text.matches("bookworm-backports").count(), 1, "{text}");
    }

    #[test]
    fn a_release_comes_without_backports() {
        let mut sources = parse_list(LIST);
        sources.extend(parse_list(
            "deb http://m/debian bookworm-backports main\ndeb http://s/x bookworm-security main",
        ));
        sources.extend(parse_list("deb http://m/tools bookworm-tools contrib"));
        let text = release_sources(&sources, "bookworm").unwrap();
        assert!(
            text.contains("Suites: bookworm\n") && text.contains("bookworm-security"),
            "{text}"
        );
        assert!(!text.contains("backports") && !text.contains("tools"), "{text}");
        assert!(release_sources(&sources, "trixie").is_err());
    }

    #[test]
    fn later_releases_need_no_backports() {
        let sources = parse_list("deb http://m/debian trixie main");
        assert_eq!(backports_entry(&sources, "trixie").unwrap(), None);
    }

    #[test]
    fn no_debian_entry_is_an_error() {
        assert!(backports_entry(&[], "bookworm").is_err());
    }

    #[test]
    fn disabled_and_multi_line_fields() {
        assert!(
            parse_deb822("Enabled: no\nTypes: deb\nURIs: u\nSuites: bookworm\nComponents: main")
                .is_empty()
        );
        let s = parse_deb822(
            "Types: deb\nURIs: u\nSuites: bookworm\nComponents: main\nSigned-By:\n -----BEGIN\n .\n",
        );
        assert_eq!(
            s.first().unwrap().options,
            [("Signed-By".to_owned(), "\n -----BEGIN\n .".to_owned())]
        );
    }
}
