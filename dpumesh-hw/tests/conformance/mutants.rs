//! Proof that the kit notices: each mutant is the memory backend with one bug, and the named case has to fail on it.
//!
//! A [`Lie`] is a claim that does not hold; a [`Bug`] is a call that misbehaves.

mod channels;
mod mutant;
mod offload;
mod ports;
mod steering;
mod vf;

use std::sync::Arc;

use dpumesh_core::steering::{Atomicity, Field};
use dpumesh_core::{
    ActionKinds, AttachmentKinds, Capabilities, ConnectionKinds, MatchKinds, Mtu, ResetLevels, VfAttributes,
};
use dpumesh_hw::conformance::memory::MemoryFixture;
use dpumesh_hw::conformance::{Outcome, run};

use mutant::{Bug, Lie, Mutant};

use crate::{DEADLINE, fixtures};

/// Runs one case against a card with a bug.
async fn outcome(fixture: MemoryFixture, bug: Bug, lie: Lie, case: &str) -> Outcome {
    let fixture = fixture.wrapped(move |inner| Arc::new(Mutant::new(inner, bug, lie)));
    let report = run(Arc::new(fixture), case, DEADLINE).await;
    report
        .outcome(case)
        .unwrap_or_else(|| panic!("there is no case {case}"))
        .clone()
}

/// Names the case that a mutant got past, if it did.
async fn missed(fixture: MemoryFixture, bug: Bug, lie: Lie, case: &str) -> Option<String> {
    let found = outcome(fixture, bug, lie, case).await;
    (!matches!(found, Outcome::Failed { .. })).then(|| format!("{bug:?} got past {case}: {found}"))
}

#[tokio::test]
async fn every_bug_is_caught_by_the_case_that_is_about_it() {
    let mut misses = Vec::new();
    for (bug, case) in BUGS {
        misses.extend(missed(fixtures::large(), *bug, |_| {}, case).await);
    }
    let case = "an_undeclared_atomicity_is_unsupported";
    misses.extend(missed(fixtures::small(), Bug::TakesAnyAtomicity, |_| {}, case).await);
    // Only real memory can be written by its peer.
    let folder = tempfile::tempdir().expect("a folder");
    let sockets = || fixtures::over_sockets(folder.path(), &dpumesh_hw::memory::capabilities());
    for (bug, case) in [
        (
            Bug::ForgivesALiar,
            "a_lie_of_the_peer_closes_the_channel_for_good",
        ),
        (
            Bug::OverlooksALiar,
            "a_lie_of_the_peer_closes_the_channel_for_good",
        ),
        (Bug::OverlooksALiar, "whatever_the_peer_writes_ends_cleanly"),
    ] {
        misses.extend(missed(sockets(), bug, |_| {}, case).await);
    }
    assert!(misses.is_empty(), "{}", misses.join("\n"));
}

