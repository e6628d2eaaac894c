//! End-to-end tests in network namespaces. One program, so that it is linked once; need root.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod addresses;
mod affinity;
mod api;
mod bad_objects;
mod capacity;
mod chained;
mod cleanup;
mod config;
mod containerd;
mod cri;
mod demo;
mod etcd;
mod failure;
mod flannel;
mod harness;
mod health_check;
mod hooks;
mod init;
mod isolation;
mod kube_proxy;
mod manifests;
mod migration;
mod node;
mod node_cri;
mod node_pods;
mod node_port;
mod overlay_path;
mod pair;
mod pod_network;
mod policies;
mod ports;
mod restart;
mod scene;
mod sctp;
mod services;
mod short_way;
mod stacked;
mod stale;
mod takeover;
mod traffic;
mod unseen;
mod upgrade;
mod walkthrough;
