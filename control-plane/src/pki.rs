//! The certificate authority, the server's and the administrator's certificate, and the kubeconfig.
//!
//! All of it is generated at the first start, kept in the data directory and used again afterwards. The server's certificate
//! is renewed at a start with other names, or when it nears its end; the authority never is, so clients keep trusting it.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, DnValue,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// Whom the API says it is to nodes, kubeadm's name: they serve nobody else.
const KUBELET_CLIENT: &str = "kube-apiserver-kubelet-client";
/// Check of a node, certificate and key.
type ForNodes = (
    Arc<dyn ClientCertVerifier>,
    CertificateDer<'static>,
    PrivateKeyDer<'static>,
);

const CA_YEARS: i16 = 10;
const LEAF_YEARS: i16 = 3;
/// A certificate with less time left is replaced: that of the API at its start, that of a node while it runs.
const RENEW_BEFORE_SECONDS: i64 = 365 * 24 * 3600;

/// What can go wrong with keys and certificates.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file could not be read or written.
    #[error("{operation} {path}: {source}")]
    File {
        /// What was being done.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A certificate or key cannot be used.
    #[error("{what}: {why}")]
    Certificate {
        /// Which one.
        what: String,
        /// Why.
        why: String,
    },
}

pub(crate) fn bad<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> PkiError {
    move |error| PkiError::Certificate {
        what: what.to_string(),
        why: error.to_string(),
    }
}

fn file<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> PkiError + 'a {
    move |source| PkiError::File {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// A certificate and its key, both PEM.
#[derive(Clone)]
pub struct Pair {
    /// The certificate.
    pub certificate: String,
    /// The private key, PKCS#8.
    pub key: String,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair")
            .field("certificate", &self.certificate)
            .finish_non_exhaustive()
    }
}

/// Everything that the server needs to prove who it is and to tell who its clients are.
#[derive(Clone)]
pub struct Pki {
    /// The authority's certificate, PEM.
    pub ca: String,
    /// The server's certificate.
    pub server: Pair,
    /// The administrator's client certificate.
    pub admin: Pair,
    /// The API's certificate as a client of nodes.
    kubelet_client: Pair,
    /// The key that service account tokens are signed with; in the place of a certificate, its public half.
    pub tokens: Pair,
    ca_key: String,
}

impl std::fmt::Debug for Pki {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pki")
            .field("ca", &self.ca)
            .finish_non_exhaustive()
    }
}

impl Pki {
    /// Loads the certificates under `dir`, generating what is missing, outdated, or not good for all of `names`.
    ///
    /// # Errors
    /// When a file cannot be read or written, or does not hold what it should; nothing is overwritten then.
    pub fn ensure(dir: &Path, names: &[String]) -> Result<Self, PkiError> {
        create_private_dir(dir)?;
        let ca = match load(dir, "ca")? {
            Some(pair) => pair,
            None => save(dir, "ca", new_ca()?)?,
        };
        let key = KeyPair::from_pem(&ca.key).map_err(bad("key of the certificate authority"))?;
        let issuer = Issuer::from_ca_cert_pem(&ca.certificate, key)
            .map_err(bad("certificate of the certificate authority"))?;
        let server = match load(dir, "server")? {
            Some(pair) if usable(&pair, names)? => pair,
            _ => {
                let mut params = leaf(names.to_vec(), "kube-apiserver", None)?;
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
                save(dir, "server", sign(&params, &issuer)?)?
            }
        };
        let admin = match load(dir, "admin")? {
            Some(pair) if usable(&pair, &[])? => pair,
            _ => {
                let mut params = leaf(Vec::new(), "kubernetes-admin", Some("system:masters"))?;
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
                save(dir, "admin", sign(&params, &issuer)?)?
            }
        };
        let kubelet_client = match load(dir, KUBELET_CLIENT)? {
            Some(pair) if usable(&pair, &[])? => pair,
            _ => {
                let mut params = leaf(Vec::new(), KUBELET_CLIENT, Some("kubeadm:cluster-admins"))?;
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
                save(dir, KUBELET_CLIENT, sign(&params, &issuer)?)?
            }
        };
        let tokens = token_key(dir)?;
        Ok(Self {
            ca: ca.certificate,
            server,
            admin,
            kubelet_client,
            tokens,
            ca_key: ca.key,
        })
    }

