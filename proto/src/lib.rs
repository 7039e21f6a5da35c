//! What the scheduler and the node agent share: the wire format, ids, units, error reasons and data plane tokens.
//!
//! The two never see each other's crate; whatever both must agree on stands here.

pub mod client;
pub mod error;
pub mod ids;
pub mod token;
pub mod units;

/// Generated messages, clients and servers of package `warren.v1`.
#[allow(missing_debug_implementations, clippy::all, clippy::unwrap_used)]
pub mod v1 {
    tonic::include_proto!("warren.v1");
}

/// Encoded `FileDescriptorSet` of every `.proto` file, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/warren.binpb"));
