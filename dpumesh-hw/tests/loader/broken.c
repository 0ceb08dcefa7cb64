// A backend that keeps to the interface but for one thing, which BREAK names.
#include <dpumesh.h>
#include <poll.h>
#include <stdlib.h>
#include <unistd.h>

#define BROKEN(what) (BREAK == what)
enum {
    NOTHING, GETTER_FAILS, GETTER_STATUS, GETTER_HANGS, MAJOR, SHORT_TABLE, NO_OPEN, HALF_PART, OPEN_FAILS, OPEN_HANGS, OPEN_STATUS,
    INFO_SIZE, INFO_ROLE, INFO_TEXT, CAPABILITIES_SIZE, CAPABILITIES_BITS, CAPABILITIES_FLAG, CLAIMS_ABSENT_PART, CLAIMS_NO_RULES,
    CLAIMS_MORE_HARDWARE, CLAIMS_NO_CONTINUE, OPEN_MESSAGE, ERROR_KIND, ERROR_MESSAGE, CALL_STATUS, CALL_HANGS, CALL_NEVER_COMPLETES,
    CALL_MORE, VERDICT_CODE, VERDICT_SIZE, VERDICT_POINTER, VERDICT_FEW, VERDICT_MANY, EVENT_KIND, FD_STORM, COMPLETES_TWICE,
    INLINE_HANGS, RECEIVE_HANGS, RECEIVE_IS_SLOW, EPOCH_HANGS, EVENTS_HANG,
};

static int epoch_reads;
static int event_due; // a judgement makes an event, or the trouble begin

static uint32_t open_card(dm_str config, uint64_t *handle, dm_error *error) {
    (void)config;
    if (BROKEN(OPEN_HANGS)) for (;;) pause();
    if (BROKEN(OPEN_FAILS)) return dm_fail(error, DM_NOT_FOUND, "no card on slot 7");
    if (BROKEN(OPEN_MESSAGE)) {
        error->kind = DM_IO;
        memset(error->message, 'x', sizeof error->message);
        return DM_FAILED;
    }
    *handle = 42;
    return BROKEN(OPEN_STATUS) ? 77 : DM_DONE;
}

static void close_card(uint64_t handle) { (void)handle; }

static void info(uint64_t handle, dm_info *info) {
    (void)handle;
    info->size = BROKEN(INFO_SIZE) ? 12 : sizeof *info;
    info->role = BROKEN(INFO_ROLE) ? 9 : DM_ROLE_BOTH;
    strcpy((char *)info->name, "broken");
    strcpy((char *)info->dpu, "dpu0");
    if (BROKEN(INFO_TEXT)) memset(info->version, 'v', sizeof info->version);
}

static void capabilities(uint64_t handle, dm_capabilities *can) {
    (void)handle;
    can->size = BROKEN(CAPABILITIES_SIZE) ? 1 << 20 : sizeof *can;
    can->parts = DM_PART_STEERING | (BROKEN(CLAIMS_ABSENT_PART) ? DM_PART_OFFLOAD : 0) | (BREAK >= RECEIVE_HANGS ? DM_PART_PORTS : 0);
    can->open_ports = BREAK >= RECEIVE_HANGS ? 2 : 0;
    can->rules = BROKEN(CLAIMS_NO_RULES) ? 0 : 8;
    can->hardware_rules = BROKEN(CLAIMS_MORE_HARDWARE) ? 9 : 0;
    can->groups = can->priorities = 1;
    can->batch_max = 8;
    can->actions = DM_CAN_DROP;
    can->fields[DM_MATCH_PORT] = DM_KIND_EXACT;
    can->atomicity = BROKEN(CLAIMS_NO_CONTINUE) ? 1 << DM_ATOMIC : 1 << DM_CONTINUE;
    if (BROKEN(CAPABILITIES_BITS)) can->actions |= 1u << 31;
    if (BROKEN(CAPABILITIES_FLAG)) can->idle_timeout = 2;
}

static uint64_t epoch(uint64_t handle) {
    (void)handle;
    if (BROKEN(EPOCH_HANGS) && event_due) for (;;) pause();
    return epoch_reads;
}

static int32_t poll_fd(uint64_t handle) {
    (void)handle;
    static int fds[2] = { -1, -1 };
    if ((BROKEN(FD_STORM) || BROKEN(EVENT_KIND) || BROKEN(COMPLETES_TWICE)) && fds[0] < 0 && pipe(fds) == 0 && write(fds[1], "x", 1) == 1) return fds[0];
    return fds[0];
}

static uint64_t pending;

static uint32_t poll_ends(uint64_t handle, dm_completion *ends, uint32_t capacity) {
    (void)handle;
    if (!BROKEN(COMPLETES_TWICE) || !pending || capacity < 2) return 0;
    for (int i = 0; i < 2; i++) ends[i] = (dm_completion){ .size = sizeof *ends, .status = DM_DONE, .token = pending };
    pending = 0;
    return 2;
}

static uint32_t next_event(uint64_t handle, dm_event *event, dm_arena *arena) {
    (void)handle; (void)arena;
    if (BROKEN(EVENTS_HANG) && event_due) for (;;) pause();
    if (!BROKEN(EVENT_KIND) || !event_due) return DM_EMPTY;
    event_due = 0;
    event->kind = 99;
    return DM_DONE;
}

