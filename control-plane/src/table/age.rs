//! Ages as people read them (apimachinery `util/duration`).

use jiff::Timestamp;
use serde_json::Value;

/// Time since `then`, `<unknown>` when it is missing.
pub(super) fn since(then: &Value, now: Option<Timestamp>) -> String {
    let then = then.as_str().and_then(|t| t.parse::<Timestamp>().ok());
    match (then, now) {
        (Some(then), Some(now)) => human(now.as_second().saturating_sub(then.as_second())),
        _ => "<unknown>".to_owned(),
    }
}

/// Two units at most; the second one only while the first is small.
fn human(seconds: i64) -> String {
    if seconds < -1 {
        return "<invalid>".to_owned();
    }
    if seconds < 120 {
        return format!("{}s", seconds.max(0));
    }
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    let two = |big: i64, big_unit: char, small: i64, small_unit: char| {
        if small == 0 {
            format!("{big}{big_unit}")
        } else {
            format!("{big}{big_unit}{small}{small_unit}")
        }
    };
    if minutes < 10 {
        two(minutes, 'm', seconds % 60, 's')
    } else if minutes < 180 {
        format!("{minutes}m")
    } else if hours < 8 {
        two(hours, 'h', minutes % 60, 'm')
    } else if hours < 48 {
        format!("{hours}h")
    } else if days < 8 {
        two(days, 'd', hours % 24, 'h')
    } else if days < 365 * 2 {
        format!("{days}d")
    } else if days < 365 * 8 {
        two(days / 365, 'y', days % 365, 'd')
    } else {
        format!("{}y", days / 365)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages() {
        const D: i64 = 86400;
        for (seconds, text) in [
            (-5, "<invalid>"),
            (-1, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (31 * 60, "31m"),
            (179 * 60 + 59, "179m"),
            (3 * 3600, "3h"),
            (3 * 3600 + 120, "3h2m"),
            (47 * 3600, "47h"),
            (2 * D, "2d"),
            (7 * D + 3600, "7d1h"),
            (100 * D, "100d"),
            (2 * 365 * D, "2y"),
            (2 * 365 * D + D, "2y1d"),
            (9 * 365 * D, "9y"),
        ] {
            assert_eq!(human(seconds), text, "{seconds}");
        }
        assert_eq!(since(&Value::Null, Some(Timestamp::UNIX_EPOCH)), "<unknown>");
    }
}
