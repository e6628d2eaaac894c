//! Lines of a container runtime's log: time, stream, whether the line is whole, text (`k8s.io/cri-client` `pkg/logs`).

use jiff::Timestamp;

/// Takes what is in front of lines away.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// The beginning of a line whose end has not been read.
    begun: Vec<u8>,
    /// Lines before that are left out.
    since: Option<Timestamp>,
    /// Lines keep their time.
    times: bool,
    /// The line before was not whole.
    inside: bool,
}

impl Lines {
    /// `since`: lines before that are left out; `times`: lines keep their time.
    pub(super) fn new(since: Option<Timestamp>, times: bool) -> Self {
        Self {
            since,
            times,
            ..Self::default()
        }
    }

    /// The text of lines that have been read to their end.
    pub(super) fn text(&mut self, read: &[u8]) -> Vec<u8> {
        self.begun.extend_from_slice(read);
        let Some(end) = self.begun.iter().rposition(|byte| *byte == b'\n') else {
            return Vec::new();
        };
        let rest = self.begun.split_off(end + 1);
        let whole = std::mem::replace(&mut self.begun, rest);
        let mut text = Vec::new();
        for line in whole.split_inclusive(|byte| *byte == b'\n') {
            self.line(line, &mut text);
        }
        text
    }

    fn line(&mut self, line: &[u8], text: &mut Vec<u8>) {
        let mut fields = line.splitn(4, |byte| *byte == b' ');
        let (Some(time), Some(_stream), Some(tag), Some(said)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            // Not as it should be: better shown than lost.
            text.extend_from_slice(line);
            return;
        };
        let at = std::str::from_utf8(time)
            .ok()
            .and_then(|time| time.parse::<Timestamp>().ok());
        if self.since.zip(at).is_some_and(|(since, at)| at < since) {
            return;
        }
        if self.times && !self.inside {
            text.extend_from_slice(time);
            text.push(b' ');
        }
        self.inside = tag.first() == Some(&b'P');
        text.extend_from_slice(if self.inside {
            said.strip_suffix(b"\n").unwrap_or(said)
        } else {
            said
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "2026-01-01T00:00:01.5Z stdout F one\n2026-01-01T00:00:02Z stderr P tw\n\
        2026-01-01T00:00:02Z stderr F o words\n2026-01-01T00:00:03Z stdout F \n";

    fn read(mut lines: Lines, step: usize) -> String {
        let text: Vec<u8> = LOG
            .as_bytes()
            .chunks(step)
            .flat_map(|part| lines.text(part))
            .collect();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn only_what_was_said_is_left() {
        for step in [1, 7, 1000] {
            assert_eq!(read(Lines::default(), step), "one\ntwo words\n\n", "{step}");
        }
        let lines = Lines::new(Some("2026-01-01T00:00:02Z".parse().unwrap()), true);
        assert_eq!(
            read(lines, 9),
            "2026-01-01T00:00:02Z two words\n2026-01-01T00:00:03Z \n"
        );
        assert_eq!(Lines::default().text(b"odd\n"), b"odd\n");
    }
}
