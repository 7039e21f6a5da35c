//! Files in a sandbox: the calls behind the commands, and `sandbox ls`, `cat`, `mkdir`, `mv`, `rm`.

use std::io::Write;

use clap::Args;
use tonic::Streaming;
use warren_proto::v1::read_file_response::Message as Piece;
use warren_proto::v1::sandbox_file_service_client::SandboxFileServiceClient;
use warren_proto::v1::{
    FileInfo, FileKind, ListDirectoryRequest, ListDirectoryResponse, MakeDirectoryRequest, MoveFileRequest,
    ReadFileRequest, RemoveFileRequest, StatFileRequest,
};

use super::exec::put;
use super::link::{Again, Link};
use super::place::{Place, place};
use super::process::printable;
use crate::client::Client;
use crate::failure::Failure;
use crate::output::{Format, Output, Row, write};

/// Zero bytes that stand for a hole where there can be none.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

const LS_EXAMPLES: &str = "\
Examples:
  warrenctl sandbox ls box:/srv             names
  warrenctl sandbox ls -l box:/srv          with modes, owners, sizes and times
  warrenctl sandbox ls -R box:/srv -o json  all that lies below, for a program";

#[derive(Debug, Args)]
#[command(after_help = LS_EXAMPLES)]
pub struct LsArgs {
    /// Show modes, owners, sizes and times
    #[arg(short, long)]
    long: bool,
    /// Show what lies below too
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Directory or file
    #[arg(value_name = "SANDBOX:/PATH", value_parser = place)]
    place: Place,
}

#[derive(Debug, Args)]
pub struct CatArgs {
    /// From which byte on
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, value_parser = clap::value_parser!(i64).range(0..))]
    offset: i64,
    /// So many bytes [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
    length: Option<i64>,
    /// File
    #[arg(value_name = "SANDBOX:/PATH", value_parser = place)]
    place: Place,
}

#[derive(Debug, Args)]
pub struct MkdirArgs {
    /// Make the directories that are missing, and succeed where it is there already
    #[arg(short, long)]
    parents: bool,
    /// Directory
    #[arg(value_name = "SANDBOX:/PATH", value_parser = place)]
    place: Place,
}

#[derive(Debug, Args)]
pub struct MvArgs {
    /// Replace a file that is there
    #[arg(short, long)]
    force: bool,
    /// What to move
    #[arg(value_name = "SANDBOX:/PATH", value_parser = place)]
    from: Place,
    /// Its new path in the same sandbox
    #[arg(value_name = "/NEW/PATH")]
    to: String,
}

#[derive(Debug, Args)]
pub struct RmArgs {
    /// A directory with all that is in it
    #[arg(short, long)]
    recursive: bool,
    /// It is fine if there is nothing
    #[arg(short, long)]
    force: bool,
    /// What to remove
    #[arg(value_name = "SANDBOX:/PATH", value_parser = place)]
    place: Place,
}

pub async fn ls(client: &Client, output: &Output, args: LsArgs) -> Result<(), Failure> {
    let link = Link::new(client, &args.place.sandbox);
    let found = stat(&link, &args.place.path, true).await?;
    let mut entries = match found.kind() {
        FileKind::Directory => list(&link, &args.place.path, args.recursive).await?,
        _ => vec![found],
    };
    entries.sort_by(|a, b| (&a.path, &a.path_bytes).cmp(&(&b.path, &b.path_bytes)));
    if output.format != Format::Table || args.long {
        return output.list(&entries);
    }
    let below = |entry: &FileInfo| match args.recursive {
        true => shown_path(entry),
        false => shown_path(entry).rsplit('/').next().unwrap_or_default().to_owned(),
    };
    write(&entries.iter().map(|entry| below(entry) + "\n").collect::<String>())
}

