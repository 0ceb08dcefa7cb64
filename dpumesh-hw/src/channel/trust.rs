//! Who may speak on a channel: certificates made by one authority per card.
//!
//! # Bootstrap
//! The operator (in the emulator: the program that starts the node) makes an [`Authority`] for the card and has it issue two
//! [`Credentials`]: the dataplane's go to the SoC together with its software image, the agent's to the host. The
//! authority's key stays with the operator. Each side trusts that authority only, and the name it expects of the other.
//!
//! Names are DNS names in the certificate's subject alternative names: `<card>.dataplane.dpumesh` and
//! `<card>.agent.dpumesh`. So an agent's certificate cannot pass for a dataplane's, nor one card's for another's.
//!
//! # Rotation
//! An authority lasts [`AUTHORITY_LIFETIME`] unless told otherwise, credentials [`CREDENTIALS_LIFETIME`] and never longer
//! than their authority. Both ends read credentials when they start to serve or connect: to rotate, issue and write new
//! ones for both parties before the old expire, then start the dataplane again and then the agent. Old and new of one
//! authority get on with each other, so the order between them does not matter; with a new authority both ends have to
//! change. A connection that is up outlives its certificates; one that comes back does not.

use std::fmt;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use dpumesh_core::DpuId;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PublicKeyData,
};
use x509_parser::pem::parse_x509_pem;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// How long an authority lasts by default: ten years.
pub const AUTHORITY_LIFETIME: Duration = Duration::from_secs(3653 * DAY.as_secs());
/// How long credentials last by default: one year.
pub const CREDENTIALS_LIFETIME: Duration = Duration::from_secs(365 * DAY.as_secs());
/// Longest lifetime: a hundred years.
const LONGEST: Duration = Duration::from_secs(36_525 * DAY.as_secs());
/// Certificates begin so long ago, for clocks that are behind.
const SKEW: Duration = DAY;

/// An end of the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Party {
    /// The node agent, on the host.
    Agent,
    /// The dataplane, on the SoC.
    Dataplane,
}

impl Party {
    /// The name that this party's certificate for a card must carry.
    pub fn name(self, dpu: &DpuId) -> String {
        let party = match self {
            Self::Agent => "agent",
            Self::Dataplane => "dataplane",
        };
        format!("{dpu}.{party}.dpumesh")
    }
}

/// Certificate and key of one party, and the authority it trusts; all PEM.
#[derive(Clone)]
pub struct Credentials {
    /// The authority's certificate.
    pub authority: String,
    /// The party's certificate.
    pub certificate: String,
    /// The party's private key (PKCS #8).
    pub key: String,
}

/// The authority of one card.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dpu: DpuId,
    /// Its end, since 1970.
    until: Duration,
}

