// A backend in plain C: VF leases and steering of a card that is only books in memory. No frames, no network processor, no ports:
// those parts are absent, and nothing here mentions them but by leaving their functions null.
//
//     cc -shared -fPIC -I ../../dpumesh-hw/include -o libexample.so backend.c
//     dpumesh-conform --backend $PWD/libexample.so
//
// Where a vendor starts: replace the books by calls of your SDK. Calls that take time return DM_PENDING and end in `poll`; here
// none does. The order of the file is that of the table at its end: card, VFs, steering, hooks of the conformance kit.
#include <dpumesh.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { VFS = 4, RULES = 64, ACTIONS = 8, COUNTERS = 16, GROUPS = 2, PRIORITIES = 4, MASKS = 8, BATCH = 32, TEXT = 256, PLACES = 32, EVENTS = 64 };

typedef struct { uint8_t mac[6], admin_mac[6]; uint32_t spoof_check; } attributes;

typedef struct {
    attributes now, before; // `before` is the snapshot that a release restores
    uint64_t lease, admitted; // numbers of leases; 0 is none
    uint64_t lease_epoch, admitted_epoch;
    char owner[TEXT], admitted_owner[TEXT];
    uint32_t location; // DM_AT_*
    char place[TEXT], ifname[16]; // namespace or driver, and the device's name there
    uint32_t ifindex;
    int jammed;
} function;

typedef struct { dm_rule rule; dm_pattern pattern; dm_action actions[ACTIONS]; } entry; // lists point into the entry itself

typedef struct card {
    struct card *next;
    char *name; // the configuration's text: opening it again finds the same card
    pthread_mutex_t lock;
    uint64_t epoch, number;
    int lost;
    function vfs[VFS];
    entry rules[RULES];
    uint32_t count;
    char netns[PLACES][TEXT];
    struct client *clients;
} card;

// What one `open` gave: its card, and the events that it has not fetched.
typedef struct client {
    struct client *next;
    card *card;
    int fd;
    uint32_t events; // DM_EVENT_* in a ring
    struct { uint32_t kind; uint64_t epoch; } event[EVENTS];
    uint32_t first;
    uint64_t overflowed;
} client;

static pthread_mutex_t all = PTHREAD_MUTEX_INITIALIZER;
static card *cards;

static client *of(uint64_t handle) { return (client *)(uintptr_t)handle; }

// A failure about a field of what was given.
static uint32_t refuse(dm_error *error, uint32_t kind, const char *object, const char *field, const char *message) {
    snprintf((char *)error->object, sizeof error->object, "%s", object);
    snprintf((char *)error->field, sizeof error->field, "%s", field);
    return dm_fail(error, kind, message);
}

static const char *name_of(uint16_t vf) {
    static const char *names[VFS] = { "c0pf0vf0", "c0pf0vf1", "c0pf0vf2", "c0pf0vf3" };
    return vf < VFS ? names[vf] : "";
}

static int same_text(dm_str text, const char *other) {
    return text.len == strlen(other) && memcmp(text.at, other, text.len) == 0;
}

static void keep(char *to, size_t room, dm_str text) {
    size_t len = text.len < room ? text.len : room - 1;
    if (len) memcpy(to, text.at, len);
    to[len] = 0;
}

static dm_str put(dm_call *call, const char *text) { return dm_text(call->arena, text, strlen(text)); }

// Begins a call: the card must be there, and the fence, if any, of its present life. Leaves the card locked if so.
static uint32_t begin(card *card, dm_call *call) {
    pthread_mutex_lock(&card->lock);
    uint32_t status = DM_DONE;
    if (card->lost) status = dm_fail(call->error, DM_DEVICE_LOST, "the card is away");
    else if (call->epoch != DM_NO_FENCE && call->epoch != card->epoch)
        status = refuse(call->error, DM_STALE, "epoch", "", "the fence is of another life of the card");
    if (status != DM_DONE) pthread_mutex_unlock(&card->lock);
    return status;
}

static uint32_t end(card *card, uint32_t status) {
    pthread_mutex_unlock(&card->lock);
    return status;
}

// ---- the card

static void fresh(card *card) {
    memset(card->vfs, 0, sizeof card->vfs);
    for (int i = 0; i < VFS; i++) {
        card->vfs[i].now = (attributes){ .mac = { 2, 0, 0, 0xc, 0, (uint8_t)i } };
        card->vfs[i].location = DM_AT_HOST;
    }
    card->count = 0;
}

static uint32_t card_open(dm_str config, uint64_t *handle, dm_error *error) {
    client *client = calloc(1, sizeof *client);
    if (!client || (client->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) < 0) {
        free(client);
        return dm_fail(error, DM_IO, "no memory or descriptor for the card");
    }
    pthread_mutex_lock(&all);
    card *card = cards;
    while (card && !same_text(config, card->name)) card = card->next;
    if (!card && (card = calloc(1, sizeof *card))) {
        card->name = calloc(1, config.len + 1);
        memcpy(card->name, config.at, config.len);
        pthread_mutex_init(&card->lock, NULL);
        fresh(card);
        card->next = cards;
        cards = card;
    }
    pthread_mutex_unlock(&all);
    if (!card) {
        close(client->fd);
        free(client);
        return dm_fail(error, DM_IO, "no memory for the card");
    }
    pthread_mutex_lock(&card->lock);
    client->card = card;
    client->next = card->clients;
    card->clients = client;
    pthread_mutex_unlock(&card->lock);
    *handle = (uint64_t)(uintptr_t)client;
    return DM_DONE;
}

static void card_close(uint64_t handle) {
    client *client = of(handle), **at = &client->card->clients;
    pthread_mutex_lock(&client->card->lock);
    while (*at != client) at = &(*at)->next;
    *at = client->next;
    pthread_mutex_unlock(&client->card->lock);
    close(client->fd);
    free(client);
}

