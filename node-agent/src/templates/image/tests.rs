//! Layers made for the purpose, flattened and read back.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use flate2::Compression;
use flate2::write::GzEncoder;
use tar::{Archive, Builder, EntryType, Header};

use super::tree::{MAX_DEPTH, key_of};
use super::*;

/// What a layer is made of.
#[derive(Clone, Copy)]
enum Part<'a> {
    Dir(&'a str, u32),
    File(&'a str, &'a [u8]),
    Symlink(&'a str, &'a str),
    Link(&'a str, &'a str),
    Device(&'a str),
}
use Part::*;

fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(12);
    header.set_gid(34);
    header.set_mtime(56);
    header.set_size(size);
    header
}

fn tar(parts: &[Part]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for part in parts {
        match *part {
            Dir(path, mode) => tar.append_data(&mut header(EntryType::Directory, mode, 0), path, &[][..]),
            File(path, bytes) => {
                tar.append_data(&mut header(EntryType::Regular, 0o644, bytes.len() as u64), path, bytes)
            }
            Symlink(path, target) => tar.append_link(&mut header(EntryType::Symlink, 0o777, 0), path, target),
            Link(path, target) => tar.append_link(&mut header(EntryType::Link, 0o644, 0), path, target),
            Device(path) => tar.append_data(&mut header(EntryType::Char, 0o666, 0), path, &[][..]),
        }
        .expect("an entry");
    }
    tar.into_inner().expect("a tar")
}

fn section(bytes: &[u8]) -> Section {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(bytes).expect("written");
    Section::whole(file).expect("a section")
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("written");
    encoder.finish().expect("gzip")
}

fn merge(layers: &[&[Part]]) -> Result<Tree, ImageError> {
    let mut tree = Tree::default();
    layers.iter().try_for_each(|parts| layer::apply(&mut tree, &section(&tar(parts))))?;
    Ok(tree)
}

fn written(tree: &Tree) -> Vec<u8> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("tar");
    let (digest, size) = canonical::write(tree, std::fs::File::create(&path).expect("a file")).expect("written");
    let bytes = std::fs::read(path).expect("read");
    assert_eq!((digest.to_string(), size.0), (sha256(&bytes), bytes.len() as u64));
    bytes
}

/// Path to what is there, as text: `dir`, `link TARGET`, `hard TARGET`, or a file's content.
fn listed(tar: &[u8]) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for entry in Archive::new(tar).entries().expect("a tar") {
        let mut entry = entry.expect("an entry");
        let path = entry.path().expect("a path").to_string_lossy().into_owned();
        let target = entry.link_name().expect("a target").map(|t| t.to_string_lossy().into_owned());
        let what = match entry.header().entry_type() {
            EntryType::Directory => "dir".to_owned(),
            EntryType::Symlink => format!("link {}", target.expect("a target")),
            EntryType::Link => format!("hard {}", target.expect("a target")),
            _ => {
                let mut text = String::new();
                entry.read_to_string(&mut text).expect("text");
                text
            }
        };
        assert!(found.insert(path, what).is_none(), "a path stands twice");
    }
    found
}

fn merged(layers: &[&[Part]]) -> Vec<(String, String)> {
    listed(&written(&merge(layers).expect("merged"))).into_iter().collect()
}

fn want(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(path, what)| ((*path).to_owned(), (*what).to_owned())).collect()
}

