//! iptables with its old way into the kernel, which only its own programs know: `iptables-legacy-save` and
//! `iptables-legacy-restore`. Asked only where the kernel says that it is in use.

use std::fs;
use std::io::{self, Write as _};
use std::process::{Command, Output, Stdio};

use super::names;
use super::plan::{Found, Jump, Removal, Stage, removal};
use super::{Counts, Family, Survey};

/// A rule as `iptables-save` writes it, behind `-A CHAIN `.
type Text = String;

/// What `iptables-save` printed.
#[derive(Debug, Default)]
struct Saved {
    tables: Vec<Found<Text>>,
    /// Rules are in the chain of all Services, and there is a way to it.
    complete: bool,
}

/// The programs for one family.
#[derive(Debug)]
struct Programs {
    save: String,
    restore: String,
}

/// True if a table that kube-proxy writes to is in use with the old way.
fn in_use(family: Family) -> bool {
    // it is there only while the module is loaded
    let file = match family {
        Family::V4 => "ip_tables_names",
        Family::V6 => "ip6_tables_names",
    };
    let names = fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
    names.lines().any(|name| names::TABLES.contains(&name))
}

/// Looks the programs up; a plain `iptables` may be of either way, and says so.
fn programs(family: Family) -> io::Result<Programs> {
    let base = match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    };
    for variant in ["-legacy", ""] {
        let save = format!("{base}{variant}-save");
        let Ok(output) = Command::new(&save).arg("--version").output() else {
            continue;
        };
        let version = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() && !version.contains("nf_tables") {
            return Ok(Programs {
                save,
                restore: format!("{base}{variant}-restore"),
            });
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        format!(
            "the kernel has tables of iptables-legacy, and there is no {base}-legacy-save to look into them: \
             install iptables, or remove kube-proxy's rules with `kube-proxy --cleanup`"
        ),
    ))
}

fn checked(program: &str, output: &Output) -> io::Result<String> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!(
        "{program}: {}: {}",
        output.status,
        said.trim()
    )))
}

fn save(programs: &Programs) -> io::Result<Saved> {
    let output = Command::new(&programs.save)
        .output()
        .map_err(|error| io::Error::other(format!("start {}: {error}", programs.save)))?;
    Ok(parse(&checked(&programs.save, &output)?))
}

/// The words of a line: quotes hold one together, a backslash the next character.
fn words(line: &str) -> Vec<String> {
    let mut out = Vec::new();
    let (mut word, mut quoted, mut begun) = (String::new(), false, false);
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => (quoted, begun) = (!quoted, true),
            '\\' => word.extend(chars.next()),
            c if c.is_whitespace() && !quoted => {
                if begun || !word.is_empty() {
                    out.push(std::mem::take(&mut word));
                }
                begun = false;
            }
            c => word.push(c),
        }
    }
    if begun || !word.is_empty() {
        out.push(word);
    }
    out
}

fn parse(text: &str) -> Saved {
    let mut saved = Saved::default();
    let mut table: Option<Found<Text>> = None;
    let mut base: Vec<&str> = Vec::new();
    let mut has_services = false;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = names::TABLES.contains(&name).then(|| Found::new(name));
            base.clear();
            has_services = false;
            continue;
        }
        let Some(found) = &mut table else { continue };
        if line == "COMMIT" {
            let entered = found.jumps.iter().any(|jump| jump.to == names::SERVICES);
            saved.complete |= found.table == "nat" && has_services && entered;
            saved.tables.extend(table.take());
        } else if let Some(chain) = line.strip_prefix(':') {
            let (name, policy) = chain.split_once(' ').unwrap_or((chain, "-"));
            if names::is_chain(name) {
                found.chains.insert(name.into());
            } else if !policy.starts_with('-') {
                base.push(name);
            }
        } else if let Some((from, rule)) = line.strip_prefix("-A ").and_then(|rule| rule.split_once(' ')) {
            if names::is_chain(from) {
                has_services |= from == names::SERVICES;
                continue;
            }
            let words = words(rule);
            let target = words.iter().position(|word| word == "-j" || word == "-g");
            let Some(to) = target
                .and_then(|at| words.get(at + 1))
                .filter(|to| names::is_chain(to))
            else {
                continue;
            };
            found.jumps.push(Jump {
                from: from.into(),
                from_base: base.contains(&from),
                to: to.clone(),
                rule: rule.into(),
            });
        }
    }
    saved.tables.retain(|found| !found.is_empty());
    saved
}

