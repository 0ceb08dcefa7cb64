//! The binary interface itself: every type, number and function that crosses it. `include/dpumesh.h` is made from this
//! file, comments and all, by the test `header`; so is what a vendor reads.
//!
//! Names are C's, since both readers see the same text. Enumerations are plain integers: a foreign library may write
//! any number, and a Rust `enum` must never hold one that it does not know.
#![allow(
    non_camel_case_types,
    reason = "one name on both sides: the header is made from these"
)]

use std::ffi::c_void;

/// Major version of this interface. Libraries of another one are refused.
pub const DM_ABI_MAJOR: u32 = 1;
/// Minor version: grows when something is appended to a struct or to the table.
pub const DM_ABI_MINOR: u32 = 0;

/// Status: done; the answer is written.
pub const DM_DONE: u32 = 0;
/// Status: begun; the end comes by `poll`, with the call's token. All memory of the call stays valid until then.
pub const DM_PENDING: u32 = 1;
/// Status: failed; `dm_call.error` says how.
pub const DM_FAILED: u32 = 2;
/// Status: the answer does not fit. `dm_rows.len` and `dm_arena.needed` say how much room it takes; nothing changed. Only calls
/// that change nothing may say so.
pub const DM_MORE: u32 = 3;
/// Status of `next_event`: there is none.
pub const DM_EMPTY: u32 = 4;

/// `dm_ops.flags`: functions of the table may be called from several threads at a time.
pub const DM_THREAD_SAFE: u32 = 1;
/// `dm_call.epoch` of a call that changes nothing.
pub const DM_NO_FENCE: u64 = u64::MAX;
/// A number that nobody knows.
pub const DM_UNKNOWN: u64 = u64::MAX;

/// `dm_error.kind`: the backend cannot do this at all.
pub const DM_UNSUPPORTED: u32 = 1;
/// `dm_error.kind`: the request makes no sense on any backend.
pub const DM_INVALID: u32 = 2;
/// `dm_error.kind`: no such object.
pub const DM_NOT_FOUND: u32 = 3;
/// `dm_error.kind`: the object is there already, and differs.
pub const DM_EXISTS: u32 = 4;
/// `dm_error.kind`: two objects contradict each other.
pub const DM_CONFLICT: u32 = 5;
/// `dm_error.kind`: the lease or epoch given is not current any more.
pub const DM_STALE: u32 = 6;
/// `dm_error.kind`: a finite resource is used up; `object` names it.
pub const DM_CAPACITY_EXCEEDED: u32 = 7;
/// `dm_error.kind`: in use by somebody.
pub const DM_BUSY: u32 = 8;
/// `dm_error.kind`: the deadline passed.
pub const DM_TIMEOUT: u32 = 9;
/// `dm_error.kind`: the device is gone; wait for the event `DM_EVENT_BACK`.
pub const DM_DEVICE_LOST: u32 = 10;
/// `dm_error.kind`: not allowed.
pub const DM_DENIED: u32 = 11;
/// `dm_error.kind`: the operating system or a link failed.
pub const DM_IO: u32 = 12;
/// `dm_error.kind`: device, firmware or backend misbehaved.
pub const DM_FAULT: u32 = 13;
/// `dm_error.kind`: this interface was broken.
pub const DM_ABI: u32 = 14;
/// `dm_error.kind`: a peer broke a protocol.
pub const DM_PEER_MISBEHAVED: u32 = 15;

/// `dm_error.effect`: nothing changed.
pub const DM_EFFECT_NONE: u32 = 0;
/// `dm_error.effect`: everything took effect; only the answer failed.
pub const DM_EFFECT_APPLIED: u32 = 1;
/// `dm_error.effect`: some of it took effect.
pub const DM_EFFECT_PARTIAL: u32 = 2;
/// `dm_error.effect`: nobody can tell.
pub const DM_EFFECT_UNKNOWN: u32 = 3;

/// `dm_error.retry`: as is usual for the kind.
pub const DM_RETRY_USUAL: u32 = 0;
/// `dm_error.retry`: it will fail again.
pub const DM_RETRY_NEVER: u32 = 1;
/// `dm_error.retry`: at once or after a short pause.
pub const DM_RETRY_NOW: u32 = 2;
/// `dm_error.retry`: after the device came back.
pub const DM_RETRY_AFTER_RESET: u32 = 3;
/// `dm_error.retry`: after something was freed.
pub const DM_RETRY_AFTER_FREE: u32 = 4;

/// `dm_error.has`: `index` is set.
pub const DM_HAS_INDEX: u32 = 1;
/// `dm_error.has`: `vendor_code` is set.
pub const DM_HAS_VENDOR_CODE: u32 = 2;
/// `dm_error.has`: the error is about an object, whose name and field may be empty.
pub const DM_HAS_OBJECT: u32 = 4;

/// `dm_info.role`: the host's side, which has the VFs.
pub const DM_ROLE_HOST: u32 = 1;
/// `dm_info.role`: the SoC's side, which has eswitch, ports and network processor.
pub const DM_ROLE_SOC: u32 = 2;
/// `dm_info.role`: both.
pub const DM_ROLE_BOTH: u32 = 3;

/// `dm_port.kind`: a network port of the card.
pub const DM_PORT_UPLINK: u16 = 1;
/// `dm_port.kind`: a physical function.
pub const DM_PORT_PF: u16 = 2;
/// `dm_port.kind`: a virtual function, seen at its representor.
pub const DM_PORT_VF: u16 = 3;
/// `dm_port.kind`: the entry of the shared proxy.
pub const DM_PORT_STACK: u16 = 4;

/// Bit of a field in `dm_pattern.fields`; also of `dm_capabilities.fields`, where addresses have a bit per family.
pub const DM_FIELD_PORT: u32 = 1;
/// Source MAC.
pub const DM_FIELD_ETH_SRC: u32 = 1 << 1;
/// Destination MAC.
pub const DM_FIELD_ETH_DST: u32 = 1 << 2;
/// EtherType.
pub const DM_FIELD_ETHERTYPE: u32 = 1 << 3;
/// 802.1Q tag.
pub const DM_FIELD_VLAN: u32 = 1 << 4;
/// Tunnel's network identifier.
pub const DM_FIELD_VNI: u32 = 1 << 5;
/// Source IP address.
pub const DM_FIELD_IP_SRC: u32 = 1 << 6;
/// Destination IP address.
pub const DM_FIELD_IP_DST: u32 = 1 << 7;
/// IP protocol.
pub const DM_FIELD_IP_PROTO: u32 = 1 << 8;
/// DSCP.
pub const DM_FIELD_DSCP: u32 = 1 << 9;
/// Fragmentation.
pub const DM_FIELD_FRAGMENT: u32 = 1 << 10;
/// L4 source port.
pub const DM_FIELD_L4_SRC: u32 = 1 << 11;
/// L4 destination port.
pub const DM_FIELD_L4_DST: u32 = 1 << 12;
/// TCP flags.
pub const DM_FIELD_TCP_FLAGS: u32 = 1 << 13;
/// Mark of an earlier group.
pub const DM_FIELD_MARK: u32 = 1 << 14;
/// Connection state.
pub const DM_FIELD_CT_STATE: u32 = 1 << 15;

