//! [`CASES`]: every case once, with the doc sentence that it proves and what it needs to be shown at all.

use std::fmt;
use std::future::Future;
use std::pin::Pin;

use dpumesh_core::steering::{Atomicity, Field};
use dpumesh_core::{ActionKinds, AttachmentKinds, Capabilities, EventKinds, VfAttributes};

use super::check::{CaseResult, Halt};
use super::{
    Rig, change, events, hardware, hostile, lifecycle, limits, offload, ports, steering, traffic, transport,
    vf,
};

/// A sentence of the contract and how it is proved.
#[derive(Clone, Copy)]
pub struct Case {
    /// The part of the contract, as the kit's modules are named.
    pub part: &'static str,
    /// The sentence in short; unique.
    pub name: &'static str,
    /// The doc sentence.
    pub sentence: &'static str,
    /// What it needs; without one of these it is skipped.
    pub needs: &'static [Need],
    pub(super) run: Run,
}

type Run = for<'a> fn(&'a dyn Rig) -> Pin<Box<dyn Future<Output = CaseResult> + 'a>>;

/// What a case needs to be shown.
#[derive(Clone, Copy)]
pub enum Need {
    /// The host's half has VFs.
    Vf,
    /// So many VFs are there.
    Vfs(usize),
    /// The SoC's half takes leases.
    Admission,
    /// The two halves are two backends.
    Halves,
    /// The SoC's half steers.
    Steering,
    /// The SoC's half has a network processor.
    Offload,
    /// The SoC's half has channels.
    Transport,
    /// The SoC's half has ports.
    Ports,
    /// [`Rig::reset`].
    Reset,
    /// [`Rig::probe`].
    Probe,
    /// [`Rig::namespaces`].
    Namespaces,
    /// [`Rig::crash`].
    Crash,
    /// [`Rig::sabotage`].
    Sabotage,
    /// [`Rig::disturb`].
    Disturb,
    /// [`Rig::programs`].
    Programs,
    /// The host's half claims this, by path.
    HostClaims(&'static str, fn(&Capabilities) -> bool),
    /// The SoC's half claims this, by path.
    Claims(&'static str, fn(&Capabilities) -> bool),
}

impl Case {
    /// True when its name contains `filter`, or its part is `filter`; an empty one selects every case.
    pub fn is_selected_by(&self, filter: &str) -> bool {
        self.name.contains(filter) || self.part == filter
    }

    /// Ends the case as not supported when something it needs is missing.
    pub(super) async fn check_needs(&self, rig: &dyn Rig) -> CaseResult {
        for need in self.needs {
            need.check(rig).await?;
        }
        Ok(())
    }
}

impl Need {
    /// Path of the ability, as reports name it.
    pub fn capability(&self) -> &'static str {
        match self {
            Self::Vf => "vf",
            Self::Vfs(_) => "vf.count",
            Self::Admission => "vf.admit",
            Self::Halves => "rig.halves",
            Self::Steering => "steering",
            Self::Offload => "offload",
            Self::Transport => "transport",
            Self::Ports => "ports",
            Self::Reset => "rig.reset",
            Self::Probe => "rig.probe",
            Self::Namespaces => "rig.namespaces",
            Self::Crash => "rig.crash",
            Self::Sabotage => "rig.sabotage",
            Self::Disturb => "rig.disturb",
            Self::Programs => "rig.programs",
            Self::HostClaims(path, _) | Self::Claims(path, _) => path,
        }
    }

    async fn check(&self, rig: &dyn Rig) -> CaseResult {
        let (host, soc) = (rig.host(), rig.soc());
        let (met, reason) = match self {
            Self::Vf => (host.vf().is_some(), NO_PART),
            Self::Vfs(count) => {
                let vfs = match host.vf() {
                    Some(vf) => vf.list().await?.len(),
                    None => 0,
                };
                (vfs >= *count, "the card has too few VFs")
            }
            Self::Admission => (soc.vf().is_some(), "the SoC's half has no vf part"),
            Self::Halves => (
                host.info().role != soc.info().role,
                "one backend plays host and SoC",
            ),
            Self::Steering => (soc.steering().is_some(), NO_PART),
            Self::Offload => (soc.offload().is_some(), NO_PART),
            Self::Transport => (soc.transport().is_some(), NO_PART),
            Self::Ports => (soc.ports().is_some(), NO_PART),
            Self::Reset => (rig.reset().is_some(), "the fixture cannot reset the card"),
            Self::Probe => (rig.probe().is_some(), "the fixture sends no frames"),
            Self::Namespaces => (rig.namespaces().is_some(), "the fixture makes no namespaces"),
            Self::Crash => (rig.crash().is_some(), "the fixture cannot crash the process"),
            Self::Sabotage => (rig.sabotage().is_some(), "the fixture cannot make VFs misbehave"),
            Self::Disturb => (rig.disturb().is_some(), "the fixture cannot disturb the card"),
            Self::Programs => (
                rig.programs().len() >= 2,
                "the fixture has fewer than two programs",
            ),
            Self::HostClaims(_, claims) => (claims(&host.capabilities()), NOT_CLAIMED),
            Self::Claims(_, claims) => (claims(&soc.capabilities()), NOT_CLAIMED),
        };
        if met {
            return Ok(());
        }
        Err(Halt::not_supported(self.capability(), reason))
    }
}

const NO_PART: &str = "the backend has no such part";
const NOT_CLAIMED: &str = "not claimed";

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}", self.part, self.name)
    }
}

impl fmt::Debug for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.capability())
    }
}

