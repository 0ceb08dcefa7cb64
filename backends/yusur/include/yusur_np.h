/*
 * yusur_np.h: the functions that dpumesh-yusur needs from the vendor's library of the network processor (NP).
 *
 * THIS IS OUR ASSUMPTION. The vendor's own interface is not published; no name below is known to exist anywhere else.
 * What is certain is only what a mesh needs, and that is what stands here. A vendor engineer writes a thin library that
 * exports yusur_np_table_v1 and maps each function to the true symbols; README.md beside this directory has the list of
 * what each one must do and where dpumesh uses it. The Rust side of this file is src/table.rs, and a test compiles
 * both and compares every size and offset.
 *
 * Rules that hold for every function
 *  - 0 (YNP_OK) or one of the negative codes below. A failed call has changed nothing, except a batch, which says how far it
 *    came.
 *  - The caller owns all memory. Nothing is kept after return, nothing is allocated for the caller, nothing is freed.
 *  - `size` is the first field of each struct that may grow: the caller sets it to what it knows, the library fills or
 *    reads no more than that.
 *  - No exception and no longjmp leaves the library.
 *  - All functions of one device may be called from any thread. dpumesh makes all calls that change something from one
 *    thread, one after the other, and `wait` from another.
 *  - A call may block for as long as the hardware takes; `wait` for at most its timeout.
 *  - `generation` counts the NP's lives. A call that changes something carries the one its caller knows and is refused with
 *    YNP_E_STALE when the NP was reset since. (Without such a guard in the SDK: compare before and after the call.)
 *  - Ports are numbered by what they are: kind << 48 | controller << 32 | PF << 16 | VF, with kind 0 uplink (number at bit
 *    32), 1 PF, 2 VF, 3 the entry of the shared proxy (number at bit 32).
 */
#ifndef YUSUR_NP_H
#define YUSUR_NP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define YNP_ABI_MAJOR 1u
#define YNP_ABI_MINOR 0u

/* Results. */
#define YNP_OK 0
#define YNP_E_INVALID (-1)      /* an argument makes no sense */
#define YNP_E_NOT_FOUND (-2)    /* no such table, entry, slot, token, card */
#define YNP_E_EXISTS (-3)       /* it is there already and differs */
#define YNP_E_FULL (-4)         /* a finite resource is used up */
#define YNP_E_BUSY (-5)         /* in use; a running program */
#define YNP_E_TIMEOUT (-6)      /* the hardware did not answer in time */
#define YNP_E_GONE (-7)         /* the NP is being reset, or the card is gone */
#define YNP_E_STALE (-8)        /* the generation is not the present one */
#define YNP_E_UNSUPPORTED (-9)  /* this card, mode or firmware cannot do it */
#define YNP_E_IO (-10)          /* the way to the card failed */
#define YNP_E_FIRMWARE (-11)    /* firmware and library do not fit together */
#define YNP_E_COLLISION (-12)   /* the hash bucket is full although the table is not */
#define YNP_E_FAULT (-13)       /* anything else that went wrong inside */
#define YNP_E_DIGEST (-14)      /* the digest differs from that of the image which arrived */

/* Modes of the card. A change of mode is a new life of the NP. */
#define YNP_MODE_LEGACY 0u   /* a NIC with SR-IOV; the NP is not ours */
#define YNP_MODE_SMARTNIC 1u /* steering tables; no programs, no connections */
#define YNP_MODE_DPU 2u      /* everything */

/* Fields of a key. An entry is found by the whole key: there are neither masks nor prefixes nor ranges. */
#define YNP_FIELD_PORT (1ull << 0)
#define YNP_FIELD_ETH_SRC (1ull << 1)
#define YNP_FIELD_ETH_DST (1ull << 2)
#define YNP_FIELD_ETHERTYPE (1ull << 3) /* behind at most one 802.1Q tag */
#define YNP_FIELD_VLAN (1ull << 4)      /* 1 to 4094, or YNP_UNTAGGED */
#define YNP_FIELD_IP4_SRC (1ull << 5)
#define YNP_FIELD_IP4_DST (1ull << 6)
#define YNP_FIELD_IP6_SRC (1ull << 7)
#define YNP_FIELD_IP6_DST (1ull << 8)
#define YNP_FIELD_IP_PROTO (1ull << 9)
#define YNP_FIELD_L4_SRC (1ull << 10) /* TCP, UDP, SCTP; never a later fragment */
#define YNP_FIELD_L4_DST (1ull << 11)
#define YNP_UNTAGGED 0xffffu

