//! Objects in numbers, in the shape that a kube-apiserver hands out: with uid, owner, managed fields and all.

use std::net::IpAddr;

use anyhow::{Context, Result};
use beeline_tests::AgentOptions;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};

/// The port of every service and backend.
pub(crate) const PORT: u16 = 8080;
const CREATED: &str = "2026-11-21T01:25:30Z";

/// So many services with so many endpoints each, one port and one IPv4 slice per service.
#[derive(Clone, Copy)]
pub(crate) struct Population {
    pub(crate) services: u32,
    pub(crate) endpoints: u32,
}

impl Population {
    /// All services.
    pub(crate) fn services(self) -> Result<Vec<Service>> {
        (0..self.services).map(|number| typed(service(number))).collect()
    }

    /// All slices.
    pub(crate) fn slices(self) -> Result<Vec<EndpointSlice>> {
        (0..self.services).map(|number| self.slice(number, 0)).collect()
    }

    /// The slice of a service after so many changes: each change replaces the first endpoint.
    pub(crate) fn slice(self, number: u32, changes: u32) -> Result<EndpointSlice> {
        Self::slice_with(number, &self.addresses(number, changes))
    }

    /// The slice of a service with these endpoints.
    pub(crate) fn slice_with(number: u32, addresses: &[IpAddr]) -> Result<EndpointSlice> {
        typed(slice(number, addresses))
    }

    /// All Services with their slices, as an API would send them.
    pub(crate) fn objects(self) -> impl Iterator<Item = (Value, Value)> {
        (0..self.services).map(move |number| (service(number), slice(number, &self.addresses(number, 0))))
    }

    /// An agent's flags that make enough room, with the rest that updates need.
    pub(crate) fn room(self, options: AgentOptions) -> AgentOptions {
        let (services, endpoints) = self.capacity();
        options
            .flag("--max-services", services)
            .flag("--max-frontends", 2 * services)
            .flag("--max-backends", endpoints)
            .flag("--max-slots", endpoints)
    }

    /// Entries for services, and for backends and slots. Frontends take twice as many as services: each ClusterIP has one
    /// as such, too.
    pub(crate) fn capacity(self) -> (u32, u32) {
        let room = |count: u32| (count + count / 4).max(4096).next_power_of_two();
        (room(self.services), room(self.services * self.endpoints))
    }

    fn addresses(self, number: u32, changes: u32) -> Vec<IpAddr> {
        (0..self.endpoints)
            .map(|index| {
                // Replaced endpoints come from a range of their own.
                let base = if index == 0 && changes > 0 {
                    (1 + changes % 64) * 0x0002_0000
                } else {
                    0
                };
                endpoint_ip(base + number * self.endpoints + index)
            })
            .collect()
    }
}

fn typed<T: serde::de::DeserializeOwned>(object: Value) -> Result<T> {
    serde_json::from_value(object).context("an object of the bench is not what the API has")
}

/// The ClusterIP of a service by number, from 10.96.0.0/12.
pub(crate) fn cluster_ip(number: u32) -> IpAddr {
    IpAddr::from((0x0a60_0100 + number).to_be_bytes())
}

/// An endpoint's address, from 11.0.0.0 up.
fn endpoint_ip(number: u32) -> IpAddr {
    IpAddr::from((0x0b00_0001 + number).to_be_bytes())
}

fn service(number: u32) -> Value {
    let ip = cluster_ip(number);
    json!({
        "kind": "Service", "apiVersion": "v1",
        "metadata": {
            "name": format!("service-{number}"), "namespace": "bench",
            "uid": format!("954e525c-060d-4c26-91c8-{number:012x}"),
            "resourceVersion": (number + 1000).to_string(), "creationTimestamp": CREATED,
            "managedFields": [{
                "manager": "kubectl-create", "operation": "Update", "apiVersion": "v1", "time": CREATED,
                "fieldsType": "FieldsV1",
                "fieldsV1": {"f:spec": {
                    "f:internalTrafficPolicy": {}, "f:selector": {}, "f:sessionAffinity": {}, "f:type": {},
                    "f:ports": {".": {}, "k:{\"port\":8080,\"protocol\":\"TCP\"}": {
                        ".": {}, "f:name": {}, "f:port": {}, "f:protocol": {}, "f:targetPort": {},
                    }},
                }},
            }],
        },
        "spec": {
            "ports": [{"name": "http", "protocol": "TCP", "port": PORT, "targetPort": PORT}],
            "selector": {"app": format!("app-{number}")},
            "clusterIP": ip, "clusterIPs": [ip], "type": "ClusterIP", "sessionAffinity": "None",
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack", "internalTrafficPolicy": "Cluster",
        },
        "status": {"loadBalancer": {}},
    })
}

fn slice(number: u32, addresses: &[IpAddr]) -> Value {
    let service = format!("service-{number}");
    let owner = format!("954e525c-060d-4c26-91c8-{number:012x}");
    let endpoints: Vec<Value> = addresses
        .iter()
        .map(|ip| {
            let pod = format!("{service}-{ip}");
            json!({
                "addresses": [ip],
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "nodeName": format!("node-{}", number % 100),
                "targetRef": {"kind": "Pod", "namespace": "bench", "name": pod, "uid": owner},
            })
        })
        .collect();
    json!({
        "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
        "metadata": {
            "name": format!("{service}-dw2pz"), "generateName": format!("{service}-"), "namespace": "bench",
            "uid": format!("3bb721f5-9bf2-493f-a89a-{number:012x}"),
            "resourceVersion": (number + 200_000).to_string(), "generation": 1, "creationTimestamp": CREATED,
            "labels": {
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                "kubernetes.io/service-name": service,
            },
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": CREATED},
            "ownerReferences": [{
                "apiVersion": "v1", "kind": "Service", "name": service, "uid": owner,
                "controller": true, "blockOwnerDeletion": true,
            }],
        },
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "http", "protocol": "TCP", "port": PORT}],
    })
}
