//! Bootstrap tokens: Secrets `bootstrap-token-ID` in `kube-system`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use clap::{Args, Subcommand};
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use rand::Rng as _;

use super::{ADMIN_CONF, client, objects};

const TYPE: &str = "bootstrap.kubernetes.io/token";
const NAMESPACE: &str = "kube-system";
/// As kubeadm.
const TTL: &str = "24h";

/// `beeline token`.
#[derive(Debug, Args)]
pub struct TokenCommand {
    #[command(subcommand)]
    action: Action,
    /// Kubeconfig of an administrator
    #[arg(long, global = true, env = "KUBECONFIG", default_value = ADMIN_CONF)]
    kubeconfig: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make a token with which nodes can join
    Create(CreateArgs),
    /// List them
    List,
    /// Delete them
    Delete {
        /// Tokens, or what is before their dot
        #[arg(required = true)]
        tokens: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// The token to make [default: a random one]
    token: Option<Token>,
    /// How long it is good for, such as 2h; 0: for ever
    #[arg(long, default_value = TTL, value_parser = ttl)]
    ttl: Ttl,
    /// What it is for
    #[arg(long)]
    description: Option<String>,
    /// Print the command with which a node joins, not just the token
    #[arg(long)]
    print_join_command: bool,
}

/// How long a token is good for; `None`: for ever.
pub(super) type Ttl = Option<Duration>;

/// Go's durations in whole numbers.
pub(super) fn ttl(text: &str) -> Result<Ttl, String> {
    if text == "0" {
        return Ok(None);
    }
    let wrong = || format!("{text:?} is no duration such as 24h, 90m or 3600s");
    let span: jiff::SignedDuration = text.parse().map_err(|_| wrong())?;
    let duration = Duration::try_from(span).map_err(|_| wrong())?;
    Ok(Some(duration).filter(|duration| !duration.is_zero()))
}

/// A token: public and secret part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    id: String,
    secret: String,
}

impl Token {
    pub(super) fn random() -> Self {
        let mut generator = rand::rng();
        let mut text = |length: usize| -> String {
            (0..length)
                .map(|_| char::from_digit(generator.random_range(0..36), 36).unwrap_or('0'))
                .collect()
        };
        Self {
            id: text(6),
            secret: text(16),
        }
    }
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.id, self.secret)
    }
}

impl std::str::FromStr for Token {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |part: &str, length: usize| {
            part.len() == length && part.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
        };
        match text.split_once('.') {
            Some((id, secret)) if plain(id, 6) && plain(secret, 16) => Ok(Self {
                id: id.to_owned(),
                secret: secret.to_owned(),
            }),
            _ => Err(format!(
                "the token {text:?} was not of the form [a-z0-9]{{6}}.[a-z0-9]{{16}}"
            )),
        }
    }
}

/// The Secret of a token.
fn secret(token: &Token, ttl: Ttl, description: Option<&str>, now: Timestamp) -> anyhow::Result<Secret> {
    let mut data = vec![
        ("token-id", token.id.clone()),
        ("token-secret", token.secret.clone()),
        ("usage-bootstrap-authentication", "true".to_owned()),
        ("usage-bootstrap-signing", "true".to_owned()),
        ("auth-extra-groups", objects::JOINERS.to_owned()),
    ];
    if let Some(ttl) = ttl {
        let end = now
            .checked_add(ttl)
            .context("the token would end after all time")?;
        data.push(("expiration", end.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()));
    }
    if let Some(text) = description {
        data.push(("description", text.to_owned()));
    }
    let mut secret = Secret {
        type_: Some(TYPE.to_owned()),
        data: Some(
            data.into_iter()
                .map(|(key, value)| (key.to_owned(), ByteString(value.into_bytes())))
                .collect(),
        ),
        ..Secret::default()
    };
    secret.metadata.name = Some(format!("bootstrap-token-{}", token.id));
    Ok(secret)
}

pub(super) async fn create(
    client: &Client,
    token: &Token,
    ttl: Ttl,
    description: Option<&str>,
) -> anyhow::Result<()> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    let secret = secret(token, ttl, description, Timestamp::now())?;
    secrets
        .create(&PostParams::default(), &secret)
        .await
        .with_context(|| format!("create token {}", token.id))?;
    Ok(())
}

/// The line that a user copies to the next machine.
pub(super) fn join_command(address: &str, token: &Token, hash: &str) -> String {
    format!("beeline join {address} --token {token} \\\n\t--discovery-token-ca-cert-hash {hash}")
}

