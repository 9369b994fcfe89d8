//! What a side shows of itself, and whom it believes: files of a directory, named as QEMU and libvirt name them.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::default_provider;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{CipherSuite, ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use schemars::JsonSchema;
use serde::Deserialize;

/// Authorities that are believed; one at least.
const AUTHORITIES: &str = "ca-cert.pem";
/// What they have revoked; may be missing.
const REVOKED: &str = "ca-crl.pem";
/// Most bytes of a file: a list of revoked certificates is the longest.
const MOST_BYTES: u64 = 16 << 20;

/// QMP `QCryptoTLSCredsEndpoint`: which side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "QCryptoTLSCredsEndpoint")]
pub enum Endpoint {
    /// The one that connects.
    Client,
    /// The one that is connected to.
    Server,
}

/// Where credentials are, and what they are for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CredentialsSpec {
    /// The directory.
    pub dir: PathBuf,
    /// Which side's.
    pub endpoint: Endpoint,
    /// A server's: whether clients have to have a certificate. A client always looks at the server's.
    pub verify_peer: bool,
}

/// One side's, read.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// Of who connects.
    Client(Client),
    /// Of who is connected to.
    Server(Server),
}

/// Credentials of who connects.
#[derive(Clone, Debug)]
pub struct Client {
    pub(super) config: Arc<ClientConfig>,
    pub(super) dir: Arc<Path>,
}

/// Credentials of who is connected to.
#[derive(Clone, Debug)]
pub struct Server {
    pub(super) config: Arc<ServerConfig>,
    pub(super) dir: Arc<Path>,
}

