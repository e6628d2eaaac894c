//! `beeline ipam list`.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use beeline_cni::client::{Agent as _, Socket};
use beeline_cni::protocol::{Address, List, Request, Response};

/// Asks the agent for all addresses.
///
/// # Errors
///
/// When there is no answer.
pub fn ask(socket: &Path) -> anyhow::Result<List> {
    match Socket.ask(socket, &Request::List, None)? {
        Response::List(list) => Ok(list),
        Response::Failed(failure) => Err(failure).context("the agent cannot list the addresses"),
        other => anyhow::bail!("unexpected answer {other:?}: agent of another version?"),
    }
}

/// As text, one line each.
#[must_use]
pub fn table(list: &List) -> String {
    let mut lines = vec![["ADDRESS", "STATE", "POD", "DEVICE", "CONTAINER"].map(String::from)];
    lines.extend(list.addresses.iter().map(line));
    let mut widths = [0; 5];
    for line in &lines {
        for (width, field) in widths.iter_mut().zip(line) {
            *width = field.len().max(*width);
        }
    }
    let mut text = format!("ranges: {}\n", list.ranges.join(", "));
    for line in &lines {
        let mut row = String::new();
        for (field, width) in line.iter().zip(widths) {
            let _ = write!(row, "{field:width$}  ");
        }
        let _ = writeln!(text, "{}", row.trim_end());
    }
    text
}

fn line(address: &Address) -> [String; 5] {
    let pod = address
        .pod
        .as_ref()
        .map(|pod| format!("{}/{}", pod.namespace, pod.name));
    [
        address.address.to_string(),
        address.state.clone(),
        pod.unwrap_or_else(|| "-".into()),
        address.device.clone().unwrap_or_else(|| "-".into()),
        address
            .key
            .as_ref()
            .map_or_else(|| "-".into(), |key| key.container_id.clone()),
    ]
}

#[cfg(test)]
mod tests {
    use beeline_cni::protocol::{Key, Pod};

    use super::*;

    #[test]
    fn columns_are_aligned_and_what_is_unknown_is_a_dash() {
        let key = Key {
            network: "net".into(),
            container_id: "abc".into(),
            ifname: "eth0".into(),
        };
        let pod = Pod {
            namespace: "default".into(),
            name: "web".into(),
            uid: String::new(),
        };
        let used = Address {
            address: "10.244.1.2".parse().unwrap(),
            state: "used".into(),
            key: Some(key),
            pod: Some(pod),
            device: Some("bee0".into()),
        };
        let waits = Address {
            address: "10.244.1.33".parse().unwrap(),
            state: "quarantine".into(),
            key: None,
            pod: None,
            device: None,
        };
        let list = List {
            ranges: vec!["10.244.1.0/24".into()],
            addresses: vec![used, waits],
        };
        assert_eq!(
            table(&list),
            "ranges: 10.244.1.0/24\n\
             ADDRESS      STATE       POD          DEVICE  CONTAINER\n\
             10.244.1.2   used        default/web  bee0    abc\n\
             10.244.1.33  quarantine  -            -       -\n"
        );
    }
}
