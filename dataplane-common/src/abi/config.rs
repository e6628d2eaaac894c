use core::mem::offset_of;

use super::{Addr, BePort};

/// Flags of the node's configuration.
pub mod config_flag {
    /// Traffic to a ClusterIP is masqueraded whoever sends it (`masqueradeAll`, spec kube-proxy 2.1).
    pub const MASQUERADE_ALL: u32 = 1 << 0;
    /// Host processes and pods reach node ports at 127.0.0.1 and ::1.
    pub const LOCALHOST_NODE_PORTS: u32 = 1 << 1;
    /// Connections are under way that someone else translates, as kube-proxy's rules did before a take-over: a packet
    /// from the middle of an unknown connection is left alone, not taken for one whose entry was lost.
    pub const FOREIGN_FLOWS: u32 = 1 << 3;
    /// Someone else serves what is new (hand-back to kube-proxy): packets of unknown flows are left alone.
    pub const NO_NEW_FLOWS: u32 = 1 << 4;
}

/// A range of addresses.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Range {
    /// The first address.
    pub addr: Addr,
    /// A one for each bit of the prefix; all zero means that the entry is unused.
    pub mask: Addr,
}

/// Number of ranges of service addresses that a node knows.
pub const SERVICE_RANGES: usize = 4;

/// Number of ranges of pod addresses that a node knows.
pub const POD_RANGES: usize = 4;

/// The one row of `CONFIG`: what holds for the whole node and may change while the programs run. Every field is a word
/// of its own for readers; user space changes it in place.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NodeConfig {
    /// Service addresses (ServiceCIDRs): those that no service has are dropped (spec kube-proxy 2.3).
    pub service_ranges: [Range; SERVICE_RANGES],
    /// Pod addresses of the cluster (detect-local ClusterCIDR or NodeCIDR, spec kube-proxy 2.1).
    pub pod_ranges: [Range; POD_RANGES],
    /// See [`config_flag`].
    pub flags: u32,
    /// Bit of the packet mark that asks the egress program to masquerade (`masqueradeBit`); the others are left alone.
    pub mark: u32,
    /// First port (host order) that translation gives out.
    pub nat_first: u16,
    /// Last port (host order) that translation gives out; the host's own sockets never use them.
    pub nat_last: u16,
    /// See [`super::algorithm`]: how flows from other hosts are spread.
    pub external_algorithm: u32,
}

const _: () = {
    assert!(size_of::<Range>() == 32 && align_of::<Range>() == 4);
    assert!(offset_of!(Range, addr) == 0 && offset_of!(Range, mask) == 16);
    assert!(size_of::<NodeConfig>() == 272 && align_of::<NodeConfig>() == 4);
    assert!(offset_of!(NodeConfig, service_ranges) == 0);
    assert!(offset_of!(NodeConfig, pod_ranges) == 128);
    assert!(offset_of!(NodeConfig, flags) == 256);
    assert!(offset_of!(NodeConfig, mark) == 260);
    assert!(offset_of!(NodeConfig, nat_first) == 264);
    assert!(offset_of!(NodeConfig, nat_last) == 266);
    assert!(offset_of!(NodeConfig, external_algorithm) == 268);
};

/// Flags of an address of the node, the value (`u32`) of `NODE_ADDRS` by [`Addr`].
pub mod node_addr_flag {
    /// Node ports are offered at the address (spec kube-proxy 2.5). Without it the address is merely the node's own.
    pub const NODE_PORTS: u32 = 1 << 0;
    /// A loopback address: only sockets of this node can mean it.
    pub const LOOPBACK: u32 = 1 << 1;
}

/// One entry of `DEVICES`, by interface index: the addresses that masqueraded packets leave with.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Device {
    /// IPv4 address; all zero if there is none.
    pub v4: Addr,
    /// IPv6 address; all zero if there is none.
    pub v6: Addr,
    /// See [`device_flag`].
    pub flags: u16,
    /// UDP port at which a tunnel of the node's own (VXLAN) takes what comes to the device's address; 0 if there is none.
    pub tunnel: BePort,
    /// Length of the link-layer header in bytes: 14, or 0 for devices without one.
    pub header: u32,
}

/// Flags of a device.
pub mod device_flag {
    /// The node's end of the device of a pod or another workload: it has the pod programs, and what comes in by it is from
    /// this node.
    pub const POD: u16 = 1 << 0;
    /// Of what comes in by a pod's device, only sources within `NodeConfig::pod_ranges` are pods; without it all are.
    pub const BY_SOURCE: u16 = 1 << 1;
}

/// Key of the trie `MASQUERADE`. In a trie the first word is the prefix length, of the (IPv4-mapped) address behind it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct MasqueradeKey {
    /// Length of the prefix in bits, 96 more for IPv4.
    pub prefix_len: u32,
    /// The network's first address.
    pub addr: Addr,
}

const _: () = {
    assert!(size_of::<MasqueradeKey>() == 20 && align_of::<MasqueradeKey>() == 4);
    assert!(offset_of!(MasqueradeKey, prefix_len) == 0 && offset_of!(MasqueradeKey, addr) == 4);
};

/// Flags of a network in `MASQUERADE`. What is in none is the world.
pub mod masquerade {
    /// Pods of this node: what they begin with the world gets the node's address.
    pub const SOURCE: u32 = 1 << 0;
    /// Not the world: pods' packets go there with their own address.
    pub const EXEMPT: u32 = 1 << 1;
    /// Pods of other nodes. Without [`SOURCE`] it is also what the network of all pods has.
    pub const REMOTE_PODS: u32 = 1 << 2;
}

const _: () = {
    assert!(size_of::<Device>() == 40 && align_of::<Device>() == 4);
    assert!(offset_of!(Device, v4) == 0 && offset_of!(Device, v6) == 16);
    assert!(offset_of!(Device, flags) == 32 && offset_of!(Device, tunnel) == 34);
    assert!(offset_of!(Device, header) == 36);
};
