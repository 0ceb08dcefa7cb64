// dpumesh.h: the C interface of dpumesh backends, version 1.0. Made from dpumesh-hw/src/loader/abi.rs; do not edit.
//
// A backend is a shared library with one symbol, `dpumesh_backend_v1`, which gives a table of functions (`dm_ops`). What each
// function must do is told at the trait of the same name in dpumesh-core; what is said here is how it is said in C.
//
//  * Every struct begins with its size, but for those marked frozen. Later minor versions only append: whoever gets a
//    struct looks at no more than its size, and whoever makes one sets it (`DM_NEW`).
//  * All memory is the caller's and stays valid until the call ended. Texts and lists of an answer are taken from the
//    call's arena (`dm_take`, `dm_text`); elements of an answer go to its rows (`DM_ROW`). If either has no room, a call that changes
//    nothing answers DM_MORE and is made again with more.
//  * Enumerations are numbers. One that is not known must be refused, never guessed.
//  * Nothing is unwound, thrown or jumped across.
//  * A control call must not block. One that takes time answers DM_PENDING; its end is fetched by `poll`, when the
//    descriptor of `poll_fd` is readable. So are events, by `next_event`.
//
// For 64-bit machines. examples/c-backend has a whole backend.

#ifndef DPUMESH_H
#define DPUMESH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

// Major version of this interface. Libraries of another one are refused.
#define DM_ABI_MAJOR 1

// Minor version: grows when something is appended to a struct or to the table.
#define DM_ABI_MINOR 0

// Status: done; the answer is written.
#define DM_DONE 0

// Status: begun; the end comes by `poll`, with the call's token. All memory of the call stays valid until then.
#define DM_PENDING 1

// Status: failed; `dm_call.error` says how.
#define DM_FAILED 2

// Status: the answer does not fit. `dm_rows.len` and `dm_arena.needed` say how much room it takes; nothing changed. Only calls
// that change nothing may say so.
#define DM_MORE 3

// Status of `next_event`: there is none.
#define DM_EMPTY 4

// `dm_ops.flags`: functions of the table may be called from several threads at a time.
#define DM_THREAD_SAFE 1

// `dm_call.epoch` of a call that changes nothing.
#define DM_NO_FENCE UINT64_MAX

// A number that nobody knows.
#define DM_UNKNOWN UINT64_MAX

// `dm_error.kind`: the backend cannot do this at all.
#define DM_UNSUPPORTED 1

// `dm_error.kind`: the request makes no sense on any backend.
#define DM_INVALID 2

// `dm_error.kind`: no such object.
#define DM_NOT_FOUND 3

// `dm_error.kind`: the object is there already, and differs.
#define DM_EXISTS 4

// `dm_error.kind`: two objects contradict each other.
#define DM_CONFLICT 5

// `dm_error.kind`: the lease or epoch given is not current any more.
#define DM_STALE 6

// `dm_error.kind`: a finite resource is used up; `object` names it.
#define DM_CAPACITY_EXCEEDED 7

// `dm_error.kind`: in use by somebody.
#define DM_BUSY 8

// `dm_error.kind`: the deadline passed.
#define DM_TIMEOUT 9

// `dm_error.kind`: the device is gone; wait for the event `DM_EVENT_BACK`.
#define DM_DEVICE_LOST 10

// `dm_error.kind`: not allowed.
#define DM_DENIED 11

// `dm_error.kind`: the operating system or a link failed.
#define DM_IO 12

// `dm_error.kind`: device, firmware or backend misbehaved.
#define DM_FAULT 13

// `dm_error.kind`: this interface was broken.
#define DM_ABI 14

// `dm_error.kind`: a peer broke a protocol.
#define DM_PEER_MISBEHAVED 15

// `dm_error.effect`: nothing changed.
#define DM_EFFECT_NONE 0

// `dm_error.effect`: everything took effect; only the answer failed.
#define DM_EFFECT_APPLIED 1

// `dm_error.effect`: some of it took effect.
#define DM_EFFECT_PARTIAL 2

// `dm_error.effect`: nobody can tell.
#define DM_EFFECT_UNKNOWN 3

// `dm_error.retry`: as is usual for the kind.
#define DM_RETRY_USUAL 0

// `dm_error.retry`: it will fail again.
#define DM_RETRY_NEVER 1

// `dm_error.retry`: at once or after a short pause.
#define DM_RETRY_NOW 2

// `dm_error.retry`: after the device came back.
#define DM_RETRY_AFTER_RESET 3

// `dm_error.retry`: after something was freed.
#define DM_RETRY_AFTER_FREE 4

// `dm_error.has`: `index` is set.
#define DM_HAS_INDEX 1

// `dm_error.has`: `vendor_code` is set.
#define DM_HAS_VENDOR_CODE 2

// `dm_error.has`: the error is about an object, whose name and field may be empty.
#define DM_HAS_OBJECT 4

// `dm_info.role`: the host's side, which has the VFs.
#define DM_ROLE_HOST 1

// `dm_info.role`: the SoC's side, which has eswitch, ports and network processor.
#define DM_ROLE_SOC 2

// `dm_info.role`: both.
#define DM_ROLE_BOTH 3

// `dm_port.kind`: a network port of the card.
#define DM_PORT_UPLINK 1

// `dm_port.kind`: a physical function.
#define DM_PORT_PF 2

// `dm_port.kind`: a virtual function, seen at its representor.
#define DM_PORT_VF 3

// `dm_port.kind`: the entry of the shared proxy.
#define DM_PORT_STACK 4

// Bit of a field in `dm_pattern.fields`; also of `dm_capabilities.fields`, where addresses have a bit per family.
#define DM_FIELD_PORT 1

// Source MAC.
#define DM_FIELD_ETH_SRC (1 << 1)

// Destination MAC.
#define DM_FIELD_ETH_DST (1 << 2)

// EtherType.
#define DM_FIELD_ETHERTYPE (1 << 3)

// 802.1Q tag.
#define DM_FIELD_VLAN (1 << 4)

// Tunnel's network identifier.
#define DM_FIELD_VNI (1 << 5)

// Source IP address.
#define DM_FIELD_IP_SRC (1 << 6)

// Destination IP address.
#define DM_FIELD_IP_DST (1 << 7)

// IP protocol.
#define DM_FIELD_IP_PROTO (1 << 8)

// DSCP.
#define DM_FIELD_DSCP (1 << 9)

// Fragmentation.
#define DM_FIELD_FRAGMENT (1 << 10)

// L4 source port.
#define DM_FIELD_L4_SRC (1 << 11)

// L4 destination port.
#define DM_FIELD_L4_DST (1 << 12)

// TCP flags.
#define DM_FIELD_TCP_FLAGS (1 << 13)

// Mark of an earlier group.
#define DM_FIELD_MARK (1 << 14)

// Connection state.
#define DM_FIELD_CT_STATE (1 << 15)

// Index into `dm_capabilities.fields` and `.hardware_fields`. Source port of the card.
#define DM_MATCH_PORT 0

// Source MAC.
#define DM_MATCH_ETH_SRC 1

// Destination MAC.
#define DM_MATCH_ETH_DST 2

// EtherType.
#define DM_MATCH_ETHERTYPE 3

// 802.1Q tag.
#define DM_MATCH_VLAN 4

// Tunnel's network identifier.
#define DM_MATCH_VNI 5

// IPv4 source.
#define DM_MATCH_IP4_SRC 6

// IPv4 destination.
#define DM_MATCH_IP4_DST 7

// IPv6 source.
#define DM_MATCH_IP6_SRC 8

// IPv6 destination.
#define DM_MATCH_IP6_DST 9