/// Why credentials can't be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file can't be read.
    #[error("{}: it can't be read", .0.display())]
    File(PathBuf, #[source] io::Error),
    /// A file is not what its name says.
    #[error("{path}: {1}", path = .0.display())]
    Content(PathBuf, &'static str),
    /// What it holds can't be used.
    #[error("{path}: {1} can't be used", path = .0.display())]
    Unusable(PathBuf, &'static str, #[source] rustls::Error),
    /// What it holds can't be used to look at others'.
    #[error("{}: nobody can be recognized by it", .0.display())]
    Verifier(PathBuf, #[source] rustls::server::VerifierBuilderError),
    /// They are the other side's.
    #[error("these credentials are a {0}'s: this side {1}, so give it some with endpoint={2}")]
    OtherSide(&'static str, &'static str, &'static str),
    /// Nobody can be called that.
    #[error("'{0:.255}' is neither a host's name nor an address, so no certificate can be for it")]
    Name(String),
}

impl CredentialsSpec {
    /// Reads the files.
    ///
    /// # Errors
    /// One is missing, or can't be used: which, and why.
    pub fn load(&self) -> Result<Credentials, CredentialsError> {
        match self.endpoint {
            Endpoint::Client => self.client().map(Credentials::Client),
            Endpoint::Server => self.server().map(Credentials::Server),
        }
    }

    /// Reads those of who connects. Without `client-cert.pem` it shows nobody who it is.
    ///
    /// # Errors
    /// As [`Self::load`]; or they are the other side's.
    pub fn client(&self) -> Result<Client, CredentialsError> {
        if self.endpoint != Endpoint::Client {
            return Err(CredentialsError::OtherSide("server", "connects", "client"));
        }
        let provider = Arc::new(provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(self.authorities()?, Arc::clone(&provider))
            .with_crls(self.revoked()?)
            // The list says who is revoked; about others' certificates it says nothing, which is no reason to refuse them.
            .allow_unknown_revocation_status()
            .enforce_revocation_expiration()
            .build()
            .map_err(|e| CredentialsError::Verifier(self.dir.join(AUTHORITIES), e))?;
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| self.unusable(AUTHORITIES, "its cryptography", e))?
            .with_webpki_verifier(verifier);
        let mut config = match self.own("client-cert.pem", "client-key.pem", true)? {
            None => config.with_no_client_auth(),
            Some((chain, key)) => config
                .with_client_auth_cert(chain, key)
                .map_err(|e| self.unusable("client-cert.pem", "the certificate with client-key.pem", e))?,
        };
        config.resumption = Resumption::disabled();
        Ok(Client { config: Arc::new(config), dir: self.dir.as_path().into() })
    }

    /// Reads those of who is connected to.
    ///
    /// # Errors
    /// As [`Self::load`]; or they are the other side's.
    pub fn server(&self) -> Result<Server, CredentialsError> {
        if self.endpoint != Endpoint::Server {
            return Err(CredentialsError::OtherSide("client", "is connected to", "server"));
        }
        let provider = Arc::new(provider());
        let verifier = if self.verify_peer {
            WebPkiClientVerifier::builder_with_provider(self.authorities()?, Arc::clone(&provider))
                .with_crls(self.revoked()?)
                .allow_unknown_revocation_status()
                .enforce_revocation_expiration()
                .build()
                .map_err(|e| CredentialsError::Verifier(self.dir.join(AUTHORITIES), e))?
        } else {
            WebPkiClientVerifier::no_client_auth()
        };
        let own = self.own("server-cert.pem", "server-key.pem", false)?;
        let (chain, key) = own.ok_or_else(|| self.content("server-cert.pem", "it holds no certificate"))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| self.unusable(AUTHORITIES, "its cryptography", e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|e| self.unusable("server-cert.pem", "the certificate with server-key.pem", e))?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(Server { config: Arc::new(config), dir: self.dir.as_path().into() })
    }

    fn authorities(&self) -> Result<Arc<RootCertStore>, CredentialsError> {
        let mut store = RootCertStore::empty();
        for authority in self.certificates(AUTHORITIES)? {
            store.add(authority).map_err(|e| self.unusable(AUTHORITIES, "a certificate", e))?;
        }
        Ok(Arc::new(store))
    }

    fn revoked(&self) -> Result<Vec<CertificateRevocationListDer<'static>>, CredentialsError> {
        let Some(text) = self.optional(REVOKED)? else { return Ok(Vec::new()) };
        let lists = CertificateRevocationListDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>();
        let lists = lists.ok().filter(|lists| !lists.is_empty());
        lists.ok_or_else(|| self.content(REVOKED, "it holds no list of revoked certificates in PEM"))
    }

    /// The side's own certificate, with those that lead to an authority, and its key.
    fn own(
        &self,
        certificate: &str,
        key: &str,
        may_miss: bool,
    ) -> Result<Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>, CredentialsError> {
        if may_miss && !self.dir.join(certificate).exists() && !self.dir.join(key).exists() {
            return Ok(None);
        }
        let chain = self.certificates(certificate)?;
        let text = self.file(key)?;
        let read = PrivateKeyDer::from_pem_slice(&text);
        let why = if text.windows(9).any(|word| word == b"ENCRYPTED") {
            "its key is encrypted, and there is nobody to ask for the password: decrypt it, and let its owner alone read it"
        } else {
            "it holds no private key in PEM"
        };
        Ok(Some((chain, read.map_err(|_| self.content(key, why))?)))
    }

    fn certificates(&self, name: &str) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
        let text = self.file(name)?;
        let read = CertificateDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>();
        let read = read.ok().filter(|certificates| !certificates.is_empty());
        read.ok_or_else(|| self.content(name, "it holds no certificate in PEM"))
    }

    fn file(&self, name: &str) -> Result<Vec<u8>, CredentialsError> {
        self.optional(name)?.ok_or_else(|| CredentialsError::File(self.dir.join(name), Errno::ENOENT.into()))
    }

    /// What a file holds; none: it is not there.
    fn optional(&self, name: &str) -> Result<Option<Vec<u8>>, CredentialsError> {
        let path = self.dir.join(name);
        let read = || -> io::Result<Vec<u8>> {
            // Whoever opens a FIFO waits.
            if !std::fs::metadata(&path)?.is_file() {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
            }
            let mut text = Vec::new();
            File::open(&path)?.take(MOST_BYTES + 1).read_to_end(&mut text)?;
            if text.len() as u64 > MOST_BYTES {
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is longer than 16 MiB"));
            }
            Ok(text)
        };
        match read() {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(CredentialsError::File(path, e)),
        }
    }

    fn content(&self, name: &str, why: &'static str) -> CredentialsError {
        CredentialsError::Content(self.dir.join(name), why)
    }

    fn unusable(&self, name: &str, what: &'static str, why: rustls::Error) -> CredentialsError {
        CredentialsError::Unusable(self.dir.join(name), what, why)
    }
}

/// The cryptography, what is fastest here first: the server takes the first of the client's that it knows.
fn provider() -> CryptoProvider {
    use CipherSuite as Suite;
    let by_aes =
        [Suite::TLS13_AES_128_GCM_SHA256, Suite::TLS13_AES_256_GCM_SHA384, Suite::TLS13_CHACHA20_POLY1305_SHA256];
    let mut provider = default_provider();
    let has_aes = has_aes();
    provider.cipher_suites.sort_by_key(|suite| {
        let place = by_aes.iter().position(|one| *one == suite.suite()).unwrap_or(by_aes.len());
        if has_aes { place } else { by_aes.len() - place }
    });
    provider
}

/// Whether this processor has instructions for AES; without them ChaCha20 is faster.
fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes") && std::arch::is_aarch64_feature_detected!("pmull");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// Whom a server's certificate has to be for: a host's name, or an address.
pub(super) fn name(text: &str) -> Result<ServerName<'static>, CredentialsError> {
    // A name may end in the root's dot, which no certificate has.
    let bare = text.strip_suffix('.').unwrap_or(text);
    ServerName::try_from(bare.to_owned()).map_err(|_| CredentialsError::Name(text.to_owned()))
}
