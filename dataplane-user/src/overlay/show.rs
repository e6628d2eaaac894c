//! Changes in words, for errors and logs.

use super::diff::Op;
use super::snapshot::{Route, RouteKind};

impl std::fmt::Display for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::DeleteLink(_, name) => write!(f, "delete link {name}"),
            Self::CreateDevice(device) => write!(f, "create link {}", device.name),
            Self::SetDevice(_, device, _) => write!(f, "set link {}", device.name),
            Self::AddAddress(index, net) => write!(f, "add address {net} to link {index}"),
            Self::DeleteAddress(index, net) => write!(f, "delete address {net} from link {index}"),
            Self::SetNeighbour(index, address, mac) => {
                write!(f, "set neighbour {address} at {mac} on link {index}")
            }
            Self::DeleteNeighbour(index, address) => write!(f, "delete neighbour {address} on link {index}"),
            Self::SetFdb(index, mac, dst) => {
                write!(f, "set forwarding of {mac} to {dst} on link {index}")
            }
            Self::DeleteFdb(index, mac, dst) => match dst {
                Some(dst) => write!(f, "delete forwarding of {mac} to {dst} on link {index}"),
                None => write!(f, "delete forwarding of {mac} on link {index}"),
            },
            Self::SetProxy(index, ip) => write!(f, "answer for {ip} on link {index}"),
            Self::DeleteProxy(index, ip) => write!(f, "no longer answer for {ip} on link {index}"),
            Self::SetRoute(route) => write!(f, "set route {}", Shown(route)),
            Self::DeleteRoute(route) => write!(f, "delete route {}", Shown(route)),
        }
    }
}

struct Shown<'a>(&'a Route);

impl std::fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.kind == RouteKind::Unreachable {
            f.write_str("unreachable ")?;
        }
        write!(f, "{}", self.0.dst)?;
        if let Some(gateway) = self.0.gateway {
            write!(f, " via {gateway}")?;
        }
        self.0.link.map_or(Ok(()), |link| write!(f, " on link {link}"))
    }
}