const BUGS: &[(Bug, &str)] = &[
    (Bug::IgnoresTheFence, "a_stale_fence_leases_and_changes_nothing"),
    (Bug::IgnoresTheFence, "a_stale_fence_steers_nothing"),
    (Bug::IgnoresTheFence, "a_stale_fence_offloads_nothing"),
    (Bug::IgnoresTheFence, "a_stale_fence_opens_no_port"),
    (Bug::IgnoresTheFence, "a_fence_of_the_former_life_is_stale"),
    (
        Bug::FreesDespiteAFailedRelease,
        "a_release_that_fails_keeps_the_lease",
    ),
    (
        Bug::ReleasesByPortInsteadOfLease,
        "a_late_release_never_touches_the_next_owners_vf",
    ),
    (
        Bug::ReleasesByPortInsteadOfLease,
        "a_forged_lease_releases_nothing",
    ),
    (
        Bug::ReleasesByPortInsteadOfLease,
        "a_lease_of_the_former_life_touches_nothing",
    ),
    (
        Bug::LeasesTheHighestIndex,
        "lease_gives_the_lowest_index_that_fits",
    ),
    (
        Bug::GivesASecondLeaseToOneOwner,
        "the_same_owner_gets_the_same_lease",
    ),
    (Bug::ForgetsToRestoreTheMac, "release_restores_the_attributes"),
    (
        Bug::ConfiguresHalfBeforeItFails,
        "a_failed_configure_leaves_everything_as_before",
    ),
    (
        Bug::IgnoresWhatItCannotConfigure,
        "an_unclaimed_attribute_is_unsupported_by_name_and_touches_nothing",
    ),
    (
        Bug::AdmitsOverAnotherLease,
        "another_lease_of_the_port_conflicts_until_revoked",
    ),
    (Bug::ReclaimsFromTheLiving, "reclaim_spares_a_living_owner"),
    (Bug::IsSurprisedByASecondDetach, "detaching_twice_succeeds"),
    (Bug::ListsNoLeases, "a_lease_names_card_port_owner_and_epoch"),
    (Bug::ListsNoLeases, "a_lease_survives_its_process"),
    (Bug::ReordersABatch, "operations_of_a_batch_take_effect_in_order"),
    (
        Bug::ListsEverybodysRules,
        "list_shows_only_the_owners_rules_as_given",
    ),
    (
        Bug::FlushesEverybodysRules,
        "flush_removes_the_owners_rules_and_no_others",
    ),
    (Bug::StopsAtTheFirstFailure, "a_batch_continues_after_a_failure"),
    (Bug::RollsBackInWordsOnly, "a_rolled_back_batch_changes_nothing"),
    (Bug::RollsBackInWordsOnly, "an_atomic_batch_is_all_or_none"),
    (
        Bug::CallsAnEqualRuleExisting,
        "adding_an_equal_rule_again_is_present",
    ),
    (Bug::CallsAnEqualRuleExisting, "repeating_a_whole_batch_is_safe"),
    (
        Bug::ReplacesAnExistingCookie,
        "a_different_rule_of_the_same_cookie_exists",
    ),
    (Bug::SkipsCountersItLacks, "counters_answer_each_cookie_in_order"),
    (Bug::ListsInReverse, "list_is_in_group_priority_cookie_order"),
    (
        Bug::LosesFinalCounters,
        "a_counting_rule_is_removed_with_its_final_counters",
    ),
    (
        Bug::CountsBackwards,
        "counters_never_run_backwards_and_end_with_the_final_value",
    ),
    (
        Bug::CountsFcsToo,
        "counters_tell_frames_and_octets_in_the_declared_unit",
    ),
    (Bug::InvertsPriorities, "the_lowest_priority_number_wins"),
    (Bug::PromisesHardware, "a_verdict_comes_true_on_an_empty_card"),
    (
        Bug::PromisesHardware,
        "an_unclaimed_field_is_impossible_by_its_path",
    ),
    (
        Bug::InstallsWhatItValidates,
        "validate_judges_each_rule_and_installs_none",
    ),
    (
        Bug::RemovesForAnybody,
        "removing_anothers_rule_is_not_found_and_it_stays",
    ),
    (Bug::NamesNoField, "a_senseless_rule_is_invalid_with_its_field"),
    (Bug::ForgetsThatItIsFull, "hardware_holds_the_claimed_rules"),
    (Bug::LeavesMissesOpen, "a_miss_goes_to_software_when_asked"),
    (Bug::ResumesATokenTwice, "a_token_is_good_once"),
    (Bug::StopsAtTheFirstBadEntry, "writes_continue_past_failures"),
    (Bug::ReadsInReverse, "entries_are_read_in_key_order"),
    (
        Bug::RunsTheOldProgram,
        "activating_drains_the_former_and_can_be_rolled_back",
    ),
    (Bug::ReceivesInReverse, "frames_are_received_in_arrival_order"),
    (
        Bug::LeavesFramesAsTheyWere,
        "frames_are_received_in_arrival_order",
    ),
    (
        Bug::CountsNoRefusals,
        "a_frame_too_long_is_refused_counted_and_taken",
    ),
    (Bug::MergesMessages, "messages_keep_boundaries_and_order"),
    (
        Bug::OverlooksADeadPeer,
        "a_dead_peer_is_seen_and_what_it_sent_is_received",
    ),
    (Bug::LetsItsOwnerOversleep, "arming_says_whether_to_sleep"),
    (
        Bug::HidesWhatIsInFlight,
        "in_flight_is_what_the_peer_has_not_taken",
    ),
    (
        Bug::TruncatesMessages,
        "a_message_of_the_agreed_length_passes_and_no_longer_one",
    ),
    (Bug::KeepsItsEpoch, "the_epoch_grows_with_each_return"),
    (Bug::SwallowsLost, "lost_comes_before_back_with_their_epochs"),
    (
        Bug::LosesEventsSilently,
        "a_slow_subscriber_is_told_how_many_it_lost",
    ),
    (Bug::ChangesItsName, "info_and_capabilities_are_constant"),
    (
        Bug::SaysHardwareAndDoesNothing,
        "a_rule_in_hardware_acts_on_real_frames",
    ),
    (
        Bug::SaysHardwareAndDoesNothing,
        "each_action_claimed_in_hardware_acts_on_real_frames",
    ),
    (
        Bug::SaysHardwareAndDoesNothing,
        "the_counter_of_a_rule_in_hardware_moves_with_frames",
    ),
    (
        Bug::SaysHardwareAndUsesSoftware,
        "a_rule_in_hardware_needs_no_software",
    ),
    (
        Bug::CountsNothingInHardware,
        "the_counter_of_a_rule_in_hardware_moves_with_frames",
    ),
    (
        Bug::ForgetsMarks,
        "a_mark_made_in_hardware_is_matched_in_hardware",
    ),
    (Bug::ListsAnotherPlace, "a_forwarded_frame_leaves_by_its_port"),
    (Bug::ServesOldCounters, "a_counter_is_at_most_as_old_as_claimed"),
    (
        Bug::SplitsAtomicBatches,
        "no_frame_meets_the_middle_of_an_atomic_batch",
    ),
    (Bug::RemovesBeforeItAdds, "replacing_rules_leaves_no_gap"),
    (Bug::ListsTheFormerLife, "replayed_rules_act_in_the_new_life"),
    (
        Bug::CarriesCountersOver,
        "counting_begins_anew_with_the_cards_life",
    ),
    (
        Bug::SaysDoneWhatFailed,
        "what_a_failing_table_did_is_told_or_unknown_and_listed",
    ),
    (
        Bug::MarksEveryFailureUnknown,
        "what_a_failing_table_did_is_told_or_unknown_and_listed",
    ),
    (
        Bug::SaysUndoneWhatWasDone,
        "a_failing_table_leaves_all_or_none_of_a_batch_that_promised_it",
    ),
    (
        Bug::HidesAFailedFlush,
        "a_flush_that_fails_says_so_and_is_finished_by_the_next",
    ),
    (
        Bug::NeedsTheNamespaceToRelease,
        "release_with_the_namespace_gone_frees_the_vf",
    ),
    (
        Bug::GivesUpAtTheFirstStep,
        "a_release_tries_the_steps_behind_one_that_fails",
    ),
    (
        Bug::TellsOnlyTheFirstFailure,
        "a_release_tells_every_step_that_failed",
    ),
    (
        Bug::StaysBusyWhenCancelled,
        "a_cancelled_attach_can_be_repeated_or_released",
    ),
    (
        Bug::StaysBusyWhenCancelled,
        "a_cancelled_configure_can_be_repeated_or_released",
    ),
    (Bug::StaysBusyWhenCancelled, "a_cancelled_release_can_be_repeated"),
    (
        Bug::SetsOnlyTheAdministrativeMac,
        "the_function_uses_the_mac_that_it_was_given",
    ),
    (Bug::PromisesEveryVf, "fewer_vfs_than_asked_for_are_told"),
    (
        Bug::StopsTheOldProgramOnAFault,
        "a_fault_of_an_activation_leaves_the_old_program_running",
    ),
    (
        Bug::ForgetsWhatItPassed,
        "a_resumed_connection_tells_what_was_passed",
    ),
    (Bug::ResumesWhatWasLost, "a_connection_ends_with_the_cards_life"),
    (Bug::CountsNoConnections, "the_numbers_follow_what_is_carried"),
    (Bug::ForgetsMeters, "each_kind_of_table_keeps_what_is_written"),
    (
        Bug::LosesFramesAtAnError,
        "an_error_comes_behind_the_frames_before_it",
    ),
    (Bug::FillsWithoutRoom, "send_with_fills_only_what_it_will_send"),
    (Bug::SwallowsLink, "a_carrier_that_changes_is_told_and_listed"),
    (Bug::SwallowsHealth, "health_that_changes_is_told"),
    (Bug::SwallowsVfRemoved, "a_vf_that_went_is_told"),
];

