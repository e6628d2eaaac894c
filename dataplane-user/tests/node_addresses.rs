//! The host's addresses as the kernel tells them, in a network namespace of its own. Needs root.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use dataplane_user::nodeaddr::{NodePortAddresses, Settings, watch};
use futures::TryStreamExt as _;
use nix::sched::{CloneFlags, unshare};
use tokio::sync::watch::{Receiver, Sender};

async fn until<T>(receiver: &mut Receiver<T>, wanted: impl FnMut(&T) -> bool) {
    tokio::time::timeout(Duration::from_secs(10), receiver.wait_for(wanted))
        .await
        .unwrap()
        .unwrap();
}

/// The namespace ends with its only thread.
fn in_namespace(test: impl Future<Output = ()> + Send + 'static) {
    let thread = std::thread::spawn(move || {
        assert!(nix::unistd::geteuid().is_root(), "needs root");
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(test);
    });
    thread.join().unwrap();
}

#[test]
fn addresses_that_come_and_go_are_followed() {
    in_namespace(async {
        let (connection, netlink, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        let mut links = netlink.link().get().match_name("lo".to_owned()).execute();
        let lo = links.try_next().await.unwrap().unwrap().header.index;
        let add = async |ip: &str, length: u8| {
            let ip: IpAddr = ip.parse().unwrap();
            netlink.address().add(lo, ip, length).execute().await.unwrap();
        };
        add("10.99.0.1", 24).await;

        let node = Sender::new(None);
        let settings = Settings {
            bind_address: None,
            node_port_addresses: NodePortAddresses::Primary,
            wait: Duration::from_millis(10),
        };
        let mut addresses = watch(settings, node.subscribe()).await.unwrap();
        let set = |list: &[&str]| -> BTreeSet<IpAddr> { list.iter().map(|ip| ip.parse().unwrap()).collect() };
        {
            let first = addresses.borrow_and_update();
            assert_eq!(first.all, set(&["10.99.0.1"]));
            // the Node has not come: the host's addresses stand in
            assert_eq!(first.node_port, set(&["10.99.0.1"]));
            assert!(first.node_ips.is_empty());
        }
        add("fd00:99::1", 64).await;
        add("10.99.0.2", 24).await;
        let all = set(&["10.99.0.1", "10.99.0.2", "fd00:99::1"]);
        until(&mut addresses, |now| now.all == all).await;
        // of the family that the Node has no address of, all serve NodePorts
        node.send_replace(Some(vec!["10.99.0.1".parse().unwrap()]));
        until(&mut addresses, |now| {
            now.node_port == set(&["10.99.0.1", "fd00:99::1"])
        })
        .await;

        let mut all = netlink.address().get().execute();
        while let Some(message) = all.try_next().await.unwrap() {
            if message.header.prefix_len == 64 {
                netlink.address().del(message).execute().await.unwrap();
            }
        }
        until(&mut addresses, |now| now.all == set(&["10.99.0.1", "10.99.0.2"])).await;
        assert_eq!(addresses.borrow().node_port, set(&["10.99.0.1"]));
    });
}

#[test]
fn the_first_answer_waits_for_the_node() {
    in_namespace(async {
        let node = Sender::new(None);
        let settings = Settings {
            bind_address: None,
            node_port_addresses: NodePortAddresses::Primary,
            wait: Duration::from_secs(60),
        };
        let answer = tokio::spawn(watch(settings, node.subscribe()));
        node.send_replace(Some(Vec::new()));
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!answer.is_finished(), "it has no addresses yet");
        let ip: IpAddr = "192.0.2.1".parse().unwrap();
        node.send_replace(Some(vec![ip]));
        let addresses = tokio::time::timeout(Duration::from_secs(10), answer)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert_eq!(addresses.borrow().node_ips, [ip]);
    });
}