const MAC: Need = Need::HostClaims("vf.attributes.mac", |c| {
    c.vf.attributes.contains(VfAttributes::MAC)
});
const MTU: Need = Need::HostClaims("vf.attributes.mtu", |c| {
    c.vf.attributes.contains(VfAttributes::MTU)
});
const VLAN: Need = Need::HostClaims("vf.attributes.vlan", |c| {
    c.vf.attributes.contains(VfAttributes::VLAN)
});
const SPOOF_CHECK: Need = Need::HostClaims("vf.attributes.spoof_check", |c| {
    c.vf.attributes.contains(VfAttributes::SPOOF_CHECK)
});
const NETNS: Need = Need::HostClaims("vf.attachments.netns", |c| {
    c.vf.attachments.contains(AttachmentKinds::NETNS)
});
const RESIZABLE: Need = Need::HostClaims("vf.resizable", |c| c.vf.resizable);
const FIXED: Need = Need::HostClaims("vf.fixed", |c| !c.vf.resizable);
const VF_EVENTS: Need = Need::HostClaims("events.vf", |c| c.events.contains(EventKinds::VF));
const ROLLBACK: Need = Need::Claims("steering.atomicity.rollback", |c| {
    c.steering.atomicity.contains(&Atomicity::Rollback)
});
const ATOMIC: Need = Need::Claims("steering.atomicity.atomic", |c| {
    c.steering.atomicity.contains(&Atomicity::Atomic)
});
const COUNT: Need = Need::Claims("steering.actions.count", |c| {
    c.steering.actions.contains(ActionKinds::COUNT) && c.steering.counters > 0
});
const JUMP: Need = Need::Claims("steering.actions.jump", |c| {
    c.steering.actions.contains(ActionKinds::JUMP) && c.steering.groups > 1
});
const FORWARD: Need = Need::Claims("steering.actions.forward", |c| {
    c.steering.actions.contains(ActionKinds::FORWARD)
});
const HARDWARE: Need = Need::Claims("steering.hardware_rules", |c| c.steering.hardware_rules > 0);
const GROUPS: Need = Need::Claims("steering.groups", |c| c.steering.groups > 1);
const PRIORITIES: Need = Need::Claims("steering.priorities", |c| c.steering.priorities > 1);
const AGEING: Need = Need::Claims("steering.idle_timeout", |c| {
    c.steering.idle_timeout && c.events.contains(EventKinds::AGED)
});
const NO_AGEING: Need = Need::Claims("steering.no_idle_timeout", |c| !c.steering.idle_timeout);
const HIGH_WATER: Need = Need::Claims("events.high_water", |c| c.events.contains(EventKinds::HIGH_WATER));
const LINK: Need = Need::Claims("events.link", |c| c.events.contains(EventKinds::LINK));
const HEALTH: Need = Need::Claims("events.health", |c| c.events.contains(EventKinds::HEALTH));
const HARDWARE_COUNT: Need = Need::Claims("steering.hardware_actions.count", |c| {
    c.steering.hardware_actions.contains(ActionKinds::COUNT) && c.steering.counters > 0
});
const HARDWARE_FORWARD: Need = Need::Claims("steering.hardware_actions.forward", |c| {
    c.steering.hardware_rules > 0 && c.steering.hardware_actions.contains(ActionKinds::FORWARD)
});
const HARDWARE_MARK: Need = Need::Claims("steering.hardware_actions.mark", |c| {
    let steps = ActionKinds::MARK | ActionKinds::JUMP;
    c.steering.groups > 1
        && c.steering.hardware_actions.contains(steps)
        && c.steering.hardware_fields.contains_key(&Field::Mark)
});
const MESSAGES: Need = Need::Claims("transport.messages", |c| c.transport.messages);
const STREAMS: Need = Need::Claims("transport.streams", |c| c.transport.streams);
const CONNECTIONS: Need = Need::Claims("offload.connections", |c| {
    c.offload.connections > 0 && !c.offload.connection_kinds.is_empty()
});

use Need::{
    Admission, Crash, Disturb, Halves, Namespaces, Offload, Ports, Probe, Programs, Reset, Sabotage,
    Steering, Transport, Vf, Vfs,
};

macro_rules! cases {
    ($($part:ident { $($name:ident: $sentence:literal, [$($need:expr),*];)* })*) => {
        /// All cases, in the order in which they run.
        pub const CASES: &[Case] = &[$($(
            Case {
                part: stringify!($part),
                name: stringify!($name),
                sentence: $sentence,
                needs: &[$($need),*],
                run: |rig| Box::pin($part::$name(rig)),
            },
        )*)*];
    };
}