    /// A client certificate for a user and its group, signed by the authority.
    ///
    /// # Errors
    /// When the authority's key cannot be used.
    pub fn client(&self, user: &str, group: Option<&str>) -> Result<Pair, PkiError> {
        let key = KeyPair::from_pem(&self.ca_key).map_err(bad("key of the certificate authority"))?;
        let issuer = Issuer::from_ca_cert_pem(&self.ca, key)
            .map_err(bad("certificate of the certificate authority"))?;
        let mut params = leaf(Vec::new(), user, group)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        sign(&params, &issuer)
    }

    /// Signs a node's request (PKCS#10, PEM). Only its key and the node's name in its common name count: the certificate is
    /// one of a client in the group `system:nodes`, whatever else was asked for.
    ///
    /// # Errors
    /// When it is no request of a node, or not signed with its own key.
    pub fn sign_node(&self, request: &str) -> Result<SignedNode, PkiError> {
        let what = "certificate request";
        let mut request = CertificateSigningRequestParams::from_pem(request).map_err(bad(what))?;
        let name = match request.params.distinguished_name.get(&DnType::CommonName) {
            Some(DnValue::Utf8String(name)) => name.clone(),
            Some(DnValue::PrintableString(name)) => name.to_string(),
            _ => String::new(),
        };
        let node = name
            .strip_prefix("system:node:")
            .filter(|node| !node.is_empty())
            .ok_or_else(|| PkiError::Certificate {
                what: what.into(),
                why: format!("the common name {name:?} is not system:node:NAME"),
            })?
            .to_owned();
        let key = KeyPair::from_pem(&self.ca_key).map_err(bad("key of the certificate authority"))?;
        let issuer = Issuer::from_ca_cert_pem(&self.ca, key)
            .map_err(bad("certificate of the certificate authority"))?;
        request.params = leaf(Vec::new(), &name, Some("system:nodes"))?;
        request.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = request.signed_by(&issuer).map_err(bad(what))?.pem();
        Ok(SignedNode { node, certificate })
    }

    /// What the API shows nodes, and how it checks what they show: as they do at the API, the certificate of a client.
    pub(crate) fn for_nodes(&self) -> Result<ForNodes, PkiError> {
        let pair = &self.kubelet_client;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()?), provider)
            .build()
            .map_err(bad("check of nodes"))?;
        let what = "certificate for nodes";
        let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).map_err(bad(what))?;
        Ok((verifier, certificate(&pair.certificate, what)?, key))
    }

    fn roots(&self) -> Result<RootCertStore, PkiError> {
        let what = "certificate of the certificate authority";
        let mut roots = RootCertStore::empty();
        roots.add(certificate(&self.ca, what)?).map_err(bad(what))?;
        Ok(roots)
    }

    /// TLS settings: HTTP/2 and HTTP/1.1, client certificates asked for but not required.
    ///
    /// # Errors
    /// When a certificate or key does not fit.
    pub fn server_config(&self) -> Result<rustls::ServerConfig, PkiError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let roots = Arc::new(self.roots()?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .allow_unauthenticated()
            .build()
            .map_err(bad("client certificate check"))?;
        let key =
            PrivateKeyDer::from_pem_slice(self.server.key.as_bytes()).map_err(bad("key of the server"))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(bad("TLS versions"))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![certificate(
                    &self.server.certificate,
                    "certificate of the server",
                )?],
                key,
            )
            .map_err(bad("certificate of the server"))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }

    /// The administrator's kubeconfig for the server at `url`, with everything embedded.
    pub fn kubeconfig(&self, url: &str) -> String {
        let encode = |pem: &str| BASE64.encode(pem);
        format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: beeline\n  cluster:\n    server: {url}\n    \
             certificate-authority-data: {ca}\nusers:\n- name: kubernetes-admin\n  user:\n    \
             client-certificate-data: {certificate}\n    client-key-data: {key}\ncontexts:\n- name: beeline\n  \
             context:\n    cluster: beeline\n    user: kubernetes-admin\ncurrent-context: beeline\n",
            ca = encode(&self.ca),
            certificate = encode(&self.admin.certificate),
            key = encode(&self.admin.key),
        )
    }
}

