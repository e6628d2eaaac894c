//! Services for packets: what comes in from other hosts (and from pods whose sockets are not seen) is translated towards a
//! backend, and the answers back. The kernel's own forwarding carries translated packets.
//!
//! The two programs of a device undo each other: what [`ingress`] does to a destination, [`egress`] does to the source of
//! the answer, and the other way round for the masquerade.
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value they would be copied on the 512-byte stack"
)]

mod flow;
mod masquerade;
mod pods;
mod reject;
mod rewrite;
mod service;
pub(crate) mod skb;
mod trace;

use aya_ebpf::bindings::{__sk_buff, BPF_ANY, BPF_NOEXIST};
use aya_ebpf::btf_maps::{LruHashMap, PerCpuArray};
use aya_ebpf::macros::btf_map;
use dataplane_common::abi::{
    Addr, AffinityKey, BePort, Counter, Device, Flow, FlowKey, FragmentKey, FragmentPorts, NodeConfig,
    config_flag, flow_flag, flow_role,
};
use dataplane_common::packet::{Head, Outcome, head_flag, parse};

pub(crate) use self::pods::class as masquerade_class;
use self::rewrite::{Side, rewrite};
use self::service::Found;
use self::skb::Skb;
use crate::maps::{CONFIG, CONNTRACK, DEVICES, FRAGMENTS, NAT, count};
use crate::pod;

/// Verdict: on to the next program, and then to the stack.
pub(crate) const PASS: i32 = -1;
/// Verdict: drop the packet.
pub(crate) const DROP: i32 = 2;

/// `tc_index` of a packet that goes from a pod to one of another node, and that no program has to look at where it leaves:
/// neither on the tunnel's device nor, inside of a tunnel packet, on the uplink. Where it comes in anywhere, that ends. Only
/// programs like these can set it, and a kernel without it gives 0.
pub(crate) const SETTLED: u32 = 0xbee1;

/// What a program works on: more than the stack of 512 bytes would hold. Nothing of one packet is used for another.
#[repr(C)]
pub struct Scratch {
    head: Head,
    key: FlowKey,
    other: FlowKey,
    third: FlowKey,
    flow: Flow,
    back: Flow,
    target: Target,
    client: AffinityKey,
    fragment: FragmentKey,
    ports: FragmentPorts,
    spare: Spare,
}

/// Ports that a new flow may have if it finds none that is better. They are here and not in registers because the verifier
/// would follow what becomes of each.
#[repr(C)]
struct Spare {
    /// Nobody has it.
    free: BePort,
    /// That of a flow that is over.
    used: BePort,
}

/// What one end of a packet becomes.
#[repr(C)]
pub struct Target {
    addr: Addr,
    port: BePort,
    /// The port of the packet's other end; 0 keeps it.
    other: BePort,
}

/// One [`Scratch`] per CPU: a program runs to its end before another starts there.
#[btf_map]
static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

#[inline(always)]
fn drop_for(reason: Counter) -> i32 {
    count(reason);
    DROP
}

/// Finds the packet's tuple, of fragments too. False if it is none of ours.
#[inline(always)]
fn read(skb: Skb, device: &Device, scratch: &mut Scratch, egress: u8) -> bool {
    let outcome = parse(&skb, device.header, skb.ethertype(), skb.len(), &mut scratch.head);
    let head = &mut scratch.head;
    match outcome {
        Outcome::Flow | Outcome::Echo if head.flags & head_flag::FIRST_FRAGMENT == 0 => true,
        Outcome::IcmpError => true,
        Outcome::Flow | Outcome::Echo | Outcome::LaterFragment => {
            let key = &mut scratch.fragment;
            key.src = head.src;
            key.dst = head.dst;
            key.id = head.id;
            key.protocol = head.protocol;
            key.egress = egress;
            key.pad = 0;
            if head.flags & head_flag::FIRST_FRAGMENT != 0 {
                scratch.ports.src_port = head.src_port;
                scratch.ports.dst_port = head.dst_port;
                // if this fails, the other fragments are not known, and counted
                let _ = FRAGMENTS.insert(&*key, &scratch.ports, u64::from(BPF_ANY));
                return true;
            }
            let Some(ports) = FRAGMENTS.get_ptr(&*key) else {
                count(Counter::FragmentUnknown);
                return false;
            };
            // SAFETY: from a successful lookup.
            let ports = unsafe { &*ports };
            head.src_port = ports.src_port;
            head.dst_port = ports.dst_port;
            true
        }
        Outcome::Truncated => {
            count(Counter::Truncated);
            false
        }
        Outcome::Other => false,
    }
}

/// Changes the packet and counts it.
#[inline(always)]
fn translate(skb: Skb, scratch: &Scratch, side: Side, counter: Counter) -> i32 {
    if !rewrite(skb, &scratch.head, side, &scratch.target) {
        return drop_for(Counter::StoreFailed);
    }
    count(if scratch.head.flags & head_flag::ICMP_ERROR == 0 {
        counter
    } else {
        Counter::IcmpTranslated
    });
    PASS
}

