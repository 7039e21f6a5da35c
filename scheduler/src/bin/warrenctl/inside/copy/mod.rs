//! `sandbox cp`: files and directories into a sandbox and out of one, and as streams.
//!
//! `out` brings files here and trusts no name or link of the sandbox; `into` brings files there; `tarball` is what `-` means for
//! directories. A copy that breaks goes on where it broke (out), or begins that file anew (into): nobody sees half a file.

mod into;
mod out;
mod progress;
mod tarball;

use clap::Args;

use super::link::Link;
use super::place::{Place, Side, side};
use crate::client::Client;
use crate::failure::Failure;

/// Files under way at once: enough to hide the way there and back. Each may cost the agent a process that looks at the sandbox's
/// files: of 2,000 small ones 16 at once took longer than 4.
const PARALLEL: usize = 4;

/// Bytes in one message; agents take at most 1 MiB, and half of it keeps both sides busy.
const PIECE_BYTES: usize = 512 * 1024;

const EXAMPLES: &str = "\
Examples:
  warrenctl sandbox cp script.py box:/srv/           a file into a directory
  warrenctl sandbox cp project box:/srv              a directory: becomes /srv/project, or /srv where there is none yet
  warrenctl sandbox cp box:/srv/out.csv .            a file out of it
  warrenctl sandbox cp box:/srv/results results      a directory out of it
  warrenctl sandbox cp box:/srv - | tar t            a directory as a tar; a file as its bytes
  tar c src | warrenctl sandbox cp - box:/srv/       a tar into a directory; without the last / the bytes of a file

Symbolic links are copied as links; those that are named are followed. Devices, sockets and pipes are left out.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CpArgs {
    /// Numeric `uid` or `uid:gid` inside that owns what is copied into the sandbox [default: 0:0]
    #[arg(short, long, value_name = "USER", default_value = "", hide_default_value = true)]
    user: String,
    /// SANDBOX:/path, a path here, or `-`
    #[arg(value_name = "FROM", value_parser = side)]
    from: Side,
    /// The other
    #[arg(value_name = "TO", value_parser = side)]
    to: Side,
}

pub async fn cp(client: &Client, args: CpArgs) -> Result<(), Failure> {
    let link = |place: &Place| Link::new(client, &place.sandbox);
    match (args.from, args.to) {
        (Side::Here(from), Side::There(to)) => into::copy(&link(&to), &from, &to, &args.user).await,
        (Side::There(from), Side::Here(to)) => out::copy(&link(&from), &from, &to).await,
        (Side::There(from), Side::Stream) => tarball::write(&link(&from), &from).await,
        (Side::Stream, Side::There(to)) => tarball::read(&link(&to), &to, &args.user).await,
        _ => Err(Failure::Usage("one of FROM and TO must be SANDBOX:/path, and the other must not".to_owned())),
    }
}