/// Index into `dm_capabilities.fields` and `.hardware_fields`. Source port of the card.
pub const DM_MATCH_PORT: u32 = 0;
/// Source MAC.
pub const DM_MATCH_ETH_SRC: u32 = 1;
/// Destination MAC.
pub const DM_MATCH_ETH_DST: u32 = 2;
/// EtherType.
pub const DM_MATCH_ETHERTYPE: u32 = 3;
/// 802.1Q tag.
pub const DM_MATCH_VLAN: u32 = 4;
/// Tunnel's network identifier.
pub const DM_MATCH_VNI: u32 = 5;
/// IPv4 source.
pub const DM_MATCH_IP4_SRC: u32 = 6;
/// IPv4 destination.
pub const DM_MATCH_IP4_DST: u32 = 7;
/// IPv6 source.
pub const DM_MATCH_IP6_SRC: u32 = 8;
/// IPv6 destination.
pub const DM_MATCH_IP6_DST: u32 = 9;
/// IP protocol.
pub const DM_MATCH_IP_PROTO: u32 = 10;
/// DSCP.
pub const DM_MATCH_DSCP: u32 = 11;
/// Fragmentation.
pub const DM_MATCH_FRAGMENT: u32 = 12;
/// L4 source port.
pub const DM_MATCH_L4_SRC: u32 = 13;
/// L4 destination port.
pub const DM_MATCH_L4_DST: u32 = 14;
/// TCP flags.
pub const DM_MATCH_TCP_FLAGS: u32 = 15;
/// Mark.
pub const DM_MATCH_MARK: u32 = 16;
/// Connection state.
pub const DM_MATCH_CT_STATE: u32 = 17;
/// Bits of an entry of `dm_capabilities.fields`: the whole value.
pub const DM_KIND_EXACT: u8 = 1;
/// Leading bits.
pub const DM_KIND_PREFIX: u8 = 2;
/// Any bits.
pub const DM_KIND_MASK: u8 = 4;
/// A range.
pub const DM_KIND_RANGE: u8 = 8;

/// `dm_ip_match.kind`: the first `prefix_len` bits; `mask` is filled in as well.
pub const DM_IP_PREFIX: u32 = 1;
/// `dm_ip_match.kind`: the bits of `mask`.
pub const DM_IP_MASKED: u32 = 2;
/// `dm_pattern.vlan`: no tag; 1 to 4094 is a tag's identifier.
pub const DM_VLAN_UNTAGGED: u16 = 0;
/// `dm_pattern.fragment`: a whole packet.
pub const DM_FRAGMENT_WHOLE: u32 = 1;
/// `dm_pattern.fragment`: any fragment.
pub const DM_FRAGMENT_ANY: u32 = 2;
/// `dm_pattern.fragment`: the fragment at offset 0.
pub const DM_FRAGMENT_FIRST: u32 = 3;
/// `dm_pattern.fragment`: a fragment behind it.
pub const DM_FRAGMENT_LATER: u32 = 4;

/// `dm_action.kind`, final: the frame is gone.
pub const DM_ACTION_DROP: u32 = 1;
/// Final: the frame leaves by `port`.
pub const DM_ACTION_FORWARD: u32 = 2;
/// Final: the frame goes to the shared proxy.
pub const DM_ACTION_PUNT: u32 = 3;
/// Final: the frame goes to the SoC's own network stack.
pub const DM_ACTION_TO_KERNEL: u32 = 4;
/// Final: the frame goes to receive queue `number`.
pub const DM_ACTION_QUEUE: u32 = 5;
/// Final: the frame goes to one of `queues` (`uint16_t` each).
pub const DM_ACTION_RSS: u32 = 6;
/// Final: matching goes on in group `number`.
pub const DM_ACTION_JUMP: u32 = 7;
/// Puts the frame into a tunnel of kind `tunnel`: `number` is the VNI; `local`, `remote`, `eth_src`, `eth_dst` are outer addresses.
pub const DM_ACTION_ENCAPSULATE: u32 = 8;
/// Takes the frame out of a tunnel of kind `tunnel`.
pub const DM_ACTION_DECAPSULATE: u32 = 9;
/// Writes the source MAC, `eth_src`.
pub const DM_ACTION_SET_ETH_SRC: u32 = 10;
/// Writes the destination MAC, `eth_dst`.
pub const DM_ACTION_SET_ETH_DST: u32 = 11;
/// Writes the source address, `local`.
pub const DM_ACTION_SET_IP_SRC: u32 = 12;
/// Writes the destination address, `remote`.
pub const DM_ACTION_SET_IP_DST: u32 = 13;
/// Writes the L4 source port, `number`.
pub const DM_ACTION_SET_L4_SRC: u32 = 14;
/// Writes the L4 destination port, `number`.
pub const DM_ACTION_SET_L4_DST: u32 = 15;
/// Writes the DSCP, `number`.
pub const DM_ACTION_SET_DSCP: u32 = 16;
/// Counts TTL or hop limit down.
pub const DM_ACTION_DECREMENT_TTL: u32 = 17;
/// Adds the 802.1Q tag `number`.
pub const DM_ACTION_PUSH_VLAN: u32 = 18;
/// Takes the 802.1Q tag off.
pub const DM_ACTION_POP_VLAN: u32 = 19;
/// Sets the mark to `number`.
pub const DM_ACTION_MARK: u32 = 20;
/// Counts packets and octets.
pub const DM_ACTION_COUNT: u32 = 21;
/// Sends a copy out of `port`.
pub const DM_ACTION_MIRROR: u32 = 22;
/// Drops what exceeds meter `number`.
pub const DM_ACTION_METER: u32 = 23;
/// Looks the connection up in zone `number`; enters it if it is new and `commit` is 1.
pub const DM_ACTION_CONNTRACK: u32 = 24;
/// `dm_action.tunnel`: VXLAN (RFC 7348).
pub const DM_TUNNEL_VXLAN: u32 = 1;
/// `dm_action.tunnel`: Geneve (RFC 8926).
pub const DM_TUNNEL_GENEVE: u32 = 2;

/// `dm_owner.kind`: the node agent.
pub const DM_OWNER_AGENT: u32 = 1;
/// `dm_owner.kind`: the shared proxy.
pub const DM_OWNER_PROXY: u32 = 2;
/// `dm_owner.kind`: the dataplane.
pub const DM_OWNER_DATAPLANE: u32 = 3;
/// `dm_owner.kind`: users' rules, set number `user`.
pub const DM_OWNER_USER: u32 = 4;

/// `dm_rule.placement`: in the card if it can, in software else.
pub const DM_PLACE_ANY: u32 = 0;
/// `dm_rule.placement`: in the card only. As an answer: it acts in the card.
pub const DM_PLACE_HARDWARE: u32 = 1;
/// `dm_rule.placement`: in software only. As an answer: it acts in software, for `reason`.
pub const DM_PLACE_SOFTWARE: u32 = 2;
/// As an answer only: half in the card, for `reason`.
pub const DM_PLACE_PARTIAL: u32 = 3;
/// `dm_verdict.verdict` only: it cannot be done; `field` and `reason` say why. The others are `DM_PLACE_*`.
pub const DM_VERDICT_NO: u32 = 4;

/// `dm_operation.kind`: install `rule`.
pub const DM_ADD: u32 = 1;
/// `dm_operation.kind`: remove `cookie` of `owner`.
pub const DM_REMOVE: u32 = 2;

/// `dm_batch.atomicity`: go on after a failure.
pub const DM_CONTINUE: u32 = 0;
/// `dm_batch.atomicity`: undo those before it.
pub const DM_ROLLBACK: u32 = 1;
/// `dm_batch.atomicity`: all or none.
pub const DM_ATOMIC: u32 = 2;

/// `dm_change.kind`: installed; acts at `placement`.
pub const DM_ADDED: u32 = 1;
/// `dm_change.kind`: was there already; acts at `placement`.
pub const DM_PRESENT: u32 = 2;
/// `dm_change.kind`: removed; `counters` are final if `has_counters`.
pub const DM_REMOVED: u32 = 3;
/// `dm_change.kind`: no rule has the cookie.
pub const DM_ABSENT: u32 = 4;
/// `dm_change.kind`: not begun or undone, because of another one.
pub const DM_SKIPPED: u32 = 5;
/// `dm_change.kind`: failed; the error of the same index says how.
pub const DM_CHANGE_FAILED: u32 = 6;

