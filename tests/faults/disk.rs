//! A disk as a power cut sees it: what was forced to it is there; of what was only written, any part may be.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::scene::Files;

/// A file's bytes on disk, and what was written since.
#[derive(Debug, Clone, Default)]
struct Content {
    durable: Vec<u8>,
    pending: Vec<(u64, Vec<u8>)>,
}

impl Content {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        put(&mut self.durable, offset, bytes);
    }
}

fn put(file: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let end = offset as usize + bytes.len();
    if file.len() < end {
        file.resize(end, 0);
    }
    file[offset as usize..end].copy_from_slice(bytes);
}

/// One change of the names.
#[derive(Debug, Clone)]
enum Naming {
    Made(PathBuf, Node),
    Renamed(PathBuf, PathBuf),
    Exchanged(PathBuf, PathBuf),
    Gone(PathBuf),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Folder,
    File(u64),
}

type Names = HashMap<PathBuf, Node>;

/// What a power cut leaves of data that was not forced to disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    Nothing,
    Everything,
    /// Each piece of so many bytes or not, by this seed.
    Some {
        piece: u64,
        seed: u64,
    },
}

/// The disk after some of the lines of a trace.
#[derive(Clone, Default)]
pub struct Disk {
    root: PathBuf,
    contents: HashMap<u64, Content>,
    names: Names,
    /// Not forced to disk, oldest first.
    namings: Vec<Naming>,
}

impl Disk {
    /// A folder whose files are on disk; their inodes are those that a trace names.
    pub fn new(root: &Path) -> Disk {
        let mut disk = Disk { root: root.to_owned(), ..Default::default() };
        disk.load(Path::new(""));
        disk
    }

    fn load(&mut self, relative: &Path) {
        for entry in fs::read_dir(self.root.join(relative)).unwrap().map(Result::unwrap) {
            let name = relative.join(entry.file_name());
            if entry.path().is_dir() {
                self.names.insert(name.clone(), Node::Folder);
                self.load(&name);
            } else {
                let inode = entry.metadata().unwrap().ino();
                self.contents.insert(inode, Content { durable: fs::read(entry.path()).unwrap(), pending: Vec::new() });
                self.names.insert(name, Node::File(inode));
            }
        }
    }

    /// Takes in a change from a trace.
    pub fn apply(&mut self, line: &str) {
        let (what, rest) = line.split_once(' ').unwrap();
        let words: Vec<&str> = rest.split(' ').collect();
        let number = |text: &str| text.parse::<u64>().unwrap();
        let path = |text: &str| Path::new(text).strip_prefix(&self.root).unwrap().to_owned();
        match what {
            "made" => {
                self.contents.insert(number(words[0]), Content::default());
                self.namings.push(Naming::Made(path(words[1]), Node::File(number(words[0]))));
            }
            "dir" => self.namings.push(Naming::Made(path(rest), Node::Folder)),
            "write" => {
                let hex = words[2].as_bytes().chunks(2);
                let bytes = hex.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect();
                self.contents.get_mut(&number(words[0])).unwrap().pending.push((number(words[1]), bytes));
            }
            "size" => self.contents.get_mut(&number(words[0])).unwrap().pending.push((number(words[1]), Vec::new())),
            "sync" => {
                let content = self.contents.get_mut(&number(words[0])).unwrap();
                for (offset, bytes) in std::mem::take(&mut content.pending) {
                    content.write(offset, &bytes);
                }
            }
            // Names of one folder go to disk together; a folder that is renamed takes its own names along.
            "syncdir" => {
                let folder = path(rest);
                let namings = std::mem::take(&mut self.namings);
                for naming in namings {
                    if naming.folder() == folder {
                        naming.apply(&mut self.names);
                        self.namings.iter_mut().for_each(|later| later.follow(&naming));
                    } else {
                        self.namings.push(naming);
                    }
                }
            }
            "rename" | "exchange" => {
                let (from, to) = rest.split_once('\t').unwrap();
                let (from, to) = (path(from), path(to));
                self.namings.push(if what == "rename" { Naming::Renamed(from, to) } else { Naming::Exchanged(from, to) });
            }
            "gone" => self.namings.push(Naming::Gone(path(rest))),
            _ => panic!("{line}"),
        }
    }

