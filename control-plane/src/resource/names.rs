//! Syntax of names, label keys and values, ports and addresses. Each check returns what is wrong, in the API's words,
//! or nothing (apimachinery `util/validation`).

use std::net::IpAddr;

const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must \
     start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
     '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL_1123: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and \
     end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
     '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const LABEL_1035: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic \
     character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is \
     '[a-z]([-a-z0-9]*[a-z0-9])?')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must \
     start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for \
     validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
const QUALIFIED: &str = "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric \
     character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
     '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";

fn max_length(limit: usize) -> String {
    format!("must be no more than {limit} bytes")
}

fn lower_alnum(c: u8) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit()
}

/// `[a-z0-9]([-a-z0-9]*[a-z0-9])?`
fn is_label_shape(s: &str) -> bool {
    let b = s.as_bytes();
    match (b.first(), b.last()) {
        (Some(first), Some(last)) => {
            lower_alnum(*first) && lower_alnum(*last) && b.iter().all(|c| lower_alnum(*c) || *c == b'-')
        }
        _ => false,
    }
}

/// `([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]`
fn is_name_shape(s: &str) -> bool {
    let b = s.as_bytes();
    match (b.first(), b.last()) {
        (Some(first), Some(last)) => {
            first.is_ascii_alphanumeric()
                && last.is_ascii_alphanumeric()
                && b.iter()
                    .all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.'))
        }
        _ => false,
    }
}

/// RFC 1123 subdomain, at most 253 bytes.
pub(super) fn dns1123_subdomain(s: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if s.len() > 253 {
        errors.push(max_length(253));
    }
    if !s.split('.').all(is_label_shape) {
        errors.push(SUBDOMAIN.to_owned());
    }
    errors
}

/// RFC 1123 label, at most 63 bytes.
pub(super) fn dns1123_label(s: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if s.len() > 63 {
        errors.push(max_length(63));
    }
    if !is_label_shape(s) {
        errors.push(if dns1123_subdomain(s).is_empty() {
            // The usual mistake: a name that is fine elsewhere.
            "must not contain dots".to_owned()
        } else {
            LABEL_1123.to_owned()
        });
    }
    errors
}

/// RFC 1035 label, at most 63 bytes: a name of a Service.
pub(super) fn dns1035_label(s: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if s.len() > 63 {
        errors.push(max_length(63));
    }
    if !is_label_shape(s) || !s.starts_with(|c: char| c.is_ascii_lowercase()) {
        errors.push(LABEL_1035.to_owned());
    }
    errors
}

/// Key of a label or annotation: a name with an optional subdomain and slash before it.
pub(super) fn qualified_name(s: &str) -> Vec<String> {
    let mut errors = Vec::new();
    let mut parts = s.splitn(3, '/');
    let (first, second, third) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
    if third.is_some() {
        return vec![format!(
            "a qualified name {QUALIFIED} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
        )];
    }
    let name = match second {
        None => first,
        Some(name) => {
            if first.is_empty() {
                errors.push("prefix part must be non-empty".to_owned());
            } else {
                errors.extend(
                    dns1123_subdomain(first)
                        .into_iter()
                        .map(|e| format!("prefix part {e}")),
                );
            }
            name
        }
    };
    if name.is_empty() {
        errors.push("name part must be non-empty".to_owned());
    } else if name.len() > 63 {
        errors.push(format!("name part {}", max_length(63)));
    }
    if !is_name_shape(name) {
        errors.push(format!("name part {QUALIFIED}"));
    }
    errors
}

/// Value of a label.
pub(super) fn label_value(s: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if s.len() > 63 {
        errors.push(max_length(63));
    }
    if !s.is_empty() && !is_name_shape(s) {
        errors.push(LABEL_VALUE.to_owned());
    }
    errors
}

/// Port number.
pub(super) fn port_number(port: i64) -> Vec<String> {
    if (1..=65535).contains(&port) {
        Vec::new()
    } else {
        vec!["must be between 1 and 65535, inclusive".to_owned()]
    }
}