#[test]
fn a_layer_replaces_hides_and_adds() {
    let lower: &[Part] = &[
        Dir("etc", 0o755),
        File("etc/keep", b"1"),
        File("etc/gone", b"2"),
        File("etc/old", b"3"),
        Dir("cache", 0o755),
        File("cache/a", b"4"),
        Dir("cache/deep", 0o755),
        File("cache/deep/b", b"5"),
        File("was-file", b"6"),
        Dir("was-dir", 0o755),
        File("was-dir/x", b"7"),
        Dir("cache-like", 0o755),
        File("cache-like/stays", b"8"),
    ];
    let upper: &[Part] = &[
        File("etc/.wh.gone", b""),
        File("etc/old", b"new"),
        File("cache/mine", b"9"),
        // After what its own layer brings: only lower layers are hidden.
        File("cache/.wh..wh..opq", b""),
        Dir("was-file", 0o755),
        File("was-file/y", b"10"),
        File("was-dir", b"11"),
        File(".wh..wh.plnk", b""),
        File("etc/.wh.never-there", b""),
    ];
    let expected = [
        ("cache-like/", "dir"),
        ("cache-like/stays", "8"),
        ("cache/", "dir"),
        ("cache/mine", "9"),
        ("etc/", "dir"),
        ("etc/keep", "1"),
        ("etc/old", "new"),
        ("was-dir", "11"),
        ("was-file/", "dir"),
        ("was-file/y", "10"),
    ];
    assert_eq!(merged(&[lower, upper]), want(&expected));
}

#[test]
fn a_directory_may_be_hidden_and_come_again() {
    let lower: &[Part] = &[Dir("d", 0o755), File("d/a", b"1"), Dir("d/e", 0o755), File("d/e/b", b"2")];
    let again: &[Part] = &[Dir("d", 0o700), File("d/c", b"3"), File(".wh.d", b"")];
    assert_eq!(merged(&[lower, again]), want(&[("d/", "dir"), ("d/c", "3")]));
    let hidden: &[Part] = &[File(".wh.d", b"")];
    let other: &[Part] = &[File("x", b"4")];
    assert_eq!(merged(&[lower, hidden, other]), want(&[("x", "4")]));
}

#[test]
fn links_stay_links_and_devices_are_left_out() {
    let lower: &[Part] = &[File("z/first", b"data"), Link("a", "z/first"), Symlink("l", "/etc/passwd"), Device("null")];
    let expected = [("a", "data"), ("l", "link /etc/passwd"), ("z/", "dir"), ("z/first", "hard a")];
    assert_eq!(merged(&[lower]), want(&expected));
    // The other name outlives the first.
    let upper: &[Part] = &[File("z/.wh.first", b""), Link("abs", "/a")];
    let expected = [("a", "data"), ("abs", "hard a"), ("l", "link /etc/passwd"), ("z/", "dir")];
    assert_eq!(merged(&[lower, upper]), want(&expected));
}

#[test]
fn equal_images_give_equal_bytes_whatever_the_order_and_layers() {
    let one: &[Part] = &[Dir("b", 0o755), File("b/x", b"1"), File("a", b"2")];
    let (first, second): (&[Part], &[Part]) = (&[File("a", b"old"), Dir("b", 0o700)], one);
    assert_eq!(written(&merge(&[one]).expect("one")), written(&merge(&[first, second]).expect("two")));
    // And what was written is its own canonical form.
    let bytes = written(&merge(&[one]).expect("one"));
    let mut again = Tree::default();
    layer::apply(&mut again, &section(&bytes)).expect("applied");
    assert_eq!(written(&again), bytes);
}

#[test]
fn long_names_modes_owners_and_attributes_survive() {
    let (long, target) = (format!("{}/file", "d".repeat(180)), "t".repeat(150));
    let mut builder = Builder::new(Vec::new());
    builder
        .append_pax_extensions([
            ("SCHILY.xattr.user.a", &b"v\xff"[..]),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.security.capability", b"\x01"),
        ])
        .expect("attributes");
    builder.append_data(&mut header(EntryType::Regular, 0o4755, 1), &long, &b"x"[..]).expect("file");
    builder.append_link(&mut header(EntryType::Symlink, 0o777, 0), "l", &target).expect("link");
    builder.append_data(&mut header(EntryType::Directory, 0o1777, 0), "./", &[][..]).expect("the root");
    let mut tree = Tree::default();
    layer::apply(&mut tree, &section(&builder.into_inner().expect("tar"))).expect("applied");
    let bytes = written(&tree);
    let found = listed(&bytes);
    assert_eq!(found[&long], "x");
    assert_eq!(found["l"], format!("link {target}"));
    let mut archive = Archive::new(&bytes[..]);
    let mut root_mode = None;
    for entry in archive.entries().expect("a tar") {
        let mut entry = entry.expect("an entry");
        if entry.path_bytes().as_ref() == b"./" {
            root_mode = entry.header().mode().ok();
        }
        if entry.path_bytes().as_ref() == long.as_bytes() {
            let header = entry.header();
            let numbers = (header.mode().ok(), header.uid().ok(), header.gid().ok(), header.mtime().ok());
            assert_eq!(numbers, (Some(0o4755), Some(12), Some(34), Some(56)));
            let extensions = entry.pax_extensions().expect("pax").expect("some");
            let keys: Vec<_> = extensions.map(|e| e.expect("one").key().expect("text").to_owned()).collect();
            assert_eq!(keys, ["SCHILY.xattr.security.capability", "SCHILY.xattr.user.a"], "and not overlayfs' own");
        }
    }
    assert_eq!(root_mode, Some(0o1777));
}

