//! This node's addresses: which families it has, which addresses are its own, which of them serve NodePorts.

use std::fs;
use std::path::Path;

use dataplane_model::Family;

/// The address families that this host can serve (spec kube-proxy 6): IPv6 unless the kernel lacks it or it is switched
/// off for all devices.
#[must_use]
pub fn usable_families() -> Vec<Family> {
    families(Path::new("/proc"))
}

fn families(proc: &Path) -> Vec<Family> {
    let disabled = fs::read_to_string(proc.join("sys/net/ipv6/conf/all/disable_ipv6"));
    let v6 = proc.join("net/if_inet6").exists() && disabled.is_ok_and(|text| text.trim() != "1");
    let mut families = vec![Family::V4];
    families.extend(v6.then_some(Family::V6));
    families
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_ipv6_has_one_family() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(families(dir.path()), [Family::V4]);
        let conf = dir.path().join("sys/net/ipv6/conf/all");
        fs::create_dir_all(&conf).unwrap();
        fs::create_dir_all(dir.path().join("net")).unwrap();
        fs::write(dir.path().join("net/if_inet6"), "").unwrap();
        for (value, expected) in [("1\n", 1), ("0\n", 2)] {
            fs::write(conf.join("disable_ipv6"), value).unwrap();
            assert_eq!(families(dir.path()).len(), expected, "disable_ipv6 {value}");
        }
    }
}
