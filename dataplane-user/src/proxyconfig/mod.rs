//! kube-proxy's configuration (spec kube-proxy 5): `KubeProxyConfiguration` of `kubeproxy.config.k8s.io/v1alpha1`, its
//! defaults, its flags, its validation.

mod defaults;
mod duration;
mod flags;
mod load;
mod types;
mod unsupported;
mod validate;
mod watch;

pub use duration::GoDuration;
pub use flags::ProxyFlags;
pub use load::{LoadError, Loaded, load, parse};
pub use types::{
    ClientConnection, Conntrack, DetectLocal, Iptables, Ipvs, KubeProxyConfiguration, Logging, Nftables,
    Winkernel,
};
pub use unsupported::unsupported;
pub use validate::validate;
pub use watch::changed;

/// `apiVersion` of the configuration.
pub const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
/// `kind` of the configuration.
pub const KIND: &str = "KubeProxyConfiguration";