/// A node's new certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedNode {
    /// Name of the node.
    pub node: String,
    /// PEM.
    pub certificate: String,
}

/// A new key and a request for a node's certificate, both PEM.
///
/// # Errors
/// When no key can be made.
pub fn node_request(node: &str) -> Result<(String, String), PkiError> {
    let what = "certificate request";
    let key = KeyPair::generate().map_err(bad(what))?;
    let request = request(&key, &format!("system:node:{node}"), "system:nodes")?;
    Ok((key.serialize_pem(), request))
}

/// A request with a name and nothing else: the rest is for who signs to say.
fn request(key: &KeyPair, common_name: &str, organization: &str) -> Result<String, PkiError> {
    let what = "certificate request";
    let mut params = CertificateParams::new(Vec::new()).map_err(bad(what))?;
    params.distinguished_name = subject(common_name, Some(organization));
    let request = params.serialize_request(key).map_err(bad(what))?;
    request.pem().map_err(bad(what))
}

/// What an authority's certificate (PEM) is known by: the SHA-256 of its public key, as kubeadm writes it.
///
/// # Errors
/// When it is no certificate.
pub fn key_hash(ca: &str) -> Result<String, PkiError> {
    let der = certificate(ca, "certificate of the authority")?;
    let (_, parsed) =
        x509_parser::parse_x509_certificate(&der).map_err(bad("certificate of the authority"))?;
    let digest = ring::digest::digest(&ring::digest::SHA256, parsed.public_key().raw);
    let hex: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("sha256:{hex}"))
}

/// Who a client says it is, by its certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Common name.
    pub user: String,
    /// Organizations.
    pub groups: Vec<String>,
}

impl Identity {
    /// Reads the subject of a certificate that TLS has verified already.
    pub fn from_der(der: &[u8]) -> Option<Self> {
        let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
        let subject = certificate.subject();
        let user = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
        let groups = subject
            .iter_organization()
            .filter_map(|group| group.as_str().ok())
            .map(str::to_owned)
            .collect();
        Some(Self { user, groups })
    }

    /// Members of `system:masters` may do everything.
    pub fn is_admin(&self) -> bool {
        self.groups.iter().any(|group| group == "system:masters")
    }
}

/// Creates a directory that only its owner may enter; an existing one is left as it is.
///
/// # Errors
/// When it cannot be created.
pub fn create_private_dir(dir: &Path) -> Result<(), PkiError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(file("create directory", dir))
}

/// Writes a file whole or not at all, readable by its owner only.
///
/// # Errors
/// When it cannot be written.
pub fn write_private(path: &Path, content: &str) -> Result<(), PkiError> {
    let temporary = path.with_extension(format!("new-{}", std::process::id()));
    let written = (|| {
        let mut out = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        out.write_all(content.as_bytes())?;
        out.sync_all()?;
        fs::rename(&temporary, path)?;
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        fs::File::open(parent)?.sync_all()
    })();
    written
        .inspect_err(|_| drop(fs::remove_file(&temporary)))
        .map_err(file("write", path))
}

fn certificate(pem: &str, what: &'static str) -> Result<CertificateDer<'static>, PkiError> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(bad(what))
}

fn load(dir: &Path, name: &str) -> Result<Option<Pair>, PkiError> {
    let read = |extension: &str| {
        let path = dir.join(format!("{name}.{extension}"));
        match fs::read_to_string(&path) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(file("read", &path)(error)),
        }
    };
    // The key is written first: a certificate without one is an accident that must not be papered over.
    match (read("crt")?, read("key")?) {
        (Some(certificate), Some(key)) => Ok(Some(Pair { certificate, key })),
        (None, _) => Ok(None),
        (Some(_), None) => Err(PkiError::Certificate {
            what: format!("{}", dir.join(format!("{name}.key")).display()),
            why: "the certificate is there but its key is missing".into(),
        }),
    }
}