/// `dm_outcome.undone`: nothing was undone.
pub const DM_UNDONE_NO: u32 = 0;
/// `dm_outcome.undone`: everything was.
pub const DM_UNDONE_ALL: u32 = 1;
/// `dm_outcome.undone`: undoing failed; `undo_error` says how.
pub const DM_UNDONE_FAILED: u32 = 2;

/// `dm_miss.policy`: frames that match no rule are dropped.
pub const DM_MISS_DROP: u32 = 0;
/// `dm_miss.policy`: they go to the software on the representor.
pub const DM_MISS_SOFTWARE: u32 = 1;

/// `dm_capabilities.counter_unit`: octets of frames, without FCS.
pub const DM_COUNTER_L2: u32 = 0;
/// `dm_capabilities.counter_unit`: octets of IP packets.
pub const DM_COUNTER_L3: u32 = 1;

/// `dm_capabilities.events`: link changes.
pub const DM_EVENTS_LINK: u32 = 1;
/// Health changes.
pub const DM_EVENTS_HEALTH: u32 = 2;
/// High-water marks.
pub const DM_EVENTS_HIGH_WATER: u32 = 4;
/// Aged rules.
pub const DM_EVENTS_AGED: u32 = 8;
/// VFs that came or went.
pub const DM_EVENTS_VF: u32 = 16;

/// `dm_event.kind`: the card is gone; `epoch` ended.
pub const DM_EVENT_LOST: u32 = 1;
/// The card is back; `epoch` begins.
pub const DM_EVENT_BACK: u32 = 2;
/// Carrier of `port` is `up` now.
pub const DM_EVENT_LINK: u32 = 3;
/// Health changed; healthy unless `error.kind` is set.
pub const DM_EVENT_HEALTH: u32 = 4;
/// `resource` passed its mark: `used` of `limit`.
pub const DM_EVENT_HIGH_WATER: u32 = 5;
/// Rules of `owner` aged: `aged` (`dm_aged` each).
pub const DM_EVENT_AGED: u32 = 6;
/// `port`, a VF, appeared.
pub const DM_EVENT_VF_ADDED: u32 = 7;
/// `port`, a VF, disappeared.
pub const DM_EVENT_VF_REMOVED: u32 = 8;
/// `used` events were lost.
pub const DM_EVENT_OVERFLOWED: u32 = 9;

/// Disruption: nothing.
pub const DM_DISRUPTION_NONE: u32 = 0;
/// Disruption: pods with VFs must leave first.
pub const DM_DISRUPTION_DRAIN: u32 = 1;
/// Disruption: the node must reboot.
pub const DM_DISRUPTION_REBOOT: u32 = 2;

/// `dm_vf_selector.has`: `port`.
pub const DM_SELECT_PORT: u32 = 1;
/// `pf`.
pub const DM_SELECT_PF: u32 = 2;
/// `pci`.
pub const DM_SELECT_PCI: u32 = 4;
/// `numa_node`.
pub const DM_SELECT_NUMA: u32 = 8;
/// `driver`.
pub const DM_SELECT_DRIVER: u32 = 16;

/// `dm_vf_config.has` and `dm_capabilities.vf_attributes`: administrative MAC.
pub const DM_VF_MAC: u32 = 1;
/// VLAN with QoS and protocol.
pub const DM_VF_VLAN: u32 = 2;
/// Trust.
pub const DM_VF_TRUST: u32 = 4;
/// Anti-spoofing.
pub const DM_VF_SPOOF_CHECK: u32 = 8;
/// Link state.
pub const DM_VF_LINK_STATE: u32 = 16;
/// Smallest transmit rate.
pub const DM_VF_MIN_RATE: u32 = 32;
/// Largest transmit rate.
pub const DM_VF_MAX_RATE: u32 = 64;
/// MTU.
pub const DM_VF_MTU: u32 = 128;

/// `dm_vf_config.link_state`: follows the uplink.
pub const DM_LINK_AUTO: u32 = 0;
/// Always up.
pub const DM_LINK_ENABLE: u32 = 1;
/// Always down.
pub const DM_LINK_DISABLE: u32 = 2;

/// `dm_attachment.kind`: a network device named `ifname` in the namespace at `path`.
pub const DM_ATTACH_NETNS: u32 = 1;
/// A VFIO device.
pub const DM_ATTACH_VFIO: u32 = 2;
/// A vhost-user socket at `path`.
pub const DM_ATTACH_VHOST_USER: u32 = 4;

/// Reset level: attributes are restored. Bits in `dm_capabilities.vf_resets`.
pub const DM_RESET_CONFIG: u32 = 1;
/// Reset level: function-level reset.
pub const DM_RESET_FUNCTION: u32 = 2;
/// Reset level: the whole device.
pub const DM_RESET_DEVICE: u32 = 4;

/// Release: the VF is free.
pub const DM_RELEASED: u32 = 1;
/// Release: the lease was not current; nothing was touched.
pub const DM_NOT_CURRENT: u32 = 2;

/// `dm_vf_state.location`: in the host's namespace.
pub const DM_AT_HOST: u32 = 1;
/// In the namespace at `place`.
pub const DM_AT_NETNS: u32 = 2;
/// Bound to the driver `place`.
pub const DM_AT_DRIVER: u32 = 3;
/// Nowhere to be found.
pub const DM_AT_NOWHERE: u32 = 4;

/// `dm_program_info.state`: the slot is empty.
pub const DM_SLOT_EMPTY: u32 = 0;
/// Loaded.
pub const DM_SLOT_LOADED: u32 = 1;
/// Running.
pub const DM_SLOT_RUNNING: u32 = 2;
/// Draining.
pub const DM_SLOT_DRAINING: u32 = 3;

/// `dm_table_info.kind`: whole keys.
pub const DM_TABLE_EXACT: u32 = 1;
/// Keys are indices.
pub const DM_TABLE_ARRAY: u32 = 2;
/// Longest prefix.
pub const DM_TABLE_LPM: u32 = 3;
/// Masked keys with priorities.
pub const DM_TABLE_TERNARY: u32 = 4;
/// Read-only counts.
pub const DM_TABLE_COUNTER: u32 = 5;
/// Meters.
pub const DM_TABLE_METER: u32 = 6;

/// `dm_connection.kind`: splice. Bits in `dm_capabilities.connection_kinds`.
pub const DM_CONNECTION_SPLICE: u32 = 1;
/// Splice with TLS records.
pub const DM_CONNECTION_TLS_RECORDS: u32 = 2;
/// Splice with a header rewrite.
pub const DM_CONNECTION_REWRITE: u32 = 4;

/// `dm_frame.checksum`: nobody has verified it.
pub const DM_CHECKSUM_UNVERIFIED: u32 = 0;
/// Verified.
pub const DM_CHECKSUM_VERIFIED: u32 = 1;
/// To be stored at `sum_start + sum_offset` over the octets from `sum_start` on.
pub const DM_CHECKSUM_PARTIAL: u32 = 2;
/// `dm_frame.gso`: no super-frame.
pub const DM_GSO_NONE: u32 = 0;
/// TCP over IPv4.
pub const DM_GSO_TCP4: u32 = 1;
/// TCP over IPv6.
pub const DM_GSO_TCP6: u32 = 2;
/// UDP.
pub const DM_GSO_UDP: u32 = 3;

