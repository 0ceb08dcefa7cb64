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
