//! The emulator against the running kernel. Every case is a process in namespaces of its own.

mod card;
mod conformance;
mod devices;
mod steered;
mod uplink;
mod world;

use std::process::ExitCode;

use dpumesh_hw::netns::testing::{self, Case, RunAs};

macro_rules! cases {
    ($($run_as:ident $module:ident :: $name:ident,)*) => {
        &[$(Case { name: stringify!($name), run_as: RunAs::$run_as, run: $module::$name },)*]
    };
}

fn main() -> ExitCode {
    if let Some(code) = devices::hold_as_told() {
        return code;
    }
    testing::main(cases![
        Caller devices::taps_carry_ping_and_tcp_as_super_frames,
        Nobody devices::packet_sockets_carry_ping_and_tcp_as_super_frames,
        Caller devices::a_tap_and_its_routes_outlive_the_owner,
        Caller devices::a_killed_owners_tap_is_attached_at_once,
        Caller devices::a_tap_has_one_owner_at_a_time,
        Caller devices::a_deleted_device_is_lost_and_one_that_is_down_is_not,
        Caller devices::frames_that_break_the_limits_are_counted_and_stop_nothing,
        Nobody devices::vlan_tags_arrive_in_the_frame,
        Caller devices::a_hundred_devices_leave_nothing,
        Caller uplink::pods_talk_over_vxlan,
        Caller uplink::the_wire_carries_plain_vxlan,
        Nobody uplink::what_is_no_vxlan_from_here_is_refused,
        Nobody uplink::waiting_frames_keep_the_descriptor_readable,
        Nobody uplink::a_full_socket_leaves_the_rest_untouched,
        Nobody uplink::an_endpoint_without_a_route_stops_nothing,
        Caller card::tap_vfs_carry_traffic_and_are_restored,
        Nobody card::veth_vfs_carry_traffic_and_are_restored,
        Nobody card::a_duplicate_mac_is_a_conflict,
        Caller card::a_port_opens_only_while_both_sides_hold_the_lease,
        Caller card::both_sides_die_and_the_pod_goes_on,
        Caller card::a_vf_that_died_with_its_pod_is_made_anew,
        Nobody card::a_renamed_vf_is_found_and_a_namesake_is_not_touched,
        Nobody card::attach_refuses_with_nothing_moved,
        Caller card::a_lost_card_returns_without_leases,
        Caller card::a_hundred_leases_leave_nothing,
        Caller card::pods_of_two_nodes_meet_over_the_underlay,
        Nobody card::an_uplink_that_is_not_there_is_told,
        Nobody card::another_card_in_the_directory_is_refused,
        Caller conformance::tap_vfs_keep_the_contract,
        Caller conformance::veth_vfs_keep_the_contract,
        Caller conformance::steered_unlimited_cards_keep_the_contract,
        Caller conformance::steered_k2_like_cards_keep_the_contract,
        Caller conformance::steered_minimal_cards_keep_the_contract,
    ])
}