static void card_info(uint64_t handle, dm_info *info) {
    (void)handle;
    info->role = DM_ROLE_BOTH;
    strcpy((char *)info->name, "c-example");
    strcpy((char *)info->version, "1.0");
    strcpy((char *)info->dpu, "dpu0");
    strcpy((char *)info->device, "books in memory");
}

static void card_capabilities(uint64_t handle, dm_capabilities *can) {
    (void)handle;
    strcpy((char *)can->mode, "example");
    can->parts = DM_PART_VF | DM_PART_STEERING;
    can->max_vfs = VFS;
    can->vf_attributes = DM_VF_MAC | DM_VF_SPOOF_CHECK;
    can->vf_attachments = DM_ATTACH_NETNS;
    can->vf_resets = DM_RESET_CONFIG;
    can->rules = can->hardware_rules = RULES;
    can->counters = COUNTERS;
    can->groups = GROUPS;
    can->priorities = PRIORITIES;
    can->masks = MASKS;
    can->batch_max = BATCH;
    can->atomicity = 1 << DM_CONTINUE;
    can->per_operation_status = 1;
    can->actions = can->hardware_actions = DM_CAN_DROP | DM_CAN_FORWARD | DM_CAN_COUNT | DM_CAN_JUMP;
    can->fields[DM_MATCH_PORT] = DM_KIND_EXACT;
    can->fields[DM_MATCH_ETH_DST] = DM_KIND_EXACT;
    can->fields[DM_MATCH_IP4_DST] = DM_KIND_EXACT | DM_KIND_PREFIX;
    memcpy(can->hardware_fields, can->fields, sizeof can->fields);
}

static uint64_t card_epoch(uint64_t handle) {
    card *card = of(handle)->card;
    pthread_mutex_lock(&card->lock);
    uint64_t epoch = card->epoch;
    pthread_mutex_unlock(&card->lock);
    return epoch;
}

static int32_t card_poll_fd(uint64_t handle) { return of(handle)->fd; }

// Nothing is ever pending here: only the descriptor is made quiet again.
static uint32_t card_poll(uint64_t handle, dm_completion *ends, uint32_t capacity) {
    (void)ends; (void)capacity;
    uint64_t rung;
    if (read(of(handle)->fd, &rung, sizeof rung) < 0) return 0;
    return 0;
}

static uint32_t card_next_event(uint64_t handle, dm_event *event, dm_arena *arena) {
    (void)arena;
    client *client = of(handle);
    uint32_t status = DM_DONE;
    pthread_mutex_lock(&client->card->lock);
    if (client->overflowed) {
        event->kind = DM_EVENT_OVERFLOWED;
        event->used = client->overflowed;
        client->overflowed = 0;
    } else if (client->events) {
        event->kind = client->event[client->first].kind;
        event->epoch = client->event[client->first].epoch;
        client->first = (client->first + 1) % EVENTS;
        client->events--;
    } else status = DM_EMPTY;
    pthread_mutex_unlock(&client->card->lock);
    return status;
}

// Tells every client; who is too slow loses the oldest. The card is locked.
static void raise_event(card *card, uint32_t kind, uint64_t epoch) {
    for (client *client = card->clients; client; client = client->next) {
        if (client->events == EVENTS) {
            client->first = (client->first + 1) % EVENTS;
            client->events--;
            client->overflowed++;
        }
        uint32_t last = (client->first + client->events++) % EVENTS;
        client->event[last].kind = kind;
        client->event[last].epoch = epoch;
        uint64_t one = 1;
        if (write(client->fd, &one, sizeof one) < 0) continue; // full is as good as written
    }
}

// ---- VFs

static int is_vf(dm_port port) { return port.kind == DM_PORT_VF && port.controller == 0 && port.pf == 0 && port.index < VFS; }

static dm_port port_of(int vf) { return (dm_port){ .kind = DM_PORT_VF, .index = (uint16_t)vf }; }

// The VF that a lease is current for; null if for none.
static function *leased(card *card, const dm_vf_lease *lease) {
    if (!is_vf(lease->port)) return NULL;
    function *vf = &card->vfs[lease->port.index];
    int current = vf->lease == lease->id && lease->id && lease->epoch == vf->lease_epoch && same_text(lease->owner, vf->owner);
    return current ? vf : NULL;
}

static uint32_t stale(dm_call *call) { return refuse(call->error, DM_STALE, "lease", "", "the lease is not current"); }

static void write_lease(dm_call *call, dm_vf_lease *lease, int vf, uint64_t id, uint64_t epoch, const char *owner) {
    *lease = DM_NEW(dm_vf_lease);
    lease->id = id;
    lease->epoch = epoch;
    lease->port = port_of(vf);
    lease->dpu = put(call, "dpu0");
    lease->owner = put(call, owner);
}

static uint32_t vf_plan_count(uint64_t handle, dm_call *call, const dm_vf_count *want, dm_number *disruption) {
    (void)disruption;
    card *card = of(handle)->card;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    if (want->pf) return end(card, refuse(call->error, DM_NOT_FOUND, "", "pf", "there is no such PF"));
    return end(card, refuse(call->error, DM_UNSUPPORTED, "", "count", "the number of VFs is fixed"));
}

static uint32_t vf_set_count(uint64_t handle, dm_call *call, const dm_vf_count *want, dm_vf_count *have) {
    (void)have;
    return vf_plan_count(handle, call, want, NULL);
}

static uint32_t vf_list(uint64_t handle, dm_call *call, dm_rows *states) {
    card *card = of(handle)->card;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    states->len = VFS;
    for (int i = 0; i < VFS; i++) {
        function *vf = &card->vfs[i];
        dm_vf_state state = DM_NEW(dm_vf_state);
        state.port = port_of(i);
        state.mtu = 1500;
        state.location = vf->location;
        memcpy(state.admin_mac, vf->now.admin_mac, 6);
        memcpy(state.effective_mac, vf->now.mac, 6);
        if (vf->location != DM_AT_HOST) state.place = put(call, vf->place);
        if (vf->lease) {
            dm_vf_lease *lease = dm_take(call->arena, sizeof *lease);
            dm_vf_lease made;
            write_lease(call, &made, i, vf->lease, vf->lease_epoch, vf->owner);
            if (lease) *lease = made;
            state.lease = lease;
        }
        if ((uint64_t)i < states->capacity) *DM_ROW(dm_vf_state, states, i) = state;
    }
    int fits = states->len <= states->capacity && call->arena->needed <= call->arena->capacity;
    return end(card, fits ? DM_DONE : DM_MORE);
}