/// Runs `beeline token`.
///
/// # Errors
/// When the API refuses it.
pub async fn token(command: TokenCommand) -> anyhow::Result<String> {
    let client = client(&command.kubeconfig).await?;
    match command.action {
        Action::Create(args) => {
            let token = args.token.unwrap_or_else(Token::random);
            create(&client, &token, args.ttl, args.description.as_deref()).await?;
            if !args.print_join_command {
                return Ok(format!("{token}\n"));
            }
            let (address, ca) = cluster_info(&client).await?;
            let hash = beeline_control_plane::pki::key_hash(&ca)?;
            Ok(format!(
                "{}\n",
                join_command(&address, &token, &hash).replace(" \\\n\t", " ")
            ))
        }
        Action::List => {
            let secrets: Api<Secret> = Api::namespaced(client, NAMESPACE);
            let tokens = ListParams::default().fields(&format!("type={TYPE}"));
            let list = secrets.list(&tokens).await.context("list tokens")?;
            Ok(table(&list.items, Timestamp::now()))
        }
        Action::Delete { tokens } => {
            let secrets: Api<Secret> = Api::namespaced(client, NAMESPACE);
            let mut text = String::new();
            for token in tokens {
                let id = token.split('.').next().unwrap_or_default();
                ensure!(id.len() == 6, "{token:?} is neither a token nor the id of one");
                secrets
                    .delete(&format!("bootstrap-token-{id}"), &DeleteParams::default())
                    .await
                    .with_context(|| format!("delete token {id}"))?;
                text.push_str(&format!("bootstrap token {id:?} deleted\n"));
            }
            Ok(text)
        }
    }
}

fn table(secrets: &[Secret], now: Timestamp) -> String {
    let columns = ["TOKEN", "TTL", "EXPIRES", "USAGES", "DESCRIPTION", "EXTRA GROUPS"];
    let mut rows = vec![columns.map(str::to_owned)];
    for secret in secrets {
        let field = |name: &str| {
            let data = secret.data.as_ref().and_then(|data| data.get(name));
            data.map(|value| String::from_utf8_lossy(&value.0).into_owned())
                .unwrap_or_default()
        };
        let end: Option<Timestamp> = field("expiration").parse().ok();
        let left = end.map_or("<forever>".to_owned(), |end| {
            let minutes = end.duration_since(now).as_secs() / 60;
            match minutes {
                ..=0 => "<invalid>".to_owned(),
                1..60 => format!("{minutes}m"),
                _ => format!("{}h", minutes / 60),
            }
        });
        let usages = [
            ("usage-bootstrap-authentication", "authentication"),
            ("usage-bootstrap-signing", "signing"),
        ];
        let usages: Vec<&str> = usages
            .iter()
            .filter(|(key, _)| field(key) == "true")
            .map(|(_, name)| *name)
            .collect();
        let or = |text: String, other: &str| if text.is_empty() { other.to_owned() } else { text };
        rows.push([
            format!("{}.{}", field("token-id"), field("token-secret")),
            left,
            or(field("expiration"), "<never>"),
            usages.join(","),
            or(field("description"), "<none>"),
            field("auth-extra-groups"),
        ]);
    }
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        text.push_str(cells.join("   ").trim_end());
        text.push('\n');
    }
    text
}

/// Address (`host:port`) and authority (PEM) of the cluster, as it tells everybody.
pub(super) async fn cluster_info(client: &Client) -> anyhow::Result<(String, String)> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "kube-public");
    let map = maps
        .get("cluster-info")
        .await
        .context("read ConfigMap kube-public/cluster-info")?;
    let text = map.data.as_ref().and_then(|data| data.get("kubeconfig"));
    let text = text.with_context(|| format!("ConfigMap {} has no kubeconfig", map.name_any()))?;
    let config = kube::config::Kubeconfig::from_yaml(text).context("read the kubeconfig of cluster-info")?;
    let cluster = config.clusters.into_iter().find_map(|named| named.cluster);
    let Some((server, ca)) =
        cluster.and_then(|cluster| Some((cluster.server?, cluster.certificate_authority_data?)))
    else {
        bail!("the kubeconfig of cluster-info names no server and authority");
    };
    let ca = base64::engine::general_purpose::STANDARD
        .decode(ca)
        .context("decode the authority of cluster-info")?;
    let address = server.strip_prefix("https://").unwrap_or(&server).to_owned();
    Ok((
        address,
        String::from_utf8(ca).context("decode the authority of cluster-info")?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens() {
        let token = Token::random();
        assert_eq!(token.to_string().parse(), Ok(token.clone()));
        assert_ne!(Token::random(), token);
        for bad in ["", "abcdef", "abcdef.0123456789ABCDEF", "abcde.0123456789abcdef"] {
            assert!(bad.parse::<Token>().is_err(), "{bad}");
        }
    }

    #[test]
    fn times_to_live() {
        assert_eq!(ttl("0"), Ok(None));
        assert_eq!(ttl("2h"), Ok(Some(Duration::from_secs(7200))));
        assert_eq!(ttl("90m"), Ok(Some(Duration::from_secs(5400))));
        for bad in ["", "h", "-1h", "soon"] {
            assert!(ttl(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_table_is_kubeadms() {
        let now: Timestamp = "2026-11-21T10:00:00Z".parse().unwrap();
        let token: Token = "abcdef.0123456789abcdef".parse().unwrap();
        let day = secret(&token, ttl("24h").unwrap(), Some("for ci"), now).unwrap();
        let ever = secret(&token, None, None, now).unwrap();
        let text = table(&[day, ever], now);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("TOKEN                     TTL"), "{text}");
        assert!(
            lines[1].contains("24h") && lines[1].contains("2026-11-22T10:00:00Z"),
            "{text}"
        );
        assert!(
            lines[1].contains("authentication,signing") && lines[1].contains("for ci"),
            "{text}"
        );
        assert!(
            lines[2].contains("<forever>") && lines[2].contains("<never>"),
            "{text}"
        );
    }
}
