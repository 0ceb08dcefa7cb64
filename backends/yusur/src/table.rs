//! The types of `include/yusur_np.h`, field by field. What they mean stands there; `tests/header.rs` compiles both and
//! compares sizes, offsets and constants.
//!
//! There are no calls here: a function pointer is only called in [`crate::sys`].

use std::ffi::{c_char, c_void};

pub(crate) const SYMBOL: &[u8] = b"yusur_np_table_v1\0";

macro_rules! constants {
    ($($name:ident: $kind:ty = $value:expr;)*) => {
        $(
            #[doc = concat!("`YNP_", stringify!($name), "`.")]
            pub const $name: $kind = $value;
        )*

        /// All of them with their names in the header.
        pub const CONSTANTS: &[(&str, i128)] = &[$((concat!("YNP_", stringify!($name)), $value as i128)),*];
    };
}

constants! {
    ABI_MAJOR: u16 = 1;
    ABI_MINOR: u16 = 0;
    OK: i32 = 0;
    E_INVALID: i32 = -1;
    E_NOT_FOUND: i32 = -2;
    E_EXISTS: i32 = -3;
    E_FULL: i32 = -4;
    E_BUSY: i32 = -5;
    E_TIMEOUT: i32 = -6;
    E_GONE: i32 = -7;
    E_STALE: i32 = -8;
    E_UNSUPPORTED: i32 = -9;
    E_IO: i32 = -10;
    E_FIRMWARE: i32 = -11;
    E_COLLISION: i32 = -12;
    E_FAULT: i32 = -13;
    E_DIGEST: i32 = -14;
    MODE_LEGACY: u32 = 0;
    MODE_SMARTNIC: u32 = 1;
    MODE_DPU: u32 = 2;
    FIELD_PORT: u64 = 1;
    FIELD_ETH_SRC: u64 = 1 << 1;
    FIELD_ETH_DST: u64 = 1 << 2;
    FIELD_ETHERTYPE: u64 = 1 << 3;
    FIELD_VLAN: u64 = 1 << 4;
    FIELD_IP4_SRC: u64 = 1 << 5;
    FIELD_IP4_DST: u64 = 1 << 6;
    FIELD_IP6_SRC: u64 = 1 << 7;
    FIELD_IP6_DST: u64 = 1 << 8;
    FIELD_IP_PROTO: u64 = 1 << 9;
    FIELD_L4_SRC: u64 = 1 << 10;
    FIELD_L4_DST: u64 = 1 << 11;
    UNTAGGED: u16 = 0xffff;
    STEP_DROP: u32 = 1;
    STEP_FORWARD: u32 = 2;
    STEP_PUNT: u32 = 3;
    STEP_JUMP: u32 = 4;
    STEP_ENCAPSULATE: u32 = 5;
    STEP_DECAPSULATE: u32 = 6;
    STEP_SET_ETH_SRC: u32 = 7;
    STEP_SET_ETH_DST: u32 = 8;
    STEP_TTL: u32 = 9;
    STEP_METER: u32 = 10;
    STEPS_MAX: usize = 8;
    MISS_DROP: u32 = 0;
    MISS_SOC: u32 = 1;
    ALL_PORTS: u64 = u64::MAX;
    EVENT_LOST: u32 = 1;
    EVENT_BACK: u32 = 2;
    EVENT_AGED: u32 = 3;
    EVENT_HEALTH: u32 = 4;
    CONNECTION_SPLICE: u32 = 1;
    CONNECTION_TLS: u32 = 2;
    CONNECTION_REWRITE: u32 = 4;
    SLOT_EMPTY: u32 = 0;
    SLOT_LOADED: u32 = 1;
    SLOT_RUNNING: u32 = 2;
    SLOT_DRAINING: u32 = 3;
    TABLE_EXACT: u32 = 0;
    TABLE_ARRAY: u32 = 1;
    TABLE_LPM: u32 = 2;
    TABLE_TERNARY: u32 = 3;
    TABLE_COUNTER: u32 = 4;
    TABLE_METER: u32 = 5;
    OP_PUT: u32 = 1;
    OP_DELETE: u32 = 2;
    NAME_MAX: usize = 32;
    DIGEST_MAX: usize = 32;
    KEY_MAX: usize = 64;
    VALUE_MAX: usize = 64;
}