static uint32_t check_config(card *card, dm_call *call, int index, const dm_vf_config *config) {
    static const struct { uint32_t bit; const char *field; } absent[] = {
        { DM_VF_VLAN, "config.vlan" }, { DM_VF_TRUST, "config.trust" }, { DM_VF_LINK_STATE, "config.link_state" },
        { DM_VF_MIN_RATE, "config.min_rate" }, { DM_VF_MAX_RATE, "config.max_rate" }, { DM_VF_MTU, "config.mtu" },
    };
    for (size_t i = 0; i < sizeof absent / sizeof *absent; i++)
        if (config->has & absent[i].bit) return refuse(call->error, DM_UNSUPPORTED, "", absent[i].field, "the card cannot set this attribute");
    if (config->has & ~(uint32_t)(DM_VF_MAC | DM_VF_SPOOF_CHECK)) return refuse(call->error, DM_UNSUPPORTED, "", "config", "an attribute of a newer interface");
    if (!(config->has & DM_VF_MAC)) return DM_DONE;
    static const uint8_t zero[6];
    if (config->mac[0] & 1 || !memcmp(config->mac, zero, 6)) return refuse(call->error, DM_INVALID, "", "config.mac", "must be the address of one station");
    for (int i = 0; i < VFS; i++)
        if (i != index && !memcmp(card->vfs[i].now.mac, config->mac, 6))
            return refuse(call->error, DM_CONFLICT, name_of((uint16_t)i), "config.mac", "another VF uses this MAC");
    return DM_DONE;
}

static void set_config(function *vf, const dm_vf_config *config) {
    if (config->has & DM_VF_MAC) {
        memcpy(vf->now.mac, config->mac, 6);
        memcpy(vf->now.admin_mac, config->mac, 6);
    }
    if (config->has & DM_VF_SPOOF_CHECK) vf->now.spoof_check = config->spoof_check;
}

static uint32_t vf_lease(uint64_t handle, dm_call *call, const dm_vf_request *want, dm_vf_lease *lease) {
    card *card = of(handle)->card;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    if (!want->owner.len || want->owner.len >= TEXT) return end(card, refuse(call->error, DM_INVALID, "", "owner", "1 to 255 octets"));
    for (int i = 0; i < VFS; i++) {
        function *vf = &card->vfs[i];
        if (!vf->lease || !same_text(want->owner, vf->owner)) continue;
        write_lease(call, lease, i, vf->lease, vf->lease_epoch, vf->owner);
        return end(card, DM_DONE);
    }
    int index = -1, fitting = 0;
    for (int i = 0; i < VFS; i++) {
        dm_port port = port_of(i);
        if (want->has & DM_SELECT_PORT && memcmp(&want->port, &port, sizeof port)) continue;
        if (want->has & DM_SELECT_PF && want->pf) continue;
        if (want->has & DM_SELECT_PCI) continue; // books have no PCI address
        if (want->has & DM_SELECT_NUMA && want->numa_node) continue;
        if (want->has & DM_SELECT_DRIVER && !same_text(want->driver, "c-example")) continue;
        fitting++;
        if (index < 0 && !card->vfs[i].lease && card->vfs[i].location == DM_AT_HOST) index = i;
    }
    if (!fitting) return end(card, refuse(call->error, DM_NOT_FOUND, "", "selector", "no VF of the card fits the selector"));
    if (index < 0) return end(card, refuse(call->error, DM_CAPACITY_EXCEEDED, "vf", "", "no VF that fits is free"));
    status = check_config(card, call, index, want->config);
    if (status != DM_DONE) return end(card, status);
    function *vf = &card->vfs[index];
    vf->before = vf->now;
    vf->lease = ++card->number;
    vf->lease_epoch = card->epoch;
    keep(vf->owner, sizeof vf->owner, want->owner);
    set_config(vf, want->config);
    write_lease(call, lease, index, vf->lease, vf->lease_epoch, vf->owner);
    return end(card, DM_DONE);
}

static uint32_t vf_admit(uint64_t handle, dm_call *call, const dm_vf_order *order) {
    card *card = of(handle)->card;
    const dm_vf_lease *lease = order->lease;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    if (!same_text(lease->dpu, "dpu0")) return end(card, refuse(call->error, DM_INVALID, "", "lease.dpu", "the lease is of another card"));
    if (lease->epoch != card->epoch) return end(card, stale(call));
    if (!is_vf(lease->port)) return end(card, refuse(call->error, DM_NOT_FOUND, "vf", "", "there is no such VF"));
    function *vf = &card->vfs[lease->port.index];
    int same = vf->admitted == lease->id && same_text(lease->owner, vf->admitted_owner);
    if (vf->admitted && !same) return end(card, refuse(call->error, DM_CONFLICT, name_of(lease->port.index), "", "another lease of this port was not revoked"));
    vf->admitted = lease->id;
    vf->admitted_epoch = lease->epoch;
    keep(vf->admitted_owner, sizeof vf->admitted_owner, lease->owner);
    return end(card, DM_DONE);
}

static uint32_t vf_revoke(uint64_t handle, dm_call *call, const dm_vf_order *order) {
    card *card = of(handle)->card;
    const dm_vf_lease *lease = order->lease;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    if (is_vf(lease->port)) {
        function *vf = &card->vfs[lease->port.index];
        if (vf->admitted == lease->id && vf->admitted_epoch == lease->epoch && same_text(lease->owner, vf->admitted_owner)) vf->admitted = 0;
    }
    return end(card, DM_DONE);
}

