//! Certificates of one cluster: an authority, and one certificate for all its addresses, for servers and clients.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use warren_proto::client::TlsFiles;

/// Last bytes of the addresses that the certificate is for: schedulers count from 1, agents from 101.
const HOSTS: [std::ops::RangeInclusive<u8>; 2] = [1..=9, 101..=109];

/// Makes them, by openssl.
pub fn make(directory: &Path, network: &str) -> anyhow::Result<()> {
    let addresses = HOSTS.into_iter().flatten().map(|host| format!("IP:{network}.{host}"));
    let names = addresses.collect::<Vec<_>>().join(",");
    let extensions = format!("subjectAltName={names}\nextendedKeyUsage=serverAuth,clientAuth\n");
    std::fs::write(directory.join("extensions"), extensions)?;
    openssl(
        directory,
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.crt",
    )?;
    openssl(
        directory,
        "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=warren -keyout tls.key -out tls.csr",
    )?;
    openssl(
        directory,
        "x509 -req -in tls.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile extensions -out tls.crt",
    )
}

/// Where they are.
pub fn files(directory: &Path) -> TlsFiles {
    let file = |name: &str| -> Option<PathBuf> { Some(directory.join(name)) };
    TlsFiles { ca: file("ca.crt"), certificate: file("tls.crt"), key: file("tls.key") }
}

/// The flags of a server that uses them.
pub fn flags(directory: &Path) -> Vec<String> {
    let named = [("tls-ca", "ca.crt"), ("tls-cert", "tls.crt"), ("tls-key", "tls.key")];
    let pairs = named.map(|(key, name)| (key, directory.join(name).display().to_string()));
    super::flags(&pairs)
}

fn openssl(directory: &Path, arguments: &str) -> anyhow::Result<()> {
    let made =
        Command::new("openssl").args(arguments.split(' ')).current_dir(directory).output().context("run openssl")?;
    ensure!(made.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&made.stderr));
    Ok(())
}
