//! Pulls an image from an OCI registry: documents first, then each layer that the image for this platform has.

use std::path::Path;
use std::time::Duration;

use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::manifest::{
    IMAGE_MANIFEST_LIST_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE,
    OciDescriptor,
};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use tokio::io::AsyncWriteExt;
use tokio_stream::StreamExt;
use warren_proto::v1::import_progress::Stage;

use super::documents::{self, Descriptor, Index, Manifest};
use super::{Blobs, ImageError, MAX_DOCUMENT, MAX_LAYERS, Section, held_to};
use crate::templates::MAX_TEMPLATE;
use crate::templates::import::Progress;

/// A registry that sends nothing for so long is given up.
const SILENCE: Duration = Duration::from_secs(30);
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// Credentials for one registry.
#[derive(Clone, Default)]
pub struct Credentials {
    /// Empty: anonymous.
    pub username: String,
    pub password: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

/// One registry, for one image.
struct Pull<'a> {
    client: Client,
    auth: RegistryAuth,
    reference: Reference,
    scratch: &'a Path,
    progress: &'a Progress,
}

/// Pulls the image that `text` names. Its blobs lie in files without names in `scratch`; the digest is that of its manifest.
/// `insecure` names the registries that are spoken to without TLS, beside those of this host.
pub async fn pull(
    text: &str,
    credentials: &Credentials,
    insecure: &[String],
    scratch: &Path,
    progress: &Progress,
) -> Result<(Blobs, String), ImageError> {
    let reference: Reference =
        text.parse().map_err(|error| ImageError::invalid(format!("`{text}` is not an image reference: {error}")))?;
    let auth = match credentials.username.as_str() {
        "" => RegistryAuth::Anonymous,
        username => RegistryAuth::Basic(username.to_owned(), credentials.password.clone()),
    };
    let pull = Pull { client: client(&reference, insecure)?, auth, reference, scratch, progress };
    pull.image().await
}

fn client(reference: &Reference, insecure: &[String]) -> Result<Client, ImageError> {
    // Whoever installed one before is as good.
    let _installed = rustls::crypto::ring::default_provider().install_default();
    let registry = reference.resolve_registry().to_owned();
    let plain = is_loopback(&registry) || insecure.contains(&registry);
    let config = ClientConfig {
        protocol: if plain { ClientProtocol::HttpsExcept(vec![registry.clone()]) } else { ClientProtocol::Https },
        read_timeout: Some(SILENCE),
        connect_timeout: Some(CONNECT_PATIENCE),
        ..ClientConfig::default()
    };
    let failed = |error: OciDistributionError| ImageError::Registry { registry, answer: error.to_string() };
    Client::try_from(config).map_err(failed)
}

fn is_loopback(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    host == "localhost" || host.trim_matches(['[', ']']).parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
}

