//! The store in an etcd that speaks TLS and knows its clients by their certificates.
#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use beeline_control_plane::store::{EtcdOptions, EtcdStore, Expect, Store as _, Write};
use beeline_etcd::server::{Server, Tls};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

const PREFIX: &str = "/registry/core/configmaps/";
const KEY: &str = "/registry/core/configmaps/default/a";

/// An authority in a directory: `NAME.crt`, and who it signs in `NAME-server` and `NAME-client`.
fn authority(dir: &Path, name: &str) {
    let write = |file: &str, text: String| std::fs::write(dir.join(file), text).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    write(&format!("{name}.crt"), params.self_signed(&key).unwrap().pem());
    let issuer = Issuer::new(params, key);
    for (leaf, names) in [("server", vec!["127.0.0.1".to_owned()]), ("client", Vec::new())] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        write(
            &format!("{name}-{leaf}.crt"),
            params.signed_by(&key, &issuer).unwrap().pem(),
        );
        write(&format!("{name}-{leaf}.key"), key.serialize_pem());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_is_used_over_tls_by_those_who_know_each_other_only() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["ours", "other"] {
        authority(dir.path(), name);
    }
    let file = |name: &str| -> PathBuf { dir.path().join(name) };
    let etcd = Server::start_with_tls(Tls {
        ca: file("ours.crt"),
        certificate: file("ours-server.crt"),
        key: file("ours-server.key"),
    })
    .unwrap();
    let options = |ca: &str, client: Option<&str>| EtcdOptions {
        etcd_servers: vec![etcd.url()],
        etcd_cafile: Some(file(ca)),
        etcd_certfile: client.map(|client| file(&format!("{client}-client.crt"))),
        etcd_keyfile: client.map(|client| file(&format!("{client}-client.key"))),
    };
    let connect = async {
        loop {
            if let Ok(store) = EtcdStore::connect(&options("ours.crt", Some("ours"))).await {
                return store;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let store = tokio::time::timeout(Duration::from_secs(60), connect)
        .await
        .unwrap();
    let mut watch = store
        .watch(PREFIX, store.get("x").await.unwrap().1)
        .await
        .unwrap();
    let write = Write {
        key: KEY.to_owned(),
        expect: Expect::Absent,
        value: Some("one".into()),
        guards: Vec::new(),
        also: Vec::new(),
    };
    let revision = store.write(write).await.unwrap();
    let stored = store.get(KEY).await.unwrap().0.unwrap();
    assert_eq!((stored.revision, &*stored.value), (revision, &b"one"[..]));
    let event = tokio::time::timeout(Duration::from_secs(30), watch.next())
        .await
        .unwrap()
        .unwrap();
    assert_eq!((event.revision, event.key.as_str()), (revision, KEY));
    for (ca, client) in [
        ("ours.crt", None),
        ("ours.crt", Some("other")),
        ("other.crt", Some("ours")),
    ] {
        assert!(
            EtcdStore::connect(&options(ca, client)).await.is_err(),
            "{ca} {client:?}"
        );
    }
}