/// Name of a port (IANA service name, RFC 6335).
pub(super) fn port_name(s: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if s.len() > 15 {
        errors.push(max_length(15));
    }
    if s.is_empty() || !s.bytes().all(|c| lower_alnum(c) || c == b'-') {
        errors.push("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".to_owned());
    }
    if !s.bytes().any(|c| c.is_ascii_lowercase()) {
        errors.push("must contain at least one letter (a-z)".to_owned());
    }
    if s.contains("--") {
        errors.push("must not contain consecutive hyphens".to_owned());
    }
    if s.starts_with('-') || s.ends_with('-') {
        errors.push("must not begin or end with a hyphen".to_owned());
    }
    errors
}

/// An address as people write it: IPv4 with leading zeros in a part is accepted, as kube-apiserver does for stored
/// Services (`ParseIPSloppy`).
pub(super) fn parse_ip(s: &str) -> Option<IpAddr> {
    if let Ok(ip) = s.parse() {
        return Some(ip);
    }
    let mut octets = [0_u8; 4];
    let mut parts = s.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.is_empty() || !part.bytes().all(|c| c.is_ascii_digit()) {
            return None;
        }
        let digits = part.trim_start_matches('0');
        *octet = if digits.is_empty() {
            0
        } else {
            digits.parse().ok()?
        };
    }
    parts.next().is_none().then(|| IpAddr::from(octets))
}

/// Why an address cannot be one of another machine, if it cannot.
pub(super) fn special_ip(address: IpAddr) -> Option<&'static str> {
    let link_local = "may not be in the link-local range (169.254.0.0/16, fe80::/10)";
    let link_local_multicast = "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)";
    match address {
        a if a.is_unspecified() => Some("may not be unspecified"),
        a if a.is_loopback() => Some("may not be in the loopback range (127.0.0.0/8, ::1/128)"),
        IpAddr::V4(a) if a.is_link_local() => Some(link_local),
        IpAddr::V6(a) if a.is_unicast_link_local() => Some(link_local),
        IpAddr::V4(a) if a.octets().starts_with(&[224, 0, 0]) => Some(link_local_multicast),
        IpAddr::V6(a) if a.segments().first() == Some(&0xff02) => Some(link_local_multicast),
        _ => None,
    }
}

/// What is wrong with an address that [`parse_ip`] refuses.
pub(super) const BAD_IP: &str = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";

/// What is wrong with a range that does not parse.
pub(super) const BAD_CIDR: &str = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert!(dns1123_subdomain("a.b-c.9").is_empty());
        for bad in ["", "A", "a..b", "-a", "a-", "ä", ".", "a_b"] {
            assert_eq!(dns1123_subdomain(bad), vec![SUBDOMAIN.to_owned()], "{bad}");
        }
        assert_eq!(
            dns1123_subdomain(&"a".repeat(254)),
            vec!["must be no more than 253 bytes"]
        );
        assert_eq!(dns1123_label("a.b"), vec!["must not contain dots"]);
        assert_eq!(dns1035_label("9a").len(), 1);
        assert!(dns1035_label("a9").is_empty());
        assert!(qualified_name("example.com/My_Name.1").is_empty());
        assert_eq!(qualified_name("a/b/c").len(), 1);
        assert_eq!(qualified_name("/b"), vec!["prefix part must be non-empty"]);
        assert_eq!(qualified_name("a/").len(), 2);
        assert!(label_value("").is_empty());
        assert_eq!(label_value("a b").len(), 1);
        assert_eq!(label_value("日本").len(), 1);
    }

    #[test]
    fn ports_and_addresses() {
        assert!(port_number(65535).is_empty());
        assert!(!port_number(0).is_empty() && !port_number(65536).is_empty() && !port_number(-1).is_empty());
        assert!(port_name("http-2").is_empty());
        assert!(
            !port_name("HTTP").is_empty() && !port_name("1234").is_empty() && !port_name("a--b").is_empty()
        );
        assert_eq!(parse_ip("010.0.0.1"), "10.0.0.1".parse().ok());
        assert_eq!(parse_ip("fd00::1"), "fd00::1".parse().ok());
        for bad in ["", "1.2.3", "1.2.3.4.5", "1.2.3.256", "1..2.3", "a", "1.2.3.4 "] {
            assert_eq!(parse_ip(bad), None, "{bad}");
        }
    }
}
