//! Bootstrap tokens: Secrets that let a new node join for a while.

use base64::Engine as _;
use jiff::Timestamp;
use serde_json::Value;

/// Type of the Secrets.
pub(crate) const TYPE: &str = "bootstrap.kubernetes.io/token";

/// A field of the Secret's data.
pub(crate) fn field(secret: &Value, name: &str) -> Option<String> {
    let encoded = secret["data"][name].as_str()?;
    let bytes = base64::engine::general_purpose::STANDARD.decode(encoded).ok()?;
    String::from_utf8(bytes).ok()
}

/// When the token ends; nothing if it never does. A time that cannot be read is long past.
pub(crate) fn expiration(secret: &Value) -> Option<Timestamp> {
    let text = field(secret, "expiration").filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or(Timestamp::UNIX_EPOCH))
}

/// Whether the token has ended.
pub(crate) fn expired(secret: &Value, now: Timestamp) -> bool {
    expiration(secret).is_some_and(|end| end <= now)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tokens_end() {
        let secret = |expiration: &str| {
            let encoded = base64::engine::general_purpose::STANDARD.encode(expiration);
            json!({"data": {"expiration": encoded}})
        };
        let now = "2026-11-21T01:25:30Z".parse().unwrap();
        assert!(!expired(&json!({}), now));
        assert!(!expired(&secret(""), now));
        assert!(!expired(&secret("2026-11-21T01:25:31Z"), now));
        assert!(expired(&secret("2026-11-21T01:25:30Z"), now));
        assert!(expired(&secret("soon"), now));
    }
}
