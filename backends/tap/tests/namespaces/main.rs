//! The emulator against the running kernel. Every case is a process in namespaces of its own.

mod card;
mod devices;
mod uplink;
mod world;

use std::process::ExitCode;

use dpumesh_hw::netns::testing::{self, Case, RunAs};
use dpumesh_tap::VfKind;

/// `Caller` and `Nobody` are whose rights the case gets; `Tap` is the caller's, where `/dev/net/tun` opens.
macro_rules! case {
    (Tap $module:ident :: $name:ident) => {
        Case {
            name: stringify!($name),
            run_as: RunAs::Caller,
            run: || with_tap(stringify!($name), $module::$name),
        }
    };
    ($run_as:ident $module:ident :: $name:ident) => {
        Case {
            name: stringify!($name),
            run_as: RunAs::$run_as,
            run: $module::$name,
        }
    };
}

macro_rules! cases {
    ($($whose:ident $module:ident :: $name:ident,)*) => {
        &[$(case!($whose $module::$name),)*]
    };
}

fn with_tap(name: &str, case: fn()) {
    match VfKind::available() {
        VfKind::Tap => case(),
        VfKind::Veth => testing::skip(name, "/dev/net/tun does not open"),
    }
}

fn main() -> ExitCode {
    if let Some(code) = devices::hold_as_told() {
        return code;
    }
    testing::main(cases![
        Tap devices::taps_carry_ping_and_tcp_as_super_frames,
        Nobody devices::packet_sockets_carry_ping_and_tcp_as_super_frames,
        Tap devices::a_tap_and_its_routes_outlive_the_owner,
        Tap devices::a_killed_owners_tap_is_attached_at_once,
        Tap devices::a_tap_has_one_owner_at_a_time,
        Tap devices::a_deleted_device_is_lost_and_one_that_is_down_is_not,
        Tap devices::frames_that_break_the_limits_are_counted_and_stop_nothing,
        Nobody devices::vlan_tags_arrive_in_the_frame,
        Nobody devices::a_card_end_is_ready_and_only_the_card_answers,
        Nobody devices::a_half_made_pair_is_made_ready,
        Tap devices::a_hundred_devices_leave_nothing,
        Tap uplink::pods_talk_over_vxlan,
        Tap uplink::the_wire_carries_plain_vxlan,
        Nobody uplink::what_is_no_vxlan_from_here_is_refused,
        Nobody uplink::waiting_frames_keep_the_descriptor_readable,
        Nobody uplink::a_full_socket_leaves_the_rest_untouched,
        Nobody uplink::an_endpoint_without_a_route_stops_nothing,
        Tap card::tap_vfs_carry_traffic_and_are_restored,
        Nobody card::veth_vfs_carry_traffic_and_are_restored,
        Nobody card::a_duplicate_mac_is_a_conflict,
        Caller card::a_port_opens_only_while_both_sides_hold_the_lease,
        Tap card::both_sides_die_and_the_pod_of_a_tap_goes_on,
        Nobody card::both_sides_die_and_the_pod_of_a_veth_goes_on,
        Tap card::a_tap_that_died_with_its_pod_is_made_anew,
        Nobody card::a_veth_that_died_with_its_pod_is_made_anew,
        Nobody card::a_renamed_vf_is_found_and_a_namesake_is_not_touched,
        Nobody card::attach_refuses_with_nothing_moved,
        Tap card::a_lost_card_of_taps_returns_without_leases,
        Nobody card::a_lost_card_of_veths_returns_without_leases,
        Tap card::a_hundred_leases_of_taps_leave_nothing,
        Nobody card::a_hundred_leases_of_veths_leave_nothing,
        Tap card::pods_with_taps_meet_over_the_underlay,
        Nobody card::pods_with_veths_meet_over_the_underlay,
        Nobody card::an_uplink_that_is_not_there_is_told,
        Nobody card::another_card_in_the_directory_is_refused,
    ])
}