impl Pull<'_> {
    async fn image(&self) -> Result<(Blobs, String), ImageError> {
        let mut blobs = Blobs::new();
        let (mut bytes, mut digest) = self.manifest(&self.reference).await?;
        if documents::is_index(&bytes)? {
            digest = Index::parse(&bytes)?.for_this_platform()?.digest.clone();
            (bytes, _) = self.manifest(&self.reference.clone_with_digest(digest.clone())).await?;
            held_to(&digest, &bytes)?;
        }
        let manifest = Manifest::parse(&bytes)?;
        if manifest.layers.len() > MAX_LAYERS {
            return Err(ImageError::TooLarge { what: "the count of layers", limit: MAX_LAYERS.to_string() });
        }
        let layers: u64 = manifest.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.size));
        if layers > MAX_TEMPLATE.0 || manifest.config.size > MAX_DOCUMENT {
            return Err(ImageError::TooLarge { what: "the size of the image", limit: MAX_TEMPLATE.to_string() });
        }
        self.progress.begin(Stage::Pulling, layers);
        blobs.insert(digest.clone(), self.keep(&bytes).await?);
        for blob in manifest.layers.iter().chain([&manifest.config]) {
            if !blobs.contains_key(&blob.digest) {
                blobs.insert(blob.digest.clone(), self.blob(blob).await?);
            }
        }
        Ok((blobs, digest))
    }

    /// A manifest or index, held to the digest that the reference names, if it does.
    async fn manifest(&self, reference: &Reference) -> Result<(Vec<u8>, String), ImageError> {
        let accepted = [
            OCI_IMAGE_MEDIA_TYPE,
            OCI_IMAGE_INDEX_MEDIA_TYPE,
            IMAGE_MANIFEST_MEDIA_TYPE,
            IMAGE_MANIFEST_LIST_MEDIA_TYPE,
        ];
        let pulled = self.client.pull_manifest_raw(reference, &self.auth, &accepted).await;
        let (bytes, _) = pulled.map_err(|error| self.failed(error))?;
        let digest = super::sha256(&bytes);
        if let Some(want) = reference.digest() {
            held_to(want, &bytes)?;
        }
        Ok((bytes.to_vec(), digest))
    }

    /// Streams one blob to a file, never more than its manifest says; whoever assembles the image verifies its digest.
    async fn blob(&self, blob: &Descriptor) -> Result<Section, ImageError> {
        let descriptor = OciDescriptor {
            digest: blob.digest.clone(),
            media_type: blob.media_type.clone(),
            ..OciDescriptor::default()
        };
        let stream = self.client.pull_blob_stream(&self.reference, &descriptor).await;
        let mut stream = stream.map_err(|error| self.failed(error))?.stream;
        let file = tempfile::tempfile_in(self.scratch).map_err(ImageError::io("make a file for a layer"))?;
        let mut out = tokio::fs::File::from_std(file);
        let mut size = 0;
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|error| self.failed(OciDistributionError::IoError(error)))?;
            size += chunk.len() as u64;
            if size > blob.size {
                return Err(ImageError::invalid(format!("blob {} is longer than its manifest says", blob.digest)));
            }
            out.write_all(&chunk).await.map_err(ImageError::io("write a layer"))?;
            self.progress.add(chunk.len() as u64);
        }
        out.flush().await.map_err(ImageError::io("write a layer"))?;
        Section::whole(out.into_std().await).map_err(ImageError::io("read a layer"))
    }

    async fn keep(&self, bytes: &[u8]) -> Result<Section, ImageError> {
        let file = tempfile::tempfile_in(self.scratch).map_err(ImageError::io("make a file for a manifest"))?;
        let mut out = tokio::fs::File::from_std(file);
        out.write_all(bytes).await.map_err(ImageError::io("write a manifest"))?;
        out.flush().await.map_err(ImageError::io("write a manifest"))?;
        Section::whole(out.into_std().await).map_err(ImageError::io("read a manifest"))
    }

    fn failed(&self, error: OciDistributionError) -> ImageError {
        let registry = self.reference.resolve_registry().to_owned();
        let refused = match &error {
            OciDistributionError::AuthenticationFailure(_)
            | OciDistributionError::ImageManifestNotFoundError(_)
            | OciDistributionError::UnauthorizedError { .. } => true,
            OciDistributionError::RegistryError { envelope, .. } => envelope.errors.iter().any(|error| {
                matches!(
                    error.code,
                    OciErrorCode::BlobUnknown
                        | OciErrorCode::Denied
                        | OciErrorCode::ManifestUnknown
                        | OciErrorCode::NameUnknown
                        | OciErrorCode::NotFound
                        | OciErrorCode::Unauthorized
                )
            }),
            OciDistributionError::ServerError { code, .. } => matches!(code, 401 | 403 | 404),
            _ => false,
        };
        let answer = crate::templates::chain(&error);
        if refused {
            ImageError::NotFound { registry, reference: self.reference.to_string(), answer }
        } else {
            ImageError::Registry { registry, answer }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_registries_of_this_host_go_without_tls_unasked() {
        for here in ["localhost:5000", "127.0.0.1:5000", "[::1]:5000", "127.0.0.1"] {
            assert!(is_loopback(here), "{here}");
        }
        for elsewhere in ["docker.io", "localhost.example.com:5000", "10.0.0.1:5000"] {
            assert!(!is_loopback(elsewhere), "{elsewhere}");
        }
    }
}