/// Log levels of `dm_host.log`.
pub const DM_LOG_ERROR: u32 = 1;
/// Warning.
pub const DM_LOG_WARN: u32 = 2;
/// Information.
pub const DM_LOG_INFO: u32 = 3;
/// Debugging.
pub const DM_LOG_DEBUG: u32 = 4;

/// Octets of text, UTF-8, not terminated. Frozen. In an answer it must lie in the call's arena.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_str {
    /// First octet; may be null when `len` is 0.
    pub at: *const u8,
    /// How many.
    pub len: u64,
}

/// Elements in a row, each `stride` octets after the last: a caller's newer and longer struct does not disturb
/// (`DM_AT`). Frozen.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_list {
    /// First element; may be null when `len` is 0.
    pub at: *const c_void,
    /// How many.
    pub len: u32,
    /// Octets from one to the next.
    pub stride: u32,
}

/// Memory of the caller for texts and lists of an answer. Take from it with `dm_take`, which keeps `used` and `needed`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_arena {
    /// Octets of this struct.
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// First octet, aligned to 16.
    pub at: *mut u8,
    /// Octets there are.
    pub capacity: u64,
    /// Octets taken.
    pub used: u64,
    /// Octets that the whole answer would have taken.
    pub needed: u64,
}

/// Memory of the caller for the elements of an answer.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_rows {
    /// Octets of this struct.
    pub size: u32,
    /// Octets from one element to the next.
    pub stride: u32,
    /// First element.
    pub at: *mut c_void,
    /// Elements there is room for.
    pub capacity: u64,
    /// Elements of the answer; more than `capacity` goes with `DM_MORE`.
    pub len: u64,
}

/// How something failed. Texts are terminated by a zero octet.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_error {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_UNSUPPORTED` and so on; 0 is no error.
    pub kind: u32,
    /// `DM_EFFECT_*`: what changed all the same.
    pub effect: u32,
    /// `DM_RETRY_*`.
    pub retry: u32,
    /// `DM_HAS_*`.
    pub has: u32,
    /// Zero.
    pub reserved: u32,
    /// Which element of the list that was given.
    pub index: u64,
    /// The vendor's own number.
    pub vendor_code: i64,
    /// Name of the object or resource, as `steering.rules` or `c0pf0vf3`.
    pub object: [u8; 96],
    /// Path of the field, as `pattern.ip_dst`.
    pub field: [u8; 64],
    /// One sentence for people.
    pub message: [u8; 320],
    /// What the library's own layers said, or everything that failed in a teardown; may be empty.
    pub cause: [u8; 320],
}

/// One call. Its memory, and that of everything it points to, is the caller's and stays valid until the call ended.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_call {
    /// Octets of this struct.
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// Names the call in `dm_completion` and `cancel`; never 0, never given twice.
    pub token: u64,
    /// Fence: the call fails with `DM_STALE` unless this is the card's present epoch. `DM_NO_FENCE` for calls that
    /// change nothing.
    pub epoch: u64,
    /// Filled in when the call fails.
    pub error: *mut dm_error,
    /// For texts and lists of the answer.
    pub arena: *mut dm_arena,
}

/// The end of a call that was pending.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_completion {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_DONE`, `DM_FAILED` or `DM_MORE`.
    pub status: u32,
    /// Which call.
    pub token: u64,
}

/// What the caller offers to the library; valid as long as the process.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_host {
    /// Octets of this struct.
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// To be given back to `log`.
    pub context: *mut c_void,
    /// Writes to the caller's log; `level` is `DM_LOG_*`. Any thread; does not block.
    pub log: Option<unsafe extern "C" fn(context: *mut c_void, level: u32, text: dm_str)>,
}

/// Who a backend is. Texts are terminated by a zero octet.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_info {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_ROLE_*`.
    pub role: u32,
    /// Name of the backend.
    pub name: [u8; 64],
    /// Version of its code.
    pub version: [u8; 64],
    /// Which card of the node.
    pub dpu: [u8; 64],
    /// Firmware or device, for people.
    pub device: [u8; 128],
    /// Version of the conformance kit it was proved with; empty until then.
    pub conformance: [u8; 64],
}

/// What a card can do in its present mode; zero is "not at all". A part in `parts` needs its functions in the table and
/// numbers here that are not zero; a card that claims one without the other is refused.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_capabilities {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_EVENTS_*`.
    pub events: u32,
    /// Name of the mode, terminated by a zero octet.
    pub mode: [u8; 64],
    /// Most VFs per physical function.
    pub max_vfs: u32,
    /// `DM_VF_*` that can be set.
    pub vf_attributes: u32,
    /// Largest MTU of a VF; 0 if none is known.
    pub vf_max_mtu: u32,
    /// `DM_ATTACH_*`.
    pub vf_attachments: u32,
    /// `DM_RESET_*`.
    pub vf_resets: u32,
    /// 1 if the number of VFs can be changed.
    pub vf_resizable: u32,
    /// Rules that the card itself can hold.
    pub hardware_rules: u64,
    /// Rules in all.
    pub rules: u64,
    /// Rules that can count.
    pub counters: u64,
    /// Groups.
    pub groups: u32,
    /// Priority levels per group.
    pub priorities: u32,
    /// Sets of masks at a time.
    pub masks: u32,
    /// `DM_COUNTER_*`.
    pub counter_unit: u32,
    /// How old a counter value may be, in milliseconds.
    pub counter_age_ms: u32,
    /// Longest batch.
    pub batch_max: u32,
    /// Bit `1 << DM_CONTINUE` and so on.
    pub atomicity: u32,
    /// 1 if each operation of a batch gets a status of its own.
    pub per_operation_status: u32,
    /// 1 if rules can age.
    pub idle_timeout: u32,
    /// 1 if software holds what hardware cannot.
    pub software_fallback: u32,
    /// `DM_CAN_*`: carried out in hardware.
    pub hardware_actions: u32,
    /// `DM_CAN_*`: carried out at all.
    pub actions: u32,
    /// `DM_KIND_*` for each `DM_MATCH_*`: matched in hardware.
    pub hardware_fields: [u8; 32],
    /// `DM_KIND_*` for each `DM_MATCH_*`: matched at all.
    pub fields: [u8; 32],
    /// Program slots.
    pub slots: u32,
    /// Tables that programs may declare.
    pub tables: u32,
    /// Largest program image in octets.
    pub max_image: u64,
    /// Entries over all tables.
    pub entries: u64,
    /// Connections that the network processor can carry.
    pub connections: u64,
    /// `DM_CONNECTION_*`.
    pub connection_kinds: u32,
    /// Ports that can be open at a time.
    pub open_ports: u32,
    /// 1 if checksums can be left open.
    pub checksum_offload: u32,
    /// 1 if TCP super-frames are cut.
    pub tso: u32,
    /// 1 if UDP super-frames are cut.
    pub uso: u32,
    /// `DM_PART_*`: parts that this card has. Fixed while it is open.
    pub parts: u32,
}

/// `dm_capabilities.parts`: leases of virtual functions, `vf_`.
pub const DM_PART_VF: u32 = 1;
/// Rules in the eswitch, `steering_`.
pub const DM_PART_STEERING: u32 = 2;
/// The network processor, `offload_`.
pub const DM_PART_OFFLOAD: u32 = 4;
/// Frames of ports, `port_`.
pub const DM_PART_PORTS: u32 = 8;