/// What `iptables-restore --noflush` is given: each table at once.
fn script(removals: &[Removal<Text>]) -> String {
    let mut text = String::new();
    for removal in removals.iter().filter(|removal| !removal.is_empty()) {
        text.push_str(&format!("*{}\n", removal.table));
        for chain in &removal.chains {
            // empties it
            text.push_str(&format!(":{chain} - [0:0]\n"));
        }
        for (chain, rule) in &removal.rules {
            text.push_str(&format!("-D {chain} {rule}\n"));
        }
        for chain in &removal.chains {
            text.push_str(&format!("-X {chain}\n"));
        }
        text.push_str("COMMIT\n");
    }
    text
}

/// Says what of kube-proxy is in the tables of iptables-legacy.
pub(super) fn survey(survey: &mut Survey) -> io::Result<()> {
    for family in [Family::V4, Family::V6] {
        if !in_use(family) {
            continue;
        }
        let saved = save(&programs(family)?)?;
        for found in &saved.tables {
            survey.look_at("iptables-legacy", family, found);
        }
        if saved.complete {
            survey.complete.insert(family);
        }
    }
    Ok(())
}

/// Removes kube-proxy's rules, table by table.
pub(super) fn remove(stage: Stage, counts: &mut Counts) -> io::Result<()> {
    for family in [Family::V4, Family::V6] {
        if !in_use(family) {
            continue;
        }
        let programs = programs(family)?;
        let removals: Vec<Removal<Text>> = save(&programs)?
            .tables
            .iter()
            .map(|found| removal(found, stage))
            .collect();
        let script = script(&removals);
        if script.is_empty() {
            continue;
        }
        let start = |error| io::Error::other(format!("start {}: {error}", programs.restore));
        // waits for its lock as kube-proxy does
        let mut child = Command::new(&programs.restore)
            .args(["--noflush", "--wait", "5"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(start)?;
        if let Some(mut input) = child.stdin.take() {
            // what it says about a script that it did not read to the end is of more use than that
            let _broken_pipe = input.write_all(script.as_bytes());
        }
        checked(&programs.restore, &child.wait_with_output()?)?;
        removals.iter().for_each(|removal| counts.add(removal));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"# Generated
*mangle
:PREROUTING ACCEPT [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
*nat
:PREROUTING ACCEPT [5:300]
:OUTPUT ACCEPT [0:0]
:CNI-HN - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-ABC - [0:0]
-A PREROUTING -m comment --comment "says \"-j KUBE-POSTROUTING\" twice" -j KUBE-SERVICES
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HN
-A OUTPUT -g KUBE-SERVICES
-A CNI-HN -p tcp -j DNAT --to-destination 10.0.0.1:80
-A KUBE-SERVICES -d 10.96.0.1/32 -j KUBE-SVC-ABC
COMMIT
*raw
:PREROUTING ACCEPT [0:0]
-A PREROUTING -j KUBE-SERVICES
COMMIT
"#;

    #[test]
    fn what_iptables_save_prints_becomes_what_restore_takes() {
        let saved = parse(TEXT);
        assert!(saved.complete);
        let tables: Vec<&str> = saved.tables.iter().map(|found| found.table.as_str()).collect();
        assert_eq!(tables, ["mangle", "nat"]);
        let removals: Vec<_> = saved
            .tables
            .iter()
            .map(|found| removal(found, Stage::Rules))
            .collect();
        let expected = r#"*mangle
:KUBE-PROXY-CANARY - [0:0]
-X KUBE-PROXY-CANARY
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-ABC - [0:0]
-D PREROUTING -m comment --comment "says \"-j KUBE-POSTROUTING\" twice" -j KUBE-SERVICES
-D OUTPUT -g KUBE-SERVICES
-X KUBE-SERVICES
-X KUBE-SVC-ABC
COMMIT
"#;
        assert_eq!(script(&removals), expected);
    }

    #[test]
    fn chains_without_rules_are_not_complete() {
        let text = TEXT.replace("-A KUBE-SERVICES", "-A CNI-HN");
        assert!(!parse(&text).complete);
    }

    #[test]
    fn words_are_split_as_a_shell_does() {
        assert_eq!(words(r#"-m "a b" "" c\ d"#), ["-m", "a b", "", "c d"]);
    }
}