pub async fn cat(client: &Client, args: CatArgs) -> Result<(), Failure> {
    let link = Link::new(client, &args.place.sandbox);
    let (_, mut pieces) = read(&link, &args.place.path, args.offset, args.length.unwrap_or(0)).await?;
    let mut stdout = std::io::stdout().lock();
    while let Some(piece) = pieces.message().await? {
        let written = match piece.message {
            Some(Piece::Data(bytes)) => stdout.write_all(&bytes),
            Some(Piece::Hole(length)) => zeros(&mut stdout, length),
            Some(Piece::File(_)) | None => Ok(()),
        };
        if let Err(error) = written {
            return quiet_end(error);
        }
    }
    put(&mut stdout, b"").or_else(quiet_end_io).map_err(Failure::io("write to stdout"))
}

pub async fn mkdir(client: &Client, args: MkdirArgs) -> Result<(), Failure> {
    let link = Link::new(client, &args.place.sandbox);
    make_directory(&link, &args.place.path, args.parents, 0, "").await.map(drop)
}

pub async fn mv(client: &Client, args: MvArgs) -> Result<(), Failure> {
    if !args.to.starts_with('/') {
        let what = format!("`{}` is no absolute path: expected the new path in the same sandbox", args.to);
        return Err(Failure::Usage(what));
    }
    let link = Link::new(client, &args.from.sandbox);
    let request =
        MoveFileRequest { path: args.from.path, new_path: args.to, replace: args.force, ..MoveFileRequest::default() };
    link.call(Again::Unstarted, |agent| {
        let request = agent.asking(request.clone());
        async move { Ok(SandboxFileServiceClient::new(agent.channel).move_file(request?).await?) }
    })
    .await
    .map(drop)
}

pub async fn rm(client: &Client, args: RmArgs) -> Result<(), Failure> {
    remove(&Link::new(client, &args.place.sandbox), &args.place.path, args.recursive, args.force).await
}

/// Files that may take long to remove are waited for as long as it takes.
pub async fn remove(link: &Link<'_>, path: &str, recursive: bool, allow_missing: bool) -> Result<(), Failure> {
    let request = RemoveFileRequest { path: path.to_owned(), recursive, allow_missing, ..RemoveFileRequest::default() };
    let again = if allow_missing { Again::Always } else { Again::Unstarted };
    link.call(again, |agent| {
        let request = agent.bearing(request.clone());
        async move { Ok(SandboxFileServiceClient::new(agent.channel).remove_file(request?).await?) }
    })
    .await
    .map(drop)
}

pub async fn stat(link: &Link<'_>, path: &str, follow: bool) -> Result<FileInfo, Failure> {
    let request = StatFileRequest { path: path.to_owned(), follow, ..StatFileRequest::default() };
    let answer = link.call(Again::Always, |agent| {
        let request = agent.asking(request.clone());
        async move { Ok(SandboxFileServiceClient::new(agent.channel).stat_file(request?).await?) }
    });
    Ok(answer.await?.into_inner())
}

/// The entries of a directory, parents before what is in them.
pub async fn list(link: &Link<'_>, path: &str, recursive: bool) -> Result<Vec<FileInfo>, Failure> {
    let request = ListDirectoryRequest { path: path.to_owned(), recursive, ..ListDirectoryRequest::default() };
    link.call(Again::Always, |agent| {
        let request = agent.bearing(request.clone());
        async move {
            let answer = SandboxFileServiceClient::new(agent.channel).list_directory(request?).await?;
            collect(answer.into_inner()).await
        }
    })
    .await
}

async fn collect(mut pages: Streaming<ListDirectoryResponse>) -> Result<Vec<FileInfo>, Failure> {
    let mut entries = Vec::new();
    while let Some(page) = pages.message().await? {
        entries.extend(page.entries);
    }
    Ok(entries)
}

/// Begins to read a file: what it is, and its pieces.
pub async fn read(
    link: &Link<'_>,
    path: &str,
    offset: i64,
    length: i64,
) -> Result<(FileInfo, Streaming<warren_proto::v1::ReadFileResponse>), Failure> {
    let request = ReadFileRequest { path: path.to_owned(), offset, length, ..ReadFileRequest::default() };
    link.call(Again::Always, |agent| {
        let request = agent.bearing(request.clone());
        async move {
            let mut pieces = SandboxFileServiceClient::new(agent.channel).read_file(request?).await?.into_inner();
            match pieces.message().await?.and_then(|first| first.message) {
                Some(Piece::File(info)) => Ok((info, pieces)),
                _ => Err(Failure::Failed("the node agent did not say which file it reads".to_owned())),
            }
        }
    })
    .await
}