/// `dm_capabilities.actions`: drop.
pub const DM_CAN_DROP: u32 = 1;
/// Forward.
pub const DM_CAN_FORWARD: u32 = 1 << 1;
/// Punt.
pub const DM_CAN_PUNT: u32 = 1 << 2;
/// To the SoC's own stack.
pub const DM_CAN_TO_KERNEL: u32 = 1 << 3;
/// Queue and RSS.
pub const DM_CAN_QUEUE: u32 = 1 << 4;
/// Jump.
pub const DM_CAN_JUMP: u32 = 1 << 5;
/// VXLAN, both ways.
pub const DM_CAN_VXLAN: u32 = 1 << 6;
/// Geneve, both ways.
pub const DM_CAN_GENEVE: u32 = 1 << 7;
/// Rewriting MACs.
pub const DM_CAN_REWRITE_ETH: u32 = 1 << 8;
/// Rewriting addresses and ports.
pub const DM_CAN_REWRITE_IP: u32 = 1 << 9;
/// Rewriting the DSCP.
pub const DM_CAN_REWRITE_DSCP: u32 = 1 << 10;
/// Counting the TTL down.
pub const DM_CAN_TTL: u32 = 1 << 11;
/// Tags.
pub const DM_CAN_VLAN: u32 = 1 << 12;
/// Marks.
pub const DM_CAN_MARK: u32 = 1 << 13;
/// Counting.
pub const DM_CAN_COUNT: u32 = 1 << 14;
/// Mirroring.
pub const DM_CAN_MIRROR: u32 = 1 << 15;
/// Meters.
pub const DM_CAN_METER: u32 = 1 << 16;
/// Connection tracking.
pub const DM_CAN_CONNTRACK: u32 = 1 << 17;

/// A virtual port of the card. Frozen.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct dm_port {
    /// `DM_PORT_*`.
    pub kind: u16,
    /// Host it belongs to, for functions.
    pub controller: u16,
    /// Physical function, for functions.
    pub pf: u16,
    /// Number of the VF, uplink or stack port.
    pub index: u16,
}

/// An IP address. Frozen.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_addr {
    /// 4 or 6; 0 is none.
    pub family: u32,
    /// Network order; IPv4 in the first four.
    pub octets: [u8; 16],
}

/// An IP address pattern. Frozen.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_ip_match {
    /// `DM_IP_*`.
    pub kind: u32,
    /// Length of the prefix in bits.
    pub prefix_len: u32,
    /// Value.
    pub value: dm_addr,
    /// Which bits count.
    pub mask: [u8; 16],
}

/// A rule's name. Frozen.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct dm_cookie {
    /// Upper 64 bits.
    pub high: u64,
    /// Lower 64 bits.
    pub low: u64,
}

/// A rule's owner. Frozen.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct dm_owner {
    /// `DM_OWNER_*`.
    pub kind: u32,
    /// Number of the users' set; else 0.
    pub user: u32,
}

/// What a rule looks at: the conjunction of the fields whose bit is set. What else is in the struct means nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_pattern {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_FIELD_*`. An unknown bit must be refused: the rule would match too much.
    pub fields: u32,
    /// Port the frame came in on.
    pub port: dm_port,
    /// Source MAC.
    pub eth_src: [u8; 6],
    /// Which bits of it count.
    pub eth_src_mask: [u8; 6],
    /// Destination MAC.
    pub eth_dst: [u8; 6],
    /// Which bits of it count.
    pub eth_dst_mask: [u8; 6],
    /// EtherType, in host order as all numbers.
    pub ethertype: u16,
    /// Tag, or `DM_VLAN_UNTAGGED`.
    pub vlan: u16,
    /// Tunnel's network identifier.
    pub vni: u32,
    /// Source address.
    pub ip_src: dm_ip_match,
    /// Destination address.
    pub ip_dst: dm_ip_match,
    /// Protocol.
    pub ip_proto: u32,
    /// DSCP.
    pub dscp: u32,
    /// `DM_FRAGMENT_*`.
    pub fragment: u32,
    /// First and last source port.
    pub l4_src: [u16; 2],
    /// First and last destination port.
    pub l4_dst: [u16; 2],
    /// TCP flags.
    pub tcp_flags: u8,
    /// Which of them count.
    pub tcp_flags_mask: u8,
    /// Connection state.
    pub ct_state: u8,
    /// Which bits of it count.
    pub ct_state_mask: u8,
    /// Mark.
    pub mark: u32,
    /// Which bits of it count.
    pub mark_mask: u32,
}

/// One step of a rule; which fields it uses is told at its kind.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_action {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_ACTION_*`. An unknown one must be refused.
    pub kind: u32,
    /// A port.
    pub port: dm_port,
    /// A number.
    pub number: u32,
    /// `DM_TUNNEL_*`.
    pub tunnel: u32,
    /// 1 to commit.
    pub commit: u32,
    /// An address.
    pub local: dm_addr,
    /// An address.
    pub remote: dm_addr,
    /// A MAC.
    pub eth_src: [u8; 6],
    /// A MAC.
    pub eth_dst: [u8; 6],
    /// Queues, `uint16_t` each.
    pub queues: dm_list,
}

/// A steering rule.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_rule {
    /// Octets of this struct.
    pub size: u32,
    /// Where it is looked for.
    pub group: u32,
    /// Its name.
    pub cookie: dm_cookie,
    /// Who may see and remove it.
    pub owner: dm_owner,
    /// Lower numbers win.
    pub priority: u32,
    /// `DM_PLACE_*`.
    pub placement: u32,
    /// Removed after so many milliseconds without a hit; 0 keeps it.
    pub idle_timeout_ms: u32,
    /// Zero.
    pub reserved: u32,
    /// What it looks at.
    pub pattern: *const dm_pattern,
    /// What it does, `dm_action` each.
    pub actions: dm_list,
}

/// Rules to be judged.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_rules {
    /// Octets of this struct.
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// `dm_rule` each.
    pub rules: dm_list,
}

/// What would become of a rule.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_verdict {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_PLACE_HARDWARE`, `_PARTIAL`, `_SOFTWARE`, or `DM_VERDICT_NO`.
    pub verdict: u32,
    /// Path of the field that stands in the way.
    pub field: dm_str,
    /// Why.
    pub reason: dm_str,
}

/// One change of a batch.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_operation {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_ADD` or `DM_REMOVE`.
    pub kind: u32,
    /// The rule to add.
    pub rule: *const dm_rule,
    /// Whose rule to remove.
    pub owner: dm_owner,
    /// Which rule to remove.
    pub cookie: dm_cookie,
}

/// Changes to be carried out in order.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_batch {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_CONTINUE`, `DM_ROLLBACK` or `DM_ATOMIC`.
    pub atomicity: u32,
    /// `dm_operation` each.
    pub operations: dm_list,
}

/// Counts of a rule. Frozen.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_counters {
    /// Frames.
    pub packets: u64,
    /// Octets.
    pub octets: u64,
    /// Life of the card in which the counting began.
    pub epoch: u64,
    /// Milliseconds since the last hit, or `DM_UNKNOWN`.
    pub idle_ms: u64,
}

/// What became of one operation.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_change {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_ADDED` and so on.
    pub kind: u32,
    /// `DM_PLACE_HARDWARE`, `_PARTIAL` or `_SOFTWARE`, of an added or present rule.
    pub placement: u32,
    /// 1 if `counters` are set.
    pub has_counters: u32,
    /// Final counters of a removed rule.
    pub counters: dm_counters,
    /// Why it is not in hardware. The arena has 128 octets for each operation.
    pub reason: dm_str,
}

/// What became of a batch. `changes` and `errors` have an element for each operation, made by the caller; an error is to be
/// written only where its change is `DM_CHANGE_FAILED`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_outcome {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_UNDONE_*`.
    pub undone: u32,
    /// `dm_change` each.
    pub changes: dm_rows,
    /// `dm_error` each.
    pub errors: dm_rows,
    /// Why undoing failed.
    pub undo_error: *mut dm_error,
}