// IP protocol.
#define DM_MATCH_IP_PROTO 10

// DSCP.
#define DM_MATCH_DSCP 11

// Fragmentation.
#define DM_MATCH_FRAGMENT 12

// L4 source port.
#define DM_MATCH_L4_SRC 13

// L4 destination port.
#define DM_MATCH_L4_DST 14

// TCP flags.
#define DM_MATCH_TCP_FLAGS 15

// Mark.
#define DM_MATCH_MARK 16

// Connection state.
#define DM_MATCH_CT_STATE 17

// Bits of an entry of `dm_capabilities.fields`: the whole value.
#define DM_KIND_EXACT 1

// Leading bits.
#define DM_KIND_PREFIX 2

// Any bits.
#define DM_KIND_MASK 4

// A range.
#define DM_KIND_RANGE 8

// `dm_ip_match.kind`: the first `prefix_len` bits; `mask` is filled in as well.
#define DM_IP_PREFIX 1

// `dm_ip_match.kind`: the bits of `mask`.
#define DM_IP_MASKED 2

// `dm_pattern.vlan`: no tag; 1 to 4094 is a tag's identifier.
#define DM_VLAN_UNTAGGED 0

// `dm_pattern.fragment`: a whole packet.
#define DM_FRAGMENT_WHOLE 1

// `dm_pattern.fragment`: any fragment.
#define DM_FRAGMENT_ANY 2

// `dm_pattern.fragment`: the fragment at offset 0.
#define DM_FRAGMENT_FIRST 3

// `dm_pattern.fragment`: a fragment behind it.
#define DM_FRAGMENT_LATER 4

// `dm_action.kind`, final: the frame is gone.
#define DM_ACTION_DROP 1

// Final: the frame leaves by `port`.
#define DM_ACTION_FORWARD 2

// Final: the frame goes to the shared proxy.
#define DM_ACTION_PUNT 3

// Final: the frame goes to the SoC's own network stack.
#define DM_ACTION_TO_KERNEL 4

// Final: the frame goes to receive queue `number`.
#define DM_ACTION_QUEUE 5

// Final: the frame goes to one of `queues` (`uint16_t` each).
#define DM_ACTION_RSS 6

// Final: matching goes on in group `number`.
#define DM_ACTION_JUMP 7

// Puts the frame into a tunnel of kind `tunnel`: `number` is the VNI; `local`, `remote`, `eth_src`, `eth_dst` are outer addresses.
#define DM_ACTION_ENCAPSULATE 8

// Takes the frame out of a tunnel of kind `tunnel`.
#define DM_ACTION_DECAPSULATE 9

// Writes the source MAC, `eth_src`.
#define DM_ACTION_SET_ETH_SRC 10

// Writes the destination MAC, `eth_dst`.
#define DM_ACTION_SET_ETH_DST 11

// Writes the source address, `local`.
#define DM_ACTION_SET_IP_SRC 12

// Writes the destination address, `remote`.
#define DM_ACTION_SET_IP_DST 13

// Writes the L4 source port, `number`.
#define DM_ACTION_SET_L4_SRC 14

// Writes the L4 destination port, `number`.
#define DM_ACTION_SET_L4_DST 15

// Writes the DSCP, `number`.
#define DM_ACTION_SET_DSCP 16

// Counts TTL or hop limit down.
#define DM_ACTION_DECREMENT_TTL 17

// Adds the 802.1Q tag `number`.
#define DM_ACTION_PUSH_VLAN 18

// Takes the 802.1Q tag off.
#define DM_ACTION_POP_VLAN 19

// Sets the mark to `number`.
#define DM_ACTION_MARK 20

// Counts packets and octets.
#define DM_ACTION_COUNT 21

// Sends a copy out of `port`.
#define DM_ACTION_MIRROR 22

// Drops what exceeds meter `number`.
#define DM_ACTION_METER 23

// Looks the connection up in zone `number`; enters it if it is new and `commit` is 1.
#define DM_ACTION_CONNTRACK 24

// `dm_action.tunnel`: VXLAN (RFC 7348).
#define DM_TUNNEL_VXLAN 1

// `dm_action.tunnel`: Geneve (RFC 8926).
#define DM_TUNNEL_GENEVE 2

// `dm_owner.kind`: the node agent.
#define DM_OWNER_AGENT 1

// `dm_owner.kind`: the shared proxy.
#define DM_OWNER_PROXY 2

// `dm_owner.kind`: the dataplane.
#define DM_OWNER_DATAPLANE 3

// `dm_owner.kind`: users' rules, set number `user`.
#define DM_OWNER_USER 4

// `dm_rule.placement`: in the card if it can, in software else.
#define DM_PLACE_ANY 0

// `dm_rule.placement`: in the card only. As an answer: it acts in the card.
#define DM_PLACE_HARDWARE 1

// `dm_rule.placement`: in software only. As an answer: it acts in software, for `reason`.
#define DM_PLACE_SOFTWARE 2

// As an answer only: half in the card, for `reason`.
#define DM_PLACE_PARTIAL 3

// `dm_verdict.verdict` only: it cannot be done; `field` and `reason` say why. The others are `DM_PLACE_*`.
#define DM_VERDICT_NO 4

// `dm_operation.kind`: install `rule`.
#define DM_ADD 1

// `dm_operation.kind`: remove `cookie` of `owner`.
#define DM_REMOVE 2

// `dm_batch.atomicity`: go on after a failure.
#define DM_CONTINUE 0

// `dm_batch.atomicity`: undo those before it.
#define DM_ROLLBACK 1

// `dm_batch.atomicity`: all or none.
#define DM_ATOMIC 2

// `dm_change.kind`: installed; acts at `placement`.
#define DM_ADDED 1

// `dm_change.kind`: was there already; acts at `placement`.
#define DM_PRESENT 2

// `dm_change.kind`: removed; `counters` are final if `has_counters`.
#define DM_REMOVED 3

// `dm_change.kind`: no rule has the cookie.
#define DM_ABSENT 4

// `dm_change.kind`: not begun or undone, because of another one.
#define DM_SKIPPED 5

// `dm_change.kind`: failed; the error of the same index says how.
#define DM_CHANGE_FAILED 6

// `dm_outcome.undone`: nothing was undone.
#define DM_UNDONE_NO 0

// `dm_outcome.undone`: everything was.
#define DM_UNDONE_ALL 1

// `dm_outcome.undone`: undoing failed; `undo_error` says how.
#define DM_UNDONE_FAILED 2

// `dm_miss.policy`: frames that match no rule are dropped.
#define DM_MISS_DROP 0

// `dm_miss.policy`: they go to the software on the representor.
#define DM_MISS_SOFTWARE 1

// `dm_capabilities.counter_unit`: octets of frames, without FCS.
#define DM_COUNTER_L2 0

// `dm_capabilities.counter_unit`: octets of IP packets.
#define DM_COUNTER_L3 1

// `dm_capabilities.events`: link changes.
#define DM_EVENTS_LINK 1

// Health changes.
#define DM_EVENTS_HEALTH 2

// High-water marks.
#define DM_EVENTS_HIGH_WATER 4

// Aged rules.
#define DM_EVENTS_AGED 8

// VFs that came or went.
#define DM_EVENTS_VF 16

// `dm_event.kind`: the card is gone; `epoch` ended.
#define DM_EVENT_LOST 1

// The card is back; `epoch` begins.
#define DM_EVENT_BACK 2

// Carrier of `port` is `up` now.
#define DM_EVENT_LINK 3

// Health changed; healthy unless `error.kind` is set.
#define DM_EVENT_HEALTH 4

// `resource` passed its mark: `used` of `limit`.
#define DM_EVENT_HIGH_WATER 5