pub async fn make_directory(
    link: &Link<'_>,
    path: &str,
    make_parents: bool,
    mode: u32,
    user: &str,
) -> Result<FileInfo, Failure> {
    let request = MakeDirectoryRequest {
        path: path.to_owned(),
        make_parents,
        mode,
        user: user.to_owned(),
        ..MakeDirectoryRequest::default()
    };
    let again = if make_parents { Again::Always } else { Again::Unstarted };
    let answer = link.call(again, |agent| {
        let request = agent.asking(request.clone());
        async move { Ok(SandboxFileServiceClient::new(agent.channel).make_directory(request?).await?) }
    });
    Ok(answer.await?.into_inner())
}

fn zeros(to: &mut impl Write, length: i64) -> std::io::Result<()> {
    let mut left = usize::try_from(length).unwrap_or(0);
    while left > 0 {
        let some = left.min(ZEROS.len());
        to.write_all(&ZEROS[..some])?;
        left -= some;
    }
    Ok(())
}

/// A reader that went away ends the command quietly.
fn quiet_end(error: std::io::Error) -> Result<(), Failure> {
    quiet_end_io(error).map_err(Failure::io("write to stdout"))
}

fn quiet_end_io(error: std::io::Error) -> std::io::Result<()> {
    if error.kind() == std::io::ErrorKind::BrokenPipe { Ok(()) } else { Err(error) }
}

/// Its path, whatever bytes that has.
pub fn shown_path(info: &FileInfo) -> String {
    if info.path_bytes.is_empty() {
        printable(&info.path)
    } else {
        printable(&String::from_utf8_lossy(&info.path_bytes))
    }
}

impl Row for FileInfo {
    const TYPE: &'static str = "warren.v1.FileInfo";
    const HEADERS: &'static [&'static str] = &["MODE", "OWNER", "SIZE", "MODIFIED", "PATH"];

    fn cells(&self) -> Vec<String> {
        let target = printable(&self.symlink_target);
        let path = shown_path(self);
        vec![
            mode(self),
            format!("{}:{}", self.uid, self.gid),
            self.size_bytes.to_string(),
            self.modify_time.map(|time| prost_types::Timestamp { nanos: 0, ..time }.to_string()).unwrap_or_default(),
            if target.is_empty() { path } else { format!("{path} -> {target}") },
        ]
    }

    fn resource_name(&self) -> String {
        self.path.clone()
    }
}

/// `-rwxr-x---`.
fn mode(info: &FileInfo) -> String {
    let kind = match info.kind() {
        FileKind::Directory => 'd',
        FileKind::Symlink => 'l',
        FileKind::Other => '?',
        FileKind::File | FileKind::Unspecified => '-',
    };
    let special = [(0o4000, 's'), (0o2000, 's'), (0o1000, 't')];
    let mut text = String::from(kind);
    for (at, (bit, letter)) in special.into_iter().enumerate() {
        let bits = info.mode >> (6 - 3 * at);
        text.push(if bits & 4 == 0 { '-' } else { 'r' });
        text.push(if bits & 2 == 0 { '-' } else { 'w' });
        text.push(match (info.mode & bit != 0, bits & 1 != 0) {
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_as_ls_shows_them() {
        let shown = |kind, mode_bits| {
            let mut info = FileInfo { mode: mode_bits, ..FileInfo::default() };
            info.set_kind(kind);
            mode(&info)
        };
        assert_eq!(shown(FileKind::File, 0o644), "-rw-r--r--");
        assert_eq!(shown(FileKind::Directory, 0o1777), "drwxrwxrwt");
        assert_eq!(shown(FileKind::File, 0o4755), "-rwsr-xr-x");
        assert_eq!(shown(FileKind::Symlink, 0o2640), "lrw-r-S---");
    }
}