/// Credentials that cannot be made, read or written.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The card's name cannot stand in a certificate.
    #[error("card `{0}` cannot be named in a certificate: use up to 63 letters, digits and inner hyphens")]
    Name(DpuId),
    /// A lifetime of nothing, or of more than a hundred years.
    #[error("lifetime of {} seconds: use from one second to a hundred years", .0.as_secs())]
    Lifetime(Duration),
    /// A private key that others than its owner may use.
    #[error("{}: others than its owner have access (mode {mode:04o}): chmod 600 it", path.display())]
    Permissions {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Making a key or certificate failed.
    #[error("certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// A PEM text that is not what it should be.
    #[error("{name}: {reason}")]
    Pem {
        /// Which: a file, or a field of [`Credentials`].
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
}

const FILES: [&str; 3] = ["authority.pem", "certificate.pem", "key.pem"];

impl Authority {
    /// Makes an authority with a key of its own, for [`AUTHORITY_LIFETIME`].
    ///
    /// # Errors
    /// The card's name cannot stand in a certificate.
    pub fn new(dpu: DpuId) -> Result<Self, TrustError> {
        Self::lasting(dpu, AUTHORITY_LIFETIME)
    }

    /// Makes an authority that lasts so long from now, in whole seconds; it begins a day ago.
    ///
    /// # Errors
    /// The card's name cannot stand in a certificate, [`TrustError::Lifetime`].
    pub fn lasting(dpu: DpuId, lifetime: Duration) -> Result<Self, TrustError> {
        // A label of a DNS name (RFC 1123 §2.1).
        let valid = (1..=63).contains(&dpu.0.len())
            && dpu.0.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !dpu.0.starts_with('-')
            && !dpu.0.ends_with('-');
        if !valid {
            return Err(TrustError::Name(dpu));
        }
        let mut params = CertificateParams::default();
        let until = set_validity(&mut params, lifetime, Duration::MAX)?;
        params
            .distinguished_name
            .push(DnType::CommonName, format!("dpumesh channel of {dpu}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Ok(Self {
            issuer: CertifiedIssuer::self_signed(params, KeyPair::generate()?)?,
            dpu,
            until,
        })
    }

    /// Issues credentials for one party of this card, for [`CREDENTIALS_LIFETIME`].
    ///
    /// # Errors
    /// Making the key failed.
    pub fn issue(&self, party: Party) -> Result<Credentials, TrustError> {
        self.issue_lasting(party, CREDENTIALS_LIFETIME)
    }

    /// Issues credentials that last so long from now, in whole seconds, but not longer than the authority; they begin
    /// a day ago.
    ///
    /// # Errors
    /// Making the key failed, [`TrustError::Lifetime`].
    pub fn issue_lasting(&self, party: Party, lifetime: Duration) -> Result<Credentials, TrustError> {
        let key = KeyPair::generate()?;
        let name = party.name(&self.dpu);
        let mut params = CertificateParams::new(vec![name.clone()])?;
        set_validity(&mut params, lifetime, self.until)?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match party {
            Party::Agent => ExtendedKeyUsagePurpose::ClientAuth,
            Party::Dataplane => ExtendedKeyUsagePurpose::ServerAuth,
        }];
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Credentials {
            authority: self.issuer.pem(),
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }
}

/// From a day ago until `lifetime` from now, at the latest `latest` (since 1970). Returns the end.
fn set_validity(
    params: &mut CertificateParams,
    lifetime: Duration,
    latest: Duration,
) -> Result<Duration, TrustError> {
    if lifetime < Duration::from_secs(1) || lifetime > LONGEST {
        return Err(TrustError::Lifetime(lifetime));
    }
    // A clock before 1970 makes certificates that are valid in 1970: refused by everybody, which is right.
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let (now, until) = (now.as_secs(), (now + lifetime).min(latest).as_secs());
    let start = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = start + Duration::from_secs(now.saturating_sub(SKEW.as_secs()));
    params.not_after = start + Duration::from_secs(until);
    Ok(Duration::from_secs(until))
}

impl Credentials {
    /// Writes `authority.pem`, `certificate.pem` and `key.pem` into a folder, made if need be; all are readable by
    /// their owner only, also those that were there with other permissions.
    ///
    /// # Errors
    /// The file that could not be written.
    pub fn write(&self, folder: &Path) -> Result<(), TrustError> {
        let file_error = |path: PathBuf| move |error| TrustError::File { path, error };
        std::fs::create_dir_all(folder).map_err(file_error(folder.to_owned()))?;
        for (name, text) in FILES.iter().zip([&self.authority, &self.certificate, &self.key]) {
            let path = folder.join(name);
            write_private(&path, text).map_err(file_error(path))?;
        }
        Ok(())
    }

    /// Reads what [`Credentials::write`] wrote.
    ///
    /// # Errors
    /// The file that could not be read, or that does not hold what it should; a key that its group or others may read or
    /// write ([`TrustError::Permissions`]).
    pub fn read(folder: &Path) -> Result<Self, TrustError> {
        let paths = FILES.map(|name| folder.join(name));
        let read = |path: &PathBuf| {
            std::fs::read_to_string(path).map_err(|error| TrustError::File {
                path: path.clone(),
                error,
            })
        };
        let credentials = Self {
            authority: read(&paths[0])?,
            certificate: read(&paths[1])?,
            key: read_private(&paths[2])?,
        };
        credentials.check_named(&paths.map(|path| path.display().to_string()))?;
        Ok(credentials)
    }

    /// Looks whether the texts are certificates and the certificate's key.
    ///
    /// # Errors
    /// [`TrustError::Pem`] names the field.
    pub fn check(&self) -> Result<(), TrustError> {
        self.check_named(&["authority", "certificate", "key"].map(str::to_owned))
    }

    fn check_named(&self, names: &[String; 3]) -> Result<(), TrustError> {
        let wrong = |at: usize, reason: String| TrustError::Pem {
            name: names[at].clone(),
            reason,
        };
        public_key(&self.authority).map_err(|reason| wrong(0, reason))?;
        let certified = public_key(&self.certificate).map_err(|reason| wrong(1, reason))?;
        let key =
            KeyPair::from_pem(&self.key).map_err(|error| wrong(2, format!("no private key: {error}")))?;
        if key.subject_public_key_info() != certified {
            return Err(wrong(2, "is not the certificate's key".to_owned()));
        }
        Ok(())
    }
}

/// The public key of a certificate, in DER.
fn public_key(pem: &str) -> Result<Vec<u8>, String> {
    let (_, pem) = parse_x509_pem(pem.as_bytes()).map_err(|error| format!("no PEM: {error}"))?;
    let certificate = pem
        .parse_x509()
        .map_err(|error| format!("no certificate: {error}"))?;
    Ok(certificate.public_key().raw.to_vec())
}

/// Nobody else can read the file from before the first octet is in it.
fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))?; // it may have been there
    file.write_all(text.as_bytes())
}

/// Reads a file that belongs to its owner alone.
fn read_private(path: &Path) -> Result<String, TrustError> {
    let file_error = |error| TrustError::File {
        path: path.to_owned(),
        error,
    };
    let mut file = File::open(path).map_err(file_error)?;
    let mode = file.metadata().map_err(file_error)?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(TrustError::Permissions {
            path: path.to_owned(),
            mode,
        });
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(file_error)?;
    Ok(text)
}

impl fmt::Debug for Credentials {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("certificate", &self.certificate)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("dpu", &self.dpu)
            .finish_non_exhaustive()
    }
}
