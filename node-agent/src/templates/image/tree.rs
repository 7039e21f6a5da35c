//! The merged root file system: paths with what they are, files as parts of the layers that they came in.
//!
//! Invariants: a key is a path without leading, trailing or doubled `/`, without `.` and `..`; nothing lies below a key that is no
//! directory. Layers are applied lowest first; a whiteout takes away what lower layers brought, never what its own layer brings.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{ImageError, Section};

/// Most files, directories and links of an image: a distribution with a full toolchain has a quarter of it.
pub const MAX_ENTRIES: usize = 1_000_000;

/// Longest path, as Linux has it.
pub const MAX_PATH: usize = 4096;

/// Deepest path. Nobody nests so deep on purpose, and whoever walks the tree keeps a directory open for each step.
pub const MAX_DEPTH: usize = 256;

/// Who may do what with it, and since when.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Meta {
    /// Permission bits.
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Seconds since the Unix epoch.
    pub mtime: u64,
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

#[derive(Debug)]
pub enum Kind {
    Directory,
    File(Section),
    Symlink(Vec<u8>),
}

/// What a path, or several that are hard links of each other, name.
#[derive(Debug)]
pub struct Inode {
    pub kind: Kind,
    pub meta: Meta,
}

#[derive(Debug, Clone)]
struct Node {
    inode: Arc<Inode>,
    /// Layer that brought it.
    layer: usize,
}

/// A root file system. The root itself is the empty path.
#[derive(Debug, Default)]
pub struct Tree {
    nodes: BTreeMap<Vec<u8>, Node>,
    layer: usize,
    seen: usize,
}

impl Tree {
    /// What follows belongs to the next layer.
    pub fn next_layer(&mut self) {
        self.layer += 1;
    }

    /// Puts something at a path, in the place of what was there; a directory over a directory keeps what is in it.
    pub fn put(&mut self, path: Vec<u8>, kind: Kind, meta: Meta) -> Result<(), ImageError> {
        self.put_inode(path, Arc::new(Inode { kind, meta }))
    }

    /// Makes `path` another name of the file at `target`.
    pub fn link(&mut self, path: Vec<u8>, target: &[u8]) -> Result<(), ImageError> {
        let linked = self.nodes.get(target).map(|node| node.inode.clone());
        match linked {
            Some(inode) if !matches!(inode.kind, Kind::Directory) => self.put_inode(path, inode),
            Some(_) => Err(about(&path, "is a hard link to a directory")),
            None => Err(about(&path, &format!("is a hard link to `{}`, which is not there", show(target)))),
        }
    }

    /// Takes away what lower layers have at `path` and below it.
    pub fn whiteout(&mut self, path: &[u8]) {
        let layer = self.layer;
        if self.nodes.get(path).is_some_and(|node| node.layer < layer) {
            self.nodes.remove(path);
        }
        self.clear_below(path, |node| node.layer < layer);
    }

    /// Takes away what lower layers have below `path`.
    pub fn opaque(&mut self, path: &[u8]) {
        let layer = self.layer;
        self.clear_below(path, |node| node.layer < layer);
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Everything in order of its path, parents first; parents that no layer names are there too.
    pub fn entries(&self) -> impl Iterator<Item = (&[u8], &Arc<Inode>)> {
        self.nodes.iter().map(|(path, node)| (path.as_slice(), &node.inode))
    }

    fn put_inode(&mut self, path: Vec<u8>, inode: Arc<Inode>) -> Result<(), ImageError> {
        self.seen += 1;
        if self.seen > MAX_ENTRIES {
            return Err(ImageError::TooLarge { what: "the count of entries", limit: MAX_ENTRIES.to_string() });
        }
        self.make_parents(&path)?;
        if !matches!(inode.kind, Kind::Directory) {
            if path.is_empty() {
                return Err(ImageError::invalid("the root must be a directory"));
            }
            self.clear_below(&path, |_| true);
        }
        self.nodes.insert(path, Node { inode, layer: self.layer });
        Ok(())
    }

    /// Every directory on the way must be one: a link there could lead anywhere.
    fn make_parents(&mut self, path: &[u8]) -> Result<(), ImageError> {
        let cuts: Vec<usize> = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at).collect();
        for parent in cuts.into_iter().map(|at| &path[..at]) {
            match self.nodes.get(parent) {
                Some(node) if matches!(node.inode.kind, Kind::Directory) => {}
                Some(_) => {
                    return Err(about(path, &format!("lies below `{}`, which is no directory", show(parent))));
                }
                None => {
                    self.seen += 1;
                    let meta = Meta { mode: 0o755, ..Meta::default() };
                    let inode = Arc::new(Inode { kind: Kind::Directory, meta });
                    self.nodes.insert(parent.to_vec(), Node { inode, layer: self.layer });
                }
            }
        }
        Ok(())
    }

    fn clear_below(&mut self, path: &[u8], goes: impl Fn(&Node) -> bool) {
        let first = if path.is_empty() { vec![0] } else { [path, b"/"].concat() };
        let below = self.nodes.range(first.clone()..).take_while(|(at, _)| path.is_empty() || at.starts_with(&first));
        let gone: Vec<Vec<u8>> = below.filter(|(_, node)| goes(node)).map(|(at, _)| at.clone()).collect();
        for at in gone {
            self.nodes.remove(&at);
        }
    }
}

/// A path of a tar as a key. A leading `/` is the root of the image; `..` is refused, wherever it would lead.
pub fn key_of(raw: &[u8]) -> Result<Vec<u8>, ImageError> {
    let mut key: Vec<u8> = Vec::with_capacity(raw.len());
    let mut depth = 0;
    for part in raw.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".") {
        if part == b".." {
            return Err(about(raw, "leads out of the root file system"));
        }
        if !key.is_empty() {
            key.push(b'/');
        }
        key.extend_from_slice(part);
        depth += 1;
    }
    if key.contains(&0) {
        return Err(about(raw, "has a zero byte in its name"));
    }
    if key.len() > MAX_PATH || depth > MAX_DEPTH {
        let limit = format!("{MAX_PATH} bytes or {MAX_DEPTH} directories");
        return Err(ImageError::TooLarge { what: "the length of a path", limit });
    }
    Ok(key)
}

pub fn about(path: &[u8], what: &str) -> ImageError {
    ImageError::invalid(format!("`{}` {what}", show(path)))
}

fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).chars().take(200).collect()
}