/* Steps of an entry, carried out in order; the last one of an entry is one of the first four. */
#define YNP_STEP_DROP 1u
#define YNP_STEP_FORWARD 2u     /* arg: port */
#define YNP_STEP_PUNT 3u        /* to the shared proxy, with the ingress port as identity */
#define YNP_STEP_JUMP 4u        /* arg: group of a higher number */
#define YNP_STEP_ENCAPSULATE 5u /* arg: tunnel */
#define YNP_STEP_DECAPSULATE 6u /* VXLAN; anything else is dropped */
#define YNP_STEP_SET_ETH_SRC 7u /* mac */
#define YNP_STEP_SET_ETH_DST 8u /* mac */
#define YNP_STEP_TTL 9u         /* counts down; 1 or 0 is dropped */
#define YNP_STEP_METER 10u      /* arg: meter; drops what exceeds it */
#define YNP_STEPS_MAX 8u

/* What happens to a frame that no entry matches. */
#define YNP_MISS_DROP 0u
#define YNP_MISS_SOC 1u /* to the SoC as it arrived, whatever groups before had done to it; no counter counted it */
#define YNP_ALL_PORTS UINT64_MAX

/* Events. */
#define YNP_EVENT_LOST 1u   /* a reset has begun; value: the generation that ended */
#define YNP_EVENT_BACK 2u   /* usable again and empty; value: the new generation */
#define YNP_EVENT_AGED 3u   /* value: `user` of an entry that nothing hit for its idle time; told once, the entry stays */
#define YNP_EVENT_HEALTH 4u /* value: 0 healthy, else a code of the vendor */

#define YNP_CONNECTION_SPLICE 1u
#define YNP_CONNECTION_TLS 2u
#define YNP_CONNECTION_REWRITE 4u

#define YNP_SLOT_EMPTY 0u
#define YNP_SLOT_LOADED 1u
#define YNP_SLOT_RUNNING 2u
#define YNP_SLOT_DRAINING 3u

#define YNP_TABLE_EXACT 0u
#define YNP_TABLE_ARRAY 1u
#define YNP_TABLE_LPM 2u
#define YNP_TABLE_TERNARY 3u
#define YNP_TABLE_COUNTER 4u
#define YNP_TABLE_METER 5u

#define YNP_OP_PUT 1u    /* adds; a program's entry with the same key is replaced, a steering entry is YNP_E_EXISTS */
#define YNP_OP_DELETE 2u /* removes by key; what is not there is no failure */

#define YNP_NAME_MAX 32u
#define YNP_DIGEST_MAX 32u
#define YNP_KEY_MAX 64u
#define YNP_VALUE_MAX 64u

typedef struct ynp_device ynp_device;

/* Who the card is. Texts end with a zero octet. */
typedef struct ynp_info {
    uint32_t size;
    uint32_t mode;
    uint64_t generation; /* 1 and up; grows with each reset; while the NP is away, the last one */
    uint32_t alive;      /* 0 while the NP is being reset */
    uint32_t reserved;
    char firmware[YNP_NAME_MAX]; /* "major.minor.patch" */
    char model[YNP_NAME_MAX];
    char serial[YNP_NAME_MAX];
} ynp_info;

/* What it can do in its present mode. 0 is "not at all". */
typedef struct ynp_limits {
    uint32_t size;
    uint32_t groups;          /* 0 to groups - 1 */
    uint32_t priorities;      /* per group; 0 wins */
    uint32_t profiles;        /* different sets of fields that can be in use at a time */
    uint64_t fields;          /* YNP_FIELD_* */
    uint64_t steps;           /* 1 << YNP_STEP_* */
    uint64_t entries;         /* over all steering tables */
    uint32_t tables;          /* steering tables: one per group, priority and profile */
    uint32_t counters;        /* numbered from 1 */
    uint32_t counter_age_ms;  /* how old a reading may be */
    uint32_t meters;          /* numbered from 0 */
    uint32_t tunnels;         /* numbered from 0 */
    uint32_t batch_max;       /* longest ynp_table.entries_write and program_write */
    uint32_t ageing;          /* 1: entries can age */
    uint32_t slots;           /* program slots */
    uint32_t program_tables;  /* tables that a program may declare */
    uint32_t connection_kinds;/* YNP_CONNECTION_* */
    uint64_t max_image;
    uint64_t program_entries; /* over all tables of all programs */
    uint64_t connections;
} ynp_limits;

