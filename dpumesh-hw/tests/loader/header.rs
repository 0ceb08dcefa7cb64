//! `include/dpumesh.h` is what the types say, and a C compiler lays it out as Rust does.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use dpumesh_hw::loader::abi::*;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Runs the C compiler, with the header that is checked in, and hands its complaints on.
pub(crate) fn cc(arguments: &[&str]) {
    let include = root().join("include");
    let output = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(include)
        .args(arguments)
        .output()
        .expect("a C compiler");
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cc {arguments:?}:\n{complaints}");
}

/// Generated from `src/loader/abi.rs`; the rest stands in `src/loader/header/`.
fn header() -> String {
    let mut config = cbindgen::Config {
        language: cbindgen::Language::C,
        style: cbindgen::Style::Both,
        cpp_compat: true,
        usize_is_size_t: true,
        documentation_style: cbindgen::DocumentationStyle::C99,
        line_length: 120,
        include_guard: Some("DPUMESH_H".to_owned()),
        no_includes: true,
        sys_includes: ["stddef.h", "stdint.h", "string.h"].map(str::to_owned).to_vec(),
        header: Some(
            include_str!("../../src/loader/header/top.h")
                .trim_end()
                .to_owned(),
        ),
        trailer: Some(
            include_str!("../../src/loader/header/bottom.h")
                .trim_end()
                .to_owned(),
        ),
        ..cbindgen::Config::default()
    };
    // Types that no function of ours has an argument of are for the vendor.
    config.export.include = types().map(|(name, _)| name).collect();
    config.export.item_types = Vec::new();
    let mut text = Vec::new();
    cbindgen::Builder::new()
        .with_config(config)
        .with_src(root().join("src/loader/abi.rs"))
        .generate()
        .expect("the types are C's")
        .write(&mut text);
    String::from_utf8(text).expect("text")
}

/// Structs of the interface and their fields, as the source has them.
fn types() -> impl Iterator<Item = (String, Vec<String>)> {
    include_str!("../../src/loader/abi.rs")
        .split("\npub struct ")
        .skip(1)
        .map(|text| {
            let (name, rest) = text.split_once(" {").expect("a struct with fields");
            let (body, _) = rest.split_once("\n}").expect("its end");
            let fields = body
                .lines()
                .filter_map(|line| line.strip_prefix("    pub ")?.split_once(':'))
                .map(|(field, _)| field.to_owned())
                .collect();
            (name.to_owned(), fields)
        })
}

#[test]
fn the_header_is_what_the_types_say() {
    let path = root().join("include/dpumesh.h");
    let made = header();
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        std::fs::write(&path, &made).expect("written");
        return;
    }
    let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
    let different = made
        .lines()
        .zip(checked_in.lines())
        .find(|(made, old)| made != old);
    assert!(
        made == checked_in,
        "{} is out of date (UPDATE_EXPECT=1 writes it); first difference: {different:?}",
        path.display()
    );
}

/// Size and offsets of structs, as Rust lays them out.
macro_rules! layout {
    ($($name:ident { $($field:ident)* })*) => {
        vec![$((
            stringify!($name),
            size_of::<$name>(),
            vec![$((stringify!($field), std::mem::offset_of!($name, $field))),*],
        )),*]
    };
}

/// Name and size of a struct, and its fields with their offsets.
type Layout = (&'static str, usize, Vec<(&'static str, usize)>);

