use core::mem::offset_of;

use super::Addr;

/// Value of `PODS`, by each address of a pod of this node whose device is ours.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pod {
    /// Index of the device in the node.
    pub ifindex: u32,
    /// See [`pod_flag`].
    pub flags: u32,
    /// Largest packet that the device takes, in bytes from the network header on.
    pub mtu: u32,
    /// Link-layer address in the pod. With the next field it is the head of a frame that the pod gets.
    pub mac: [u8; 6],
    /// Link-layer address in the node.
    pub host_mac: [u8; 6],
}

const _: () = {
    assert!(size_of::<Pod>() == 24 && align_of::<Pod>() == 4);
    assert!(offset_of!(Pod, ifindex) == 0 && offset_of!(Pod, flags) == 4);
    assert!(offset_of!(Pod, mtu) == 8 && offset_of!(Pod, mac) == 12);
    assert!(offset_of!(Pod, host_mac) == 18);
};

/// Flags of a pod, in [`Pod`] and [`PodDevice`].
pub mod pod_flag {
    /// Packets between this pod and others take the short way: past the node's routing and netfilter.
    pub const SHORT: u32 = 1 << 0;
    /// The packet programs have translated flows that the pod began: what it gets may be an answer that has to be
    /// translated back. Set by the programs.
    pub const TRANSLATED: u32 = 1 << 1;
}

/// Value of `POD_DEVICES`, by interface index: what may come in by a pod's device, and how much.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PodDevice {
    /// IPv4 address of the pod; all zero if it has none.
    pub v4: Addr,
    /// IPv6 address of the pod; all zero if it has none.
    pub v6: Addr,
    /// See [`pod_flag`].
    pub flags: u32,
    /// Always 0.
    pub pad: u32,
    /// What the pod may send.
    pub out: Limit,
    /// What the pod may get.
    pub into: Limit,
}

/// A rate: a bucket that holds `burst` and fills up again at `rate`, kept as the moment at which it will be full.
///
/// A packet takes its length from the bucket; one that comes when more than the whole bucket has been taken is dropped.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Limit {
    /// Bytes per second; 0 is no limit.
    pub rate: u64,
    /// How long the empty bucket takes to fill up, in nanoseconds.
    pub burst: u64,
    /// When it is full again, nanoseconds since boot (`CLOCK_MONOTONIC`). Written by the programs.
    pub full_at: u64,
}

impl Limit {
    /// Of a rate and a burst in bits per second and bits, as in the plugins' `bandwidth` capability. A rate of 0 is no
    /// limit. A burst that says nothing gets a tenth of a second: 0, or 2^31 - 1 and more, which the kubelet's runtimes give
    /// where a pod asks only for a rate. It is never less than the 64 KiB of one large packet.
    #[must_use]
    pub fn from_bits(rate: u64, burst: u64) -> Self {
        const SECOND: u128 = 1_000_000_000;
        const SMALLEST: u64 = 64 << 10;
        let bytes = rate / 8;
        if bytes == 0 && rate == 0 {
            return Self::default();
        }
        let rate = bytes.max(1);
        let unsaid = burst == 0 || burst >= (1 << 31) - 1;
        let burst = if unsaid { rate / 10 } else { burst / 8 }.max(SMALLEST);
        let time = u128::from(burst) * SECOND / u128::from(rate);
        Self {
            rate,
            burst: u64::try_from(time).unwrap_or(u64::MAX >> 1).min(u64::MAX >> 1),
            full_at: 0,
        }
    }
}

const _: () = {
    assert!(size_of::<Limit>() == 24 && align_of::<Limit>() == 8);
    assert!(offset_of!(Limit, rate) == 0 && offset_of!(Limit, burst) == 8);
    assert!(offset_of!(Limit, full_at) == 16);
    assert!(size_of::<PodDevice>() == 88 && align_of::<PodDevice>() == 8);
    assert!(offset_of!(PodDevice, v4) == 0 && offset_of!(PodDevice, v6) == 16);
    assert!(offset_of!(PodDevice, flags) == 32 && offset_of!(PodDevice, pad) == 36);
    assert!(offset_of!(PodDevice, out) == 40 && offset_of!(PodDevice, into) == 64);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_its_rate_and_the_time_of_its_burst() {
        let limit = Limit::from_bits(8_000_000, 8_000_000);
        assert_eq!((limit.rate, limit.burst), (1_000_000, 1_000_000_000));
        // what a kubelet's runtime gives for a rate alone
        let limit = Limit::from_bits(80_000_000, i32::MAX as u64);
        assert_eq!((limit.rate, limit.burst), (10_000_000, 100_000_000));
        assert_eq!(Limit::from_bits(0, 5), Limit::default());
        // a large packet fits always
        let limit = Limit::from_bits(8, 8);
        assert_eq!((limit.rate, limit.burst), (1, 65_536 * 1_000_000_000));
        assert!(Limit::from_bits(1, u64::MAX).burst > 0);
    }
}