#[test]
fn nothing_leads_out_of_the_root() {
    assert_eq!(key_of(b"/etc//./passwd/").expect("inside"), b"etc/passwd");
    for path in ["../x", "a/../../x", "a/..", ".."] {
        assert!(matches!(key_of(path.as_bytes()), Err(ImageError::Invalid(_))), "{path}");
    }
    let deep = "d/".repeat(MAX_DEPTH + 1);
    assert!(matches!(key_of(deep.as_bytes()), Err(ImageError::TooLarge { .. })));
    let refused: [&[Part]; 5] = [
        &[Symlink("out", "/tmp"), File("out/file", b"x")],
        &[File("file", b"x"), File("file/below", b"x")],
        &[Link("stolen", "/etc/passwd")],
        &[Dir("d", 0o755), Link("e", "d")],
        &[Symlink("out", "/tmp"), File("out/.wh.x", b""), Link("y", "out/x")],
    ];
    for parts in refused {
        assert!(matches!(merge(&[parts]), Err(ImageError::Invalid(_))));
    }
    // Through a link of a lower layer too.
    let (lower, upper): (&[Part], &[Part]) = (&[Symlink("lib", "usr/lib")], &[File("lib/x", b"1")]);
    assert!(matches!(merge(&[lower, upper]), Err(ImageError::Invalid(_))));
}

#[test]
fn a_bomb_goes_off_before_it_fills_the_disk() {
    let scratch = tempfile::tempdir().expect("a directory");
    let packed = gzip(&vec![0; 8 << 20]);
    assert!(packed.len() * 200 < 8 << 20, "it is a bomb");
    let blob = LayerBlob { bytes: section(&packed), diff_id: None };
    // What other layers took counts.
    let mut spent = crate::templates::MAX_TEMPLATE.0 - (1 << 20);
    assert!(matches!(layer::tar_of(&blob, scratch.path(), &mut spent), Err(ImageError::TooLarge { .. })));
    assert!(layer::tar_of(&blob, scratch.path(), &mut 0).is_ok(), "so little harms nobody");
    assert_eq!(std::fs::read_dir(scratch.path()).expect("list").count(), 0, "files without names");
}

#[test]
fn what_is_no_image_says_why() {
    let scratch = tempfile::tempdir().expect("a directory");
    let open = |bytes: &[u8]| {
        let image = archive::open(section(bytes), "", scratch.path())?;
        layer::apply(&mut Tree::default(), &image.layers[0].bytes)
    };
    let text = open(&b"not a tar, though long enough for a header ".repeat(20)).expect_err("text");
    assert!(text.to_string().starts_with("not a tar"), "{text}");
    let zstd = open(&[0x28, 0xb5, 0x2f, 0xfd, 0, 0]).expect_err("zstd");
    assert!(zstd.to_string().contains("zstd"), "{zstd}");
    let mut cut = gzip(&tar(&[File("a", b"1")]));
    cut.truncate(cut.len() / 2);
    assert!(open(&cut).expect_err("cut").to_string().contains("gzip"));
    let mut whole = tar(&[File("a", &[7; 3000])]);
    whole.truncate(1024);
    assert!(open(&whole).is_err(), "a file that is cut short");
}