/// An owner, of whom to list or to flush.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_of_owner {
    /// Octets of this struct.
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// Which.
    pub owner: dm_owner,
}

/// A rule as it is installed.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_installed {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_PLACE_HARDWARE`, `_PARTIAL` or `_SOFTWARE`.
    pub placement: u32,
    /// Why it is not in hardware.
    pub reason: dm_str,
    /// The rule as it was given, in the arena.
    pub rule: *const dm_rule,
}

/// Whose counters to read.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_cookies {
    /// Octets of this struct.
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// Whose.
    pub owner: dm_owner,
    /// `dm_cookie` each.
    pub cookies: dm_list,
}

/// Counters of one cookie.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_count {
    /// Octets of this struct.
    pub size: u32,
    /// 1 if there are any.
    pub present: u32,
    /// The counts.
    pub counters: dm_counters,
}

/// What to do with frames of a port that match nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_miss {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_MISS_*`.
    pub policy: u32,
    /// Which port.
    pub port: dm_port,
}

/// Use of one finite resource.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_occupancy {
    /// Octets of this struct.
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// In use.
    pub used: u64,
    /// How many there are.
    pub limit: u64,
    /// Its name.
    pub resource: dm_str,
}

/// One number as an answer.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_number {
    /// Octets of this struct.
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// The number.
    pub value: u64,
}

/// A number of VFs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_vf_count {
    /// Octets of this struct.
    pub size: u32,
    /// Physical function.
    pub pf: u32,
    /// Asked for; as an answer, how many there are.
    pub count: u32,
    /// As an answer, `DM_DISRUPTION_*` that the rest needs.
    pub needs: u32,
}

/// A PCI address. Frozen.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct dm_pci {
    /// Domain.
    pub domain: u16,
    /// Bus.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// Attributes of a VF; only those whose bit is set mean anything.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_vf_config {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_VF_*`.
    pub has: u32,
    /// Administrative MAC.
    pub mac: [u8; 6],
    /// VLAN; 0 takes it off.
    pub vlan: u16,
    /// Priority code point.
    pub vlan_qos: u32,
    /// 1 for 802.1ad.
    pub vlan_service_tag: u32,
    /// 1 to trust.
    pub trust: u32,
    /// 1 to check.
    pub spoof_check: u32,
    /// `DM_LINK_*`.
    pub link_state: u32,
    /// Megabits per second; 0 is unlimited.
    pub min_rate: u32,
    /// Megabits per second; 0 is unlimited.
    pub max_rate: u32,
    /// Octets.
    pub mtu: u32,
}

/// A request for a VF.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_vf_request {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_SELECT_*`: which of the selectors below count.
    pub has: u32,
    /// For whom.
    pub owner: dm_str,
    /// This port.
    pub port: dm_port,
    /// This PCI address.
    pub pci: dm_pci,
    /// Of this physical function.
    pub pf: u32,
    /// On this NUMA node.
    pub numa_node: u32,
    /// Bound to this driver.
    pub driver: dm_str,
    /// Attributes from the start.
    pub config: *const dm_vf_config,
}

/// A lease.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_vf_lease {
    /// Octets of this struct.
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// Its number.
    pub id: u64,
    /// In which life of the card.
    pub epoch: u64,
    /// Which VF.
    pub port: dm_port,
    /// Which card.
    pub dpu: dm_str,
    /// For whom.
    pub owner: dm_str,
}

/// Where a VF goes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_attachment {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_ATTACH_*`.
    pub kind: u32,
    /// Path of the namespace or socket.
    pub path: dm_str,
    /// Name of the network device.
    pub ifname: dm_str,
}

/// A lease and what to do with it; which of the others count is told at the function.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_vf_order {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_RESET_*`.
    pub level: u32,
    /// The lease.
    pub lease: *const dm_vf_lease,
    /// Attributes.
    pub config: *const dm_vf_config,
    /// A place.
    pub attachment: *const dm_attachment,
    /// The port to reclaim.
    pub port: dm_port,
    /// Owners that live, `dm_str` each.
    pub live: dm_list,
}

/// A VF at its place.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_attached {
    /// Octets of this struct.
    pub size: u32,
    /// MTU.
    pub mtu: u32,
    /// Interface index; 0 if there is none.
    pub ifindex: u32,
    /// MAC.
    pub mac: [u8; 6],
    /// Zero.
    pub reserved: [u8; 2],
}

/// A VF as observed.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_vf_state {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_AT_*`.
    pub location: u32,
    /// Which VF.
    pub port: dm_port,
    /// 1 if `pci` is set.
    pub has_pci: u32,
    /// Largest L3 packet.
    pub mtu: u32,
    /// Its PCI address.
    pub pci: dm_pci,
    /// MAC given by the PF.
    pub admin_mac: [u8; 6],
    /// MAC in use.
    pub effective_mac: [u8; 6],
    /// Zero.
    pub reserved: u32,
    /// Namespace or driver.
    pub place: dm_str,
    /// Its lease, in the arena; null if there is none.
    pub lease: *const dm_vf_lease,
}

/// A slot of the network processor.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_slot {
    /// Octets of this struct.
    pub size: u32,
    /// Which.
    pub slot: u32,
}

/// A program for a slot.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_program {
    /// Octets of this struct.
    pub size: u32,
    /// Which slot.
    pub slot: u32,
    /// Its name.
    pub name: dm_str,
    /// Its version.
    pub version: dm_str,
    /// Digest of the image.
    pub hash: dm_list,
    /// The image, octets.
    pub image: dm_list,
}

/// What a slot holds.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_program_info {
    /// Octets of this struct.
    pub size: u32,
    /// Which slot.
    pub slot: u32,
    /// `DM_SLOT_*`; the texts mean nothing when it is empty.
    pub state: u32,
    /// Zero.
    pub reserved: u32,
    /// Name of the program.
    pub name: dm_str,
    /// Its version.
    pub version: dm_str,
    /// Its digest, octets.
    pub hash: dm_list,
}

/// A table of the running program.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_table_info {
    /// Octets of this struct.
    pub size: u32,
    /// Its number.
    pub id: u32,
    /// `DM_TABLE_*`.
    pub kind: u32,
    /// Octets of a key.
    pub key_len: u16,
    /// Octets of a value.
    pub value_len: u16,
    /// Entries in use.
    pub used: u64,
    /// Entries it can hold.
    pub capacity: u64,
    /// Its name.
    pub name: dm_str,
}

/// An entry of a table.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_entry {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_ADD` puts it, `DM_REMOVE` deletes it; 0 in an answer.
    pub kind: u32,
    /// Lower numbers win.
    pub priority: u32,
    /// 1 if `mask` is set.
    pub has_mask: u32,
    /// The key, octets.
    pub key: dm_list,
    /// Its bits that count, octets.
    pub mask: dm_list,
    /// The value, octets.
    pub value: dm_list,
}

/// Entries to be written, or the table to be read.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_entries {
    /// Octets of this struct.
    pub size: u32,
    /// Which table.
    pub table: u32,
    /// `dm_entry` each.
    pub entries: dm_list,
}

/// One leg of a connection. Frozen.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_leg {
    /// Port of the card.
    pub port: dm_port,
    /// The proxy's address.
    pub local: dm_addr,
    /// The peer's address.
    pub remote: dm_addr,
    /// The proxy's port.
    pub local_port: u16,
    /// The peer's port.
    pub remote_port: u16,
    /// IPv6 zones of the two addresses.
    pub scope: [u32; 2],
    /// IPv6 flow labels of the two addresses.
    pub flow: [u32; 2],
    /// Next sequence number to send.
    pub send_next: u32,
    /// Next sequence number to receive.
    pub receive_next: u32,
}