// Rules of `owner` aged: `aged` (`dm_aged` each).
#define DM_EVENT_AGED 6

// `port`, a VF, appeared.
#define DM_EVENT_VF_ADDED 7

// `port`, a VF, disappeared.
#define DM_EVENT_VF_REMOVED 8

// `used` events were lost.
#define DM_EVENT_OVERFLOWED 9

// Disruption: nothing.
#define DM_DISRUPTION_NONE 0

// Disruption: pods with VFs must leave first.
#define DM_DISRUPTION_DRAIN 1

// Disruption: the node must reboot.
#define DM_DISRUPTION_REBOOT 2

// `dm_vf_selector.has`: `port`.
#define DM_SELECT_PORT 1

// `pf`.
#define DM_SELECT_PF 2

// `pci`.
#define DM_SELECT_PCI 4

// `numa_node`.
#define DM_SELECT_NUMA 8

// `driver`.
#define DM_SELECT_DRIVER 16

// `dm_vf_config.has` and `dm_capabilities.vf_attributes`: administrative MAC.
#define DM_VF_MAC 1

// VLAN with QoS and protocol.
#define DM_VF_VLAN 2

// Trust.
#define DM_VF_TRUST 4

// Anti-spoofing.
#define DM_VF_SPOOF_CHECK 8

// Link state.
#define DM_VF_LINK_STATE 16

// Smallest transmit rate.
#define DM_VF_MIN_RATE 32

// Largest transmit rate.
#define DM_VF_MAX_RATE 64

// MTU.
#define DM_VF_MTU 128

// `dm_vf_config.link_state`: follows the uplink.
#define DM_LINK_AUTO 0

// Always up.
#define DM_LINK_ENABLE 1

// Always down.
#define DM_LINK_DISABLE 2

// `dm_attachment.kind`: a network device named `ifname` in the namespace at `path`.
#define DM_ATTACH_NETNS 1

// A VFIO device.
#define DM_ATTACH_VFIO 2

// A vhost-user socket at `path`.
#define DM_ATTACH_VHOST_USER 4

// Reset level: attributes are restored. Bits in `dm_capabilities.vf_resets`.
#define DM_RESET_CONFIG 1

// Reset level: function-level reset.
#define DM_RESET_FUNCTION 2

// Reset level: the whole device.
#define DM_RESET_DEVICE 4

// Release: the VF is free.
#define DM_RELEASED 1

// Release: the lease was not current; nothing was touched.
#define DM_NOT_CURRENT 2

// `dm_vf_state.location`: in the host's namespace.
#define DM_AT_HOST 1

// In the namespace at `place`.
#define DM_AT_NETNS 2

// Bound to the driver `place`.
#define DM_AT_DRIVER 3

// Nowhere to be found.
#define DM_AT_NOWHERE 4

// `dm_program_info.state`: the slot is empty.
#define DM_SLOT_EMPTY 0

// Loaded.
#define DM_SLOT_LOADED 1

// Running.
#define DM_SLOT_RUNNING 2

// Draining.
#define DM_SLOT_DRAINING 3

// `dm_table_info.kind`: whole keys.
#define DM_TABLE_EXACT 1

// Keys are indices.
#define DM_TABLE_ARRAY 2

// Longest prefix.
#define DM_TABLE_LPM 3

// Masked keys with priorities.
#define DM_TABLE_TERNARY 4

// Read-only counts.
#define DM_TABLE_COUNTER 5

// Meters.
#define DM_TABLE_METER 6

// `dm_connection.kind`: splice. Bits in `dm_capabilities.connection_kinds`.
#define DM_CONNECTION_SPLICE 1

// Splice with TLS records.
#define DM_CONNECTION_TLS_RECORDS 2

// Splice with a header rewrite.
#define DM_CONNECTION_REWRITE 4

// `dm_frame.checksum`: nobody has verified it.
#define DM_CHECKSUM_UNVERIFIED 0

// Verified.
#define DM_CHECKSUM_VERIFIED 1

// To be stored at `sum_start + sum_offset` over the octets from `sum_start` on.
#define DM_CHECKSUM_PARTIAL 2

// `dm_frame.gso`: no super-frame.
#define DM_GSO_NONE 0

// TCP over IPv4.
#define DM_GSO_TCP4 1

// TCP over IPv6.
#define DM_GSO_TCP6 2

// UDP.
#define DM_GSO_UDP 3

// Log levels of `dm_host.log`.
#define DM_LOG_ERROR 1

// Warning.
#define DM_LOG_WARN 2

// Information.
#define DM_LOG_INFO 3

// Debugging.
#define DM_LOG_DEBUG 4

// `dm_capabilities.parts`: leases of virtual functions, `vf_`.
#define DM_PART_VF 1

// Rules in the eswitch, `steering_`.
#define DM_PART_STEERING 2

// The network processor, `offload_`.
#define DM_PART_OFFLOAD 4

// Frames of ports, `port_`.
#define DM_PART_PORTS 8

// `dm_capabilities.actions`: drop.
#define DM_CAN_DROP 1

// Forward.
#define DM_CAN_FORWARD (1 << 1)

// Punt.
#define DM_CAN_PUNT (1 << 2)

// To the SoC's own stack.
#define DM_CAN_TO_KERNEL (1 << 3)

// Queue and RSS.
#define DM_CAN_QUEUE (1 << 4)

// Jump.
#define DM_CAN_JUMP (1 << 5)

// VXLAN, both ways.
#define DM_CAN_VXLAN (1 << 6)

// Geneve, both ways.
#define DM_CAN_GENEVE (1 << 7)

// Rewriting MACs.
#define DM_CAN_REWRITE_ETH (1 << 8)

// Rewriting addresses and ports.
#define DM_CAN_REWRITE_IP (1 << 9)

// Rewriting the DSCP.
#define DM_CAN_REWRITE_DSCP (1 << 10)

// Counting the TTL down.
#define DM_CAN_TTL (1 << 11)

// Tags.
#define DM_CAN_VLAN (1 << 12)

// Marks.
#define DM_CAN_MARK (1 << 13)

// Counting.
#define DM_CAN_COUNT (1 << 14)

// Mirroring.
#define DM_CAN_MIRROR (1 << 15)

// Meters.
#define DM_CAN_METER (1 << 16)

// Connection tracking.
#define DM_CAN_CONNTRACK (1 << 17)

// Octets of text, UTF-8, not terminated. Frozen. In an answer it must lie in the call's arena.
typedef struct dm_str {
  // First octet; may be null when `len` is 0.
  const uint8_t *at;
  // How many.
  uint64_t len;
} dm_str;

// Elements in a row, each `stride` octets after the last: a caller's newer and longer struct does not disturb
// (`DM_AT`). Frozen.
typedef struct dm_list {
  // First element; may be null when `len` is 0.
  const void *at;
  // How many.
  uint32_t len;
  // Octets from one to the next.
  uint32_t stride;
} dm_list;

// Memory of the caller for texts and lists of an answer. Take from it with `dm_take`, which keeps `used` and `needed`.
typedef struct dm_arena {
  // Octets of this struct.
  uint32_t size;
  // Zero.
  uint32_t reserved;
  // First octet, aligned to 16.
  uint8_t *at;
  // Octets there are.
  uint64_t capacity;
  // Octets taken.
  uint64_t used;
  // Octets that the whole answer would have taken.
  uint64_t needed;
} dm_arena;

// Memory of the caller for the elements of an answer.
typedef struct dm_rows {
  // Octets of this struct.
  uint32_t size;
  // Octets from one element to the next.
  uint32_t stride;
  // First element.
  void *at;
  // Elements there is room for.
  uint64_t capacity;
  // Elements of the answer; more than `capacity` goes with `DM_MORE`.
  uint64_t len;
} dm_rows;

