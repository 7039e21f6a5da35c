//! Where files are: `SANDBOX:/path`, a path here, or `-`.

use std::path::{Component, Path, PathBuf};

/// A path in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub sandbox: String,
    /// Absolute, without `.`, `..` and a `/` at its end.
    pub path: String,
    /// It ended in `/`: a directory is meant.
    pub directory: bool,
}

/// One side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Side {
    There(Place),
    Here(PathBuf),
    /// `-`: standard input or output.
    Stream,
}

/// `SANDBOX:/path`.
pub fn place(text: &str) -> Result<Place, String> {
    let wrong = || format!("`{text}` is no place in a sandbox: expected SANDBOX:/absolute/path");
    let (sandbox, path) = text.split_once(':').ok_or_else(wrong)?;
    if sandbox.is_empty() || !path.starts_with('/') {
        return Err(wrong());
    }
    let names = path.split('/').filter(|name| !name.is_empty() && *name != ".");
    if names.clone().any(|name| name == "..") {
        return Err(format!("`{text}` contains `..`: expected the path itself"));
    }
    let joined: String = names.flat_map(|name| ["/", name]).collect();
    let directory = path.ends_with('/') || path.ends_with("/.");
    Ok(Place { sandbox: sandbox.to_owned(), path: if joined.is_empty() { "/".to_owned() } else { joined }, directory })
}

/// What begins with `/` or `.`, or has no `:`, is here.
pub fn side(text: &str) -> Result<Side, String> {
    match text {
        "" => Err("expected a path, SANDBOX:/path, or -".to_owned()),
        "-" => Ok(Side::Stream),
        _ if text.starts_with(['/', '.']) || !text.contains(':') => Ok(Side::Here(PathBuf::from(text))),
        _ => place(text).map(Side::There),
    }
}

impl Place {
    /// `name` in this directory.
    pub fn below(&self, name: &str) -> Self {
        let path = format!("{}/{name}", self.path.trim_end_matches('/'));
        Self { sandbox: self.sandbox.clone(), path, directory: false }
    }

    pub fn file_name(&self) -> Option<&str> {
        self.path.rsplit('/').next().filter(|name| !name.is_empty())
    }
}

/// The part of a path in a sandbox that lies below `root`; `None` where it does not, or is no plain path. The sandbox chose it,
/// so it is not trusted.
pub fn beneath<'a>(root: &str, path: &'a str) -> Option<&'a Path> {
    let relative = path.strip_prefix(root.trim_end_matches('/'))?.strip_prefix('/')?;
    let plain = Path::new(relative).components().all(|component| matches!(component, Component::Normal(_)));
    let clean =
        !relative.is_empty() && !relative.contains('\0') && relative.split('/').all(|name| name != "." && name != "..");
    (plain && clean).then_some(Path::new(relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_here_and_there() {
        let there = |sandbox: &str, path: &str, directory| {
            Ok(Side::There(Place { sandbox: sandbox.into(), path: path.into(), directory }))
        };
        assert_eq!(side("box:/srv/a"), there("box", "/srv/a", false));
        assert_eq!(side("tenants/a/sandboxes/b:/srv//x/./"), there("tenants/a/sandboxes/b", "/srv/x", true));
        assert_eq!(side("box:/"), there("box", "/", true));
        assert_eq!(side("./a:b"), Ok(Side::Here("./a:b".into())));
        assert_eq!(side("a/b"), Ok(Side::Here("a/b".into())));
        assert_eq!(side("-"), Ok(Side::Stream));
        for wrong in ["box:srv", ":/srv", "box:/srv/../etc", "box:"] {
            assert!(side(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_plain_names_below_the_directory_count() {
        assert_eq!(beneath("/srv", "/srv/a/b"), Some(Path::new("a/b")));
        assert_eq!(beneath("/", "/etc"), Some(Path::new("etc")));
        for hostile in [
            "/etc/passwd",
            "/srv",
            "/srv/",
            "/srvx/a",
            "/srv//etc/passwd",
            "/srv/../a",
            "/srv/a/../../b",
            "/srv/./a",
            "/srv/a\0b",
        ] {
            assert_eq!(beneath("/srv", hostile), None, "{hostile}");
        }
    }
}