static uint32_t vf_configure(uint64_t handle, dm_call *call, const dm_vf_order *order) {
    card *card = of(handle)->card;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    function *vf = leased(card, order->lease);
    if (!vf) return end(card, stale(call));
    status = check_config(card, call, (int)(vf - card->vfs), order->config);
    if (status == DM_DONE) set_config(vf, order->config);
    return end(card, status);
}

static int is_ifname(dm_str name) {
    if (!name.len || name.len > 15 || same_text(name, ".") || same_text(name, "..")) return 0;
    for (uint64_t i = 0; i < name.len; i++)
        if (name.at[i] <= ' ' || name.at[i] > '~' || name.at[i] == '/' || name.at[i] == ':') return 0;
    return 1;
}

static char *find_netns(card *card, dm_str path) {
    for (int i = 0; i < PLACES; i++)
        if (card->netns[i][0] && same_text(path, card->netns[i])) return card->netns[i];
    return NULL;
}

static uint32_t vf_attach(uint64_t handle, dm_call *call, const dm_vf_order *order, dm_attached *attached) {
    card *card = of(handle)->card;
    const dm_attachment *to = order->attachment;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    function *vf = leased(card, order->lease);
    if (!vf) return end(card, stale(call));
    if (to->kind != DM_ATTACH_NETNS) return end(card, refuse(call->error, DM_UNSUPPORTED, "", "attachment", "VFs cannot be attached like this"));
    if (vf->ifindex && !(same_text(to->path, vf->place) && same_text(to->ifname, vf->ifname)))
        return end(card, refuse(call->error, DM_BUSY, name_of(order->lease->port.index), "", "it is attached elsewhere"));
    if (!vf->ifindex) {
        if (!is_ifname(to->ifname)) return end(card, refuse(call->error, DM_INVALID, "", "attachment.ifname", "1 to 15 printable octets without / and :"));
        if (!find_netns(card, to->path)) return end(card, refuse(call->error, DM_NOT_FOUND, "netns", "attachment.path", "there is no such network namespace"));
        for (int i = 0; i < VFS; i++)
            if (card->vfs[i].ifindex && same_text(to->path, card->vfs[i].place) && same_text(to->ifname, card->vfs[i].ifname))
                return end(card, refuse(call->error, DM_EXISTS, "ifname", "attachment.ifname", "the name is taken there"));
        if (vf->jammed) return end(card, refuse(call->error, DM_IO, name_of(order->lease->port.index), "", "the VF does not move"));
        keep(vf->place, sizeof vf->place, to->path);
        keep(vf->ifname, sizeof vf->ifname, to->ifname);
        vf->location = DM_AT_NETNS;
        vf->ifindex = (uint32_t)++card->number;
    }
    attached->mtu = 1500;
    attached->ifindex = vf->ifindex;
    memcpy(attached->mac, vf->now.mac, 6);
    return end(card, DM_DONE);
}

static void to_host(function *vf) {
    vf->location = DM_AT_HOST;
    vf->place[0] = vf->ifname[0] = 0;
    vf->ifindex = 0;
}

static uint32_t bring_back(dm_call *call, function *vf) {
    if (vf->location == DM_AT_HOST) return DM_DONE;
    if (vf->jammed) return refuse(call->error, DM_IO, "vf", "", "the VF does not move");
    to_host(vf);
    return DM_DONE;
}

static uint32_t vf_detach(uint64_t handle, dm_call *call, const dm_vf_order *order) {
    card *card = of(handle)->card;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    function *vf = leased(card, order->lease);
    return end(card, vf ? bring_back(call, vf) : stale(call));
}

static uint32_t check_level(dm_call *call, uint32_t level) {
    return level == DM_RESET_CONFIG ? DM_DONE : refuse(call->error, DM_UNSUPPORTED, "", "level", "the card has no such reset");
}

static void free_vf(function *vf) {
    vf->now = vf->before;
    vf->lease = 0;
    vf->owner[0] = 0;
}

static uint32_t vf_release(uint64_t handle, dm_call *call, const dm_vf_order *order, dm_number *released) {
    card *card = of(handle)->card;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    status = check_level(call, order->level);
    if (status != DM_DONE) return end(card, status);
    function *vf = leased(card, order->lease);
    released->value = vf ? DM_RELEASED : DM_NOT_CURRENT;
    if (!vf) return end(card, DM_DONE);
    status = bring_back(call, vf);
    vf->now = vf->before;
    if (status != DM_DONE) {
        dm_error *error = call->error;
        memcpy(error->cause, error->message, sizeof error->cause);
        refuse(error, DM_IO, name_of(order->lease->port.index), "", "the VF stays leased, since not every step worked");
        error->effect = DM_EFFECT_PARTIAL;
        return end(card, DM_FAILED);
    }
    free_vf(vf);
    return end(card, DM_DONE);
}

static uint32_t vf_reclaim(uint64_t handle, dm_call *call, const dm_vf_order *order, dm_number *level) {
    card *card = of(handle)->card;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    status = check_level(call, order->level);
    if (status != DM_DONE) return end(card, status);
    if (!is_vf(order->port)) return end(card, refuse(call->error, DM_NOT_FOUND, "vf", "", "there is no such VF"));
    function *vf = &card->vfs[order->port.index];
    for (uint32_t i = 0; vf->lease && i < order->live.len; i++)
        if (same_text(*DM_AT(dm_str, order->live, i), vf->owner))
            return end(card, refuse(call->error, DM_BUSY, name_of(order->port.index), "", "it is leased and its owner lives"));
    if (vf->jammed || vf->location == DM_AT_DRIVER)
        return end(card, refuse(call->error, DM_IO, name_of(order->port.index), "level", "it takes a reset of the function to get it back"));
    to_host(vf);
    if (vf->lease) free_vf(vf);
    level->value = DM_RESET_CONFIG;
    return end(card, DM_DONE);
}

// ---- steering