typedef struct ynp_event {
    uint32_t kind;
    uint32_t reserved;
    uint64_t value;
} ynp_event;

/* A key. Fields that its table does not look at are zero. Numbers are in the order of the machine, addresses and MACs as on
 * the wire; an IPv4 address is in the first four octets. */
typedef struct ynp_key {
    uint64_t port;
    uint8_t eth_src[6];
    uint8_t eth_dst[6];
    uint16_t ethertype;
    uint16_t vlan;
    uint8_t ip_src[16];
    uint8_t ip_dst[16];
    uint16_t l4_src;
    uint16_t l4_dst;
    uint8_t ip_proto;
    uint8_t reserved[3];
} ynp_key;

typedef struct ynp_step {
    uint32_t kind;
    uint8_t mac[6];
    uint16_t reserved;
    uint64_t arg;
} ynp_step;

/* A steering table: all entries of one group and priority that look at the same fields. */
typedef struct ynp_steering_table {
    uint32_t size;
    uint32_t id; /* chosen by the caller, below limits.tables */
    uint32_t group;
    uint32_t priority;
    uint64_t fields;
} ynp_steering_table;

typedef struct ynp_entry {
    uint32_t op;
    uint32_t table;
    ynp_key key;
    uint64_t user;    /* the caller's number, for events */
    uint32_t counter; /* 0: does not count */
    uint32_t idle_ms; /* 0: does not age */
    uint32_t steps;
    uint32_t reserved;
    ynp_step step[YNP_STEPS_MAX];
} ynp_entry;

/* What became of a batch. It goes on after a failure; which operations failed, it does not say. */
typedef struct ynp_batch_result {
    uint64_t done;
    uint64_t failed;
    int32_t first_error;
    uint32_t reserved;
} ynp_batch_result;

typedef struct ynp_counter {
    uint64_t packets;
    uint64_t octets; /* frames with Ethernet header, without FCS */
} ynp_counter;

typedef struct ynp_meter {
    uint64_t octets_per_second;
    uint64_t burst_octets;
} ynp_meter;

typedef struct ynp_tunnel {
    uint32_t vni;
    uint32_t ip_version; /* 4 or 6 */
    uint8_t local[16];
    uint8_t remote[16];
    uint8_t eth_src[6];
    uint8_t eth_dst[6];
    uint32_t reserved;
} ynp_tunnel;

typedef struct ynp_program {
    uint32_t size;
    uint32_t state;      /* YNP_SLOT_*; read only */
    uint32_t digest_len;
    uint32_t reserved;
    uint8_t digest[YNP_DIGEST_MAX]; /* of the image, by the library's algorithm */
    char name[YNP_NAME_MAX];
    char version[YNP_NAME_MAX];
} ynp_program;

typedef struct ynp_program_table {
    uint32_t size;
    uint32_t kind;
    uint32_t key_len;
    uint32_t value_len;
    uint64_t used;
    uint64_t capacity;
    char name[YNP_NAME_MAX];
} ynp_program_table;

typedef struct ynp_program_entry {
    uint32_t op;
    uint32_t priority;
    uint32_t key_len;
    uint32_t value_len;
    uint32_t masked; /* 0: the whole key counts, `mask` is not looked at */
    uint32_t reserved;
    uint8_t key[YNP_KEY_MAX];
    uint8_t mask[YNP_KEY_MAX];
    uint8_t value[YNP_VALUE_MAX];
} ynp_program_entry;

typedef struct ynp_leg {
    uint64_t port;
    uint8_t local[16]; /* an IPv4 address as ::ffff:a.b.c.d */
    uint8_t remote[16];
    uint16_t local_port;
    uint16_t remote_port;
    uint32_t send_next;
    uint32_t receive_next;
    uint32_t reserved;
} ynp_leg;

typedef struct ynp_connection {
    uint32_t size;
    uint32_t kind; /* one YNP_CONNECTION_* */
    ynp_leg downstream;
    ynp_leg upstream;
    uint64_t octets_up;   /* client to server, by the NP */
    uint64_t octets_down;
} ynp_connection;