    /// The files after a power cut.
    pub fn image(&self, keep: Keep, names_too: bool) -> Files {
        let mut names = self.names.clone();
        if names_too {
            self.namings.iter().for_each(|naming| naming.apply(&mut names));
        }
        let mut files = Files::new();
        for (path, node) in names {
            match node {
                Node::Folder => files.insert(path.join(""), Vec::new()),
                Node::File(inode) => files.insert(path, self.contents[&inode].survives(keep, inode)),
            };
        }
        files
    }
}

impl Content {
    fn survives(&self, keep: Keep, inode: u64) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        for (index, (offset, written)) in self.pending.iter().enumerate() {
            match keep {
                Keep::Nothing => {}
                Keep::Everything => put(&mut bytes, *offset, written),
                Keep::Some { piece, seed } => {
                    let mut done = 0;
                    while done < written.len() as u64 {
                        let at = offset + done;
                        let end = ((at / piece + 1) * piece).min(offset + written.len() as u64);
                        if coin(seed, inode ^ ((index as u64) << 40) ^ (at / piece)) {
                            put(&mut bytes, at, &written[done as usize..(end - offset) as usize]);
                        }
                        done = end - offset;
                    }
                    if written.is_empty() && coin(seed, inode) {
                        put(&mut bytes, *offset, &[]);
                    }
                }
            }
        }
        bytes
    }
}

impl Naming {
    /// The folder whose names it changes.
    fn folder(&self) -> PathBuf {
        let (Naming::Made(path, _) | Naming::Renamed(_, path) | Naming::Exchanged(_, path) | Naming::Gone(path)) = self;
        path.parent().unwrap().to_owned()
    }

    fn apply(&self, names: &mut Names) {
        let mut take = |path: &Path| {
            let below: Vec<PathBuf> = names.keys().filter(|name| name.starts_with(path)).cloned().collect();
            below.into_iter().map(|name| (name.strip_prefix(path).unwrap().to_owned(), names.remove(&name).unwrap())).collect()
        };
        let place = |names: &mut Names, path: &Path, nodes: Vec<(PathBuf, Node)>| {
            names.extend(nodes.into_iter().map(|(name, node)| (join(path, &name), node)));
        };
        match self {
            Naming::Made(path, node) => {
                names.insert(path.clone(), *node);
            }
            Naming::Renamed(from, to) => {
                let nodes = take(from);
                let _: Vec<_> = take(to);
                place(names, to, nodes);
            }
            Naming::Exchanged(from, to) => {
                let (here, there) = (take(from), take(to));
                place(names, to, here);
                place(names, from, there);
            }
            Naming::Gone(path) => {
                let _: Vec<(PathBuf, Node)> = take(path);
            }
        }
    }

    /// What was done below a folder that has since another name.
    fn follow(&mut self, earlier: &Naming) {
        let swap = |path: &mut PathBuf, from: &Path, to: &Path| {
            if let Ok(rest) = path.clone().strip_prefix(from) {
                *path = join(to, rest);
            }
        };
        if let (Naming::Renamed(from, to) | Naming::Exchanged(from, to), Naming::Made(path, _) | Naming::Gone(path)) =
            (earlier, self)
        {
            swap(path, from, to);
        }
    }
}

fn join(path: &Path, rest: &Path) -> PathBuf {
    if rest.as_os_str().is_empty() { path.to_owned() } else { path.join(rest) }
}

/// A coin that falls the same way in every run (splitmix64).
fn coin(seed: u64, number: u64) -> bool {
    let mut x = number.wrapping_add(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)) & 1 == 1
}