static int same_owner(dm_owner a, dm_owner b) { return a.kind == b.kind && a.user == b.user; }
static int same_cookie(dm_cookie a, dm_cookie b) { return a.high == b.high && a.low == b.low; }
static int is_final(uint32_t kind) { return kind <= DM_ACTION_JUMP; }
static int has_port(dm_port port) { return is_vf(port) || (port.kind == DM_PORT_UPLINK && port.index == 0) || (port.kind == DM_PORT_STACK && port.index == 0); }
static uint32_t mask_bits(const dm_pattern *p) {
    uint32_t bits = 0;
    for (int i = 0; i < 4; i++) bits = bits << 8 | p->ip_dst.mask[i];
    return bits;
}
static uint32_t address(const dm_pattern *p) {
    uint32_t bits = 0;
    for (int i = 0; i < 4; i++) bits = bits << 8 | p->ip_dst.value.octets[i];
    return bits;
}

// Why a rule cannot be done; null if it can. `kind` is DM_INVALID for what makes no sense on any card, DM_UNSUPPORTED for
// what this one cannot do. What makes no sense at all, dpumesh does not even send for fields that this card lacks.
static const char *judge(const dm_rule *rule, uint32_t *kind, char field[64]) {
    const dm_pattern *p = rule->pattern;
    uint32_t count = rule->actions.len;
    strcpy(field, "actions");
    *kind = DM_INVALID;
    if (!count) return "must not be empty";
    for (uint32_t i = 0; i < count; i++) {
        const dm_action *action = DM_AT(dm_action, rule->actions, i);
        snprintf(field, 64, "actions[%u]", i);
        if (is_final(action->kind) != (i + 1 == count)) return "the last action must end the rule, and no other";
        if (action->kind == DM_ACTION_JUMP && action->number <= rule->group) return "may jump only to a group of a higher number";
    }
    if (p->fields & DM_FIELD_IP_DST && p->ip_dst.value.family == 4 && p->ip_dst.kind == DM_IP_PREFIX && address(p) & ~mask_bits(p)) {
        strcpy(field, "pattern.ip_dst");
        return "has bits set behind its prefix length";
    }
    static const struct { uint32_t bit; const char *path; } lacking[] = {
        { DM_FIELD_ETH_SRC, "pattern.eth_src" }, { DM_FIELD_ETHERTYPE, "pattern.ethertype" }, { DM_FIELD_VLAN, "pattern.vlan" },
        { DM_FIELD_VNI, "pattern.vni" }, { DM_FIELD_IP_SRC, "pattern.ip_src" }, { DM_FIELD_DSCP, "pattern.dscp" },
        { DM_FIELD_FRAGMENT, "pattern.fragment" }, { DM_FIELD_L4_SRC, "pattern.l4_src" }, { DM_FIELD_L4_DST, "pattern.l4_dst" },
        { DM_FIELD_TCP_FLAGS, "pattern.tcp_flags" }, { DM_FIELD_IP_PROTO, "pattern.ip_proto" }, { DM_FIELD_MARK, "pattern.mark" },
        { DM_FIELD_CT_STATE, "pattern.ct_state" },
    };
    uint32_t able = DM_FIELD_PORT | DM_FIELD_ETH_DST | DM_FIELD_IP_DST;
    int has_ports = p->fields & DM_FIELD_IP_PROTO && (p->ip_proto == 6 || p->ip_proto == 17 || p->ip_proto == 132);
    if (p->fields & (DM_FIELD_L4_SRC | DM_FIELD_L4_DST)) {
        strcpy(field, p->fields & DM_FIELD_L4_SRC ? "pattern.l4_src" : "pattern.l4_dst");
        if (!has_ports) return "needs pattern.ip_proto to be TCP, UDP or SCTP";
        const uint16_t *range = p->fields & DM_FIELD_L4_SRC ? p->l4_src : p->l4_dst;
        if (range[0] > range[1]) return "range ends before it begins";
    }
    strcpy(field, "idle_timeout_ms");
    if (rule->idle_timeout_ms == UINT32_MAX) return "must be at least 1";
    *kind = DM_UNSUPPORTED;
    if (rule->idle_timeout_ms) return "rules do not age here";
    strcpy(field, "group");
    if (rule->group >= GROUPS) return "there is no such group";
    strcpy(field, "priority");
    if (rule->priority >= PRIORITIES) return "there is no such priority";
    for (size_t i = 0; i < sizeof lacking / sizeof *lacking; i++) {
        strcpy(field, lacking[i].path);
        if (p->fields & lacking[i].bit) return "is not matched here";
    }
    strcpy(field, "pattern");
    if (p->fields & ~able) return "has a field of a newer interface";
    static const uint8_t whole[6] = { 255, 255, 255, 255, 255, 255 };
    strcpy(field, "pattern.eth_dst");
    if (p->fields & DM_FIELD_ETH_DST && memcmp(p->eth_dst_mask, whole, 6)) return "is matched as a whole only";
    strcpy(field, "pattern.ip_dst");
    if (p->fields & DM_FIELD_IP_DST) {
        if (p->ip_dst.value.family != 4) return "IPv6 is not matched here";
        uint32_t behind = ~mask_bits(p);
        if (behind & (behind + 1)) return "only leading bits are matched";
    }
    for (uint32_t i = 0; i < count; i++) {
        const dm_action *action = DM_AT(dm_action, rule->actions, i);
        snprintf(field, 64, "actions[%u]", i);
        if (action->kind == DM_ACTION_JUMP && action->number >= GROUPS) return "there is no such group";
        if (action->kind != DM_ACTION_DROP && action->kind != DM_ACTION_FORWARD && action->kind != DM_ACTION_COUNT && action->kind != DM_ACTION_JUMP)
            return "is not done here";
    }
    if (count > ACTIONS) return "the list is too long";
    strcpy(field, "placement");
    if (rule->placement == DM_PLACE_SOFTWARE) return "the backend has no software to run rules in";
    return NULL;
}

