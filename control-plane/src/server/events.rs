//! Events are kept for an hour, as kube-apiserver keeps them.

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::delete::Options;
use super::route::Target;
use super::{Api, codec, write};
use crate::error::ApiError;

const KEEP: SignedDuration = SignedDuration::from_hours(1);

impl Api {
    /// Deletes the events that have not happened again for an hour.
    pub(super) async fn expire_events(&self) -> Result<(), ApiError> {
        let events = write::collection("", "events", "")?;
        let (r, prefix) = (events.resource, events.prefix());
        let oldest = Timestamp::now() - KEEP;
        for item in self.items(&events).await? {
            let event = codec::decode(r, item.revision, &item.value)?;
            let Some((namespace, name)) = item.key.strip_prefix(&prefix).and_then(|key| key.split_once('/'))
            else {
                continue;
            };
            if last_seen(&event).is_some_and(|seen| seen < oldest) {
                match self
                    .remove(&Target::collection(r, namespace), name, &Options::now())
                    .await
                {
                    Ok(_) => {}
                    Err(error) if error.code == 404 => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}

/// When the event happened last.
fn last_seen(event: &Value) -> Option<Timestamp> {
    let times = [
        &event["series"]["lastObservedTime"],
        &event["lastTimestamp"],
        &event["eventTime"],
        &event["metadata"]["creationTimestamp"],
    ];
    times
        .into_iter()
        .filter_map(|time| time.as_str()?.parse().ok())
        .max()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_latest_time_counts() {
        let event = json!({
            "metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"},
            "lastTimestamp": "2026-01-01T02:00:00Z", "eventTime": null,
        });
        assert_eq!(last_seen(&event), "2026-01-01T02:00:00Z".parse().ok());
        assert_eq!(
            last_seen(&json!({"metadata": {"creationTimestamp": "yesterday"}})),
            None
        );
    }
}