#[tokio::test]
async fn every_false_claim_is_caught() {
    let mut misses = Vec::new();
    for (lie, case) in LIES {
        misses.extend(missed(fixtures::small(), Bug::None, *lie, case).await);
    }
    let mtu: Lie = |c| c.vf.max_mtu = Mtu::try_from(9001).ok();
    let case = "an_mtu_up_to_the_claimed_one_is_taken";
    misses.extend(missed(fixtures::large(), Bug::None, mtu, case).await);
    assert!(misses.is_empty(), "{}", misses.join("\n"));
}

const LIES: &[(Lie, &str)] = &[
    (|c| c.vf.max_vfs = 2, "list_shows_each_vf_once_within_the_limit"),
    (
        |c| c.vf.attributes |= VfAttributes::MAX_RATE,
        "each_claimed_attribute_can_be_set",
    ),
    (
        |c| c.vf.attributes |= VfAttributes::MTU,
        "each_claimed_attribute_can_be_set",
    ),
    (
        |c| c.vf.attributes.remove(VfAttributes::SPOOF_CHECK),
        "an_unclaimed_attribute_is_unsupported_by_name_and_touches_nothing",
    ),
    (
        |c| c.vf.attachments = AttachmentKinds::empty(),
        "an_unclaimed_attachment_is_unsupported",
    ),
    (
        |c| c.vf.resets |= ResetLevels::FUNCTION,
        "each_claimed_reset_level_works",
    ),
    (
        |c| c.vf.resizable = true,
        "the_vf_count_becomes_what_the_answer_says",
    ),
    (
        |c| c.steering.hardware_rules += 1,
        "hardware_holds_the_claimed_rules",
    ),
    (
        |c| c.steering.hardware_rules -= 1,
        "hardware_holds_the_claimed_rules",
    ),
    (
        |c| c.steering.rules += 1,
        "the_card_holds_the_claimed_rules_in_all",
    ),
    (
        |c| c.steering.rules = 5,
        "the_card_holds_the_claimed_rules_in_all",
    ),
    (|c| c.steering.groups += 1, "the_claimed_groups_are_accepted"),
    (|c| c.steering.groups -= 1, "the_claimed_groups_are_accepted"),
    (
        |c| c.steering.groups += 1,
        "a_jump_stays_within_the_claimed_groups",
    ),
    (
        |c| c.steering.priorities += 1,
        "the_claimed_priorities_are_accepted",
    ),
    (
        |c| c.steering.priorities -= 1,
        "the_claimed_priorities_are_accepted",
    ),
    (|c| c.steering.masks += 1, "the_claimed_masks_are_held"),
    (|c| c.steering.masks -= 1, "the_claimed_masks_are_held"),
    (|c| c.steering.counters += 1, "the_claimed_counters_count"),
    (|c| c.steering.counters -= 1, "the_claimed_counters_count"),
    (
        |c| c.steering.batch_max += 1,
        "a_batch_of_the_claimed_length_is_taken",
    ),
    (
        |c| c.steering.batch_max -= 1,
        "a_batch_of_the_claimed_length_is_taken",
    ),
    (
        |c| c.steering.counter_unit = dpumesh_core::CounterUnit::L3,
        "counters_tell_frames_and_octets_in_the_declared_unit",
    ),
    (
        |c| claim(c, Field::Dscp, MatchKinds::EXACT),
        "claimed_fields_can_be_matched",
    ),
    (
        |c| claim(c, Field::Ip4Dst, MatchKinds::MASK),
        "claimed_fields_can_be_matched",
    ),
    (
        |c| claim(c, Field::Vlan, MatchKinds::EXACT),
        "fields_claimed_in_hardware_are_judged_hardware",
    ),
    (
        |c| {
            c.steering.hardware_fields.remove(&Field::EthDst);
        },
        "fields_claimed_in_hardware_are_judged_hardware",
    ),
    (
        |c| {
            c.steering.fields.remove(&Field::EthDst);
        },
        "an_unclaimed_field_is_impossible_by_its_path",
    ),
    (
        |c| c.steering.actions |= ActionKinds::VXLAN,
        "claimed_actions_can_be_had",
    ),
    (
        |c| c.steering.actions |= ActionKinds::METER,
        "claimed_actions_can_be_had",
    ),
    (
        |c| c.steering.hardware_actions.remove(ActionKinds::COUNT),
        "claimed_actions_can_be_had",
    ),
    (
        |c| c.steering.actions.remove(ActionKinds::COUNT),
        "an_unclaimed_action_is_impossible_by_its_index",
    ),
    (
        |c| {
            c.steering.atomicity.insert(Atomicity::Rollback);
        },
        "a_rolled_back_batch_changes_nothing",
    ),
    (
        |c| {
            c.steering.atomicity.insert(Atomicity::Atomic);
        },
        "an_atomic_batch_is_all_or_none",
    ),
    (
        |c| c.steering.atomicity.clear(),
        "an_undeclared_atomicity_is_unsupported",
    ),
    (|c| ages(c), "a_rule_that_nothing_hits_ages_with_its_counters"),
    (|c| c.offload.slots += 1, "the_claimed_slots_are_listed_in_order"),
    (
        |c| c.offload.max_image -= 1,
        "an_image_too_large_exceeds_the_capacity",
    ),
    (|c| c.offload.entries += 1, "a_table_holds_what_it_says"),
    (
        |c| c.offload.connections += 1,
        "the_claimed_connections_are_carried",
    ),
    (
        |c| c.offload.connection_kinds |= ConnectionKinds::TLS_RECORDS,
        "claimed_kinds_of_connections_are_taken_and_no_others",
    ),
    (
        |c| c.offload.connection_kinds = ConnectionKinds::empty(),
        "claimed_kinds_of_connections_are_taken_and_no_others",
    ),
    (
        |c| c.offload = Default::default(),
        "a_part_is_there_when_it_is_claimed",
    ),
    (|c| c.transport.channels += 1, "the_claimed_channels_can_be_had"),
    (|c| c.transport.channels -= 1, "the_claimed_channels_can_be_had"),
    (
        |c| c.transport.max_message += 1,
        "the_claimed_message_length_can_be_agreed",
    ),
    (
        |c| c.transport.max_message -= 1,
        "the_claimed_message_length_can_be_agreed",
    ),
    (|c| c.transport.max_ring /= 2, "sizes_out_of_range_are_invalid"),
    (|c| c.transport.streams = true, "a_stream_keeps_every_octet"),
    (
        |c| c.transport.messages = false,
        "an_unclaimed_mode_is_unsupported",
    ),
    (|c| c.ports.open += 1, "the_claimed_number_of_ports_can_be_open"),
    (|c| c.ports.open -= 1, "the_claimed_number_of_ports_can_be_open"),
    (
        |c| c.events = dpumesh_core::EventKinds::empty(),
        "unclaimed_kinds_of_events_are_not_raised",
    ),
];

fn claim(capabilities: &mut Capabilities, field: Field, kind: MatchKinds) {
    let steering = &mut capabilities.steering;
    for fields in [&mut steering.fields, &mut steering.hardware_fields] {
        *fields.entry(field).or_default() |= kind;
    }
}

fn ages(capabilities: &mut Capabilities) {
    capabilities.steering.idle_timeout = true;
    capabilities.events |= dpumesh_core::EventKinds::AGED;
}

#[tokio::test]
async fn without_a_bug_and_a_lie_nothing_fails() {
    let fixture = fixtures::small().wrapped(|inner| Arc::new(Mutant::new(inner, Bug::None, |_| {})));
    let report = run(Arc::new(fixture), "", DEADLINE).await;
    assert!(report.is_clean(), "{report}");
}