// How something failed. Texts are terminated by a zero octet.
typedef struct dm_error {
  // Octets of this struct.
  uint32_t size;
  // `DM_UNSUPPORTED` and so on; 0 is no error.
  uint32_t kind;
  // `DM_EFFECT_*`: what changed all the same.
  uint32_t effect;
  // `DM_RETRY_*`.
  uint32_t retry;
  // `DM_HAS_*`.
  uint32_t has;
  // Zero.
  uint32_t reserved;
  // Which element of the list that was given.
  uint64_t index;
  // The vendor's own number.
  int64_t vendor_code;
  // Name of the object or resource, as `steering.rules` or `c0pf0vf3`.
  uint8_t object[96];
  // Path of the field, as `pattern.ip_dst`.
  uint8_t field[64];
  // One sentence for people.
  uint8_t message[320];
  // What the library's own layers said, or everything that failed in a teardown; may be empty.
  uint8_t cause[320];
} dm_error;

// One call. Its memory, and that of everything it points to, is the caller's and stays valid until the call ended.
typedef struct dm_call {
  // Octets of this struct.
  uint32_t size;
  // Zero.
  uint32_t reserved;
  // Names the call in `dm_completion` and `cancel`; never 0, never given twice.
  uint64_t token;
  // Fence: the call fails with `DM_STALE` unless this is the card's present epoch. `DM_NO_FENCE` for calls that
  // change nothing.
  uint64_t epoch;
  // Filled in when the call fails.
  struct dm_error *error;
  // For texts and lists of the answer.
  struct dm_arena *arena;
} dm_call;

// The end of a call that was pending.
typedef struct dm_completion {
  // Octets of this struct.
  uint32_t size;
  // `DM_DONE`, `DM_FAILED` or `DM_MORE`.
  uint32_t status;
  // Which call.
  uint64_t token;
} dm_completion;

// What the caller offers to the library; valid as long as the process.
typedef struct dm_host {
  // Octets of this struct.
  uint32_t size;
  // Zero.
  uint32_t reserved;
  // To be given back to `log`.
  void *context;
  // Writes to the caller's log; `level` is `DM_LOG_*`. Any thread; does not block.
  void (*log)(void *context, uint32_t level, struct dm_str text);
} dm_host;

// Who a backend is. Texts are terminated by a zero octet.
typedef struct dm_info {
  // Octets of this struct.
  uint32_t size;
  // `DM_ROLE_*`.
  uint32_t role;
  // Name of the backend.
  uint8_t name[64];
  // Version of its code.
  uint8_t version[64];
  // Which card of the node.
  uint8_t dpu[64];
  // Firmware or device, for people.
  uint8_t device[128];
  // Version of the conformance kit it was proved with; empty until then.
  uint8_t conformance[64];
} dm_info;

// What a card can do in its present mode; zero is "not at all". A part in `parts` needs its functions in the table and
// numbers here that are not zero; a card that claims one without the other is refused.
typedef struct dm_capabilities {
  // Octets of this struct.
  uint32_t size;
  // `DM_EVENTS_*`.
  uint32_t events;
  // Name of the mode, terminated by a zero octet.
  uint8_t mode[64];
  // Most VFs per physical function.
  uint32_t max_vfs;
  // `DM_VF_*` that can be set.
  uint32_t vf_attributes;
  // Largest MTU of a VF; 0 if none is known.
  uint32_t vf_max_mtu;
  // `DM_ATTACH_*`.
  uint32_t vf_attachments;
  // `DM_RESET_*`.
  uint32_t vf_resets;
  // 1 if the number of VFs can be changed.
  uint32_t vf_resizable;
  // Rules that the card itself can hold.
  uint64_t hardware_rules;
  // Rules in all.
  uint64_t rules;
  // Rules that can count.
  uint64_t counters;
  // Groups.
  uint32_t groups;
  // Priority levels per group.
  uint32_t priorities;
  // Sets of masks at a time.
  uint32_t masks;
  // `DM_COUNTER_*`.
  uint32_t counter_unit;
  // How old a counter value may be, in milliseconds.
  uint32_t counter_age_ms;
  // Longest batch.
  uint32_t batch_max;
  // Bit `1 << DM_CONTINUE` and so on.
  uint32_t atomicity;
  // 1 if each operation of a batch gets a status of its own.
  uint32_t per_operation_status;
  // 1 if rules can age.
  uint32_t idle_timeout;
  // 1 if software holds what hardware cannot.
  uint32_t software_fallback;
  // `DM_CAN_*`: carried out in hardware.
  uint32_t hardware_actions;
  // `DM_CAN_*`: carried out at all.
  uint32_t actions;
  // `DM_KIND_*` for each `DM_MATCH_*`: matched in hardware.
  uint8_t hardware_fields[32];
  // `DM_KIND_*` for each `DM_MATCH_*`: matched at all.
  uint8_t fields[32];
  // Program slots.
  uint32_t slots;
  // Tables that programs may declare.
  uint32_t tables;
  // Largest program image in octets.
  uint64_t max_image;
  // Entries over all tables.
  uint64_t entries;
  // Connections that the network processor can carry.
  uint64_t connections;
  // `DM_CONNECTION_*`.
  uint32_t connection_kinds;
  // Ports that can be open at a time.
  uint32_t open_ports;
  // 1 if checksums can be left open.
  uint32_t checksum_offload;
  // 1 if TCP super-frames are cut.
  uint32_t tso;
  // 1 if UDP super-frames are cut.
  uint32_t uso;
  // `DM_PART_*`: parts that this card has. Fixed while it is open.
  uint32_t parts;
} dm_capabilities;

// A virtual port of the card. Frozen.
typedef struct dm_port {
  // `DM_PORT_*`.
  uint16_t kind;
  // Host it belongs to, for functions.
  uint16_t controller;
  // Physical function, for functions.
  uint16_t pf;
  // Number of the VF, uplink or stack port.
  uint16_t index;
} dm_port;

// An IP address. Frozen.
typedef struct dm_addr {
  // 4 or 6; 0 is none.
  uint32_t family;
  // Network order; IPv4 in the first four.
  uint8_t octets[16];
} dm_addr;

// An IP address pattern. Frozen.
typedef struct dm_ip_match {
  // `DM_IP_*`.
  uint32_t kind;
  // Length of the prefix in bits.
  uint32_t prefix_len;
  // Value.
  struct dm_addr value;
  // Which bits count.
  uint8_t mask[16];
} dm_ip_match;

// A rule's name. Frozen.
typedef struct dm_cookie {
  // Upper 64 bits.
  uint64_t high;
  // Lower 64 bits.
  uint64_t low;
} dm_cookie;

// A rule's owner. Frozen.
typedef struct dm_owner {
  // `DM_OWNER_*`.
  uint32_t kind;
  // Number of the users' set; else 0.
  uint32_t user;
} dm_owner;