/// A packet comes in by a device that leads to other hosts.
#[inline(always)]
pub fn ingress(skb: *mut __sk_buff) -> i32 {
    incoming::<false>(skb)
}

/// A packet leaves by a device that leads to other hosts.
#[inline(always)]
pub fn egress(skb: *mut __sk_buff) -> i32 {
    outgoing::<false>(skb)
}

/// A pod has sent a packet, which is at the node's end of its device.
///
/// What the socket layer does not see of pods (SCTP, raw sockets, sandboxed runtimes, virtual machines) is translated here,
/// before the kernel routes it; what that layer has translated goes through untouched.
#[inline(always)]
pub fn from_pod(skb: *mut __sk_buff) -> i32 {
    incoming::<true>(skb)
}

/// A packet is about to reach a pod.
///
/// Wherever an answer comes from, it passes here, also from another port of the same bridge, which the kernel does not
/// route.
#[inline(always)]
pub fn to_pod(skb: *mut __sk_buff) -> i32 {
    outgoing::<true>(skb)
}

/// A packet comes in. `POD` is true for the programs of pods' devices, which do not lead to the world: what only concerns
/// one of the two kinds is left out of the other's programs.
#[inline(always)]
fn incoming<const POD: bool>(skb: *mut __sk_buff) -> i32 {
    let skb = Skb(skb);
    if skb.tc_index() == SETTLED {
        skb.set_tc_index(0);
    }
    let Some((device, config, scratch)) = environment(skb) else {
        return PASS;
    };
    if let Some(verdict) = pod::ingress::<POD>(skb, device, config) {
        return verdict;
    }
    if !read(skb, device, scratch, 0) {
        return PASS;
    }
    let now = flow::now();
    // SAFETY: from a successful lookup.
    let config_row: &NodeConfig = unsafe { &*config };

    // what was masqueraded comes back
    let port = scratch.head.dst_port.to_host();
    let mut counter = Counter::PacketUnmasqueraded;
    let mut found = false;
    if port >= config_row.nat_first && port <= config_row.nat_last {
        flow::set_key(&mut scratch.key, &scratch.head, flow_role::NAT_REVERSE);
        if let Some(nat) = known(&NAT, scratch, now) {
            // SAFETY: from a successful lookup.
            let nat = unsafe { &mut *nat };
            flow::touch(nat, &scratch.head, now);
            scratch.target.addr = nat.addr;
            scratch.target.port = nat.port;
            scratch.target.other = BePort::from_be(0);
            found = true;
        }
    }
    if !found {
        if scratch.head.flags & head_flag::ECHO != 0 {
            // services have no echo
            return PASS;
        }
        counter = Counter::PacketForward;
        match towards_backend::<POD>(skb, device, config, scratch, now) {
            Ok(masquerade) => {
                if masquerade {
                    skb.set_mark(skb.mark() | config_row.mark);
                }
            }
            Err(verdict) => {
                if !POD && verdict == PASS {
                    pods::arrive(scratch, now);
                }
                return verdict;
            }
        }
    }
    translate(skb, scratch, Side::Destination, counter)
}

/// Finds or chooses the backend, in `scratch.target`; true if the packet has to be masqueraded when it leaves. `Err` is the
/// verdict of a packet that is not translated.
#[inline(always)]
fn towards_backend<const POD: bool>(
    skb: Skb,
    device: &Device,
    config: *const NodeConfig,
    scratch: &mut Scratch,
    now: u64,
) -> Result<bool, i32> {
    flow::set_key(&mut scratch.key, &scratch.head, flow_role::FORWARD);
    if let Some(known) = CONNTRACK.get_ptr_mut(&scratch.key) {
        // SAFETY: from a successful lookup.
        let known = unsafe { &mut *known };
        if flow::usable(known, &scratch.head, &mut scratch.other, now) {
            flow::keep_answers(scratch, known, now);
            flow::touch(known, &scratch.head, now);
            scratch.target.addr = known.addr;
            scratch.target.port = known.port;
            scratch.target.other = known.client_port;
            return Ok(known.flags & flow_flag::MASQUERADE != 0);
        }
    }
    if scratch.head.flags & (head_flag::ICMP_ERROR | head_flag::LATER_FRAGMENT) != 0 {
        return Err(PASS);
    }
    // SAFETY: from a successful lookup; an aligned word.
    let flags = unsafe { (&raw const (*config).flags).read_volatile() };
    if flags & config_flag::NO_NEW_FLOWS != 0 {
        // the tuple may be that of a connection that has ended: the new one is someone else's
        let _absent = CONNTRACK.remove(&scratch.key);
        return Err(PASS);
    }
    if flags & config_flag::FOREIGN_FLOWS != 0 && !flow::opens(&scratch.head) {
        return Err(PASS);
    }
    let pod = POD && service::is_pod(&scratch.head, device, config);
    match service::choose(scratch, config, pod, now) {
        Found::Nothing => {
            flow::give_way(scratch, now);
            return Err(PASS);
        }
        Found::Drop(reason) => return Err(drop_for(reason)),
        Found::Reject(reason) => {
            count(reason);
            return Err(reject::answer(skb, device, &scratch.head, now));
        }
        Found::Backend => {}
    }
    // SAFETY: from a successful lookup.
    if !flow::create(scratch, unsafe { &*config }, now) {
        return Err(drop_for(Counter::FlowLost));
    }
    if POD {
        pod::translated(&scratch.head.src);
    }
    scratch.target.addr = scratch.flow.addr;
    scratch.target.port = scratch.flow.port;
    scratch.target.other = scratch.flow.client_port;
    Ok(scratch.flow.flags & flow_flag::MASQUERADE != 0)
}

