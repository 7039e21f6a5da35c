//! What is in files.

use tokio_stream::iter;
use tonic::{Code, Status};
use warren_node_agent::driver::Driver;
use warren_proto::v1::write_file_request::Message as Write;
use warren_proto::v1::*;

use crate::lab::*;

fn header(path: &str) -> WriteFileHeader {
    WriteFileHeader { path: path.into(), ..Default::default() }
}

#[test]
fn what_is_written_is_read_and_belongs_to_whom_it_should() {
    with_lab("round trip", |lab| async move {
        let big: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let info = lab.write("/root/big", &big).await.unwrap();
        assert_eq!((info.size_bytes, info.mode, info.uid, info.kind()), (3_000_000, 0o644, 0, FileKind::File));
        assert!(lab.read("/root/big").await.unwrap() == big);
        let part = ReadFileRequest { path: "/root/big".into(), offset: 1000, length: 500, ..Default::default() };
        assert_eq!(lab.read_part(part).await.unwrap().0, big[1000..1500]);
        let inside = lab.sh("sha256sum < /root/big; stat -c '%u:%g %a' /root/big").await;
        assert!(inside.ends_with("0:0 644"), "{inside}");

        let as_user = WriteFileHeader {
            mode: 0o4751,
            user: "1000:100".into(),
            make_parents: true,
            exclusive: true,
            ..header("/home/u/bin/tool")
        };
        lab.write_as(as_user.clone(), b"one").await.unwrap();
        assert_eq!(lab.sh("stat -c '%u:%g %a' /home/u/bin/tool /home/u/bin").await, "1000:100 4751\n1000:100 755");
        let exists = (Code::AlreadyExists, Some(ErrorReason::FileAlreadyExists));
        assert_eq!(refused(lab.write_as(as_user, b"two").await), exists);
        // What replaces keeps mode and owner, and is all there or not at all.
        lab.write("/home/u/bin/tool", b"three").await.unwrap();
        assert_eq!(
            lab.sh("stat -c '%u:%g %a' /home/u/bin/tool; cat /home/u/bin/tool; ls -A /home/u/bin").await,
            "1000:100 4751\nthreetool"
        );
        // A file that only its owner may read, in a directory likewise.
        lab.sh("mkdir /priv; echo mine > /priv/x; chown 1000:1000 /priv/x /priv; busybox chmod 600 /priv/x; busybox chmod 700 /priv").await;
        assert_eq!(lab.read("/priv/x").await.unwrap(), b"mine\n");
        lab
    });
}

#[test]
fn a_file_is_changed_in_place_only_where_it_is_asked_for() {
    with_lab("in place", |lab| async move {
        let at = |offset| WriteFileHeader { offset: Some(offset), ..header("/f") };
        let append = WriteFileHeader { append: true, ..header("/f") };
        assert_eq!(refused(lab.write_as(append.clone(), b"x").await), missing());
        lab.write("/f", b"0123456789").await.unwrap();
        let before = lab.sh("stat -c %i /f").await;
        lab.write_as(at(3), b"abc").await.unwrap();
        lab.write_as(append.clone(), b"end").await.unwrap();
        assert_eq!(lab.write_as(at(15), b"far").await.unwrap().size_bytes, 18);
        assert_eq!(lab.read("/f").await.unwrap(), b"012abc6789end\0\0far");
        assert_eq!(lab.sh("stat -c %i /f").await, before);
        let both = WriteFileHeader { append: true, ..at(1) };
        for bad in
            [both, at(-1), WriteFileHeader { exclusive: true, ..at(1) }, header("f"), header("/"), header("/x/..")]
        {
            assert_eq!(refused(lab.write_as(bad, b"x").await).0, Code::InvalidArgument);
        }
        let hole = lab.write_pieces(append, vec![Write::Hole(5)]).await;
        assert_eq!(refused(hole), (Code::InvalidArgument, Some(ErrorReason::InvalidField)));
        // A stream that breaks off leaves the old one.
        let messages = [Write::Header(header("/f")), Write::Data(b"half".to_vec()), Write::Header(header("/f"))];
        let messages = messages.map(|message| WriteFileRequest { message: Some(message) });
        let broken = lab.files().write_file(lab.with(iter(messages))).await;
        assert_eq!(refused(broken).0, Code::InvalidArgument);
        assert_eq!(lab.read("/f").await.unwrap(), b"012abc6789end\0\0far");
        assert_eq!(lab.sh("ls -A / | grep -c warren").await, "0");
        lab
    });
}

#[test]
fn four_gigabytes_of_nothing_take_no_room_either_way() {
    with_lab("sparse", |lab| async move {
        let size = 4i64 << 30;
        let pieces = vec![Write::Data(b"a".to_vec()), Write::Hole(size - 2), Write::Data(b"z".to_vec())];
        let info = lab.write_pieces(header("/sparse"), pieces).await.unwrap();
        assert_eq!(info.size_bytes, size);
        assert!(info.allocated_bytes < 1 << 20, "{}", info.allocated_bytes);
        let whole = ReadFileRequest { path: "/sparse".into(), ..Default::default() };
        let (data, holes) = lab.read_part(whole).await.unwrap();
        assert!(data.len() < 1 << 20 && holes + data.len() as i64 == size, "{} and {holes}", data.len());
        assert_eq!((data.first(), data.last()), (Some(&b'a'), Some(&b'z')));
        assert_eq!(lab.sh("stat -c %s /sparse; tail -c 1 /sparse").await, format!("{size}\nz"));
        // A hole at the end counts too.
        let info = lab.write_pieces(header("/sparse"), vec![Write::Hole(1 << 20)]).await.unwrap();
        assert_eq!((info.size_bytes, info.allocated_bytes), (1 << 20, 0));
        lab
    });
}

#[test]
fn a_full_disk_says_so_and_leaves_the_old_file_whole() {
    with_lab("full", |lab| async move {
        // The same as the disk's own bound, and half of the memory: 32 MiB.
        lab.write("/dev/shm/f", b"old").await.unwrap();
        let full: Result<_, Status> = lab.write("/dev/shm/f", &vec![1; 40 << 20]).await;
        assert_eq!(refused(full), (Code::ResourceExhausted, Some(ErrorReason::SandboxDiskFull)));
        assert_eq!(lab.read("/dev/shm/f").await.unwrap(), b"old");
        lab.write("/dev/shm/g", &vec![1; 20 << 20]).await.unwrap();
        lab
    });
}

#[test]
fn nothing_is_touched_in_a_frozen_sandbox() {
    with_lab("frozen", |lab| async move {
        lab.write("/f", b"x").await.unwrap();
        lab.world.driver.freeze(&lab.key).await.unwrap();
        let state = (Code::FailedPrecondition, Some(ErrorReason::SandboxState));
        assert_eq!(refused(lab.write("/f", b"y").await), state);
        lab.world.driver.thaw(&lab.key).await.unwrap();
        assert_eq!(lab.read("/f").await.unwrap(), b"x");
        lab
    });
}