static uint32_t steering_validate(uint64_t handle, dm_call *call, const dm_rules *rules, dm_rows *verdicts) {
    card *card = of(handle)->card;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    verdicts->len = rules->rules.len;
    for (uint32_t i = 0; i < rules->rules.len; i++) {
        dm_verdict verdict = DM_NEW(dm_verdict);
        char field[64];
        uint32_t kind;
        const char *reason = judge(DM_AT(dm_rule, rules->rules, i), &kind, field);
        verdict.verdict = reason ? DM_VERDICT_NO : DM_PLACE_HARDWARE;
        if (reason) {
            verdict.field = put(call, field);
            verdict.reason = put(call, reason);
        }
        if (i < verdicts->capacity) *DM_ROW(dm_verdict, verdicts, i) = verdict;
    }
    int fits = verdicts->len <= verdicts->capacity && call->arena->needed <= call->arena->capacity;
    return end(card, fits ? DM_DONE : DM_MORE);
}

static int same_port(dm_port a, dm_port b) { return !memcmp(&a, &b, sizeof a); }

static int same_pattern(const dm_pattern *a, const dm_pattern *b) {
    if (a->fields != b->fields) return 0;
    if (a->fields & DM_FIELD_PORT && !same_port(a->port, b->port)) return 0;
    if (a->fields & DM_FIELD_ETH_DST && memcmp(a->eth_dst, b->eth_dst, 6)) return 0;
    return !(a->fields & DM_FIELD_IP_DST) || (a->ip_dst.kind == b->ip_dst.kind && address(a) == address(b) && mask_bits(a) == mask_bits(b));
}

// Some frame could match both.
static int overlap(const dm_pattern *a, const dm_pattern *b) {
    uint32_t both = a->fields & b->fields, mask = mask_bits(a) & mask_bits(b);
    if (both & DM_FIELD_PORT && !same_port(a->port, b->port)) return 0;
    if (both & DM_FIELD_ETH_DST && memcmp(a->eth_dst, b->eth_dst, 6)) return 0;
    return !(both & DM_FIELD_IP_DST) || ((address(a) ^ address(b)) & mask) == 0;
}

static int same_actions(dm_list a, dm_list b) {
    if (a.len != b.len) return 0;
    for (uint32_t i = 0; i < a.len; i++) {
        const dm_action *x = DM_AT(dm_action, a, i), *y = DM_AT(dm_action, b, i);
        if (x->kind != y->kind) return 0;
        if (x->kind == DM_ACTION_FORWARD && !same_port(x->port, y->port)) return 0;
        if (x->kind == DM_ACTION_JUMP && x->number != y->number) return 0;
    }
    return 1;
}

static int counts(const dm_rule *rule) {
    for (uint32_t i = 0; i < rule->actions.len; i++)
        if (DM_AT(dm_action, rule->actions, i)->kind == DM_ACTION_COUNT) return 1;
    return 0;
}

static int same_masks(const dm_pattern *a, const dm_pattern *b) {
    return a->fields == b->fields && (!(a->fields & DM_FIELD_IP_DST) || mask_bits(a) == mask_bits(b));
}

static uint32_t masks_of(card *card) {
    uint32_t masks = 0;
    for (uint32_t i = 0; i < card->count; i++) {
        uint32_t j = 0;
        while (j < i && !same_masks(&card->rules[i].pattern, &card->rules[j].pattern)) j++;
        masks += j == i;
    }
    return masks;
}

static uint32_t counters_of(card *card) {
    uint32_t used = 0;
    for (uint32_t i = 0; i < card->count; i++) used += counts(&card->rules[i].rule);
    return used;
}

static entry *find(card *card, dm_cookie cookie) {
    for (uint32_t i = 0; i < card->count; i++)
        if (same_cookie(card->rules[i].rule.cookie, cookie)) return &card->rules[i];
    return NULL;
}

static int before(const dm_rule *a, const dm_rule *b) {
    if (a->group != b->group) return a->group < b->group;
    if (a->priority != b->priority) return a->priority < b->priority;
    if (a->cookie.high != b->cookie.high) return a->cookie.high < b->cookie.high;
    return a->cookie.low < b->cookie.low;
}

// An entry's pointers go to itself: set again whenever it moved.
static void settle(entry *entry) {
    entry->rule.pattern = &entry->pattern;
    entry->rule.actions.at = entry->actions;
    entry->rule.actions.stride = sizeof *entry->actions;
}

static uint32_t full(dm_error *error, const char *resource, unsigned limit) {
    char message[64];
    snprintf(message, sizeof message, "%s is full: %u of %u", resource, limit, limit);
    return refuse(error, DM_CAPACITY_EXCEEDED, resource, "", message);
}

static uint32_t add(card *card, const dm_rule *rule, dm_change *change, dm_error *error) {
    char field[64];
    uint32_t kind;
    const char *reason = judge(rule, &kind, field);
    if (reason) return refuse(error, kind, "", field, reason);
    entry *there = find(card, rule->cookie);
    change->placement = DM_PLACE_HARDWARE;
    if (there) {
        const dm_rule *old = &there->rule;
        int same = same_owner(old->owner, rule->owner) && old->group == rule->group && old->priority == rule->priority
            && old->placement == rule->placement && same_pattern(old->pattern, rule->pattern) && same_actions(old->actions, rule->actions);
        if (!same) return refuse(error, DM_EXISTS, "cookie", "", "another rule has this cookie");
        change->kind = DM_PRESENT;
        return DM_DONE;
    }
    int new_mask = 1;
    for (uint32_t i = 0; i < card->count; i++) {
        const dm_rule *other = &card->rules[i].rule;
        if (same_masks(other->pattern, rule->pattern)) new_mask = 0;
        if (other->group == rule->group && other->priority == rule->priority && overlap(other->pattern, rule->pattern) && !same_actions(other->actions, rule->actions))
            return refuse(error, DM_CONFLICT, "rule", "pattern", "a rule of the same priority matches some of the same frames with other actions");
    }
    if (card->count == RULES) return full(error, "steering.rules", RULES);
    if (new_mask && masks_of(card) == MASKS) return full(error, "steering.masks", MASKS);
    if (counts(rule) && counters_of(card) == COUNTERS) return full(error, "steering.counters", COUNTERS);
    uint32_t at = card->count++;
    for (; at && before(rule, &card->rules[at - 1].rule); at--) {
        card->rules[at] = card->rules[at - 1];
        settle(&card->rules[at]);
    }
    entry *entry = &card->rules[at];
    entry->rule = *rule;
    entry->rule.size = sizeof entry->rule;
    entry->pattern = *rule->pattern;
    entry->pattern.size = sizeof entry->pattern;
    for (uint32_t i = 0; i < rule->actions.len; i++) {
        entry->actions[i] = *DM_AT(dm_action, rule->actions, i);
        entry->actions[i].size = sizeof *entry->actions;
    }
    settle(entry);
    change->kind = DM_ADDED;
    return DM_DONE;
}