/// The key for service account tokens, made when it is first needed.
fn token_key(dir: &Path) -> Result<Pair, PkiError> {
    let path = dir.join("sa.key");
    let key = match fs::read_to_string(&path) {
        Ok(pem) => KeyPair::from_pem(&pem).map_err(bad(path.display()))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let key = KeyPair::generate().map_err(bad("key for service account tokens"))?;
            write_private(&path, &key.serialize_pem())?;
            key
        }
        Err(error) => return Err(file("read", &path)(error)),
    };
    Ok(Pair {
        certificate: key.public_key_pem(),
        key: key.serialize_pem(),
    })
}

fn save(dir: &Path, name: &str, pair: Pair) -> Result<Pair, PkiError> {
    write_private(&dir.join(format!("{name}.key")), &pair.key)?;
    write_private(&dir.join(format!("{name}.crt")), &pair.certificate)?;
    Ok(pair)
}

fn validity(params: &mut CertificateParams, years: i16) {
    // A day back, for clients whose clock is behind.
    let today = jiff::Zoned::now()
        .with_time_zone(jiff::tz::TimeZone::UTC)
        .date()
        .yesterday();
    let start = today.unwrap_or(jiff::civil::Date::MIN);
    let date = |year: i16| {
        rcgen::date_time_ymd(
            i32::from(year),
            start.month().unsigned_abs(),
            // Every year has a 28 February.
            start.day().unsigned_abs().min(28),
        )
    };
    params.not_before = date(start.year());
    params.not_after = date(start.year().saturating_add(years));
}

fn new_ca() -> Result<Pair, PkiError> {
    let mut params = CertificateParams::new(Vec::new()).map_err(bad("certificate authority"))?;
    params.distinguished_name = subject("kubernetes", None);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    validity(&mut params, CA_YEARS);
    let key = KeyPair::generate().map_err(bad("key of the certificate authority"))?;
    let certificate = params.self_signed(&key).map_err(bad("certificate authority"))?;
    Ok(Pair {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    })
}

fn subject(common_name: &str, organization: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    if let Some(organization) = organization {
        name.push(DnType::OrganizationName, organization);
    }
    name
}

fn leaf(
    names: Vec<String>,
    common_name: &str,
    organization: Option<&str>,
) -> Result<CertificateParams, PkiError> {
    let list = names.join(", ");
    let mut params = CertificateParams::new(names).map_err(bad(format!("certificate for {list}")))?;
    params.distinguished_name = subject(common_name, organization);
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    validity(&mut params, LEAF_YEARS);
    Ok(params)
}

fn sign(params: &CertificateParams, issuer: &Issuer<'_, KeyPair>) -> Result<Pair, PkiError> {
    let key = KeyPair::generate().map_err(bad("key"))?;
    let certificate = params.signed_by(&key, issuer).map_err(bad("certificate"))?;
    Ok(Pair {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    })
}

/// Whether a certificate (PEM) ends so soon after that time (seconds since 1970) that it is to be replaced.
///
/// # Errors
/// When it is no certificate.
pub fn ends_soon(certificate_pem: &str, now: i64) -> Result<bool, PkiError> {
    let der = certificate(certificate_pem, "stored certificate")?;
    let (_, parsed) = x509_parser::parse_x509_certificate(&der).map_err(bad("stored certificate"))?;
    Ok(parsed.validity().not_after.timestamp().saturating_sub(now) < RENEW_BEFORE_SECONDS)
}

/// Whether the certificate has time left and is good for all of `names`.
fn usable(pair: &Pair, names: &[String]) -> Result<bool, PkiError> {
    if ends_soon(&pair.certificate, jiff::Timestamp::now().as_second())? {
        return Ok(false);
    }
    let der = certificate(&pair.certificate, "stored certificate")?;
    let (_, parsed) = x509_parser::parse_x509_certificate(&der).map_err(bad("stored certificate"))?;
    let san = parsed
        .subject_alternative_name()
        .map_err(bad("stored certificate"))?;
    let have: Vec<String> = san.map_or(Vec::new(), |san| {
        san.value.general_names.iter().filter_map(general_name).collect()
    });
    Ok(names.iter().all(|name| have.contains(name)))
}