cases! {
    lifecycle {
        info_and_capabilities_are_constant: "Who this is. Constant.", [];
        both_halves_are_of_one_card: "Host and SoC are two machines joined by PCIe.", [];
        a_part_is_there_when_it_is_claimed: "Zero or empty means not at all.", [];
        a_lost_card_fails_every_call_fast: "When the card goes, every call fails fast with `DeviceLost`.", [Reset];
        the_error_of_a_lost_card_says_after_reset: "Retry after the device came back with a new epoch.", [Steering, Reset];
        the_epoch_grows_with_each_return: "When the card is usable again the epoch has grown.", [Reset];
        a_fence_of_the_former_life_is_stale: "A fence of an older epoch gets `Stale` and has no effect.", [Reset];
        a_lease_of_the_former_life_touches_nothing: "A lease that is not current cannot touch the VF any more.", [Vf, Reset];
        rules_of_the_former_life_are_gone_or_listed: "Nothing installed before survives unless `list` shows it.", [Steering, COUNT, Reset];
        programs_of_the_former_life_are_gone_or_listed: "Nothing installed before survives unless `list` shows it.", [Offload, Programs, Reset];
        an_admission_ends_with_the_cards_life: "A lease: the right to use one VF in one life of the card.", [Vf, Admission, Ports, Reset];
        an_open_port_ends_with_device_lost: "`DeviceLost` when the device went away.", [Vf, Admission, Ports, Reset];
        a_lease_survives_its_process: "Journalled before it is touched, so that a crash at any point leaves a record to undo.", [Vf, Vfs(2), Crash];
        a_new_process_releases_what_the_old_one_leased: "Restores attributes by difference of observed and snapshot.", [Vf, Crash];
        rules_after_a_crash_are_what_list_shows: "From the device or from what the backend knows to be on it; never what somebody once asked for.", [Steering, Crash];
    }
    vf {
        lease_gives_the_lowest_index_that_fits: "Deterministic: the lowest index that fits.", [Vf];
        a_freed_lower_index_is_given_again: "Deterministic: the lowest index that fits.", [Vf, Vfs(2)];
        the_same_owner_gets_the_same_lease: "Asking again with the same owner returns the same lease.", [Vf];
        a_lease_names_card_port_owner_and_epoch: "A lease: the right to use one VF in one life of the card.", [Vf];
        a_lease_number_is_never_given_twice: "Number of the lease; never given twice on a card.", [Vf];
        an_empty_owner_is_invalid: "`Invalid` (`owner` empty).", [Vf];
        when_no_vf_is_free_the_error_names_vf: "`CapacityExceeded` (`vf`: none free).", [Vf];
        refusals_of_a_lease_say_never_or_after_free: "After something was freed or released.", [Vf];
        a_selector_that_fits_none_is_not_found: "`NotFound` (none fits the selector).", [Vf];
        a_selector_picks_its_port: "This very port.", [Vf];
        a_selector_picks_by_pci_address_and_driver: "With this PCI address; bound to this driver.", [Vf];
        a_lease_starts_with_its_attributes: "Attributes from the start.", [Vf, MAC];
        a_mac_in_use_on_the_card_is_a_conflict: "`Conflict` (the MAC is in use on the card).", [Vf, Vfs(2), MAC];
        configuring_a_mac_in_use_is_a_conflict: "`Conflict` (MAC).", [Vf, Vfs(2), MAC];
        concurrent_leases_are_different_vfs: "Safe to call concurrently; calls about one VF are serialised by the backend.", [Vf, Vfs(2)];
        cancelling_a_lease_leaves_what_list_shows: "Cancelling one leaves a journalled state that `list` shows.", [Vf];
        list_shows_each_vf_once_within_the_limit: "Lists every VF as observed now.", [Vf];
        each_claimed_attribute_can_be_set: "Attributes that can be set.", [Vf];
        an_unclaimed_attribute_is_unsupported_by_name_and_touches_nothing: "Support for all of them is checked before the first is touched.", [Vf];
        an_attribute_left_none_stays: "`None` leaves one alone.", [Vf, MAC, MTU];
        a_failed_configure_leaves_everything_as_before: "On a failure half-way the ones already set are put back.", [Vf, Vfs(2), MAC, MTU];
        an_mtu_up_to_the_claimed_one_is_taken: "Largest MTU of a VF.", [Vf, MTU];
        a_vlan_priority_above_7_is_invalid: "Priority code point, 0 to 7.", [Vf, VLAN];
        a_lease_that_is_not_current_is_stale: "`Stale` (lease not current).", [Vf];
        releasing_again_is_not_current: "Idempotent: a lease that is not current any more is `NotCurrent`.", [Vf];
        a_late_release_never_touches_the_next_owners_vf: "The next pod's VF is safe from the last pod's late DEL.", [Vf];
        a_forged_lease_releases_nothing: "A lease that is not current any more touches nothing.", [Vf];
        release_restores_the_attributes: "Restores attributes by difference of observed and snapshot.", [Vf];
        release_undoes_the_attributes_given_with_the_lease: "A free VF is journalled, snapshotted and given to an owner.", [Vf, Vfs(2), MAC];
        a_release_that_fails_keeps_the_lease: "Tries every step and frees the VF only if all of them worked; else the lease stays and the error lists what failed.", [Vf, NETNS, Namespaces, Sabotage];
        each_claimed_reset_level_works: "How a VF can be reset when it is released.", [Vf];
        an_unclaimed_reset_level_is_unsupported_and_the_lease_stays: "Frees the VF only if all of them worked; else the lease stays.", [Vf];
        attach_moves_the_vf: "Moves a leased VF to where its owner will use it, under its final name, link up.", [Vf, NETNS, Namespaces];
        attaching_to_where_it_is_succeeds: "Attaching to where it is already succeeds.", [Vf, NETNS, Namespaces];
        attaching_elsewhere_is_busy: "`Busy` (attached elsewhere).", [Vf, NETNS, Namespaces];
        a_missing_namespace_is_not_found: "`NotFound` (namespace).", [Vf, NETNS, Namespaces];
        a_taken_interface_name_exists: "`Exists` (name taken there).", [Vf, Vfs(2), NETNS, Namespaces];
        an_interface_name_has_at_most_15_octets: "Name of the device there, at most 15 octets.", [Vf, NETNS, Namespaces];
        an_unclaimed_attachment_is_unsupported: "`Unsupported` (kind).", [Vf];
        detach_brings_the_vf_back: "Brings a leased VF back from where it was attached.", [Vf, NETNS, Namespaces];
        detaching_twice_succeeds: "Idempotent.", [Vf];
        detach_with_the_namespace_gone_succeeds: "A namespace that is gone is no error.", [Vf, NETNS, Namespaces];
        release_detaches: "Ends a lease: detaches, restores, resets and frees the VF.", [Vf, NETNS, Namespaces];
        admitting_the_same_lease_again_succeeds: "Taking the same lease again succeeds.", [Vf, Admission];
        another_lease_of_the_port_conflicts_until_revoked: "A different lease of the same port is `Conflict` until the old one is revoked.", [Vf, Admission];
        another_cards_lease_is_invalid: "`Invalid` (another card's lease).", [Vf, Admission];
        admitting_a_port_that_is_not_there_is_not_found: "`NotFound` (port).", [Vf, Admission];
        revoking_what_is_not_held_succeeds: "A lease that is not held is no error.", [Vf, Admission];
        revoking_another_lease_leaves_the_port_admitted: "A different lease of the same port is `Conflict` until the old one is revoked.", [Vf, Admission];
        the_other_sides_calls_are_unsupported: "Calls of the other side's part are `Unsupported`.", [Vf, Admission, Halves];
        a_stale_fence_leases_and_changes_nothing: "Refused with `Stale` unless its epoch is the card's present one.", [Vf];
        the_vf_count_does_not_change_under_a_lease: "Refused with `Busy` while a VF that would go is leased.", [Vf, RESIZABLE];
        the_vf_count_becomes_what_the_answer_says: "Returns when they are enumerated, with the number the card really gave.", [Vf, RESIZABLE];
        planning_a_vf_count_changes_nothing: "Tells what changing the number of VFs would disturb, without doing it.", [Vf, RESIZABLE];
        a_vf_count_out_of_range_is_refused: "`NotFound` (PF), `CapacityExceeded`.", [Vf, RESIZABLE];
        a_fixed_vf_count_is_unsupported: "`Unsupported` (fixed number).", [Vf, FIXED];
        reclaim_spares_a_living_owner: "Refused with `Busy` while the VF is leased and its owner is in `live`.", [Vf];
        reclaim_frees_a_dead_owners_vf: "Gets a stray VF back without its lease, and says how far it had to go.", [Vf];
        a_stray_vf_is_shown_and_reclaimed: "One that `list` shows where nobody put it; tries in order a move back, a rebind and a reset.", [Vf, Sabotage];
        reclaim_goes_no_further_than_its_level: "Up to `level`, and says how far it had to go.", [Vf, Sabotage];
        reclaiming_a_port_that_is_not_there_is_not_found: "`NotFound`.", [Vf];
        reclaim_refuses_an_unclaimed_level: "`Unsupported` (level).", [Vf];
        release_with_the_namespace_gone_frees_the_vf: "Detaches, restores and frees the VF; a namespace that is gone is no error.", [Vf, NETNS, Namespaces];
        a_release_tries_the_steps_behind_one_that_fails: "Teardown tries every step.", [Vf, MAC, NETNS, Namespaces, Sabotage];
        a_release_tells_every_step_that_failed: "Else the lease stays and the error lists what failed.", [Vf, MAC, NETNS, Namespaces, Sabotage, Disturb];
        a_cancelled_attach_can_be_repeated_or_released: "Cancelling one leaves a journalled state that `list` shows.", [Vf, NETNS, Namespaces];
        a_cancelled_configure_can_be_repeated_or_released: "Cancelling one leaves a journalled state that `list` shows.", [Vf, MAC];
        a_cancelled_release_can_be_repeated: "Release is idempotent; cancelling one leaves a journalled state.", [Vf, MAC];
        the_function_uses_the_mac_that_it_was_given: "MAC that the function uses; through the PF first, then the network device.", [Vf, MAC];
        fewer_vfs_than_asked_for_are_told: "How many there are now; may be fewer than asked for. What is still needed to get the rest.", [Vf, RESIZABLE, Disturb];
        occupancy_of_vf_is_the_number_of_leases: "How full the card's finite resources are.", [Vf, Steering];
    }
    steering {
        adding_an_equal_rule_again_is_present: "Adding a cookie again with an equal rule succeeds without effect.", [Steering];
        a_different_rule_of_the_same_cookie_exists: "With a different rule it is `Exists`.", [Steering];
        a_cookie_is_unique_on_the_card: "The caller's name for it; unique on the card.", [Steering];
        an_overlap_of_equal_priority_conflicts: "Two rules of equal priority that some frame could both match must have equal actions.", [Steering];
        an_overlap_conflicts_whoever_owns_the_first: "Else adding the second is `Conflict`, whoever owns the first.", [Steering];
        a_wider_pattern_overlaps_a_narrower_one: "Two rules of equal priority that some frame could both match must have equal actions.", [Steering];
        an_overlap_with_equal_actions_is_no_conflict: "Two rules that some frame could both match must have equal actions.", [Steering];
        an_overlap_of_other_priority_is_no_conflict: "Within a group, two rules of equal priority.", [Steering, PRIORITIES];
        an_overlap_in_another_group_is_no_conflict: "Within a group, two rules of equal priority.", [Steering, GROUPS];
        a_conflict_ends_with_the_rule_that_made_it: "When the future is ready, each change that is reported done acts.", [Steering];
        removing_what_is_not_there_is_absent: "A cookie that is not there is `Absent`, not an error.", [Steering];
        removing_anothers_rule_is_not_found_and_it_stays: "Another owner's is `NotFound`.", [Steering];
        a_removed_rule_is_gone_and_its_cookie_free: "The rule was removed.", [Steering];
        list_shows_only_the_owners_rules_as_given: "Lists installed rules of an owner: the rule as it was given, and where it acts.", [Steering];
        list_is_in_group_priority_cookie_order: "Lists installed rules of an owner in (group, priority, cookie) order.", [Steering];
        flush_removes_the_owners_rules_and_no_others: "Removes every rule of an owner and returns how many. Other owners' rules are untouched.", [Steering];
        counters_answer_each_cookie_in_order: "One answer per cookie, in order; `None` for a cookie that the owner does not have or that does not count.", [Steering, COUNT];
        counters_of_another_owner_are_none: "Owners are fenced apart.", [Steering, COUNT];
        a_counting_rule_is_removed_with_its_final_counters: "The rule was removed; its final counters, if it counted.", [Steering, COUNT];
        counting_survives_a_repeated_addition: "The same rule was there already; it acts here and keeps its counters.", [Steering, COUNT];
        operations_of_a_batch_take_effect_in_order: "Operations take effect in order.", [Steering];
        a_batch_continues_after_a_failure: "The others are carried out all the same. Every backend has it.", [Steering];
        a_rolled_back_batch_changes_nothing: "Those before it are undone, those behind it are not begun.", [Steering, ROLLBACK];
        an_atomic_batch_is_all_or_none: "All or none, and no frame meets an intermediate state.", [Steering, ATOMIC];
        an_undeclared_atomicity_is_unsupported: "Refuses a stronger one that it did not declare with `Unsupported`.", [Steering];
        an_empty_batch_succeeds: "One per operation, in order.", [Steering];
        repeating_a_whole_batch_is_safe: "Adding a cookie that is there, and removing one that is not, make repeating the whole batch safe.", [Steering];
        cancelling_a_batch_leaves_a_prefix: "Cancelling may leave any prefix of the batch carried out; `list` tells which.", [Steering];
        concurrent_batches_all_take_effect: "All methods are safe to call concurrently.", [Steering];
        calls_about_one_cookie_take_effect_in_order: "Calls of one caller that touch the same cookie take effect in the order in which they were made.", [Steering];
        a_stale_fence_steers_nothing: "Refused with `Stale` unless its epoch is the card's present one.", [Steering];
        validate_judges_each_rule_and_installs_none: "Judges rules without installing them; one verdict per rule, in order.", [Steering];
        validate_does_not_look_at_what_is_installed: "Judges each rule by itself, against the card's abilities, not against what is installed.", [Steering];
        a_senseless_rule_is_invalid_with_its_field: "Every backend calls this first and may rely on it afterwards.", [Steering];
        a_verdict_comes_true_on_an_empty_card: "What a backend would do with a rule.", [Steering];
        a_requested_placement_is_kept_or_refused: "In the card only; refused when it cannot.", [Steering];
        a_miss_policy_needs_a_port: "`NotFound` (port).", [Steering];
        occupancy_of_rules_follows_the_table: "How full the card's finite resources are.", [Steering];
        a_failed_operation_says_it_had_no_effect: "Each operation of a batch gets a status of its own.", [Steering];
    }
    limits {
        hardware_holds_the_claimed_rules: "Rules that the card itself can hold.", [Steering, HARDWARE];
        the_card_holds_the_claimed_rules_in_all: "Rules in all, software included.", [Steering];
        the_claimed_priorities_are_accepted: "Priorities 0 to `priorities - 1` are accepted.", [Steering];
        the_claimed_groups_are_accepted: "Groups.", [Steering];
        a_jump_stays_within_the_claimed_groups: "Matching goes on in a group of a higher number.", [Steering, JUMP];
        a_batch_of_the_claimed_length_is_taken: "Longest batch; `CapacityExceeded` (longer than `batch_max`).", [Steering];
        the_claimed_counters_count: "Rules that can count.", [Steering, COUNT];
        the_claimed_masks_are_held: "Different sets of masks that the card can hold at a time.", [Steering, HARDWARE];
        claimed_fields_can_be_matched: "How each field can be matched at all.", [Steering];
        fields_claimed_in_hardware_are_judged_hardware: "How each field can be matched in hardware.", [Steering];
        an_unclaimed_field_is_impossible_by_its_path: "Path of the field that stands in the way.", [Steering];
        claimed_actions_can_be_had: "Actions that are carried out at all.", [Steering];
        an_unclaimed_action_is_impossible_by_its_index: "Path of the field that stands in the way, as `actions[1]`.", [Steering];
        without_idle_timeouts_one_is_impossible: "Rules can age.", [Steering, NO_AGEING];
    }
    traffic {
        a_forwarded_frame_leaves_by_its_port: "The frame leaves by a port of the card.", [Steering, Vf, Vfs(2), Probe, FORWARD];
        frames_keep_their_order: "In arrival order.", [Steering, Vf, Vfs(2), Probe, FORWARD];
        a_miss_is_dropped_by_default: "A port starts with `MissPolicy::Drop`: closed is the default.", [Steering, Vf, Vfs(2), Probe, FORWARD];
        a_miss_goes_to_software_when_asked: "It goes to the dataplane's software on the representor.", [Steering, Vf, Vfs(2), Ports, Probe, FORWARD];
        the_lowest_priority_number_wins: "Within a group the matching rule with the lowest priority number wins.", [Steering, Vf, Vfs(2), Probe, FORWARD, PRIORITIES];
        removing_the_winner_lets_the_next_act: "Within a group the matching rule with the lowest priority number wins.", [Steering, Vf, Vfs(2), Probe, FORWARD, PRIORITIES];
        a_removed_rule_acts_no_more: "Each change that is reported done acts on the next frame.", [Steering, Vf, Vfs(2), Probe, FORWARD];
        a_rule_has_acted_when_the_batch_is_done: "Each change that is reported done acts on the next frame.", [Steering, Vf, Vfs(2), Probe, FORWARD];
        a_jump_goes_on_in_the_higher_group: "A frame starts in group 0; a rule may jump to a group of a higher number.", [Steering, Vf, Vfs(2), Probe, FORWARD, JUMP];
        a_port_is_never_what_a_frame_claims: "Port the frame came in on. Never derived from what the frame claims.", [Steering, Vf, Vfs(2), Probe, FORWARD];
        counters_tell_frames_and_octets_in_the_declared_unit: "Octets in the backend's declared unit.", [Steering, Vf, Vfs(2), Probe, FORWARD, COUNT];
        counters_never_run_backwards_and_end_with_the_final_value: "Never runs backwards within an epoch; removed rules' counters are final.", [Steering, Vf, Vfs(2), Probe, FORWARD, COUNT];
        a_rule_counts_only_what_it_wins: "Counts packets and octets.", [Steering, Vf, Vfs(2), Probe, FORWARD, COUNT, PRIORITIES];
        a_new_rule_of_an_old_cookie_counts_from_zero: "The rule was removed; its final counters, if it counted.", [Steering, Vf, Vfs(2), Probe, FORWARD, COUNT];
        a_rewritten_mac_is_what_leaves: "Writes a header field.", [Steering, Vf, Vfs(2), Probe, FORWARD];
        a_rewritten_address_leaves_with_right_checksums: "Writes a header field; checksums follow (NAT).", [Steering, Vf, Vfs(2), Probe, FORWARD];
        a_pushed_tag_is_in_the_frame: "Adds an 802.1Q tag.", [Steering, Vf, Vfs(2), Probe, FORWARD];
        a_popped_tag_is_gone: "Takes the 802.1Q tag off.", [Steering, Vf, Vfs(2), Probe, FORWARD];
        an_encapsulated_frame_is_inside_its_tunnel: "Puts the frame into a tunnel.", [Steering, Vf, Vfs(2), Probe, FORWARD];
        a_decapsulated_frame_is_what_was_inside: "Takes the frame out of its tunnel. What is no such tunnel packet is dropped.", [Steering, Vf, Vfs(2), Probe, FORWARD];
        a_ttl_counts_down_and_ends_at_1: "Counts TTL down; a packet that arrives with 1 or 0 is dropped.", [Steering, Vf, Vfs(2), Probe, FORWARD];
        a_mirrored_frame_leaves_by_both_ports: "Sends a copy out of a port.", [Steering, Vf, Vfs(2), Probe, FORWARD];
        a_mark_is_matched_in_a_later_group: "Sets the mark that later groups can match.", [Steering, Vf, Vfs(2), Probe, FORWARD, JUMP];
        a_later_fragment_never_matches_a_port: "Later fragments carry no L4 header: a pattern with an L4 field never matches them.", [Steering, Vf, Vfs(2), Probe, FORWARD];
        a_vf_that_only_the_host_leased_passes_no_frame: "A VF whose lease only one of them holds passes no frame.", [Steering, Vf, Vfs(3), Admission, Probe, FORWARD];
        a_frame_of_a_foreign_mac_is_dropped_when_checked: "Frames with a foreign source MAC are dropped.", [Steering, Vf, Vfs(2), Probe, FORWARD, SPOOF_CHECK];
        a_revoked_vf_passes_no_frame: "The port closes; frames stop.", [Steering, Vf, Vfs(3), Admission, Probe, FORWARD];
    }
    hardware {
        a_rule_in_hardware_acts_on_real_frames: "The card does it alone.", [Steering, Vf, Vfs(2), Probe, FORWARD, HARDWARE_FORWARD];
        each_action_claimed_in_hardware_acts_on_real_frames: "Actions that hardware carries out.", [Steering, Vf, Vfs(2), Probe, FORWARD, HARDWARE_FORWARD];
        a_mark_made_in_hardware_is_matched_in_hardware: "Sets the mark that later groups can match.", [Steering, Vf, Vfs(2), Probe, FORWARD, HARDWARE_FORWARD, HARDWARE_MARK];
        the_counter_of_a_rule_in_hardware_moves_with_frames: "Rules that can count.", [Steering, Vf, Vfs(2), Probe, FORWARD, HARDWARE_FORWARD, HARDWARE_COUNT];
        a_rule_in_hardware_needs_no_software: "In the card only.", [Steering, Vf, Vfs(2), Probe, Disturb, FORWARD, HARDWARE_FORWARD];
        a_counter_is_at_most_as_old_as_claimed: "A value is at most `counter_age_ms` old.", [Steering, Vf, Vfs(2), Probe, FORWARD, COUNT];
    }
    change {
        no_frame_meets_the_middle_of_an_atomic_batch: "All or none, and no frame meets an intermediate state.", [Steering, Vf, Vfs(2), Probe, FORWARD, ATOMIC];
        replacing_rules_leaves_no_gap: "Operations take effect in order: added before removed, no frame finds a gap.", [Steering, Vf, Vfs(2), Probe, FORWARD];
        replayed_rules_act_in_the_new_life: "Nothing installed before survives unless `list` shows it; the owner replays.", [Steering, Vf, Vfs(2), Probe, FORWARD, Reset];
        counting_begins_anew_with_the_cards_life: "Life of the card in which the counting began; a new epoch starts at zero.", [Steering, Vf, Vfs(2), Probe, FORWARD, COUNT, Reset];
        what_a_failing_table_did_is_told_or_unknown_and_listed: "Reports the first failure, marks the rest `Unknown`, and reads the table again before the next batch.", [Steering, Disturb];
        a_failing_table_leaves_all_or_none_of_a_batch_that_promised_it: "All of them, or there were none: nothing changed.", [Steering, Disturb, ROLLBACK];
        a_flush_that_fails_says_so_and_is_finished_by_the_next: "`Io` with `Partial` when some were removed; calling again removes the rest.", [Steering, Disturb];
    }
    offload {
        the_claimed_slots_are_listed_in_order: "Lists the program slots in order.", [Offload];
        loading_leaves_the_running_program_alone: "Puts an image into a free slot; the running program is not touched.", [Offload, Programs];
        loading_the_same_again_succeeds: "Loading the same program into the same slot again succeeds.", [Offload, Programs];
        a_slot_in_use_is_busy: "`Busy` (slot in use).", [Offload, Programs];
        a_hash_that_differs_is_invalid_and_loads_nothing: "The hash of what arrived is compared before anything runs.", [Offload, Programs];
        an_image_too_large_exceeds_the_capacity: "`CapacityExceeded` (`offload.max_image`).", [Offload, Programs];
        a_slot_that_is_not_there_is_not_found: "`NotFound` (slot).", [Offload, Programs];
        activating_an_empty_slot_is_not_found: "`NotFound` (nothing loaded there).", [Offload];
        activating_drains_the_former_and_can_be_rolled_back: "Makes it the running one; the former stays in its slot, draining; `activate` of it rolls back.", [Offload, Programs];
        a_running_program_cannot_be_unloaded: "`Busy` (it runs).", [Offload, Programs];
        unloading_is_idempotent_and_frees_the_slot: "Empties a slot. Idempotent.", [Offload, Programs];
        a_former_program_can_be_unloaded: "`unload` frees a slot that does not run.", [Offload, Programs];
        entries_are_read_in_key_order: "Reads every entry of a table, in key order.", [Offload, Programs];
        put_replaces_and_delete_of_nothing_succeeds: "`Put` replaces, `Delete` of nothing succeeds.", [Offload, Programs];
        writes_continue_past_failures: "Writes entries, in order, continuing past failures; one result per entry.", [Offload, Programs];
        a_table_that_is_not_there_is_not_found: "`NotFound` (table).", [Offload, Programs];
        a_table_holds_what_it_says: "Entries it can hold.", [Offload, Programs];
        a_token_is_good_once: "A token is good once.", [Offload, CONNECTIONS];
        offloading_a_connection_twice_exists: "`Exists`.", [Offload, CONNECTIONS];
        a_connection_of_no_port_is_not_found: "`NotFound` (port).", [Offload, CONNECTIONS];
        claimed_kinds_of_connections_are_taken_and_no_others: "`Unsupported` (kind).", [Offload];
        the_claimed_connections_are_carried: "Established connections that the NP can carry.", [Offload, CONNECTIONS];
        a_fault_of_an_activation_leaves_the_old_program_running: "`Fault` with the old program still running.", [Offload, Programs, Disturb];
        a_resumed_connection_tells_what_was_passed: "Takes a connection back with its final state.", [Offload, CONNECTIONS, Disturb];
        a_connection_ends_with_the_cards_life: "Until it ends, `resume` takes it back, or the epoch changes: then it is lost.", [Offload, CONNECTIONS, Reset];
        the_numbers_follow_what_is_carried: "Connections carried now; connections ever taken.", [Offload, CONNECTIONS];
        each_kind_of_table_keeps_what_is_written: "Adds the entry or replaces the one with the same key, mask and priority; counts are read-only.", [Offload, Programs];
        a_stale_fence_offloads_nothing: "Refused with `Stale` unless its epoch is the card's present one.", [Offload, Programs];
    }
    transport {
        messages_keep_boundaries_and_order: "Sends, in order, whole messages.", [Transport, MESSAGES];
        a_channel_carries_both_ways: "A channel is a pair of single-producer single-consumer rings.", [Transport, MESSAGES];
        a_message_of_the_agreed_length_passes_and_no_longer_one: "`Invalid` (message longer than `max_message`; those before it were sent).", [Transport, MESSAGES];
        the_claimed_message_length_can_be_agreed: "Largest message in octets.", [Transport, MESSAGES];
        sizes_out_of_range_are_invalid: "`Invalid` (sizes).", [Transport];
        both_ends_agree_on_a_ring_of_a_power_of_two: "Octets of the ring of each direction; rounded up to a power of two.", [Transport];
        an_unclaimed_mode_is_unsupported: "`Unsupported` (no common version or mode).", [Transport];
        a_full_ring_takes_a_part_and_goes_on_later: "Sends, in order, as much as fits, and returns how much.", [Transport, MESSAGES];
        a_stream_keeps_every_octet: "Stream mode: octets of the concatenated slices; the count is of octets.", [Transport, STREAMS];
        a_message_longer_than_the_buffer_stays: "`Invalid` (message longer than the buffer; it stays).", [Transport, MESSAGES];
        an_empty_message_is_a_message: "Records with boundaries.", [Transport, MESSAGES];
        send_with_writes_one_message_of_exactly_its_length: "Writes one message of exactly `len` octets straight into the ring; `fill` is called once.", [Transport, MESSAGES];
        send_with_fills_only_what_it_will_send: "False, and nothing sent, when there is no room; `Invalid` when it is longer than was agreed.", [Transport, MESSAGES];
        arming_says_whether_to_sleep: "Asks for a notification, then looks again: false when there is something to do already.", [Transport, MESSAGES];
        room_wakes_an_armed_sender: "Asks for a notification of the next message or room.", [Transport, MESSAGES];
        in_flight_is_what_the_peer_has_not_taken: "Octets sent that the peer has not taken.", [Transport, MESSAGES];
        a_dead_peer_is_seen_and_what_it_sent_is_received: "`DeviceLost` (peer is gone and everything it sent was received).", [Transport, MESSAGES];
        a_name_in_use_exists: "`Exists` (name in use by a living process). Dropping the listener ends the offer.", [Transport];
        nobody_listening_is_not_found: "`NotFound` (nobody listens).", [Transport];
        a_name_of_64_octets_is_taken: "Name of a listener: 1 to 64 of `a-z A-Z 0-9 . _ -`, not starting with a dot.", [Transport];
        channels_outlive_their_listener: "Dropping the listener ends the offer; channels already made live on.", [Transport, MESSAGES];
        a_listener_accepts_one_channel_per_peer: "Waits for the next peer.", [Transport, MESSAGES];
        cancelling_accept_loses_no_peer: "Cancelling loses no peer that was not yet accepted.", [Transport, MESSAGES];
        the_claimed_channels_can_be_had: "Channels at a time.", [Transport];
    }
    hostile {
        a_lie_of_the_peer_closes_the_channel_for_good: "What it lies about becomes `PeerMisbehaved`, and the channel is closed for good.", [Transport, MESSAGES];
        whatever_the_peer_writes_ends_cleanly: "Nothing it writes can make this side read outside the region, loop without end or panic.", [Transport, MESSAGES];
    }
    ports {
        list_of_ports_is_in_ascending_order: "Lists the ports that exist now, in ascending `PortRef` order.", [Ports];
        an_open_port_tells_who_it_is_and_what_it_takes: "What may be transmitted; constant for the life of the `PortIo`.", [Ports, Vf, Admission];
        a_port_has_one_reader: "Opening it a second time before the first `PortIo` was dropped is `Busy`.", [Ports];
        opening_a_port_that_is_not_there_is_not_found: "`NotFound` (no such port).", [Ports];
        a_vfs_port_is_denied_until_admitted_and_after_revoked: "A VF's port opens only after `admit` took its lease (`Denied` before that).", [Ports, Vf, Admission];
        revoking_ends_open_frames_with_device_lost: "The port closes; its open frames end with `DeviceLost`.", [Ports, Vf, Admission];
        a_released_lease_opens_no_port: "A VF whose lease only one of them holds passes no frame.", [Ports, Vf, Admission];
        a_stale_fence_opens_no_port: "`Stale` (old epoch).", [Ports, Vf, Admission];
        nothing_waiting_is_zero_frames: "Zero means none is waiting. Ends early rather than wait.", [Ports];
        frames_are_received_in_arrival_order: "Receives frames into the first slots, in arrival order; each used slot is reset first.", [Ports, Probe];
        frames_are_transmitted_in_order: "Transmits the first frames of the slice, in order, and returns how many the port took.", [Ports, Probe];
        dropping_a_port_loses_no_transmitted_frame: "Frames not yet received are lost, those transmitted are not.", [Ports, Probe];
        a_frame_too_long_is_refused_counted_and_taken: "A frame that breaks the limits is counted as refused, dropped, and reported as taken.", [Ports];
        an_open_checksum_is_refused_where_it_is_not_offered: "Open checksums may be transmitted.", [Ports];
        a_super_frame_is_refused_where_it_is_not_offered: "UDP super-frames may be transmitted.", [Ports];
        the_descriptor_polls_readable_when_a_frame_waits: "Descriptor that polls readable when `receive` would return frames.", [Ports, Probe];
        an_error_comes_behind_the_frames_before_it: "Frames received before the error are counted first; the error comes with the next call.", [Ports, Probe, Disturb];
        the_claimed_number_of_ports_can_be_open: "Ports that can be open at a time.", [Ports];
    }
    events {
        lost_comes_before_back_with_their_epochs: "When the card goes, it raises `Lost`; when it is usable again, `Back`.", [Reset];
        when_back_arrives_the_card_is_usable: "The card is usable again, with nothing of its former life but what `list` shows.", [Vf, Reset];
        a_subscription_begins_now: "A new subscription to the backend's events, from now on.", [Reset];
        every_subscriber_sees_the_same_order: "Events of one backend arrive in the order they happened.", [Reset];
        cancelling_next_loses_no_event: "Cancelling loses nothing.", [Reset];
        events_end_with_the_backend: "`None` once the backend was dropped.", [Crash];
        a_slow_subscriber_is_told_how_many_it_lost: "A subscriber too slow loses the oldest and is told by `Overflowed`.", [Reset];
        a_rule_that_nothing_hits_ages_with_its_counters: "Rules were removed because nothing hit them, with their final counters.", [Steering, AGEING];
        a_high_water_mark_is_told_once_until_it_fell: "A finite resource passed its high-water mark; raised again only after it fell below.", [Steering, HIGH_WATER];
        a_new_vf_is_told: "A VF appeared.", [Vf, RESIZABLE, VF_EVENTS];
        a_vf_that_went_is_told: "A VF disappeared without having been released.", [Vf, RESIZABLE, VF_EVENTS];
        a_carrier_that_changes_is_told_and_listed: "A port's carrier changed.", [Ports, Disturb, LINK];
        health_that_changes_is_told: "The card's health changed; `None` is healthy.", [Disturb, HEALTH];
        unclaimed_kinds_of_events_are_not_raised: "Which events are raised; `Lost` and `Back` always are.", [Reset];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_every_case_has_its_sentence() {
        let mut names: Vec<&str> = CASES.iter().map(|case| case.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CASES.len(), "two cases share a name");
        for case in CASES {
            assert!(case.sentence.ends_with('.'), "{}: {}", case.name, case.sentence);
        }
    }
}