/// A packet leaves. `POD` as for [`incoming`].
#[inline(always)]
fn outgoing<const POD: bool>(skb: *mut __sk_buff) -> i32 {
    let skb = Skb(skb);
    if !POD && skb.tc_index() == SETTLED {
        return PASS;
    }
    let Some((device, config, scratch)) = environment(skb) else {
        return PASS;
    };
    if POD && !pod::egress(skb) {
        return DROP;
    }
    if !read(skb, device, scratch, 1) {
        return PASS;
    }
    let now = flow::now();
    // Read again below: if this were kept, the verifier would walk through `source` for each value.
    // SAFETY: from a successful lookup; an aligned word.
    let bit = || unsafe { (&raw const (*config).mark).read_volatile() };
    if skb.mark() & bit() == 0 {
        flow::set_key(&mut scratch.key, &scratch.head, flow_role::REVERSE);
        if let Some(known) = known(&CONNTRACK, scratch, now) {
            // SAFETY: from a successful lookup.
            let known = unsafe { &mut *known };
            let first = known.packets == 0;
            flow::touch(known, &scratch.head, now);
            scratch.target.addr = known.addr;
            scratch.target.port = known.port;
            scratch.target.other = known.client_port;
            if first && scratch.head.flags & head_flag::ICMP_ERROR == 0 {
                replied(scratch);
            }
            return translate(skb, scratch, Side::Source, Counter::PacketReverse);
        }
        if POD || !pods::leave(scratch, device, now) {
            return PASS;
        }
    }
    if let Err(reason) = masquerade::source(scratch, config, device, now) {
        return drop_for(reason);
    }
    let mark = skb.mark();
    if mark & bit() != 0 {
        // not again on a further device
        skb.set_mark(mark & !bit());
    } else if scratch.target.addr.same(&scratch.head.src) {
        return PASS;
    }
    translate(skb, scratch, Side::Source, Counter::PacketMasqueraded)
}

/// The entry of `scratch.key`, the packet's tuple, made again if it was forgotten.
#[inline(always)]
fn known<const N: usize>(
    map: &LruHashMap<FlowKey, Flow, N>,
    scratch: &mut Scratch,
    now: u64,
) -> Option<*mut Flow> {
    let found = map.get_ptr_mut(&scratch.key);
    if found.is_some() || !trace::recall(scratch, now) {
        return found;
    }
    let _ = map.insert(&scratch.key, &scratch.flow, u64::from(BPF_NOEXIST));
    map.get_ptr_mut(&scratch.key)
}

/// The backend has answered: the forward entry says so from now on.
#[inline(always)]
fn replied(scratch: &mut Scratch) {
    let (head, target) = (&scratch.head, &scratch.target);
    let key = &mut scratch.other;
    key.src = head.dst;
    key.dst = target.addr;
    key.src_port = if target.other.to_be() == 0 {
        head.dst_port
    } else {
        target.other
    };
    key.dst_port = target.port;
    key.protocol = head.protocol;
    key.role = flow_role::FORWARD;
    key.pad = 0;
    if let Some(forward) = CONNTRACK.get_ptr_mut(&*key) {
        // SAFETY: from a successful lookup.
        let forward = unsafe { &mut *forward };
        forward.flags |= flow_flag::REPLIED;
    }
}

/// The device's entry, the configuration and this CPU's scratch; `None` on devices that are not served.
#[inline(always)]
fn environment(skb: Skb) -> Option<(&'static Device, *const NodeConfig, &'static mut Scratch)> {
    let device = DEVICES.get_ptr(skb.ifindex())?;
    let config = CONFIG.get_ptr(0)?;
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: both come from successful lookups; the scratch is this CPU's and nobody else's while a program runs.
    unsafe { Some((&*device, config, &mut *scratch)) }
}