/// A connection that the network processor can carry; as an answer, what became of it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_connection {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_CONNECTION_*`.
    pub kind: u32,
    /// The leg to the client.
    pub downstream: dm_leg,
    /// The leg to the server.
    pub upstream: dm_leg,
    /// Octets passed from client to server.
    pub octets_up: u64,
    /// Octets passed from server to client.
    pub octets_down: u64,
}

/// Numbers of the network processor.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_offload_stats {
    /// Octets of this struct.
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// Connections carried now.
    pub connections: u64,
    /// Connections ever taken.
    pub connections_total: u64,
    /// Table entries in use.
    pub entries: u64,
}

/// A port as the eswitch knows it; as the answer of `port_open`, what may be sent there.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_port_info {
    /// Octets of this struct.
    pub size: u32,
    /// 1 if `mac` is set.
    pub has_mac: u32,
    /// Which port.
    pub port: dm_port,
    /// MAC of the function.
    pub mac: [u8; 6],
    /// Zero.
    pub reserved: [u8; 2],
    /// Largest L3 packet.
    pub mtu: u32,
    /// 1 if there is a carrier.
    pub link_up: u32,
    /// Name of the representor, for people.
    pub netdev: dm_str,
    /// `port_open`: handle of the open port.
    pub handle: u64,
    /// `port_open`: longest frame, super-frames included.
    pub max_frame: u64,
    /// `port_open`: descriptor that polls readable when frames wait; -1 if the port must be polled. The library's, until
    /// `port_close`.
    pub poll_fd: i32,
    /// `port_open`: 1 if open checksums may be sent.
    pub checksum_offload: u32,
    /// `port_open`: 1 if TCP super-frames may be sent.
    pub tso: u32,
    /// `port_open`: 1 if UDP super-frames may be sent.
    pub uso: u32,
}

/// A frame in the caller's memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_frame {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_CHECKSUM_*`.
    pub checksum: u32,
    /// First octet.
    pub at: *mut u8,
    /// Octets there is room for.
    pub capacity: u64,
    /// Octets of the frame.
    pub len: u64,
    /// First octet summed.
    pub sum_start: u16,
    /// Where the sum goes, from there.
    pub sum_offset: u16,
    /// `DM_GSO_*`.
    pub gso: u32,
    /// Payload octets of a segment.
    pub gso_size: u16,
    /// Octets in front of the payload.
    pub gso_header_len: u16,
    /// 1 if the flow negotiated ECN.
    pub gso_ecn: u32,
}

/// A rule that aged.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_aged {
    /// Octets of this struct.
    pub size: u32,
    /// 1 if `counters` are set.
    pub has_counters: u32,
    /// Which.
    pub cookie: dm_cookie,
    /// What it had counted.
    pub counters: dm_counters,
}

/// An event; which fields count is told at its kind.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_event {
    /// Octets of this struct.
    pub size: u32,
    /// `DM_EVENT_*`.
    pub kind: u32,
    /// A life of the card.
    pub epoch: u64,
    /// A number in use.
    pub used: u64,
    /// How many there are.
    pub limit: u64,
    /// A port.
    pub port: dm_port,
    /// An owner.
    pub owner: dm_owner,
    /// 1 if the carrier is there.
    pub up: u32,
    /// Zero.
    pub reserved: u32,
    /// A resource.
    pub resource: dm_str,
    /// `dm_aged` each.
    pub aged: dm_list,
    /// How the card ails, in memory of the caller.
    pub error: *mut dm_error,
}

