use core::mem::offset_of;

use super::{Addr, BePort};

/// IANA protocol numbers that a frontend can have.
pub mod protocol {
    /// Transmission Control Protocol.
    pub const TCP: u8 = 6;
    /// User Datagram Protocol.
    pub const UDP: u8 = 17;
    /// Stream Control Transmission Protocol.
    pub const SCTP: u8 = 132;
}

/// How a frontend is keyed.
pub mod frontend_class {
    /// By its own address.
    pub const ADDRESS: u8 = 0;
    /// A node port or host port on all addresses of the node: keyed once per family, with the unspecified address `::`
    /// (IPv6) or `::ffff:0.0.0.0` (IPv4); `NODE_ADDRS` says which addresses are the node's.
    pub const NODE_PORT: u8 = 1;
    /// A service address as such, with port 0 and protocol 0: what is no frontend there is rejected (spec kube-proxy 2.3).
    pub const ACTIVE_ADDRESS: u8 = 2;
}

/// What a frontend is.
pub mod frontend_kind {
    /// `spec.clusterIPs`.
    pub const CLUSTER_IP: u8 = 1;
    /// `spec.ports[].nodePort`.
    pub const NODE_PORT: u8 = 2;
    /// `spec.externalIPs`.
    pub const EXTERNAL_IP: u8 = 3;
    /// `status.loadBalancer.ingress[].ip`.
    pub const LOAD_BALANCER: u8 = 4;
    /// A container's `hostPort`.
    pub const HOST_PORT: u8 = 5;
    /// A service address as such ([`super::frontend_class::ACTIVE_ADDRESS`]); leads to no service.
    pub const ACTIVE_ADDRESS: u8 = 6;
}

/// Flags of a frontend.
pub mod frontend_flag {
    /// Only clients of the service's source ranges may enter (spec kube-proxy 2.4).
    pub const SOURCE_RANGES: u8 = 1 << 0;
}

/// Key of `FRONTENDS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct FrontendKey {
    /// The address where the service is offered.
    pub addr: Addr,
    /// The port where the service is offered.
    pub port: BePort,
    /// See [`protocol`].
    pub protocol: u8,
    /// See [`frontend_class`].
    pub class: u8,
}

const _: () = {
    assert!(size_of::<FrontendKey>() == 20 && align_of::<FrontendKey>() == 4);
    assert!(offset_of!(FrontendKey, addr) == 0);
    assert!(offset_of!(FrontendKey, port) == 16);
    assert!(offset_of!(FrontendKey, protocol) == 18);
    assert!(offset_of!(FrontendKey, class) == 19);
};

/// Value of `FRONTENDS`: one aligned 8-byte word, because the kernel recycles hash values at once after a delete and a
/// reader must never see half of another frontend's.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FrontendValue {
    /// Row in `SERVICES`; 0 for an address as such.
    pub service: u32,
    /// See [`frontend_kind`].
    pub kind: u8,
    /// See [`frontend_flag`].
    pub flags: u8,
    /// Always 0.
    pub pad: u16,
}

const _: () = {
    assert!(size_of::<FrontendValue>() == 8 && align_of::<FrontendValue>() == 8);
    assert!(offset_of!(FrontendValue, service) == 0);
    assert!(offset_of!(FrontendValue, kind) == 4);
    assert!(offset_of!(FrontendValue, flags) == 5);
    assert!(offset_of!(FrontendValue, pad) == 6);
};
