//! Why there is no TLS with the other side, in words that say whose fault it is.

use std::io;
use std::path::Path;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError, Error};

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// What the other side says is none.
    #[error("the other side speaks no TLS: have both sides use it, or neither")]
    NoTls,
    /// It hung up meanwhile.
    #[error("the other side hung up in the middle of the TLS handshake: does it use TLS at all? Its log says more")]
    HungUp,
    /// It says nothing.
    #[error("the other side took longer than {0:?} for the TLS handshake: does it use TLS at all?")]
    Slow(Duration),
    /// Its certificate is wrong.
    #[error("the other side's certificate {0}")]
    Theirs(String),
    /// It has shown none.
    #[error("the other side has no certificate: who connects needs client-cert.pem and client-key.pem")]
    Nobody,
    /// This side's is wrong, or so the other side says.
    #[error("the other side {0}")]
    Ours(String),
    /// What comes was changed on its way, or is no TLS any more.
    #[error("what came is not what the other side sent: somebody or something has changed it on its way ({0})")]
    Forged(Error),
    /// It hung up without saying so, so something may be missing.
    #[error("the other side hung up without a word, so the end of what it sent may be missing")]
    Truncated,
    /// Anything else.
    #[error("the sides can't agree on TLS 1.3")]
    Other(#[source] Error),
}

impl From<TlsError> for io::Error {
    fn from(error: TlsError) -> Self {
        let kind = match error {
            TlsError::HungUp => io::ErrorKind::ConnectionAborted,
            TlsError::Truncated => io::ErrorKind::UnexpectedEof,
            TlsError::Slow(_) => io::ErrorKind::TimedOut,
            TlsError::Theirs(_) | TlsError::Nobody | TlsError::Ours(_) => io::ErrorKind::PermissionDenied,
            TlsError::NoTls | TlsError::Forged(_) | TlsError::Other(_) => io::ErrorKind::InvalidData,
        };
        Self::new(kind, error)
    }
}

impl TlsError {
    /// What a failure of the handshake means; `dir` has this side's certificates.
    pub(super) fn of_handshake(error: Error, dir: &Path) -> Self {
        match error {
            // The first bytes of anything else are no message.
            Error::InvalidMessage(_) => Self::NoTls,
            error => Self::of(error, dir),
        }
    }

    /// What a failure after the handshake means: a client hears only then what the server thinks of it.
    pub(super) fn of(error: Error, dir: &Path) -> Self {
        let dir = dir.display();
        match error {
            Error::InvalidCertificate(wrong) => Self::Theirs(theirs(&wrong, &dir.to_string())),
            Error::NoCertificatesPresented => Self::Nobody,
            Error::AlertReceived(alert) => match ours(alert, &dir.to_string()) {
                Some(why) => Self::Ours(why),
                None => Self::Other(Error::AlertReceived(alert)),
            },
            Error::DecryptError | Error::InvalidMessage(_) => Self::Forged(error),
            error => Self::Other(error),
        }
    }

    /// What an error of the system's in the handshake means.
    pub(super) fn of_system(error: io::Error, patience: Duration, dir: &Path) -> io::Error {
        use io::ErrorKind as Kind;
        match error.kind() {
            Kind::WouldBlock | Kind::TimedOut => Self::Slow(patience).into(),
            Kind::UnexpectedEof | Kind::ConnectionReset | Kind::BrokenPipe | Kind::ConnectionAborted => {
                Self::HungUp.into()
            }
            _ => match error.downcast::<Error>() {
                Ok(error) => Self::of_handshake(error, dir).into(),
                Err(error) => error,
            },
        }
    }
}

/// What is wrong with the other side's certificate.
fn theirs(wrong: &CertificateError, dir: &str) -> String {
    use CertificateError as Wrong;
    match wrong {
        Wrong::Expired | Wrong::ExpiredContext { .. } => {
            "has expired: have a new one made, and look at this machine's clock".into()
        }
        Wrong::NotValidYet | Wrong::NotValidYetContext { .. } => {
            "isn't valid yet: look at both machines' clocks".into()
        }
        Wrong::UnknownIssuer | Wrong::BadSignature => {
            format!("was signed by none of the authorities in {dir}/ca-cert.pem: both sides need the one that signs the other")
        }
        Wrong::NotValidForNameContext { expected, presented } => {
            let expected = expected.to_str();
            // Written as `DnsName("there.example")`, `IpAddress(10.0.0.1)`.
            let bare = |name: &'_ String| name.split_once('(').map_or(name.as_str(), |it| it.1).trim_matches(['"', ')']).to_owned();
            let names: Vec<_> = presented.iter().map(bare).collect();
            let presented = if names.is_empty() { "nobody".to_owned() } else { names.join(", ") };
            format!(
                "is not for {expected} but for {presented:.300}: say by tls-hostname (--tls-hostname) whom it is for, or have one made with that as \
                 subjectAltName"
            )
        }
        Wrong::NotValidForName => "is for another host: have one made with its name as subjectAltName".into(),
        Wrong::Revoked => format!("was revoked, as {dir}/ca-crl.pem says"),
        Wrong::ExpiredRevocationList | Wrong::ExpiredRevocationListContext { .. } => {
            format!("can't be checked, since {dir}/ca-crl.pem has expired: put a newer one there")
        }
        Wrong::InvalidPurpose | Wrong::InvalidPurposeContext { .. } => {
            "isn't made for this: a server's needs the purpose TLS server (serverAuth), a client's TLS client (clientAuth)".into()
        }
        other => format!("can't be used: {other}"),
    }
}

/// What the other side says is wrong with this side's.
fn ours(alert: AlertDescription, dir: &str) -> Option<String> {
    use AlertDescription as Alert;
    Some(match alert {
        Alert::CertificateRequired => {
            format!("demands a certificate: put client-cert.pem and client-key.pem into {dir}")
        }
        Alert::UnknownCA => {
            format!(
                "knows no authority that signed this side's certificate ({dir}): both sides need the one that signs the other"
            )
        }
        Alert::CertificateExpired => {
            format!(
                "says that this side's certificate ({dir}) has expired, or isn't valid yet: have a new one made, and look at the clocks"
            )
        }
        Alert::CertificateRevoked => format!("says that this side's certificate ({dir}) was revoked"),
        Alert::BadCertificate
        | Alert::UnsupportedCertificate
        | Alert::CertificateUnknown
        | Alert::AccessDenied
        | Alert::DecryptError => {
            format!("refused this side's certificate ({dir}): its log says why")
        }
        Alert::ProtocolVersion => "speaks no TLS 1.3: upgrade it".into(),
        _ => return None,
    })
}