/// The table of a library.
///
/// Control calls (those with a `dm_call`) must not block: one that takes time returns `DM_PENDING`, and its end comes by
/// `poll`. They are made from one thread at a time unless `flags` has `DM_THREAD_SAFE`. `info`, `capabilities`, `epoch`,
/// `poll`, `next_event` and `cancel` are quick and may be called from any thread at any time; `port_receive` and
/// `port_transmit` of one port come from one thread at a time, which need not be that of the control calls.
///
/// A caller gives every call a deadline, quick ones and frames included. One that has not returned by then fails the card: it is
/// told as ill, and nothing is called any more until that call returns. `close` is then not waited for.
///
/// Functions of a part (`vf_`, `steering_`, `offload_`, `port_`) are all there, or all null; which parts an open card has,
/// `dm_capabilities.parts` tells. What each function has to do is told at the trait of the same name in the documentation of `dpumesh-core`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_ops {
    /// Octets of this struct, as the library knows it.
    pub size: u32,
    /// `DM_ABI_MAJOR` that the library was built with.
    pub abi_major: u32,
    /// `DM_ABI_MINOR` that the library was built with.
    pub abi_minor: u32,
    /// `DM_THREAD_SAFE`.
    pub flags: u32,

    /// Opens the card by the text of the library's own configuration. May take its time. `DM_DONE` or `DM_FAILED`.
    pub open: Option<unsafe extern "C" fn(config: dm_str, handle: *mut u64, error: *mut dm_error) -> u32>,
    /// Ends all use of the handle. Calls that are pending then never complete; their memory is not touched any more.
    pub close: Option<unsafe extern "C" fn(handle: u64)>,
    /// Who it is.
    pub info: Option<unsafe extern "C" fn(handle: u64, info: *mut dm_info)>,
    /// What it can do now.
    pub capabilities: Option<unsafe extern "C" fn(handle: u64, capabilities: *mut dm_capabilities)>,
    /// The card's present life; while it is away, the last one.
    pub epoch: Option<unsafe extern "C" fn(handle: u64) -> u64>,
    /// Descriptor that polls readable when `poll` or `next_event` have something; -1 if they never do.
    pub poll_fd: Option<unsafe extern "C" fn(handle: u64) -> i32>,
    /// Writes up to `capacity` ends of pending calls and returns how many.
    pub poll:
        Option<unsafe extern "C" fn(handle: u64, completions: *mut dm_completion, capacity: u32) -> u32>,
    /// Takes the next event since `open`: `DM_DONE`, `DM_EMPTY`, or `DM_MORE` (the event stays).
    pub next_event:
        Option<unsafe extern "C" fn(handle: u64, event: *mut dm_event, arena: *mut dm_arena) -> u32>,
    /// Optional: nobody waits for this pending call any more. It still completes, soon.
    pub cancel: Option<unsafe extern "C" fn(handle: u64, token: u64)>,

    /// What changing the number of VFs would disturb: `DM_DISRUPTION_*`.
    pub vf_plan_count: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            want: *const dm_vf_count,
            disruption: *mut dm_number,
        ) -> u32,
    >,
    /// Changes the number of VFs.
    pub vf_set_count: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            want: *const dm_vf_count,
            have: *mut dm_vf_count,
        ) -> u32,
    >,
    /// Lists VFs, `dm_vf_state` each.
    pub vf_list: Option<unsafe extern "C" fn(handle: u64, call: *mut dm_call, states: *mut dm_rows) -> u32>,
    /// Leases a VF. The arena has room for the texts.
    pub vf_lease: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            request: *const dm_vf_request,
            lease: *mut dm_vf_lease,
        ) -> u32,
    >,
    /// Takes `order.lease` (SoC).
    pub vf_admit:
        Option<unsafe extern "C" fn(handle: u64, call: *mut dm_call, order: *const dm_vf_order) -> u32>,
    /// Gives `order.lease` back (SoC).
    pub vf_revoke:
        Option<unsafe extern "C" fn(handle: u64, call: *mut dm_call, order: *const dm_vf_order) -> u32>,
    /// Sets `order.config` of `order.lease`.
    pub vf_configure:
        Option<unsafe extern "C" fn(handle: u64, call: *mut dm_call, order: *const dm_vf_order) -> u32>,
    /// Moves the VF of `order.lease` to `order.attachment`.
    pub vf_attach: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            order: *const dm_vf_order,
            attached: *mut dm_attached,
        ) -> u32,
    >,
    /// Brings the VF of `order.lease` back.
    pub vf_detach:
        Option<unsafe extern "C" fn(handle: u64, call: *mut dm_call, order: *const dm_vf_order) -> u32>,
    /// Ends `order.lease` with a reset of `order.level`: `DM_RELEASED` or `DM_NOT_CURRENT`.
    pub vf_release: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            order: *const dm_vf_order,
            released: *mut dm_number,
        ) -> u32,
    >,
    /// Gets `order.port` back without its lease, up to `order.level`, unless its owner is in `order.live`: the `DM_RESET_*` it took.
    pub vf_reclaim: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            order: *const dm_vf_order,
            level: *mut dm_number,
        ) -> u32,
    >,

    /// Judges rules; `dm_verdict` each.
    pub steering_validate: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            rules: *const dm_rules,
            verdicts: *mut dm_rows,
        ) -> u32,
    >,
    /// Carries out a batch.
    pub steering_apply: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            batch: *const dm_batch,
            outcome: *mut dm_outcome,
        ) -> u32,
    >,
    /// Lists an owner's rules in (group, priority, cookie) order, `dm_installed` each.
    pub steering_list: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            whose: *const dm_of_owner,
            rules: *mut dm_rows,
        ) -> u32,
    >,
    /// Reads counters, `dm_count` each.
    pub steering_counters: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            which: *const dm_cookies,
            counts: *mut dm_rows,
        ) -> u32,
    >,
    /// Removes an owner's rules and says how many.
    pub steering_flush: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            whose: *const dm_of_owner,
            removed: *mut dm_number,
        ) -> u32,
    >,
    /// Sets a port's miss policy.
    pub steering_set_miss_policy:
        Option<unsafe extern "C" fn(handle: u64, call: *mut dm_call, miss: *const dm_miss) -> u32>,
    /// Use of finite resources, `dm_occupancy` each.
    pub steering_occupancy:
        Option<unsafe extern "C" fn(handle: u64, call: *mut dm_call, resources: *mut dm_rows) -> u32>,

    /// Lists slots, `dm_program_info` each.
    pub offload_programs:
        Option<unsafe extern "C" fn(handle: u64, call: *mut dm_call, slots: *mut dm_rows) -> u32>,
    /// Loads a program.
    pub offload_load: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            program: *const dm_program,
            info: *mut dm_program_info,
        ) -> u32,
    >,
    /// Makes a loaded program the running one.
    pub offload_activate:
        Option<unsafe extern "C" fn(handle: u64, call: *mut dm_call, slot: *const dm_slot) -> u32>,
    /// Empties a slot.
    pub offload_unload:
        Option<unsafe extern "C" fn(handle: u64, call: *mut dm_call, slot: *const dm_slot) -> u32>,
    /// Lists tables, `dm_table_info` each.
    pub offload_tables:
        Option<unsafe extern "C" fn(handle: u64, call: *mut dm_call, tables: *mut dm_rows) -> u32>,
    /// Writes entries. An error whose `kind` stays 0 is a success.
    pub offload_write: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            entries: *const dm_entries,
            errors: *mut dm_rows,
        ) -> u32,
    >,
    /// Reads a table, `dm_entry` each.
    pub offload_read: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            table: *const dm_entries,
            entries: *mut dm_rows,
        ) -> u32,
    >,
    /// Hands a connection over: its token.
    pub offload_connection: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            connection: *const dm_connection,
            token: *mut dm_number,
        ) -> u32,
    >,
    /// Takes a connection back by its token.
    pub offload_resume: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            token: *const dm_number,
            state: *mut dm_connection,
        ) -> u32,
    >,
    /// Numbers of the processor.
    pub offload_stats:
        Option<unsafe extern "C" fn(handle: u64, call: *mut dm_call, stats: *mut dm_offload_stats) -> u32>,

    /// Lists ports, `dm_port_info` each.
    pub port_list: Option<unsafe extern "C" fn(handle: u64, call: *mut dm_call, ports: *mut dm_rows) -> u32>,
    /// Opens `port.port`.
    pub port_open: Option<
        unsafe extern "C" fn(
            handle: u64,
            call: *mut dm_call,
            port: *const dm_port_info,
            open: *mut dm_port_info,
        ) -> u32,
    >,
    /// Closes an open port.
    pub port_close: Option<unsafe extern "C" fn(handle: u64, port: u64)>,
    /// Receives up to `count` frames, says in `done` how many: `DM_DONE` or `DM_FAILED`. Does not block.
    pub port_receive: Option<
        unsafe extern "C" fn(
            handle: u64,
            port: u64,
            frames: *mut dm_frame,
            count: u32,
            done: *mut u32,
            error: *mut dm_error,
        ) -> u32,
    >,
    /// Transmits the first of `count` frames, says in `done` how many were taken: `DM_DONE` or `DM_FAILED`. Does not block.
    pub port_transmit: Option<
        unsafe extern "C" fn(
            handle: u64,
            port: u64,
            frames: *mut dm_frame,
            count: u32,
            done: *mut u32,
            error: *mut dm_error,
        ) -> u32,
    >,
    /// Frames dropped because they broke the port's limits.
    pub port_refused: Option<unsafe extern "C" fn(handle: u64, port: u64) -> u64>,
}

/// The symbol `dpumesh_backend_v1` of a library. Writes its table, at most `want` octets of it, and the table's own size into
/// `ops.size`: `DM_DONE` or `DM_FAILED`. `host` stays valid. May be called more than once.
pub type dm_getter = Option<
    unsafe extern "C" fn(host: *const dm_host, want: u32, ops: *mut dm_ops, error: *mut dm_error) -> u32,
>;

/// What a library lets the conformance kit do to a card from outside; each is optional, and what is null skips its cases.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dm_hooks {
    /// Octets of this struct.
    pub size: u32,
    /// 1 if closing and opening with the same configuration finds the same card, as after a crash of the process.
    pub survives: u32,
    /// The card vanishes: `DM_DONE` or `DM_FAILED`.
    pub lose: Option<unsafe extern "C" fn(handle: u64) -> u32>,
    /// The card returns with a new epoch.
    pub bring_back: Option<unsafe extern "C" fn(handle: u64) -> u32>,
    /// Hands a frame in at a port, as the function behind it or the wire would.
    pub inject: Option<unsafe extern "C" fn(handle: u64, port: dm_port, octets: *const u8, len: u64) -> u32>,
    /// Takes the next frame that left by a port, its octets into `buffer` and their number into `len`: `DM_DONE` or `DM_EMPTY`.
    pub observe: Option<
        unsafe extern "C" fn(
            handle: u64,
            port: dm_port,
            buffer: *mut u8,
            capacity: u64,
            len: *mut u64,
        ) -> u32,
    >,
    /// Makes a namespace known under a path, or (`present` 0) takes it away. Null if real ones do.
    pub netns: Option<unsafe extern "C" fn(handle: u64, path: dm_str, present: u32) -> u32>,
    /// Makes moves of a VF fail (`jammed` 1) or work again.
    pub jam: Option<unsafe extern "C" fn(handle: u64, port: dm_port, jammed: u32) -> u32>,
    /// Takes a VF away behind the backend's back.
    pub strand: Option<unsafe extern "C" fn(handle: u64, port: dm_port) -> u32>,
    /// Writes program number `index` that the processor takes, its octets being the library's: `DM_DONE` or `DM_EMPTY`.
    pub program: Option<unsafe extern "C" fn(index: u32, program: *mut dm_program) -> u32>,
}
