/* Matrix products of bfloat16 in AMX's tiles: registers of 16 rows of 64 bytes.
 *
 * The sum of a tile, 16 x 16 float32, grows by the product of one of 16 x 32 and one of 32 x 16 factors;
 * the latter's rows lie in pairs, value by value side by side. Four sums, 32 x 32, take turns: what is
 * loaded is used twice, and no product waits for the one before it.
 *
 * The harness of the tests brings its own tiles, in plain C, for processors that have none.
 */
#define SUMMED 32 /* factors that an instruction sums over */
#define HIGH 16 /* rows of a tile */

/* Ask for rows of 64 bytes in all tiles; every thread does so, and gives them back at the end. */
INLINE void begin_tiles(void) {
    struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    for (int t = 0; t < 8; t++) shapes.bytes[t] = 64, shapes.rows[t] = HIGH;
    __asm__ volatile("" ::"r"(&shapes) : "memory"); /* GCC thinks that only a part is read */
    _tile_loadconfig(&shapes);
}
INLINE void end_tiles(void) { _tile_release(); }

/* What has been written to memory is there for tiles to load: the compiler does not know that they do. */
INLINE void written(void) { __asm__ volatile("" ::: "memory"); }

INLINE void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
INLINE void load_sums(const float *s0, const float *s1) {
    _tile_loadd(0, s0, 64);
    _tile_loadd(1, s1, 64);
    _tile_loadd(2, s0 + HIGH * STRIP, 64);
    _tile_loadd(3, s1 + HIGH * STRIP, 64);
}
INLINE void store_sums(float *s0, float *s1) {
    _tile_stored(0, s0, 64);
    _tile_stored(1, s1, 64);
    _tile_stored(2, s0 + HIGH * STRIP, 64);
    _tile_stored(3, s1 + HIGH * STRIP, 64);
}
/* The sums grow by products of the 16 x 32 factors a0 and a1 with the 32 x 16 factors b0 and b1. */
INLINE void add_products(const uint16_t *a0, const uint16_t *a1, const uint16_t *b0, const uint16_t *b1) {
    _tile_loadd(4, a0, 64);
    _tile_loadd(6, b0, 64);
    _tile_loadd(5, a1, 64);
    _tile_loadd(7, b1, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
}

/* Turn the rows of 16 x 16 pairs into columns, in place: halves change sides, then quarters, … */
static void turn_pairs(uint16_t *pairs) {
    ivec rows[HIGH], *at = (ivec *)pairs;
    UNROLL for (int i = 0; i < HIGH; i++) rows[i] = at[i];
#define EXCHANGE(d)                                                                                \
    UNROLL for (int i = 0; i < HIGH; i++) {                                                        \
        if (i & d) continue;                                                                       \
        ivec upper = {0}, lower = {0};                                                             \
        for (int j = 0; j < HIGH; j++) upper[j] = j & d ? 16 + j - d : j, lower[j] = j & d ? 16 + j : j + d; \
        ivec a = rows[i], b = rows[i + d];                                                         \
        rows[i] = __builtin_shuffle(a, b, upper), rows[i + d] = __builtin_shuffle(a, b, lower);    \
    }
    EXCHANGE(8) EXCHANGE(4) EXCHANGE(2) EXCHANGE(1)
#undef EXCHANGE
    UNROLL for (int i = 0; i < HIGH; i++) at[i] = rows[i];
}
