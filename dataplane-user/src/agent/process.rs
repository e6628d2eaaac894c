//! What the process uses, under the names that every Prometheus client library gives it.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::unistd::{SysconfVar, sysconf};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;

/// The `process_*` metrics.
#[derive(Clone, Debug, Default)]
pub(super) struct Process {
    /// Bytes.
    pub(super) resident: Gauge,
    /// Bytes.
    pub(super) virt: Gauge,
    /// Seconds.
    pub(super) cpu: Counter<f64, AtomicU64>,
    pub(super) open_fds: Gauge,
    pub(super) max_fds: Gauge,
    /// Unix seconds.
    pub(super) start_time: Gauge<f64, AtomicU64>,
}

impl Process {
    /// Reads everything again. What cannot be read keeps its value.
    pub(super) fn read(&self) {
        let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
        let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten();
        if let (Some(page), Some(ticks), Ok(stat)) = (page, ticks, fs::read_to_string("/proc/self/stat"))
            && let Some(stat) = Stat::parse(&stat)
        {
            self.resident.set(stat.resident_pages.saturating_mul(page));
            self.virt.set(stat.virtual_bytes);
            let per_second = f64::from(i32::try_from(ticks).unwrap_or(100));
            self.cpu
                .inner()
                .store((stat.cpu_ticks / per_second).to_bits(), Ordering::Relaxed);
            if let Some(boot) = boot_time() {
                self.start_time.set(boot + stat.start_ticks / per_second);
            }
        }
        if let Ok(fds) = fs::read_dir("/proc/self/fd") {
            // one of them is the directory itself
            let count = fds.count().saturating_sub(1);
            self.open_fds.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        if let Ok((soft, _)) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE) {
            self.max_fds.set(i64::try_from(soft).unwrap_or(i64::MAX));
        }
    }
}

/// Fields of `/proc/PID/stat`, proc_pid_stat(5).
#[derive(PartialEq, Debug)]
struct Stat {
    cpu_ticks: f64,
    start_ticks: f64,
    virtual_bytes: i64,
    resident_pages: i64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // the name in parentheses may hold anything
        let (_, rest) = text.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // numbered from 1 in the manual; the first of these is 3
        let field = |number: usize| fields.get(number - 3);
        let float = |number| field(number)?.parse::<f64>().ok();
        Some(Self {
            cpu_ticks: float(14)? + float(15)?,
            start_ticks: float(22)?,
            virtual_bytes: field(23)?.parse().ok()?,
            resident_pages: field(24)?.parse().ok()?,
        })
    }
}

/// When the machine started, in Unix seconds.
fn boot_time() -> Option<f64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("btime ")?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let text = "7 (a) b 1) S 1 7 7 0 -1 4194560 100 0 0 0 150 50 0 0 20 0 1 0 12345 1048576 256 18446744073709551615";
        assert_eq!(
            Stat::parse(text),
            Some(Stat {
                cpu_ticks: 200.0,
                start_ticks: 12345.0,
                virtual_bytes: 1_048_576,
                resident_pages: 256,
            })
        );
        assert_eq!(Stat::parse("7 (a"), None);
    }
}