static void drop(card *card, entry *entry) {
    for (uint32_t i = (uint32_t)(entry - card->rules); i + 1 < card->count; i++) {
        card->rules[i] = card->rules[i + 1];
        settle(&card->rules[i]);
    }
    card->count--;
}

// Books see no frame: every count is zero.
static dm_counters zero_counts(card *card) { return (dm_counters){ .epoch = card->epoch, .idle_ms = DM_UNKNOWN }; }

static uint32_t delete(card *card, const dm_operation *operation, dm_change *change, dm_error *error) {
    entry *entry = find(card, operation->cookie);
    change->kind = DM_ABSENT;
    if (!entry) return DM_DONE;
    if (!same_owner(entry->rule.owner, operation->owner)) return refuse(error, DM_NOT_FOUND, "cookie", "", "this owner has no such rule");
    change->kind = DM_REMOVED;
    change->has_counters = counts(&entry->rule);
    change->counters = zero_counts(card);
    drop(card, entry);
    return DM_DONE;
}

static uint32_t steering_apply(uint64_t handle, dm_call *call, const dm_batch *batch, dm_outcome *outcome) {
    card *card = of(handle)->card;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    if (batch->operations.len > BATCH) {
        char message[64];
        snprintf(message, sizeof message, "%u operations are more than the %d of one batch", batch->operations.len, BATCH);
        call->error->retry = DM_RETRY_NEVER;
        return end(card, refuse(call->error, DM_CAPACITY_EXCEEDED, "steering.batch_max", "", message));
    }
    if (batch->atomicity != DM_CONTINUE) return end(card, refuse(call->error, DM_UNSUPPORTED, "", "atomicity", "is not on offer"));
    outcome->changes.len = outcome->errors.len = batch->operations.len;
    for (uint32_t i = 0; i < batch->operations.len; i++) {
        const dm_operation *operation = DM_AT(dm_operation, batch->operations, i);
        dm_change *change = DM_ROW(dm_change, &outcome->changes, i);
        dm_error *error = DM_ROW(dm_error, &outcome->errors, i);
        *change = DM_NEW(dm_change);
        error->size = sizeof *error;
        if (operation->kind == DM_ADD) status = add(card, operation->rule, change, error);
        else if (operation->kind == DM_REMOVE) status = delete(card, operation, change, error);
        else status = dm_fail(error, DM_UNSUPPORTED, "an operation of a newer interface");
        if (status != DM_DONE) {
            change->kind = DM_CHANGE_FAILED;
            error->has |= DM_HAS_OBJECT | DM_HAS_INDEX;
            error->index = i;
        }
    }
    return end(card, DM_DONE);
}

// A rule for an answer: all of it goes into the arena.
static const dm_rule *copy_rule(dm_call *call, const dm_rule *rule) {
    dm_rule *copy = dm_take(call->arena, sizeof *copy);
    dm_pattern *pattern = dm_take(call->arena, sizeof *pattern);
    dm_action *actions = dm_take(call->arena, rule->actions.len * sizeof *actions);
    if (!copy || !pattern || !actions) return NULL;
    *copy = *rule;
    *pattern = *rule->pattern;
    memcpy(actions, rule->actions.at, rule->actions.len * sizeof *actions);
    for (uint32_t i = 0; i < rule->actions.len; i++) actions[i].queues.len = 0;
    copy->pattern = pattern;
    copy->actions.at = actions;
    return copy;
}

static uint32_t steering_list(uint64_t handle, dm_call *call, const dm_of_owner *whose, dm_rows *rules) {
    card *card = of(handle)->card;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    rules->len = 0;
    for (uint32_t i = 0; i < card->count; i++) {
        if (!same_owner(card->rules[i].rule.owner, whose->owner)) continue;
        dm_installed installed = DM_NEW(dm_installed);
        installed.placement = DM_PLACE_HARDWARE;
        installed.rule = copy_rule(call, &card->rules[i].rule);
        if (rules->len < rules->capacity) *DM_ROW(dm_installed, rules, rules->len) = installed;
        rules->len++;
    }
    int fits = rules->len <= rules->capacity && call->arena->needed <= call->arena->capacity;
    return end(card, fits ? DM_DONE : DM_MORE);
}

static uint32_t steering_counters(uint64_t handle, dm_call *call, const dm_cookies *which, dm_rows *answers) {
    card *card = of(handle)->card;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    answers->len = which->cookies.len;
    for (uint32_t i = 0; i < which->cookies.len && i < answers->capacity; i++) {
        entry *entry = find(card, *DM_AT(dm_cookie, which->cookies, i));
        dm_count *count = DM_ROW(dm_count, answers, i);
        *count = DM_NEW(dm_count);
        count->present = entry && same_owner(entry->rule.owner, which->owner) && counts(&entry->rule);
        count->counters = zero_counts(card);
    }
    return end(card, answers->len <= answers->capacity ? DM_DONE : DM_MORE);
}