macro_rules! structs {
    ($($rust:ident = $c:literal { $($field:ident: $kind:ty,)* })*) => {
        $(
            #[doc = concat!("`", $c, "`.")]
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
            pub struct $rust {
                $(
                    #[doc = concat!("`", stringify!($field), "`.")]
                    pub $field: $kind,
                )*
            }
        )*
        offsets! { $($rust = $c { $($field,)* })* }
    };
}

macro_rules! offsets {
    ($($rust:ident = $c:literal { $($field:ident,)* })*) => {
        /// Names, sizes and the offsets of the fields of all structs.
        pub const LAYOUTS: &[(&str, usize, &[(&str, usize)])] = &[$(
            (
                $c,
                size_of::<$rust>(),
                &[$((stringify!($field), std::mem::offset_of!($rust, $field))),*],
            )
        ),*];
    };
}

/// An opaque handle.
pub type Device = c_void;

/// A text that ends with a zero octet.
pub type Name = [u8; NAME_MAX];

structs! {
    Info = "ynp_info" {
        size: u32,
        mode: u32,
        generation: u64,
        alive: u32,
        reserved: u32,
        firmware: Name,
        model: Name,
        serial: Name,
    }
    Limits = "ynp_limits" {
        size: u32,
        groups: u32,
        priorities: u32,
        profiles: u32,
        fields: u64,
        steps: u64,
        entries: u64,
        tables: u32,
        counters: u32,
        counter_age_ms: u32,
        meters: u32,
        tunnels: u32,
        batch_max: u32,
        ageing: u32,
        slots: u32,
        program_tables: u32,
        connection_kinds: u32,
        max_image: u64,
        program_entries: u64,
        connections: u64,
    }
    Event = "ynp_event" {
        kind: u32,
        reserved: u32,
        value: u64,
    }
    Key = "ynp_key" {
        port: u64,
        eth_src: [u8; 6],
        eth_dst: [u8; 6],
        ethertype: u16,
        vlan: u16,
        ip_src: [u8; 16],
        ip_dst: [u8; 16],
        l4_src: u16,
        l4_dst: u16,
        ip_proto: u8,
        reserved: [u8; 3],
    }
    Step = "ynp_step" {
        kind: u32,
        mac: [u8; 6],
        reserved: u16,
        arg: u64,
    }
    SteeringTable = "ynp_steering_table" {
        size: u32,
        id: u32,
        group: u32,
        priority: u32,
        fields: u64,
    }
    Entry = "ynp_entry" {
        op: u32,
        table: u32,
        key: Key,
        user: u64,
        counter: u32,
        idle_ms: u32,
        steps: u32,
        reserved: u32,
        step: [Step; STEPS_MAX],
    }
    BatchResult = "ynp_batch_result" {
        done: u64,
        failed: u64,
        first_error: i32,
        reserved: u32,
    }
    Counter = "ynp_counter" {
        packets: u64,
        octets: u64,
    }
    Meter = "ynp_meter" {
        octets_per_second: u64,
        burst_octets: u64,
    }
    Tunnel = "ynp_tunnel" {
        vni: u32,
        ip_version: u32,
        local: [u8; 16],
        remote: [u8; 16],
        eth_src: [u8; 6],
        eth_dst: [u8; 6],
        reserved: u32,
    }
    Program = "ynp_program" {
        size: u32,
        state: u32,
        digest_len: u32,
        reserved: u32,
        digest: [u8; DIGEST_MAX],
        name: Name,
        version: Name,
    }
    ProgramTable = "ynp_program_table" {
        size: u32,
        kind: u32,
        key_len: u32,
        value_len: u32,
        used: u64,
        capacity: u64,
        name: Name,
    }
    Leg = "ynp_leg" {
        port: u64,
        local: [u8; 16],
        remote: [u8; 16],
        local_port: u16,
        remote_port: u16,
        send_next: u32,
        receive_next: u32,
        reserved: u32,
    }
    Connection = "ynp_connection" {
        size: u32,
        kind: u32,
        downstream: Leg,
        upstream: Leg,
        octets_up: u64,
        octets_down: u64,
    }
}