/// An image of one layer: its layout as a tar, and the digest of the layer.
fn layout(spoil: impl Fn(&str, &mut Vec<u8>)) -> Vec<u8> {
    let plain = tar(&[File("hello", b"world")]);
    let packed = gzip(&plain);
    let config = format!(
        r#"{{"os":"linux","config":{{"Env":["A=1=2"],"Entrypoint":["/sh"],"Cmd":["-c","x"],"WorkingDir":"/w","User":"u"}},
            "rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
        sha256(&plain)
    );
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"digest":"{}"}},"layers":[{{"digest":"{}"}}]}}"#,
        sha256(config.as_bytes()),
        sha256(&packed)
    );
    let image = sha256(manifest.as_bytes());
    let other = r#"{"digest":"sha256:00","platform":{"os":"linux","architecture":"arm64"}}"#;
    let here = format!(r#"{{"digest":"{image}","platform":{{"os":"linux","architecture":"amd64"}}}}"#);
    let inner = format!(r#"{{"manifests":[{other},{here}]}}"#);
    let index = format!(
        r#"{{"manifests":[{{"digest":"{}","annotations":{{"org.opencontainers.image.ref.name":"v1"}}}}]}}"#,
        sha256(inner.as_bytes())
    );
    let mut tar = Builder::new(Vec::new());
    let blob = |bytes: &[u8]| format!("./blobs/sha256/{}", &sha256(bytes)[7..]);
    let files = [
        ("layer", blob(&packed), packed.clone()),
        ("config", blob(config.as_bytes()), config.into_bytes()),
        ("manifest", blob(manifest.as_bytes()), manifest.into_bytes()),
        ("inner", blob(inner.as_bytes()), inner.into_bytes()),
        ("index", "./index.json".into(), index.into_bytes()),
        ("marker", "./oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
    ];
    for (name, path, mut bytes) in files {
        spoil(name, &mut bytes);
        let size = bytes.len() as u64;
        tar.append_data(&mut header(EntryType::Regular, 0o644, size), path, &bytes[..]).expect("a file");
    }
    tar.into_inner().expect("a tar")
}

#[test]
fn an_image_layout_is_opened_by_tag_and_platform_and_its_configuration_kept() {
    let scratch = tempfile::tempdir().expect("a directory");
    let open = |tag| archive::open(section(&layout(|_, _| {})), tag, scratch.path());
    let image = open("v1").expect("an image");
    assert_eq!(image.defaults.command, ["/sh", "-c", "x"]);
    assert_eq!(image.defaults.environment, BTreeMap::from([("A".to_owned(), "1=2".to_owned())]));
    assert_eq!((image.defaults.working_directory.as_str(), image.defaults.user.as_str()), ("/w", "u"));
    let tar = layer::tar_of(&image.layers[0], scratch.path(), &mut 0).expect("decompressed");
    assert_eq!(listed(&tar.read_all().expect("read"))["hello"], "world");
    assert!(open("").is_ok(), "the only one");
    let missing = open("v2").expect_err("no such tag").to_string();
    assert!(missing.contains("it has v1"), "{missing}");
}

#[test]
fn a_changed_byte_is_noticed_wherever_it_is() {
    let scratch = tempfile::tempdir().expect("a directory");
    for blob in ["layer", "config", "manifest", "inner"] {
        let spoilt = layout(|name, bytes| {
            if name == blob {
                let at = bytes.len() / 2;
                bytes[at] ^= 1;
            }
        });
        let error = archive::open(section(&spoilt), "", scratch.path()).expect_err(blob).to_string();
        assert!(error.contains("has digest"), "{blob}: {error}");
    }
    // A layer that is what its manifest says and not what the configuration says.
    let blob = LayerBlob { bytes: section(&gzip(&tar(&[]))), diff_id: Some("sha256:00".into()) };
    let error = layer::tar_of(&blob, scratch.path(), &mut 0).expect_err("another diff_id").to_string();
    assert!(error.contains("diff_id"), "{error}");
}