/*
 * The function table. Append only. Every pointer is mandatory but `diagnose`.
 */
typedef struct ynp_table {
    uint32_t size;
    uint16_t abi_major;
    uint16_t abi_minor;

    /* What the result means, in words. Never fails; the text is static. */
    const char *(*text)(int32_t status);

    /* Opens the card at a PCI address ("0000:3b:00.0"). `profile` is the vendor's own text of settings, may be empty.
     * Several handles of one card share it; what is programmed outlives them. */
    int32_t (*open)(const char *pci, const char *profile, ynp_device **device);
    /* Gives the handle back and ends its `wait`. */
    void (*close)(ynp_device *device);
    int32_t (*info)(ynp_device *device, ynp_info *info);
    int32_t (*limits)(ynp_device *device, ynp_limits *limits);
    /* Changes the mode: LOST and BACK follow. */
    int32_t (*set_mode)(ynp_device *device, uint64_t generation, uint32_t mode);
    /* Waits for events since the handle was opened, in order, at most timeout_ms. None is no error. */
    int32_t (*wait)(ynp_device *device, uint32_t timeout_ms, ynp_event *events, size_t room, size_t *count);

    int32_t (*table_create)(ynp_device *device, uint64_t generation, const ynp_steering_table *table);
    /* Only an empty one. */
    int32_t (*table_destroy)(ynp_device *device, uint64_t generation, uint32_t table);
    int32_t (*entries_write)(ynp_device *device, uint64_t generation, const ynp_entry *entries, size_t count,
                             ynp_batch_result *result);
    /* Entries of a table, in the library's own stable order, from *cursor (0 at first) on; *count 0 is the end. */
    int32_t (*entries_read)(ynp_device *device, uint32_t table, uint64_t *cursor, ynp_entry *entries, size_t room,
                            size_t *count);
    /* Removes all entries and tables, counters, meters and tunnels; every port misses with DROP. */
    int32_t (*steering_flush)(ynp_device *device, uint64_t generation);
    int32_t (*miss_set)(ynp_device *device, uint64_t generation, uint64_t port, uint32_t miss);

    int32_t (*counters_clear)(ynp_device *device, uint64_t generation, const uint32_t *ids, size_t count);
    int32_t (*counters_read)(ynp_device *device, const uint32_t *ids, size_t count, ynp_counter *counters);
    int32_t (*meter_set)(ynp_device *device, uint64_t generation, uint32_t id, const ynp_meter *meter);
    int32_t (*tunnel_set)(ynp_device *device, uint64_t generation, uint32_t id, const ynp_tunnel *tunnel);

    int32_t (*program_load)(ynp_device *device, uint64_t generation, uint32_t slot, const ynp_program *program,
                            const uint8_t *image, size_t image_len);
    int32_t (*program_activate)(ynp_device *device, uint64_t generation, uint32_t slot);
    int32_t (*program_unload)(ynp_device *device, uint64_t generation, uint32_t slot);
    int32_t (*program_info)(ynp_device *device, uint32_t slot, ynp_program *program);
    /* Tables of the running program, numbered from 0; YNP_E_NOT_FOUND behind the last. */
    int32_t (*program_table)(ynp_device *device, uint32_t table, ynp_program_table *info);
    int32_t (*program_write)(ynp_device *device, uint64_t generation, uint32_t table,
                             const ynp_program_entry *entries, size_t count, ynp_batch_result *result);
    /* As entries_read, in key order. */
    int32_t (*program_read)(ynp_device *device, uint32_t table, uint64_t *cursor, ynp_program_entry *entries,
                            size_t room, size_t *count);

    int32_t (*connection_add)(ynp_device *device, uint64_t generation, const ynp_connection *connection,
                              uint64_t *token);
    int32_t (*connection_take)(ynp_device *device, uint64_t generation, uint64_t token, ynp_connection *connection);
    int32_t (*connection_count)(ynp_device *device, uint64_t *now, uint64_t *ever);

    /* Optional (NULL): a text command of support engineers, answered in text. The simulator is steered by it. */
    int32_t (*diagnose)(ynp_device *device, const uint8_t *request, size_t request_len, uint8_t *answer, size_t room,
                        size_t *answer_len);
} ynp_table;

/* The only symbol that is looked up. The table lives as long as the process. */
const ynp_table *yusur_np_table_v1(void);

#ifdef __cplusplus
}
#endif

#endif
