//! Rows of the maps written as they are, for what the programs make of them.

use std::net::{IpAddr, SocketAddr};

use dataplane_common::abi::{
    Backend, BePort, FrontendKey, FrontendValue, NodeConfig, Service, SetWord, Slot, backend_state,
    frontend_class, frontend_kind,
};
use dataplane_model::Protocol;
use dataplane_model::program::{Maps, Write};
use dataplane_user::kernel::{Kernel, NodeTables, RealMaps};

use super::Place;

/// A loaded kernel side with empty maps.
pub(crate) struct Plane {
    pub(crate) kernel: Kernel,
    pub(crate) maps: RealMaps,
    pub(crate) node: NodeTables,
    next_slot: u32,
}

impl Plane {
    pub(crate) fn new(place: &Place) -> Self {
        let kernel = Kernel::open(&place.config).unwrap();
        Self {
            maps: kernel.maps().unwrap(),
            node: kernel.node_tables().unwrap(),
            kernel,
            next_slot: 0,
        }
    }

    pub(crate) fn write(&mut self, write: &Write<'_>) {
        self.maps.write(write).unwrap();
    }

    pub(crate) fn backend(&mut self, id: u32, addr: SocketAddr, protocol: Protocol) {
        self.backend_on(id, addr, protocol, 0);
    }

    /// `node` is 1 for this node, 2 for another.
    pub(crate) fn backend_on(&mut self, id: u32, addr: SocketAddr, protocol: Protocol, node: u32) {
        let row = Backend {
            node,
            addr: addr.ip().into(),
            port: BePort::from_host(addr.port()),
            protocol: protocol.number(),
            state: backend_state::ACTIVE,
            generation: 1,
            ..Backend::default()
        };
        self.write(&Write::Backend { id, row });
    }

    /// New slots of the service that name these backends.
    pub(crate) fn slots(&mut self, service: u32, backends: &[u32]) -> SetWord {
        let slots: Vec<Slot> = backends.iter().map(|id| Slot::new(*id, service)).collect();
        let count = u32::try_from(slots.len()).unwrap();
        let word = SetWord::new(self.next_slot, count);
        self.write(&Write::Slots {
            base: self.next_slot,
            slots: &slots,
        });
        self.next_slot += count;
        word
    }

    pub(crate) fn service(&mut self, id: u32, row: Service) {
        self.write(&Write::Service { id, row });
    }

    /// A service whose cluster set has these backends, with the rest as in `row`.
    pub(crate) fn serve(&mut self, id: u32, backends: &[u32], row: Service) {
        let cluster = self.slots(id, backends);
        self.service(id, Service { cluster, ..row });
    }

    pub(crate) fn front(&mut self, key: FrontendKey, service: u32, kind: u8) {
        let value = FrontendValue {
            service,
            kind,
            ..FrontendValue::default()
        };
        self.write(&Write::PutFrontend { key, value });
    }

    pub(crate) fn cluster_ip(&mut self, addr: &str, port: u16, protocol: Protocol, service: u32) {
        self.front(
            super::frontend(addr, port, protocol),
            service,
            frontend_kind::CLUSTER_IP,
        );
    }

    pub(crate) fn node_port(&mut self, any: &str, port: u16, protocol: Protocol, service: u32) {
        let mut key = super::frontend(any, port, protocol);
        key.class = frontend_class::NODE_PORT;
        self.front(key, service, frontend_kind::NODE_PORT);
    }

    pub(crate) fn active_address(&mut self, addr: &str) {
        let addr: IpAddr = addr.parse().unwrap();
        let key = FrontendKey {
            addr: addr.into(),
            class: frontend_class::ACTIVE_ADDRESS,
            ..FrontendKey::default()
        };
        self.front(key, 0, frontend_kind::ACTIVE_ADDRESS);
    }

    pub(crate) fn configure(&mut self, change: impl FnOnce(&mut NodeConfig)) {
        let mut config = self.node.config();
        change(&mut config);
        self.node.set_config(&config);
    }

    pub(crate) fn counter(&self, name: &str) -> u64 {
        let counters = self.kernel.counters().unwrap();
        counters.iter().find(|(n, _)| *n == name).unwrap().1
    }

    /// Backends 1 to `count` on loopback, which accept connections and close them.
    pub(crate) fn servers(&mut self, count: u32) -> Vec<SocketAddr> {
        (1..=count)
            .map(|id| {
                let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
                let addr = listener.local_addr().unwrap();
                self.backend(id, addr, Protocol::Tcp);
                std::thread::spawn(move || listener.incoming().for_each(drop));
                addr
            })
            .collect()
    }

    pub(crate) fn connections(&self, backend: u32) -> u64 {
        self.kernel.stats().unwrap().get(backend).unwrap().connections
    }
}
