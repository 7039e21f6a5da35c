//! Compiles the `.proto` files in-process (protox): no system `protoc` is needed.

use std::path::{Path, PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = Path::new("warren/v1");
    println!("cargo:rerun-if-changed={}", directory.display());
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(directory)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    files.retain(|path| path.extension().is_some_and(|e| e == "proto"));
    files.sort();

    let descriptors = protox::compile(&files, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("warren.binpb"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().btree_map(".").bytes(".warren.v1.raft").compile_fds(descriptors)?;
    Ok(())
}