static uint32_t steering_flush(uint64_t handle, dm_call *call, const dm_of_owner *whose, dm_number *removed) {
    card *card = of(handle)->card;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    for (uint32_t i = card->count; i--;) {
        if (!same_owner(card->rules[i].rule.owner, whose->owner)) continue;
        drop(card, &card->rules[i]);
        removed->value++;
    }
    return end(card, DM_DONE);
}

static uint32_t steering_set_miss_policy(uint64_t handle, dm_call *call, const dm_miss *miss) {
    card *card = of(handle)->card;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    if (!has_port(miss->port)) return end(card, refuse(call->error, DM_NOT_FOUND, "port", "", "there is no such port"));
    if (miss->policy != DM_MISS_DROP) return end(card, refuse(call->error, DM_UNSUPPORTED, "", "policy", "there is no software on a representor"));
    return end(card, DM_DONE);
}

static uint32_t steering_occupancy(uint64_t handle, dm_call *call, dm_rows *resources) {
    card *card = of(handle)->card;
    uint32_t status = begin(card, call);
    if (status != DM_DONE) return status;
    const struct { const char *name; uint64_t used, limit; } all[] = {
        { "steering.rules", card->count, RULES }, { "steering.hardware_rules", card->count, RULES },
        { "steering.masks", masks_of(card), MASKS }, { "steering.counters", counters_of(card), COUNTERS },
    };
    resources->len = sizeof all / sizeof *all;
    for (uint64_t i = 0; i < resources->len && i < resources->capacity; i++) {
        dm_occupancy *row = DM_ROW(dm_occupancy, resources, i);
        *row = DM_NEW(dm_occupancy);
        row->used = all[i].used;
        row->limit = all[i].limit;
        row->resource = put(call, all[i].name);
    }
    int fits = resources->len <= resources->capacity && call->arena->needed <= call->arena->capacity;
    return end(card, fits ? DM_DONE : DM_MORE);
}

// ---- the symbol

uint32_t dpumesh_backend_v1(const dm_host *host, uint32_t want, dm_ops *ops, dm_error *error) {
    (void)host; (void)error;
    static const dm_ops table = {
        .size = sizeof table, .abi_major = DM_ABI_MAJOR, .abi_minor = DM_ABI_MINOR, .flags = DM_THREAD_SAFE,
        .open = card_open, .close = card_close, .info = card_info, .capabilities = card_capabilities, .epoch = card_epoch,
        .poll_fd = card_poll_fd, .poll = card_poll, .next_event = card_next_event,
        .vf_plan_count = vf_plan_count, .vf_set_count = vf_set_count, .vf_list = vf_list, .vf_lease = vf_lease,
        .vf_admit = vf_admit, .vf_revoke = vf_revoke, .vf_configure = vf_configure, .vf_attach = vf_attach,
        .vf_detach = vf_detach, .vf_release = vf_release, .vf_reclaim = vf_reclaim,
        .steering_validate = steering_validate, .steering_apply = steering_apply, .steering_list = steering_list,
        .steering_counters = steering_counters, .steering_flush = steering_flush,
        .steering_set_miss_policy = steering_set_miss_policy, .steering_occupancy = steering_occupancy,
    };
    memcpy(ops, &table, want < sizeof table ? want : sizeof table);
    return DM_DONE;
}

// ---- hooks of the conformance kit

static uint32_t hook_lose(uint64_t handle) {
    card *card = of(handle)->card;
    pthread_mutex_lock(&card->lock);
    if (!card->lost) raise_event(card, DM_EVENT_LOST, card->epoch);
    card->lost = 1;
    pthread_mutex_unlock(&card->lock);
    return DM_DONE;
}

static uint32_t hook_bring_back(uint64_t handle) {
    card *card = of(handle)->card;
    pthread_mutex_lock(&card->lock);
    if (card->lost) {
        card->lost = 0;
        fresh(card);
        raise_event(card, DM_EVENT_BACK, ++card->epoch);
    }
    pthread_mutex_unlock(&card->lock);
    return DM_DONE;
}

static uint32_t hook_netns(uint64_t handle, dm_str path, uint32_t present) {
    card *card = of(handle)->card;
    pthread_mutex_lock(&card->lock);
    char *there = find_netns(card, path);
    if (!present && there) {
        there[0] = 0;
        for (int i = 0; i < VFS; i++)
            if (card->vfs[i].location == DM_AT_NETNS && same_text(path, card->vfs[i].place)) to_host(&card->vfs[i]);
    }
    for (int i = 0; present && !there && i < PLACES; i++)
        if (!card->netns[i][0]) keep(there = card->netns[i], TEXT, path);
    pthread_mutex_unlock(&card->lock);
    return DM_DONE;
}

static uint32_t hook_jam(uint64_t handle, dm_port port, uint32_t jammed) {
    if (!is_vf(port)) return DM_FAILED;
    card *card = of(handle)->card;
    pthread_mutex_lock(&card->lock);
    card->vfs[port.index].jammed = (int)jammed;
    pthread_mutex_unlock(&card->lock);
    return DM_DONE;
}

// Into the namespace of a pod that is dead: a move gets it back.
static uint32_t hook_strand(uint64_t handle, dm_port port) {
    if (!is_vf(port)) return DM_FAILED;
    card *card = of(handle)->card;
    pthread_mutex_lock(&card->lock);
    card->vfs[port.index].location = DM_AT_NETNS;
    strcpy(card->vfs[port.index].place, "/run/netns/of-a-dead-pod");
    pthread_mutex_unlock(&card->lock);
    return DM_DONE;
}

uint32_t dpumesh_conformance_v1(dm_hooks *hooks) {
    uint32_t room = hooks->size;
    dm_hooks mine = { .size = sizeof mine, .survives = 1, .lose = hook_lose, .bring_back = hook_bring_back,
        .netns = hook_netns, .jam = hook_jam, .strand = hook_strand };
    if (room < mine.size) mine.size = room;
    memcpy(hooks, &mine, mine.size);
    return DM_DONE;
}