// What a rule looks at: the conjunction of the fields whose bit is set. What else is in the struct means nothing.
typedef struct dm_pattern {
  // Octets of this struct.
  uint32_t size;
  // `DM_FIELD_*`. An unknown bit must be refused: the rule would match too much.
  uint32_t fields;
  // Port the frame came in on.
  struct dm_port port;
  // Source MAC.
  uint8_t eth_src[6];
  // Which bits of it count.
  uint8_t eth_src_mask[6];
  // Destination MAC.
  uint8_t eth_dst[6];
  // Which bits of it count.
  uint8_t eth_dst_mask[6];
  // EtherType, in host order as all numbers.
  uint16_t ethertype;
  // Tag, or `DM_VLAN_UNTAGGED`.
  uint16_t vlan;
  // Tunnel's network identifier.
  uint32_t vni;
  // Source address.
  struct dm_ip_match ip_src;
  // Destination address.
  struct dm_ip_match ip_dst;
  // Protocol.
  uint32_t ip_proto;
  // DSCP.
  uint32_t dscp;
  // `DM_FRAGMENT_*`.
  uint32_t fragment;
  // First and last source port.
  uint16_t l4_src[2];
  // First and last destination port.
  uint16_t l4_dst[2];
  // TCP flags.
  uint8_t tcp_flags;
  // Which of them count.
  uint8_t tcp_flags_mask;
  // Connection state.
  uint8_t ct_state;
  // Which bits of it count.
  uint8_t ct_state_mask;
  // Mark.
  uint32_t mark;
  // Which bits of it count.
  uint32_t mark_mask;
} dm_pattern;

// One step of a rule; which fields it uses is told at its kind.
typedef struct dm_action {
  // Octets of this struct.
  uint32_t size;
  // `DM_ACTION_*`. An unknown one must be refused.
  uint32_t kind;
  // A port.
  struct dm_port port;
  // A number.
  uint32_t number;
  // `DM_TUNNEL_*`.
  uint32_t tunnel;
  // 1 to commit.
  uint32_t commit;
  // An address.
  struct dm_addr local;
  // An address.
  struct dm_addr remote;
  // A MAC.
  uint8_t eth_src[6];
  // A MAC.
  uint8_t eth_dst[6];
  // Queues, `uint16_t` each.
  struct dm_list queues;
} dm_action;

// A steering rule.
typedef struct dm_rule {
  // Octets of this struct.
  uint32_t size;
  // Where it is looked for.
  uint32_t group;
  // Its name.
  struct dm_cookie cookie;
  // Who may see and remove it.
  struct dm_owner owner;
  // Lower numbers win.
  uint32_t priority;
  // `DM_PLACE_*`.
  uint32_t placement;
  // Removed after so many milliseconds without a hit; 0 keeps it.
  uint32_t idle_timeout_ms;
  // Zero.
  uint32_t reserved;
  // What it looks at.
  const struct dm_pattern *pattern;
  // What it does, `dm_action` each.
  struct dm_list actions;
} dm_rule;

// Rules to be judged.
typedef struct dm_rules {
  // Octets of this struct.
  uint32_t size;
  // Zero.
  uint32_t reserved;
  // `dm_rule` each.
  struct dm_list rules;
} dm_rules;

// What would become of a rule.
typedef struct dm_verdict {
  // Octets of this struct.
  uint32_t size;
  // `DM_PLACE_HARDWARE`, `_PARTIAL`, `_SOFTWARE`, or `DM_VERDICT_NO`.
  uint32_t verdict;
  // Path of the field that stands in the way.
  struct dm_str field;
  // Why.
  struct dm_str reason;
} dm_verdict;

// One change of a batch.
typedef struct dm_operation {
  // Octets of this struct.
  uint32_t size;
  // `DM_ADD` or `DM_REMOVE`.
  uint32_t kind;
  // The rule to add.
  const struct dm_rule *rule;
  // Whose rule to remove.
  struct dm_owner owner;
  // Which rule to remove.
  struct dm_cookie cookie;
} dm_operation;

// Changes to be carried out in order.
typedef struct dm_batch {
  // Octets of this struct.
  uint32_t size;
  // `DM_CONTINUE`, `DM_ROLLBACK` or `DM_ATOMIC`.
  uint32_t atomicity;
  // `dm_operation` each.
  struct dm_list operations;
} dm_batch;

// Counts of a rule. Frozen.
typedef struct dm_counters {
  // Frames.
  uint64_t packets;
  // Octets.
  uint64_t octets;
  // Life of the card in which the counting began.
  uint64_t epoch;
  // Milliseconds since the last hit, or `DM_UNKNOWN`.
  uint64_t idle_ms;
} dm_counters;

// What became of one operation.
typedef struct dm_change {
  // Octets of this struct.
  uint32_t size;
  // `DM_ADDED` and so on.
  uint32_t kind;
  // `DM_PLACE_HARDWARE`, `_PARTIAL` or `_SOFTWARE`, of an added or present rule.
  uint32_t placement;
  // 1 if `counters` are set.
  uint32_t has_counters;
  // Final counters of a removed rule.
  struct dm_counters counters;
  // Why it is not in hardware. The arena has 128 octets for each operation.
  struct dm_str reason;
} dm_change;

// What became of a batch. `changes` and `errors` have an element for each operation, made by the caller; an error is to be
// written only where its change is `DM_CHANGE_FAILED`.
typedef struct dm_outcome {
  // Octets of this struct.
  uint32_t size;
  // `DM_UNDONE_*`.
  uint32_t undone;
  // `dm_change` each.
  struct dm_rows changes;
  // `dm_error` each.
  struct dm_rows errors;
  // Why undoing failed.
  struct dm_error *undo_error;
} dm_outcome;

// An owner, of whom to list or to flush.
typedef struct dm_of_owner {
  // Octets of this struct.
  uint32_t size;
  // Zero.
  uint32_t reserved;
  // Which.
  struct dm_owner owner;
} dm_of_owner;

// A rule as it is installed.
typedef struct dm_installed {
  // Octets of this struct.
  uint32_t size;
  // `DM_PLACE_HARDWARE`, `_PARTIAL` or `_SOFTWARE`.
  uint32_t placement;
  // Why it is not in hardware.
  struct dm_str reason;
  // The rule as it was given, in the arena.
  const struct dm_rule *rule;
} dm_installed;

// Whose counters to read.
typedef struct dm_cookies {
  // Octets of this struct.
  uint32_t size;
  // Zero.
  uint32_t reserved;
  // Whose.
  struct dm_owner owner;
  // `dm_cookie` each.
  struct dm_list cookies;
} dm_cookies;

// Counters of one cookie.
typedef struct dm_count {
  // Octets of this struct.
  uint32_t size;
  // 1 if there are any.
  uint32_t present;
  // The counts.
  struct dm_counters counters;
} dm_count;

// What to do with frames of a port that match nothing.
typedef struct dm_miss {
  // Octets of this struct.
  uint32_t size;
  // `DM_MISS_*`.
  uint32_t policy;
  // Which port.
  struct dm_port port;
} dm_miss;

// Use of one finite resource.
typedef struct dm_occupancy {
  // Octets of this struct.
  uint32_t size;
  // Zero.
  uint32_t reserved;
  // In use.
  uint64_t used;
  // How many there are.
  uint64_t limit;
  // Its name.
  struct dm_str resource;
} dm_occupancy;

// One number as an answer.
typedef struct dm_number {
  // Octets of this struct.
  uint32_t size;
  // Zero.
  uint32_t reserved;
  // The number.
  uint64_t value;
} dm_number;

// A number of VFs.
typedef struct dm_vf_count {
  // Octets of this struct.
  uint32_t size;
  // Physical function.
  uint32_t pf;
  // Asked for; as an answer, how many there are.
  uint32_t count;
  // As an answer, `DM_DISRUPTION_*` that the rest needs.
  uint32_t needs;
} dm_vf_count;

// A PCI address. Frozen.
typedef struct dm_pci {
  // Domain.
  uint16_t domain;
  // Bus.
  uint8_t bus;
  // Device, 0 to 31.
  uint8_t device;
  // Function, 0 to 7.
  uint8_t function;
  // Zero.
  uint8_t reserved[3];
} dm_pci;