fn general_name(name: &x509_parser::prelude::GeneralName<'_>) -> Option<String> {
    match name {
        x509_parser::prelude::GeneralName::DNSName(name) => Some((*name).to_owned()),
        x509_parser::prelude::GeneralName::IPAddress(octets) => {
            if let Ok(v4) = <[u8; 4]>::try_from(*octets) {
                return Some(std::net::Ipv4Addr::from(v4).to_string());
            }
            <[u8; 16]>::try_from(*octets)
                .ok()
                .map(|v6| std::net::Ipv6Addr::from(v6).to_string())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn certificates_are_kept_and_renewed_for_new_names() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("pki");
        let first = Pki::ensure(&dir, &names(&["localhost", "127.0.0.1", "::1"])).unwrap();
        let again = Pki::ensure(&dir, &names(&["localhost", "127.0.0.1"])).unwrap();
        assert_eq!(first.ca, again.ca);
        assert_eq!(first.server.certificate, again.server.certificate);
        assert_eq!(first.admin.certificate, again.admin.certificate);
        let renewed = Pki::ensure(&dir, &names(&["localhost", "192.0.2.7"])).unwrap();
        assert_eq!(first.ca, renewed.ca);
        assert_ne!(first.server.certificate, renewed.server.certificate);
        assert!(usable(&renewed.server, &names(&["192.0.2.7"])).unwrap());
        renewed.server_config().unwrap();
        for entry in fs::read_dir(&dir).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(
                entry.metadata().unwrap().permissions().mode() & 0o777,
                0o600,
                "{:?}",
                entry.path()
            );
        }
    }

    #[test]
    fn admin_is_known_by_its_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::ensure(dir.path(), &names(&["localhost"])).unwrap();
        let der = CertificateDer::from_pem_slice(pki.admin.certificate.as_bytes()).unwrap();
        let identity = Identity::from_der(&der).unwrap();
        assert_eq!(identity.user, "kubernetes-admin");
        assert!(identity.is_admin());
        let der = CertificateDer::from_pem_slice(pki.server.certificate.as_bytes()).unwrap();
        assert!(!Identity::from_der(&der).unwrap().is_admin());
        assert_eq!(Identity::from_der(b"nonsense"), None);
    }

    #[test]
    fn a_lost_key_is_an_error_not_a_new_authority() {
        let dir = tempfile::tempdir().unwrap();
        Pki::ensure(dir.path(), &[]).unwrap();
        fs::remove_file(dir.path().join("ca.key")).unwrap();
        let error = Pki::ensure(dir.path(), &[]).unwrap_err().to_string();
        assert!(error.contains("ca.key"), "{error}");
    }

    #[test]
    fn nodes_get_certificates_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::ensure(dir.path(), &[]).unwrap();
        let (_, asked) = node_request("n1").unwrap();
        let signed = pki.sign_node(&asked).unwrap();
        assert_eq!(signed.node, "n1");
        let der = certificate(&signed.certificate, "new").unwrap();
        let identity = Identity::from_der(&der).unwrap();
        assert_eq!(
            (identity.user.as_str(), identity.groups),
            ("system:node:n1", vec!["system:nodes".to_owned()])
        );
        // nobody becomes an administrator that way
        let key = KeyPair::generate().unwrap();
        let asked = request(&key, "kubernetes-admin", "system:masters").unwrap();
        let error = pki.sign_node(&asked).unwrap_err().to_string();
        assert!(error.contains("kubernetes-admin"), "{error}");
        assert!(pki.sign_node("-----BEGIN X-----").is_err());
        let hash = key_hash(&pki.ca).unwrap();
        assert_eq!((hash.len(), &hash[..7]), (71, "sha256:"));
    }
}
