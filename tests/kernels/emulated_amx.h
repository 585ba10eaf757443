/* AMX's tiles in plain C, for processors that have none; the compiler's flag -include brings them.
 * All have 16 rows of 64 bytes. */
#ifndef EMULATED
#define EMULATED
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

static _Thread_local struct {
    int begun; /* as on a processor, a program ends that uses tiles before their shape is known */
    uint8_t bytes[8][16][64];
} tiles_;

static inline void _needed_(void) {
    if (!tiles_.begun) __builtin_trap();
}
static inline void configure_(const void *asked) {
    const uint8_t *palette = asked, *bytes = palette + 16, *rows = palette + 48;
    tiles_.begun = *palette == 1;
    for (int t = 0; t < 8; t++) tiles_.begun &= bytes[2 * t] == 64 && bytes[2 * t + 1] == 0 && rows[t] == 16;
}
static inline void release_(void) { tiles_.begun = 0; }
static inline void zero_(int t) {
    _needed_();
    memset(tiles_.bytes[t], 0, sizeof tiles_.bytes[t]);
}
static inline void load_(int t, const void *from, long apart) {
    _needed_();
    for (int r = 0; r < 16; r++) memcpy(tiles_.bytes[t][r], (const char *)from + r * apart, 64);
}
static inline void store_(int t, void *to, long apart) {
    _needed_();
    for (int r = 0; r < 16; r++) memcpy((char *)to + r * apart, tiles_.bytes[t][r], 64);
}
static inline float widened_(int t, int r, int value) {
    uint32_t bits = 0;
    float wide;
    memcpy((char *)&bits + 2, tiles_.bytes[t][r] + 2 * value, 2);
    memcpy(&wide, &bits, 4);
    return wide;
}
static inline void multiply_(int sum, int a, int b) {
    _needed_();
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++) {
                float *to = (float *)(tiles_.bytes[sum][m] + 4 * n);
                for (int half = 0; half < 2; half++)
                    *to += widened_(a, m, 2 * k + half) * widened_(b, k, 2 * n + half);
            }
}
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig configure_
#define _tile_release release_
#define _tile_zero zero_
#define _tile_loadd load_
#define _tile_stored store_
#define _tile_dpbf16ps multiply_
#endif