// Attributes of a VF; only those whose bit is set mean anything.
typedef struct dm_vf_config {
  // Octets of this struct.
  uint32_t size;
  // `DM_VF_*`.
  uint32_t has;
  // Administrative MAC.
  uint8_t mac[6];
  // VLAN; 0 takes it off.
  uint16_t vlan;
  // Priority code point.
  uint32_t vlan_qos;
  // 1 for 802.1ad.
  uint32_t vlan_service_tag;
  // 1 to trust.
  uint32_t trust;
  // 1 to check.
  uint32_t spoof_check;
  // `DM_LINK_*`.
  uint32_t link_state;
  // Megabits per second; 0 is unlimited.
  uint32_t min_rate;
  // Megabits per second; 0 is unlimited.
  uint32_t max_rate;
  // Octets.
  uint32_t mtu;
} dm_vf_config;

// A request for a VF.
typedef struct dm_vf_request {
  // Octets of this struct.
  uint32_t size;
  // `DM_SELECT_*`: which of the selectors below count.
  uint32_t has;
  // For whom.
  struct dm_str owner;
  // This port.
  struct dm_port port;
  // This PCI address.
  struct dm_pci pci;
  // Of this physical function.
  uint32_t pf;
  // On this NUMA node.
  uint32_t numa_node;
  // Bound to this driver.
  struct dm_str driver;
  // Attributes from the start.
  const struct dm_vf_config *config;
} dm_vf_request;

// A lease.
typedef struct dm_vf_lease {
  // Octets of this struct.
  uint32_t size;
  // Zero.
  uint32_t reserved;
  // Its number.
  uint64_t id;
  // In which life of the card.
  uint64_t epoch;
  // Which VF.
  struct dm_port port;
  // Which card.
  struct dm_str dpu;
  // For whom.
  struct dm_str owner;
} dm_vf_lease;

// Where a VF goes.
typedef struct dm_attachment {
  // Octets of this struct.
  uint32_t size;
  // `DM_ATTACH_*`.
  uint32_t kind;
  // Path of the namespace or socket.
  struct dm_str path;
  // Name of the network device.
  struct dm_str ifname;
} dm_attachment;

// A lease and what to do with it; which of the others count is told at the function.
typedef struct dm_vf_order {
  // Octets of this struct.
  uint32_t size;
  // `DM_RESET_*`.
  uint32_t level;
  // The lease.
  const struct dm_vf_lease *lease;
  // Attributes.
  const struct dm_vf_config *config;
  // A place.
  const struct dm_attachment *attachment;
  // The port to reclaim.
  struct dm_port port;
  // Owners that live, `dm_str` each.
  struct dm_list live;
} dm_vf_order;

// A VF at its place.
typedef struct dm_attached {
  // Octets of this struct.
  uint32_t size;
  // MTU.
  uint32_t mtu;
  // Interface index; 0 if there is none.
  uint32_t ifindex;
  // MAC.
  uint8_t mac[6];
  // Zero.
  uint8_t reserved[2];
} dm_attached;

// A VF as observed.
typedef struct dm_vf_state {
  // Octets of this struct.
  uint32_t size;
  // `DM_AT_*`.
  uint32_t location;
  // Which VF.
  struct dm_port port;
  // 1 if `pci` is set.
  uint32_t has_pci;
  // Largest L3 packet.
  uint32_t mtu;
  // Its PCI address.
  struct dm_pci pci;
  // MAC given by the PF.
  uint8_t admin_mac[6];
  // MAC in use.
  uint8_t effective_mac[6];
  // Zero.
  uint32_t reserved;
  // Namespace or driver.
  struct dm_str place;
  // Its lease, in the arena; null if there is none.
  const struct dm_vf_lease *lease;
} dm_vf_state;

// A slot of the network processor.
typedef struct dm_slot {
  // Octets of this struct.
  uint32_t size;
  // Which.
  uint32_t slot;
} dm_slot;

// A program for a slot.
typedef struct dm_program {
  // Octets of this struct.
  uint32_t size;
  // Which slot.
  uint32_t slot;
  // Its name.
  struct dm_str name;
  // Its version.
  struct dm_str version;
  // Digest of the image.
  struct dm_list hash;
  // The image, octets.
  struct dm_list image;
} dm_program;

// What a slot holds.
typedef struct dm_program_info {
  // Octets of this struct.
  uint32_t size;
  // Which slot.
  uint32_t slot;
  // `DM_SLOT_*`; the texts mean nothing when it is empty.
  uint32_t state;
  // Zero.
  uint32_t reserved;
  // Name of the program.
  struct dm_str name;
  // Its version.
  struct dm_str version;
  // Its digest, octets.
  struct dm_list hash;
} dm_program_info;

// A table of the running program.
typedef struct dm_table_info {
  // Octets of this struct.
  uint32_t size;
  // Its number.
  uint32_t id;
  // `DM_TABLE_*`.
  uint32_t kind;
  // Octets of a key.
  uint16_t key_len;
  // Octets of a value.
  uint16_t value_len;
  // Entries in use.
  uint64_t used;
  // Entries it can hold.
  uint64_t capacity;
  // Its name.
  struct dm_str name;
} dm_table_info;

// An entry of a table.
typedef struct dm_entry {
  // Octets of this struct.
  uint32_t size;
  // `DM_ADD` puts it, `DM_REMOVE` deletes it; 0 in an answer.
  uint32_t kind;
  // Lower numbers win.
  uint32_t priority;
  // 1 if `mask` is set.
  uint32_t has_mask;
  // The key, octets.
  struct dm_list key;
  // Its bits that count, octets.
  struct dm_list mask;
  // The value, octets.
  struct dm_list value;
} dm_entry;

// Entries to be written, or the table to be read.
typedef struct dm_entries {
  // Octets of this struct.
  uint32_t size;
  // Which table.
  uint32_t table;
  // `dm_entry` each.
  struct dm_list entries;
} dm_entries;

// One leg of a connection. Frozen.
typedef struct dm_leg {
  // Port of the card.
  struct dm_port port;
  // The proxy's address.
  struct dm_addr local;
  // The peer's address.
  struct dm_addr remote;
  // The proxy's port.
  uint16_t local_port;
  // The peer's port.
  uint16_t remote_port;
  // IPv6 zones of the two addresses.
  uint32_t scope[2];
  // IPv6 flow labels of the two addresses.
  uint32_t flow[2];
  // Next sequence number to send.
  uint32_t send_next;
  // Next sequence number to receive.
  uint32_t receive_next;
} dm_leg;

// A connection that the network processor can carry; as an answer, what became of it.
typedef struct dm_connection {
  // Octets of this struct.
  uint32_t size;
  // `DM_CONNECTION_*`.
  uint32_t kind;
  // The leg to the client.
  struct dm_leg downstream;
  // The leg to the server.
  struct dm_leg upstream;
  // Octets passed from client to server.
  uint64_t octets_up;
  // Octets passed from server to client.
  uint64_t octets_down;
} dm_connection;

// Numbers of the network processor.
typedef struct dm_offload_stats {
  // Octets of this struct.
  uint32_t size;
  // Zero.
  uint32_t reserved;
  // Connections carried now.
  uint64_t connections;
  // Connections ever taken.
  uint64_t connections_total;
  // Table entries in use.
  uint64_t entries;
} dm_offload_stats;