fn layout() -> Vec<Layout> {
    layout! {
        dm_str { at len }
        dm_list { at len stride }
        dm_arena { size reserved at capacity used needed }
        dm_rows { size stride at capacity len }
        dm_error { size kind effect retry has reserved index vendor_code object field message cause }
        dm_call { size reserved token epoch error arena }
        dm_completion { size status token }
        dm_host { size reserved context log }
        dm_info { size role name version dpu device conformance }
        dm_capabilities { size events mode max_vfs vf_attributes vf_max_mtu vf_attachments vf_resets vf_resizable hardware_rules rules counters groups priorities masks counter_unit counter_age_ms batch_max atomicity per_operation_status idle_timeout software_fallback hardware_actions actions hardware_fields fields slots tables max_image entries connections connection_kinds open_ports checksum_offload tso uso parts }
        dm_port { kind controller pf index }
        dm_addr { family octets }
        dm_ip_match { kind prefix_len value mask }
        dm_cookie { high low }
        dm_owner { kind user }
        dm_pattern { size fields port eth_src eth_src_mask eth_dst eth_dst_mask ethertype vlan vni ip_src ip_dst ip_proto dscp fragment l4_src l4_dst tcp_flags tcp_flags_mask ct_state ct_state_mask mark mark_mask }
        dm_action { size kind port number tunnel commit local remote eth_src eth_dst queues }
        dm_rule { size group cookie owner priority placement idle_timeout_ms reserved pattern actions }
        dm_rules { size reserved rules }
        dm_verdict { size verdict field reason }
        dm_operation { size kind rule owner cookie }
        dm_batch { size atomicity operations }
        dm_counters { packets octets epoch idle_ms }
        dm_change { size kind placement has_counters counters reason }
        dm_outcome { size undone changes errors undo_error }
        dm_of_owner { size reserved owner }
        dm_installed { size placement reason rule }
        dm_cookies { size reserved owner cookies }
        dm_count { size present counters }
        dm_miss { size policy port }
        dm_occupancy { size reserved used limit resource }
        dm_number { size reserved value }
        dm_vf_count { size pf count needs }
        dm_pci { domain bus device function reserved }
        dm_vf_config { size has mac vlan vlan_qos vlan_service_tag trust spoof_check link_state min_rate max_rate mtu }
        dm_vf_request { size has owner port pci pf numa_node driver config }
        dm_vf_lease { size reserved id epoch port dpu owner }
        dm_attachment { size kind path ifname }
        dm_vf_order { size level lease config attachment port live }
        dm_attached { size mtu ifindex mac reserved }
        dm_vf_state { size location port has_pci mtu pci admin_mac effective_mac reserved place lease }
        dm_slot { size slot }
        dm_program { size slot name version hash image }
        dm_program_info { size slot state reserved name version hash }
        dm_table_info { size id kind key_len value_len used capacity name }
        dm_entry { size kind priority has_mask key mask value }
        dm_entries { size table entries }
        dm_leg { port local remote local_port remote_port scope flow send_next receive_next }
        dm_connection { size kind downstream upstream octets_up octets_down }
        dm_offload_stats { size reserved connections connections_total entries }
        dm_port_info { size has_mac port mac reserved mtu link_up netdev handle max_frame poll_fd checksum_offload tso uso }
        dm_frame { size checksum at capacity len sum_start sum_offset gso gso_size gso_header_len gso_ecn }
        dm_aged { size has_counters cookie counters }
        dm_event { size kind epoch used limit port owner up reserved resource aged error }
        dm_ops { size abi_major abi_minor flags open close info capabilities epoch poll_fd poll next_event cancel vf_plan_count vf_set_count vf_list vf_lease vf_admit vf_revoke vf_configure vf_attach vf_detach vf_release vf_reclaim steering_validate steering_apply steering_list steering_counters steering_flush steering_set_miss_policy steering_occupancy offload_programs offload_load offload_activate offload_unload offload_tables offload_write offload_read offload_connection offload_resume offload_stats port_list port_open port_close port_receive port_transmit port_refused }
        dm_hooks { size survives lose bring_back inject observe netns jam strand program }
    }
}

#[test]
fn c_lays_every_struct_out_as_rust_does() {
    let rust = layout();
    let listed: Vec<_> = rust
        .iter()
        .map(|(name, _, fields)| {
            let fields = fields.iter().map(|(field, _)| (*field).to_owned()).collect();
            ((*name).to_owned(), fields)
        })
        .collect();
    assert_eq!(
        types().collect::<Vec<(String, Vec<String>)>>(),
        listed,
        "every field of every struct is checked"
    );
    let mut source = "#include <dpumesh.h>\n".to_owned();
    for (name, size, fields) in rust {
        let _ = writeln!(
            source,
            "_Static_assert(sizeof({name}) == {size}, \"size of {name}\");"
        );
        for (field, offset) in fields {
            let _ = writeln!(
                source,
                "_Static_assert(offsetof({name}, {field}) == {offset}, \"{name}.{field}\");"
            );
        }
    }
    let folder = tempfile::tempdir().expect("a folder");
    compile_only(folder.path(), "layout.c", &source);
}

#[test]
fn the_header_is_plain_c_and_cpp() {
    let folder = tempfile::tempdir().expect("a folder");
    compile_only(folder.path(), "empty.c", "#include <dpumesh.h>\n");
    let source = folder.path().join("empty.cpp");
    std::fs::write(&source, "#include <dpumesh.h>\n").expect("written");
    let output = Command::new("cc")
        .args(["-x", "c++", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(root().join("include"))
        .arg(&source)
        .output()
        .expect("a C compiler");
    let complaints = String::from_utf8_lossy(&output.stderr);
    // Not every machine has the C++ half of its compiler.
    assert!(
        output.status.success() || complaints.contains("cc1plus"),
        "{complaints}"
    );
}

fn compile_only(folder: &Path, name: &str, source: &str) {
    let path = folder.join(name);
    std::fs::write(&path, source).expect("written");
    cc(&["-fsyntax-only", path.to_str().expect("a plain path")]);
}