static uint32_t validate(uint64_t handle, dm_call *call, const dm_rules *rules, dm_rows *verdicts) {
    (void)handle;
    event_due = 1;
    if (BROKEN(CALL_STATUS)) return 77;
    if (BROKEN(CALL_HANGS) || BROKEN(INLINE_HANGS)) for (;;) pause();
    if (BROKEN(CALL_NEVER_COMPLETES)) return DM_PENDING;
    if (BROKEN(ERROR_KIND)) { dm_fail(call->error, 1234, "odd"); return DM_FAILED; }
    if (BROKEN(ERROR_MESSAGE)) {
        call->error->kind = DM_IO;
        memset(call->error->message, 'x', sizeof call->error->message);
        return DM_FAILED;
    }
    verdicts->len = BROKEN(VERDICT_FEW) ? rules->rules.len - 1 : BROKEN(VERDICT_MANY) ? 1000 : rules->rules.len;
    if (BROKEN(CALL_MORE)) { verdicts->len = UINT64_MAX; return DM_MORE; }
    for (uint64_t i = 0; i < rules->rules.len && i < verdicts->capacity; i++) {
        dm_verdict *verdict = DM_ROW(dm_verdict, verdicts, i);
        *verdict = DM_NEW(dm_verdict);
        verdict->verdict = BROKEN(VERDICT_CODE) ? 55 : DM_PLACE_SOFTWARE;
        verdict->reason = dm_text(call->arena, "so", 2);
        if (BROKEN(VERDICT_SIZE)) verdict->size = 5000;
        if (BROKEN(VERDICT_POINTER)) verdict->reason = (dm_str){ (const uint8_t *)"elsewhere", 9 };
    }
    if (BROKEN(COMPLETES_TWICE)) { pending = call->token; return DM_PENDING; }
    return DM_DONE;
}

static uint32_t apply(uint64_t h, dm_call *c, const dm_batch *b, dm_outcome *o) { (void)h; (void)b; (void)o; return dm_fail(c->error, DM_BUSY, "not today"); }
static uint32_t list(uint64_t h, dm_call *c, const dm_of_owner *w, dm_rows *r) { (void)h; (void)c; (void)w; r->len = 0; return DM_DONE; }
static uint32_t counters(uint64_t h, dm_call *c, const dm_cookies *w, dm_rows *r) { (void)h; (void)c; (void)w; r->len = 0; return DM_DONE; }
static uint32_t flush(uint64_t h, dm_call *c, const dm_of_owner *w, dm_number *n) { (void)h; (void)c; (void)w; n->value = 0; return DM_DONE; }
static uint32_t miss(uint64_t h, dm_call *c, const dm_miss *m) { (void)h; (void)m; return dm_fail(c->error, DM_UNSUPPORTED, "no"); }
static uint32_t occupancy(uint64_t h, dm_call *c, dm_rows *r) { (void)h; (void)c; r->len = 0; return DM_DONE; }

static uint32_t ports(uint64_t h, dm_call *c, dm_rows *r) { (void)h; (void)c; r->len = 0; return DM_DONE; }
static uint32_t open_port(uint64_t h, dm_call *c, const dm_port_info *p, dm_port_info *o) {
    (void)h; (void)c;
    o->port = p->port;
    o->handle = 7;
    o->mtu = 1500;
    o->max_frame = 1514;
    o->poll_fd = -1;
    return DM_DONE;
}
static void close_port(uint64_t h, uint64_t p) { (void)h; (void)p; }
static uint64_t refused(uint64_t h, uint64_t p) { (void)h; (void)p; return 3; }
static uint32_t receive(uint64_t h, uint64_t p, dm_frame *f, uint32_t n, uint32_t *done, dm_error *e) {
    (void)h; (void)p; (void)f; (void)n; (void)e;
    if (BROKEN(RECEIVE_HANGS)) for (;;) pause();
    static int times;
    if (BROKEN(RECEIVE_IS_SLOW) && times++ == 0) poll(NULL, 0, 2000);
    *done = 0;
    return DM_DONE;
}
static uint32_t transmit(uint64_t h, uint64_t p, dm_frame *f, uint32_t n, uint32_t *done, dm_error *e) {
    (void)h; (void)p; (void)f; (void)e;
    *done = n;
    return DM_DONE;
}

uint32_t dpumesh_backend_v1(const dm_host *host, uint32_t want, dm_ops *ops, dm_error *error) {
    static const char line[] = "the broken library speaks";
    host->log(host->context, DM_LOG_INFO, (dm_str){ (const uint8_t *)line, sizeof line - 1 });
    if (BROKEN(GETTER_HANGS)) for (;;) pause();
    if (BROKEN(GETTER_FAILS)) return dm_fail(error, DM_UNSUPPORTED, "kernel too old");
    dm_ops table = {
        .size = BROKEN(SHORT_TABLE) ? 64 : sizeof table,
        .abi_major = BROKEN(MAJOR) ? 2 : DM_ABI_MAJOR, .abi_minor = DM_ABI_MINOR, .flags = BROKEN(INLINE_HANGS) ? DM_THREAD_SAFE : 0,
        .open = BROKEN(NO_OPEN) ? NULL : open_card, .close = close_card, .info = info, .capabilities = capabilities, .epoch = epoch,
        .poll_fd = poll_fd, .poll = poll_ends, .next_event = next_event,
        .steering_validate = validate, .steering_apply = apply, .steering_list = list, .steering_counters = counters,
        .steering_flush = BROKEN(HALF_PART) ? NULL : flush, .steering_set_miss_policy = miss, .steering_occupancy = occupancy,
        .port_list = ports, .port_open = open_port, .port_close = close_port, .port_receive = receive, .port_transmit = transmit,
        .port_refused = refused,
    };
    memcpy(ops, &table, want < sizeof table ? want : sizeof table);
    return BROKEN(GETTER_STATUS) ? 3 : DM_DONE;
}
