//! Certificates for tests of TLS, in directories as QEMU and libvirt lay them out.

use std::fs;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType, Error,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
    date_time_ymd,
};

/// Somebody who signs certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// Which side a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Who connects.
    Client,
    /// Who is connected to.
    Server,
}

impl Role {
    fn word(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

/// The serial number of certificates that [`Authority::revokes`] revokes.
const REVOKED: u64 = 666;

impl Authority {
    /// One of that name.
    ///
    /// # Errors
    /// The library's.
    pub fn new(name: &str) -> Result<Self, Error> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = named(name);
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    /// Has `dir` believe whom this one signs.
    ///
    /// # Errors
    /// The system's.
    pub fn is_believed_in(&self, dir: &Path) -> std::io::Result<()> {
        fs::create_dir_all(dir)?;
        fs::write(dir.join("ca-cert.pem"), &self.pem)
    }

    /// Puts a certificate for `names`, of hosts or addresses, and its key into `dir`.
    ///
    /// # Errors
    /// The library's, or the system's.
    pub fn signs(&self, dir: &Path, role: Role, names: &[&str]) -> Result<(), Box<dyn std::error::Error>> {
        self.sign(dir, role, names, |_| {})
    }

    /// The same with one that isn't valid any more.
    ///
    /// # Errors
    /// As [`Self::signs`].
    pub fn signed_long_ago(&self, dir: &Path, role: Role, names: &[&str]) -> Result<(), Box<dyn std::error::Error>> {
        self.sign(dir, role, names, |params| {
            (params.not_before, params.not_after) = (date_time_ymd(2001, 1, 1), date_time_ymd(2002, 1, 1));
        })
    }

    /// The same with one that `believer` knows to be revoked.
    ///
    /// # Errors
    /// As [`Self::signs`].
    pub fn revokes(
        &self,
        dir: &Path,
        role: Role,
        names: &[&str],
        believer: &Path,
    ) -> Result<(), Box<dyn std::error::Error>> {
        self.sign(dir, role, names, |params| params.serial_number = Some(SerialNumber::from(REVOKED)))?;
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(4000, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from(REVOKED),
                revocation_time: date_time_ymd(2020, 1, 1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(fs::write(believer.join("ca-crl.pem"), list.signed_by(&self.issuer)?.pem()?)?)
    }

    fn sign(
        &self,
        dir: &Path,
        role: Role,
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> Result<(), Box<dyn std::error::Error>> {
        let mut params = CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>())?;
        params.distinguished_name = named(role.word());
        params.extended_key_usages = vec![match role {
            Role::Client => ExtendedKeyUsagePurpose::ClientAuth,
            Role::Server => ExtendedKeyUsagePurpose::ServerAuth,
        }];
        change(&mut params);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        fs::create_dir_all(dir)?;
        fs::write(dir.join(format!("{}-cert.pem", role.word())), certificate.pem())?;
        Ok(fs::write(dir.join(format!("{}-key.pem", role.word())), key.serialize_pem())?)
    }
}

/// A directory with all that both sides need, for the host `localhost` and its addresses.
///
/// # Errors
/// The library's, or the system's.
pub fn of_localhost(dir: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let authority = Authority::new("Outboard's tests")?;
    authority.is_believed_in(dir)?;
    authority.signs(dir, Role::Server, &["localhost", "127.0.0.1", "::1"])?;
    authority.signs(dir, Role::Client, &["client.example"])
}

fn named(name: &str) -> DistinguishedName {
    let mut named = DistinguishedName::new();
    named.push(DnType::CommonName, name);
    named
}