// A port as the eswitch knows it; as the answer of `port_open`, what may be sent there.
typedef struct dm_port_info {
  // Octets of this struct.
  uint32_t size;
  // 1 if `mac` is set.
  uint32_t has_mac;
  // Which port.
  struct dm_port port;
  // MAC of the function.
  uint8_t mac[6];
  // Zero.
  uint8_t reserved[2];
  // Largest L3 packet.
  uint32_t mtu;
  // 1 if there is a carrier.
  uint32_t link_up;
  // Name of the representor, for people.
  struct dm_str netdev;
  // `port_open`: handle of the open port.
  uint64_t handle;
  // `port_open`: longest frame, super-frames included.
  uint64_t max_frame;
  // `port_open`: descriptor that polls readable when frames wait; -1 if the port must be polled. The library's, until
  // `port_close`.
  int32_t poll_fd;
  // `port_open`: 1 if open checksums may be sent.
  uint32_t checksum_offload;
  // `port_open`: 1 if TCP super-frames may be sent.
  uint32_t tso;
  // `port_open`: 1 if UDP super-frames may be sent.
  uint32_t uso;
} dm_port_info;

// A frame in the caller's memory.
typedef struct dm_frame {
  // Octets of this struct.
  uint32_t size;
  // `DM_CHECKSUM_*`.
  uint32_t checksum;
  // First octet.
  uint8_t *at;
  // Octets there is room for.
  uint64_t capacity;
  // Octets of the frame.
  uint64_t len;
  // First octet summed.
  uint16_t sum_start;
  // Where the sum goes, from there.
  uint16_t sum_offset;
  // `DM_GSO_*`.
  uint32_t gso;
  // Payload octets of a segment.
  uint16_t gso_size;
  // Octets in front of the payload.
  uint16_t gso_header_len;
  // 1 if the flow negotiated ECN.
  uint32_t gso_ecn;
} dm_frame;

// A rule that aged.
typedef struct dm_aged {
  // Octets of this struct.
  uint32_t size;
  // 1 if `counters` are set.
  uint32_t has_counters;
  // Which.
  struct dm_cookie cookie;
  // What it had counted.
  struct dm_counters counters;
} dm_aged;

// An event; which fields count is told at its kind.
typedef struct dm_event {
  // Octets of this struct.
  uint32_t size;
  // `DM_EVENT_*`.
  uint32_t kind;
  // A life of the card.
  uint64_t epoch;
  // A number in use.
  uint64_t used;
  // How many there are.
  uint64_t limit;
  // A port.
  struct dm_port port;
  // An owner.
  struct dm_owner owner;
  // 1 if the carrier is there.
  uint32_t up;
  // Zero.
  uint32_t reserved;
  // A resource.
  struct dm_str resource;
  // `dm_aged` each.
  struct dm_list aged;
  // How the card ails, in memory of the caller.
  struct dm_error *error;
} dm_event;

// The table of a library.
//
// Control calls (those with a `dm_call`) must not block: one that takes time returns `DM_PENDING`, and its end comes by
// `poll`. They are made from one thread at a time unless `flags` has `DM_THREAD_SAFE`. `info`, `capabilities`, `epoch`,
// `poll`, `next_event` and `cancel` are quick and may be called from any thread at any time; `port_receive` and
// `port_transmit` of one port come from one thread at a time, which need not be that of the control calls.
//
// A caller gives every call a deadline, quick ones and frames included. One that has not returned by then fails the card: it is
// told as ill, and nothing is called any more until that call returns. `close` is then not waited for.
//
// Functions of a part (`vf_`, `steering_`, `offload_`, `port_`) are all there, or all null; which parts an open card has,
// `dm_capabilities.parts` tells. What each function has to do is told at the trait of the same name in the documentation of `dpumesh-core`.
typedef struct dm_ops {
  // Octets of this struct, as the library knows it.
  uint32_t size;
  // `DM_ABI_MAJOR` that the library was built with.
  uint32_t abi_major;
  // `DM_ABI_MINOR` that the library was built with.
  uint32_t abi_minor;
  // `DM_THREAD_SAFE`.
  uint32_t flags;
  // Opens the card by the text of the library's own configuration. May take its time. `DM_DONE` or `DM_FAILED`.
  uint32_t (*open)(struct dm_str config, uint64_t *handle, struct dm_error *error);
  // Ends all use of the handle. Calls that are pending then never complete; their memory is not touched any more.
  void (*close)(uint64_t handle);
  // Who it is.
  void (*info)(uint64_t handle, struct dm_info *info);
  // What it can do now.
  void (*capabilities)(uint64_t handle, struct dm_capabilities *capabilities);
  // The card's present life; while it is away, the last one.
  uint64_t (*epoch)(uint64_t handle);
  // Descriptor that polls readable when `poll` or `next_event` have something; -1 if they never do.
  int32_t (*poll_fd)(uint64_t handle);
  // Writes up to `capacity` ends of pending calls and returns how many.
  uint32_t (*poll)(uint64_t handle, struct dm_completion *completions, uint32_t capacity);
  // Takes the next event since `open`: `DM_DONE`, `DM_EMPTY`, or `DM_MORE` (the event stays).
  uint32_t (*next_event)(uint64_t handle, struct dm_event *event, struct dm_arena *arena);
  // Optional: nobody waits for this pending call any more. It still completes, soon.
  void (*cancel)(uint64_t handle, uint64_t token);
  // What changing the number of VFs would disturb: `DM_DISRUPTION_*`.
  uint32_t (*vf_plan_count)(uint64_t handle,
                            struct dm_call *call,
                            const struct dm_vf_count *want,
                            struct dm_number *disruption);
  // Changes the number of VFs.
  uint32_t (*vf_set_count)(uint64_t handle,
                           struct dm_call *call,
                           const struct dm_vf_count *want,
                           struct dm_vf_count *have);
  // Lists VFs, `dm_vf_state` each.
  uint32_t (*vf_list)(uint64_t handle, struct dm_call *call, struct dm_rows *states);
  // Leases a VF. The arena has room for the texts.
  uint32_t (*vf_lease)(uint64_t handle,
                       struct dm_call *call,
                       const struct dm_vf_request *request,
                       struct dm_vf_lease *lease);
  // Takes `order.lease` (SoC).
  uint32_t (*vf_admit)(uint64_t handle, struct dm_call *call, const struct dm_vf_order *order);
  // Gives `order.lease` back (SoC).
  uint32_t (*vf_revoke)(uint64_t handle, struct dm_call *call, const struct dm_vf_order *order);
  // Sets `order.config` of `order.lease`.
  uint32_t (*vf_configure)(uint64_t handle, struct dm_call *call, const struct dm_vf_order *order);
  // Moves the VF of `order.lease` to `order.attachment`.
  uint32_t (*vf_attach)(uint64_t handle,
                        struct dm_call *call,
                        const struct dm_vf_order *order,
                        struct dm_attached *attached);
  // Brings the VF of `order.lease` back.
  uint32_t (*vf_detach)(uint64_t handle, struct dm_call *call, const struct dm_vf_order *order);
  // Ends `order.lease` with a reset of `order.level`: `DM_RELEASED` or `DM_NOT_CURRENT`.
  uint32_t (*vf_release)(uint64_t handle,
                         struct dm_call *call,
                         const struct dm_vf_order *order,
                         struct dm_number *released);
  // Gets `order.port` back without its lease, up to `order.level`, unless its owner is in `order.live`: the `DM_RESET_*` it took.
  uint32_t (*vf_reclaim)(uint64_t handle, struct dm_call *call, const struct dm_vf_order *order, struct dm_number *level);
  // Judges rules; `dm_verdict` each.
  uint32_t (*steering_validate)(uint64_t handle,
                                struct dm_call *call,
                                const struct dm_rules *rules,
                                struct dm_rows *verdicts);
  // Carries out a batch.
  uint32_t (*steering_apply)(uint64_t handle,
                             struct dm_call *call,
                             const struct dm_batch *batch,
                             struct dm_outcome *outcome);
  // Lists an owner's rules in (group, priority, cookie) order, `dm_installed` each.
  uint32_t (*steering_list)(uint64_t handle,
                            struct dm_call *call,
                            const struct dm_of_owner *whose,
                            struct dm_rows *rules);
  // Reads counters, `dm_count` each.
  uint32_t (*steering_counters)(uint64_t handle,
                                struct dm_call *call,
                                const struct dm_cookies *which,
                                struct dm_rows *counts);
  // Removes an owner's rules and says how many.
  uint32_t (*steering_flush)(uint64_t handle,
                             struct dm_call *call,
                             const struct dm_of_owner *whose,
                             struct dm_number *removed);
  // Sets a port's miss policy.
  uint32_t (*steering_set_miss_policy)(uint64_t handle, struct dm_call *call, const struct dm_miss *miss);
  // Use of finite resources, `dm_occupancy` each.
  uint32_t (*steering_occupancy)(uint64_t handle, struct dm_call *call, struct dm_rows *resources);
  // Lists slots, `dm_program_info` each.
  uint32_t (*offload_programs)(uint64_t handle, struct dm_call *call, struct dm_rows *slots);
  // Loads a program.
  uint32_t (*offload_load)(uint64_t handle,
                           struct dm_call *call,
                           const struct dm_program *program,
                           struct dm_program_info *info);
  // Makes a loaded program the running one.
  uint32_t (*offload_activate)(uint64_t handle, struct dm_call *call, const struct dm_slot *slot);
  // Empties a slot.
  uint32_t (*offload_unload)(uint64_t handle, struct dm_call *call, const struct dm_slot *slot);
  // Lists tables, `dm_table_info` each.
  uint32_t (*offload_tables)(uint64_t handle, struct dm_call *call, struct dm_rows *tables);
  // Writes entries. An error whose `kind` stays 0 is a success.
  uint32_t (*offload_write)(uint64_t handle,
                            struct dm_call *call,
                            const struct dm_entries *entries,
                            struct dm_rows *errors);
  // Reads a table, `dm_entry` each.
  uint32_t (*offload_read)(uint64_t handle,
                           struct dm_call *call,
                           const struct dm_entries *table,
                           struct dm_rows *entries);
  // Hands a connection over: its token.
  uint32_t (*offload_connection)(uint64_t handle,
                                 struct dm_call *call,
                                 const struct dm_connection *connection,
                                 struct dm_number *token);
  // Takes a connection back by its token.
  uint32_t (*offload_resume)(uint64_t handle,
                             struct dm_call *call,
                             const struct dm_number *token,
                             struct dm_connection *state);
  // Numbers of the processor.
  uint32_t (*offload_stats)(uint64_t handle, struct dm_call *call, struct dm_offload_stats *stats);
  // Lists ports, `dm_port_info` each.
  uint32_t (*port_list)(uint64_t handle, struct dm_call *call, struct dm_rows *ports);
  // Opens `port.port`.
  uint32_t (*port_open)(uint64_t handle,
                        struct dm_call *call,
                        const struct dm_port_info *port,
                        struct dm_port_info *open);
  // Closes an open port.
  void (*port_close)(uint64_t handle, uint64_t port);
  // Receives up to `count` frames, says in `done` how many: `DM_DONE` or `DM_FAILED`. Does not block.
  uint32_t (*port_receive)(uint64_t handle,
                           uint64_t port,
                           struct dm_frame *frames,
                           uint32_t count,
                           uint32_t *done,
                           struct dm_error *error);
  // Transmits the first of `count` frames, says in `done` how many were taken: `DM_DONE` or `DM_FAILED`. Does not block.
  uint32_t (*port_transmit)(uint64_t handle,
                            uint64_t port,
                            struct dm_frame *frames,
                            uint32_t count,
                            uint32_t *done,
                            struct dm_error *error);
  // Frames dropped because they broke the port's limits.
  uint64_t (*port_refused)(uint64_t handle, uint64_t port);
} dm_ops;