/// `ynp_program_entry`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramEntry {
    /// `op`.
    pub op: u32,
    /// `priority`.
    pub priority: u32,
    /// `key_len`.
    pub key_len: u32,
    /// `value_len`.
    pub value_len: u32,
    /// `masked`.
    pub masked: u32,
    /// `reserved`.
    pub reserved: u32,
    /// `key`.
    pub key: [u8; KEY_MAX],
    /// `mask`.
    pub mask: [u8; KEY_MAX],
    /// `value`.
    pub value: [u8; VALUE_MAX],
}

impl Default for ProgramEntry {
    fn default() -> Self {
        Self {
            op: 0,
            priority: 0,
            key_len: 0,
            value_len: 0,
            masked: 0,
            reserved: 0,
            key: [0; KEY_MAX],
            mask: [0; KEY_MAX],
            value: [0; VALUE_MAX],
        }
    }
}

macro_rules! functions {
    ($($name:ident($($arg:ty),*) $(-> $answer:ty)?;)*) => {
        /// `ynp_table`: null pointers are told apart before anything is called.
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub struct Table {
            /// `size`.
            pub size: u32,
            /// `abi_major`.
            pub abi_major: u16,
            /// `abi_minor`.
            pub abi_minor: u16,
            $(
                #[doc = concat!("`", stringify!($name), "`.")]
                pub $name: Option<unsafe extern "C" fn($($arg),*) $(-> $answer)?>,
            )*
        }

        impl Table {
            /// The functions that are null.
            pub fn missing(&self) -> Vec<&'static str> {
                let mut missing = Vec::new();
                $(
                    if self.$name.is_none() {
                        missing.push(stringify!($name));
                    }
                )*
                missing
            }
        }

        /// Names of the functions and the offsets of their pointers.
        pub const FUNCTIONS: &[(&str, usize)] = &[$((stringify!($name), std::mem::offset_of!(Table, $name))),*];
    };
}

functions! {
    text(i32) -> *const c_char;
    open(*const c_char, *const c_char, *mut *mut Device) -> i32;
    close(*mut Device);
    info(*mut Device, *mut Info) -> i32;
    limits(*mut Device, *mut Limits) -> i32;
    set_mode(*mut Device, u64, u32) -> i32;
    wait(*mut Device, u32, *mut Event, usize, *mut usize) -> i32;
    table_create(*mut Device, u64, *const SteeringTable) -> i32;
    table_destroy(*mut Device, u64, u32) -> i32;
    entries_write(*mut Device, u64, *const Entry, usize, *mut BatchResult) -> i32;
    entries_read(*mut Device, u32, *mut u64, *mut Entry, usize, *mut usize) -> i32;
    steering_flush(*mut Device, u64) -> i32;
    miss_set(*mut Device, u64, u64, u32) -> i32;
    counters_clear(*mut Device, u64, *const u32, usize) -> i32;
    counters_read(*mut Device, *const u32, usize, *mut Counter) -> i32;
    meter_set(*mut Device, u64, u32, *const Meter) -> i32;
    tunnel_set(*mut Device, u64, u32, *const Tunnel) -> i32;
    program_load(*mut Device, u64, u32, *const Program, *const u8, usize) -> i32;
    program_activate(*mut Device, u64, u32) -> i32;
    program_unload(*mut Device, u64, u32) -> i32;
    program_info(*mut Device, u32, *mut Program) -> i32;
    program_table(*mut Device, u32, *mut ProgramTable) -> i32;
    program_write(*mut Device, u64, u32, *const ProgramEntry, usize, *mut BatchResult) -> i32;
    program_read(*mut Device, u32, *mut u64, *mut ProgramEntry, usize, *mut usize) -> i32;
    connection_add(*mut Device, u64, *const Connection, *mut u64) -> i32;
    connection_take(*mut Device, u64, u64, *mut Connection) -> i32;
    connection_count(*mut Device, *mut u64, *mut u64) -> i32;
    diagnose(*mut Device, *const u8, usize, *mut u8, usize, *mut usize) -> i32;
}

/// A text as a [`Name`], cut at 31 octets.
pub fn name(text: &str) -> Name {
    let mut name = [0; NAME_MAX];
    let mut end = text.len().min(NAME_MAX - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    name[..end].copy_from_slice(&text.as_bytes()[..end]);
    name
}

/// A [`Name`] as text, up to its zero octet or its end.
pub fn text(name: &Name) -> String {
    let end = name.iter().position(|octet| *octet == 0).unwrap_or(NAME_MAX);
    String::from_utf8_lossy(&name[..end]).into_owned()
}