// What a library lets the conformance kit do to a card from outside; each is optional, and what is null skips its cases.
typedef struct dm_hooks {
  // Octets of this struct.
  uint32_t size;
  // 1 if closing and opening with the same configuration finds the same card, as after a crash of the process.
  uint32_t survives;
  // The card vanishes: `DM_DONE` or `DM_FAILED`.
  uint32_t (*lose)(uint64_t handle);
  // The card returns with a new epoch.
  uint32_t (*bring_back)(uint64_t handle);
  // Hands a frame in at a port, as the function behind it or the wire would.
  uint32_t (*inject)(uint64_t handle, struct dm_port port, const uint8_t *octets, uint64_t len);
  // Takes the next frame that left by a port, its octets into `buffer` and their number into `len`: `DM_DONE` or `DM_EMPTY`.
  uint32_t (*observe)(uint64_t handle, struct dm_port port, uint8_t *buffer, uint64_t capacity, uint64_t *len);
  // Makes a namespace known under a path, or (`present` 0) takes it away. Null if real ones do.
  uint32_t (*netns)(uint64_t handle, struct dm_str path, uint32_t present);
  // Makes moves of a VF fail (`jammed` 1) or work again.
  uint32_t (*jam)(uint64_t handle, struct dm_port port, uint32_t jammed);
  // Takes a VF away behind the backend's back.
  uint32_t (*strand)(uint64_t handle, struct dm_port port);
  // Writes program number `index` that the processor takes, its octets being the library's: `DM_DONE` or `DM_EMPTY`.
  uint32_t (*program)(uint32_t index, struct dm_program *program);
} dm_hooks;

#endif  /* DPUMESH_H */

// Element `i` of a list of a request, whatever its maker's size of it.
#define DM_AT(type, list, i) ((const type *)((const char *)(list).at + (size_t)(i) * (list).stride))

// Element `i` of the rows of an answer. Set its size.
#define DM_ROW(type, rows, i) ((type *)((char *)(rows)->at + (size_t)(i) * (rows)->stride))

// A struct that is zero but for its size: `dm_change change = DM_NEW(dm_change);`.
#define DM_NEW(type) ((type){ .size = sizeof(type) })

// Takes octets from an arena, aligned to 16; null when they do not fit, in which case `needed` tells how many would.
static inline void *dm_take(dm_arena *arena, uint64_t octets) {
    octets = (octets + 15) & ~(uint64_t)15;
    arena->needed += octets;
    if (arena->needed > arena->capacity) return NULL;
    void *taken = arena->at + arena->used;
    arena->used += octets;
    return taken;
}

// Copies a text into an arena; empty when it does not fit.
static inline dm_str dm_text(dm_arena *arena, const char *text, uint64_t len) {
    dm_str copy = { NULL, 0 };
    void *to = len ? dm_take(arena, len) : NULL;
    if (to) {
        memcpy(to, text, len);
        copy.at = (const uint8_t *)to;
        copy.len = len;
    }
    return copy;
}

// Fills an error in: a kind, and one sentence, which is cut to its room.
static inline uint32_t dm_fail(dm_error *error, uint32_t kind, const char *message) {
    error->kind = kind;
    size_t len = strlen(message);
    if (len >= sizeof error->message) len = sizeof error->message - 1;
    memcpy(error->message, message, len);
    error->message[len] = 0;
    return DM_FAILED;
}

// The symbol of a library: see `dm_getter`.
#ifdef __cplusplus
extern "C"
#endif
uint32_t dpumesh_backend_v1(const dm_host *host, uint32_t want, dm_ops *ops, dm_error *error);

// Optional: lets the conformance kit at the card. `hooks` tells its size.
#ifdef __cplusplus
extern "C"
#endif
uint32_t dpumesh_conformance_v1(dm_hooks *hooks);
