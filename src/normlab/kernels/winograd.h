/* 3 x 3 convolutions with padding 1 in few multiplications; winograd2.c and winograd4.c include this.
 *
 * F(m x m, 3 x 3) of Lavin and Gray (2016), arXiv 1509.09308, section 4.1: each m x m tile of the
 * output, m = SIDE, comes from an (m + 2) x (m + 2) tile of the input,
 *
 *     y = A'[(G w G') * (B' x B)]A        * value by value, summed over input channels
 *
 * The sums over channels are (m + 2)^2 matrix products. This is the same polynomial identity read
 * backwards for the gradients: the gradient of x is a convolution of g with the turned kernel, and
 *
 *     dw = G'[sum over tiles of (A g A') * (B' x B)]G
 *
 * Whoever includes this defines SIDE and the five matrices, each as a function of one column:
 * input_side (B'), output_side (A'), gradient_side (A), kernel_side (G) and back_side (G').
 *
 * Images are N x H x W x C; O is a multiple of 16, I of 8, and of 16 where its gradient is wanted.
 *
 * A tile of the output is one or more windows of 2 x 2 pooling, too. Where the maxima are all that is
 * wanted, the output itself is never written, nor is its gradient: `which` says where in each window g
 * belongs.
 *
 * Transformed tiles lie in strips of 16 channels, POINTS x C/16 x room x 16, transformed kernels too,
 * POINTS x O/16 x I x 16: what a product reads is contiguous and small, whatever C is. Where the distance of
 * points is a power of two, all of them meet in one set of the cache.
 *
 * With BFLOAT16 the products' factors are bfloat16, the upper halves of float32, and their sums
 * float32. One instruction multiplies and adds two factors next to each other in the summed index, so
 * these lie together: channels of a tile do anyway; rows of a strip are summed over in pairs, which
 * lie value by value side by side (`deep`).
 *
 * With AMX an instruction multiplies 16 x 32 factors by 32 x 16 (amx.h), whose rows are 64 bytes of memory,
 * the rows of the second such pairs. So what is summed over comes in whole 32s: tiles are filled up with
 * zeros, and channels that are summed over lie in strips of 32. Where tiles are summed over, the first
 * factor's pairs are turned into rows first. I and O are multiples of 32.
 */

#ifdef AMX
#define TILES 32 /* tiles transformed together: what they need stays in cache */
#define LEAST 64 /* times DEPTH tiles, at least, that a product over tiles sums over at a time */
#define TOGETHER 32 /* channels that lie together where they are summed over */
#define FULL 32 /* tiles that are summed over come in so many */
#define GROUP 32 /* tiles that a thread transforms at a time for a product over them */
#define GAP 32 /* values between the points of transformed tiles: not all meet in one set of the cache */
#define AT_ONCE(O) ((O) % (2 * PAIR) ? PAIR : 2 * PAIR) /* columns of a product that are there at a time */
#else
#define TILES 42 /* no whole 32s: the points of a strip do not all meet in one set of the cache */
#define LEAST 42
#define TOGETHER 16
#define FULL DEPTH
#define GROUP 8
#define GAP 0
#define AT_ONCE(O) (O)
#endif
#define SPAN (SIDE + 2) /* height and width of a tile of the input */
#define POINTS (SPAN * SPAN)
#define PIXELS (SIDE * SIDE)
#define ACROSS (SIDE / 2) /* windows of pooling across a tile, and down */
#define NEAR (ACROSS + 2) /* and those that its input touches */
#define STRIP 16
#define PAIR (2 * VEC) /* columns of a register block of the matrix products */
#define ROWS (VEC == 16 ? 14 : 6) /* its rows, not with AMX; divides TILES, as do those of a block of one vector */
#define ROWS_ALONE 14
#define FEW 7 /* rows of a last block that has no more */
#define SMALL (1 << 17) /* values of D, POINTS x I x O, of which there may be sixteen: 8 MiB */
#define OVER (VEC == 16 ? 8 : 4) /* rows of a block of the products over tiles */

#ifdef AMX
#include "amx.h"
#endif

#ifdef BFLOAT16
#define DEPTH 2 /* factors that an instruction sums over */
typedef uint16_t cell;
typedef __m512i factors;
INLINE factors factors_at(const cell *p) { return _mm512_loadu_si512(p); }
INLINE factors repeat(const cell *p) { return _mm512_set1_epi32(*(const int32_t *)p); }
INLINE vec multiply_add(factors a, factors b, vec sum) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
/* Write two rows rounded, value by value side by side. */
INLINE void put_rows(cell *p, const vec rows[DEPTH]) {
    const __m512i place = {0x0011000100100000, 0x0013000300120002, 0x0015000500140004, 0x0017000700160006,
                           0x0019000900180008, 0x001b000b001a000a, 0x001d000d001c000c, 0x001f000f001e000e};
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(place, both));
}
INLINE void put(cell *p, vec v) {
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
#else
#define DEPTH 1
typedef float cell;
typedef vec factors;
INLINE factors factors_at(const cell *p) { return load(p); }
INLINE factors repeat(const cell *p) { return splat(*p); }
INLINE vec multiply_add(factors a, factors b, vec sum) { return sum + a * b; }
INLINE void put(cell *p, vec v) { store(p, v); }
INLINE void put_rows(cell *p, const vec rows[DEPTH]) { store(p, rows[0]); }
#endif

/* Write DEPTH rows at SPAN points that lie `step` apart. */
INLINE void put_points(vec rows[DEPTH][SPAN], i64 step, cell *to) {
    UNROLL for (int j = 0; j < SPAN; j++) {
        vec together[DEPTH];
        UNROLL for (int k = 0; k < DEPTH; k++) together[k] = rows[k][j];
        put_rows(to + j * step, together);
    }
}

typedef struct {
    i64 N, H, W, down, across; /* down x across tiles an image */
} grid_t;

/* Whole windows only: an odd last row or column is pooled away. */
static grid_t grid(i64 N, i64 H, i64 W, int whole) {
    i64 h = whole ? H / 2 * 2 : H, w = whole ? W / 2 * 2 : W;
    return (grid_t){N, H, W, (h + SIDE - 1) / SIDE, (w + SIDE - 1) / SIDE};
}

static i64 tiles_of(const grid_t *s) { return s->N * s->down * s->across; }

/* Channels of whole strips. */
static inline i64 padded(i64 C) { return (C + STRIP - 1) / STRIP * STRIP; }

/* Where column `c` of row `r` is in strips of `rows` rows. */
static inline i64 at(i64 r, i64 c, i64 rows) { return (c / STRIP * rows + r) * STRIP + c % STRIP; }

/* The same in strips whose columns are summed over. */
static inline i64 wide(i64 r, i64 c, i64 rows) {
    return (c / TOGETHER * rows + r) * TOGETHER + c % TOGETHER;
}

/* The same in strips whose rows are summed over, for the first of DEPTH rows that `put_rows` writes;
 * `rows` is a multiple of DEPTH. */
static inline i64 deep(i64 r, i64 c, i64 rows) { return DEPTH * at(r / DEPTH, c, rows / DEPTH); }

/* How far apart the points of transformed kernels lie, and those of transformed tiles. */
static inline i64 apart(i64 I, i64 O) { return I * O + 32; }
static inline i64 point_step(i64 rows, i64 C) { return rows * padded(C) + GAP; }

/* Tiles that are summed over, with those of zeros that fill them up. */
static inline i64 filled(i64 count) { return (count + FULL - 1) / FULL * FULL; }

/* Column `c` of C, a multiple of 8, and those behind it; zeros behind the last. */
static inline vec load_within(const float *p, i64 c, i64 C) {
    return c + VEC <= C ? load(p + c) : load8(p + c);
}

/* The image that a tile is in, and the tile's first row and column. */
typedef struct {
    i64 n, top, left;
} place_t;

static place_t place_of(const grid_t *s, i64 t) {
    i64 rest = t % (s->down * s->across);
    return (place_t){t / (s->down * s->across), rest / s->across * SIDE, rest % s->across * SIDE};
}

/* That of the next tile; divisions would take as long as a transform. */
static inline void advance(const grid_t *s, place_t *at) {
    if ((at->left += SIDE) < s->across * SIDE) return;
    at->left = 0;
    if ((at->top += SIDE) < s->down * SIDE) return;
    at->top = 0;
    at->n++;
}

/* Whether none of the tile's `span` rows and columns from `before` its first is outside. */
static inline int whole(i64 H, i64 W, i64 top, i64 left, i64 before, i64 span) {
    return top >= before && left >= before && top + span - before <= H && left + span - before <= W;
}

/* Addresses of the pixels from which a tile is computed; `zeros` outside of the image. */
INLINE void input_pixels(const float *x, const grid_t *s, i64 C, place_t at, const float *zeros,
                         const float *pixels[POINTS]) {
    const float *corner = x + ((at.n * s->H + at.top - 1) * s->W + at.left - 1) * C;
    i64 down = s->W * C;
    if (whole(s->H, s->W, at.top, at.left, 1, SPAN)) {
        UNROLL for (int i = 0; i < SPAN; i++)
            UNROLL for (int j = 0; j < SPAN; j++) pixels[SPAN * i + j] = corner + i * down + j * C;
        return;
    }
    for (int i = 0; i < SPAN; i++)
        for (int j = 0; j < SPAN; j++) {
            i64 r = at.top + i - 1, c = at.left + j - 1;
            int inside = r >= 0 && r < s->H && c >= 0 && c < s->W;
            pixels[SPAN * i + j] = inside ? corner + i * down + j * C : zeros;
        }
}

/* Addresses of the pixels of a tile of the output; `outside` where the image ends. */
static void output_pixels(float *y, const grid_t *s, i64 C, place_t at, float *outside,
                          float *pixels[PIXELS]) {
    float *corner = y + ((at.n * s->H + at.top) * s->W + at.left) * C;
    UNROLL for (int i = 0; i < SIDE; i++)
        UNROLL for (int j = 0; j < SIDE; j++) {
            int inside = at.top + i < s->H && at.left + j < s->W;
            pixels[SIDE * i + j] = inside ? corner + (i * s->W + j) * C : outside;
        }
}

/* Which windows of the maxima a tile has, `nearby` more on each side: -1 outside of the image. */
INLINE void windows_of(const grid_t *s, place_t at, int nearby, i64 *windows) {
    i64 down = s->H / 2, across = s->W / 2, top = at.top / 2, left = at.left / 2;
    i64 first = (at.n * down + top - nearby) * across + left - nearby;
    int span = ACROSS + 2 * nearby, all = whole(down, across, top, left, nearby, span);
    UNROLL for (int i = 0; i < span; i++)
        UNROLL for (int j = 0; j < span; j++) {
            i64 r = top + i - nearby, c = left + j - nearby;
            int inside = all || (r >= 0 && r < down && c >= 0 && c < across);
            *windows++ = inside ? first + i * across + j : -1;
        }
}

/* Ask for the square of `side` x `side` pixels, of `size` bytes each, of a map of height H and width W:
 * while a product computes, memory is idle. */
INLINE void fetch(const void *map, i64 H, i64 W, i64 size, i64 n, i64 top, i64 left, int side) {
    const char *corner = (const char *)map + ((n * H + top) * W + left) * size;
    for (int i = 0; i < side; i++)
        for (i64 j = 0; j < side * size; j += 64) __builtin_prefetch(corner + i * W * size + j, 0, 2);
}

/* The pixels of a tile, from `after` its first row and column: 1 for those of its input that no tile
 * before it reads, 0 for a gradient's. */
INLINE void fetch_pixels(const float *x, const grid_t *s, i64 C, place_t at, int after) {
    fetch(x, s->H, s->W, C * sizeof *x, at.n, at.top + after, at.left + after, SIDE);
}

/* The channels from `begin` of pixels that are written next. */
INLINE void fetch_output(float *const pixels[PIXELS], i64 begin, i64 columns) {
    for (int k = 0; k < PIXELS; k++)
        for (i64 c = begin; c < begin + columns; c += 16) __builtin_prefetch(pixels[k] + c, 1, 2);
}

/* The windows of a tile in place of its pixels, to be read. */
INLINE void fetch_windows(const float *g, const uint8_t *which, const grid_t *s, i64 C, place_t at,
                          int after) {
    i64 H = s->H / 2, W = s->W / 2, top = at.top / 2 + after, left = at.left / 2 + after;
    fetch(g, H, W, C * sizeof *g, at.n, top, left, ACROSS);
    fetch(which, H, W, C, at.n, top, left, ACROSS);
}

/* The second half of B' d B of a tile: along the rows, to the points `step` apart from V on. */
INLINE void store_input(vec rows[SPAN][SPAN], i64 step, cell *V) {
    UNROLL for (int i = 0; i < SPAN; i++) {
        vec r[SPAN];
        input_side(rows[i], r);
        UNROLL for (int j = 0; j < SPAN; j++) put(V + (SPAN * i + j) * step, r[j]);
    }
}

/* V = B' x B of `count` tiles from `first`, in strips of `room` rows. `over_tiles`: for a product that sums
 * over the tiles, not the channels; the last ones are filled up with zeros. */
INLINE void transform_input(const float *x, const grid_t *s, i64 C, i64 first, int count, i64 room,
                            int over_tiles, const float *zeros, cell *V) {
    place_t place = place_of(s, first);
    i64 step = point_step(room, C);
    for (int t = 0; t < (over_tiles ? filled(count) : count); t += DEPTH) {
        const float *p[DEPTH][POINTS];
        for (int k = 0; k < DEPTH; k++, advance(s, &place)) {
            if (t + k < count) input_pixels(x, s, C, place, zeros, p[k]);
            else for (int j = 0; j < POINTS; j++) p[k][j] = zeros;
        }
        for (i64 c = 0; c < C; c += VEC) {
            vec rows[DEPTH][SPAN][SPAN];
            UNROLL for (int k = 0; k < DEPTH; k++) {
                UNROLL for (int j = 0; j < SPAN; j++) {
                    vec d[SPAN], r[SPAN];
                    UNROLL for (int i = 0; i < SPAN; i++) d[i] = load_within(p[k][SPAN * i + j], c, C);
                    input_side(d, r);
                    UNROLL for (int i = 0; i < SPAN; i++) rows[k][i][j] = r[i];
                }
                if (!over_tiles) store_input(rows[k], step, V + wide(t + k, c, room));
            }
            if (!over_tiles) continue;
            UNROLL for (int i = 0; i < SPAN; i++) {
                vec r[DEPTH][SPAN];
                UNROLL for (int k = 0; k < DEPTH; k++) input_side(rows[k][i], r[k]);
                put_points(r, step, V + deep(t, c, room) + SPAN * i * step);
            }
        }
    }
}

/* The same of the image whose windows hold the values g where `which` says, and zeros. */
static void transform_windows(const float *g, const uint8_t *which, const grid_t *s, i64 C,
                              i64 first, int count, i64 room, const float *zeros, cell *V) {
    place_t place = place_of(s, first);
    for (int t = 0; t < count; t++, advance(s, &place)) {
        i64 windows[NEAR * NEAR];
        const float *values[NEAR * NEAR];
        const uint8_t *places[NEAR * NEAR];
        windows_of(s, place, 1, windows);
        for (int k = 0; k < NEAR * NEAR; k++) {
            values[k] = windows[k] < 0 ? zeros : g + windows[k] * C;
            places[k] = windows[k] < 0 ? (const uint8_t *)zeros : which + windows[k] * C;
        }
        for (i64 c = 0; c < C; c += VEC) {
            vec rows[SPAN][SPAN];
            UNROLL for (int j = 0; j < SPAN; j++) {
                vec d[SPAN], r[SPAN];
                UNROLL for (int i = 0; i < SPAN; i++) {
                    int k = (i + 1) / 2 * NEAR + (j + 1) / 2, corner = (i + 1) % 2 * 2 + (j + 1) % 2;
                    d[i] = (vec)((ivec)load(values[k] + c) & (load_places(places[k] + c) == corner));
                }
                input_side(d, r);
                UNROLL for (int i = 0; i < SPAN; i++) rows[i][j] = r[i];
            }
            store_input(rows, point_step(room, C), V + wide(t, c, room));
        }
    }
}

/* A' M A + bias, the pixels y of the tile whose points are `in` and every `step` from there. */
INLINE void load_output(const float *in, i64 step, vec bias, vec y[PIXELS]) {
    vec rows[SIDE][SPAN];
    UNROLL for (int j = 0; j < SPAN; j++) {
        vec m[SPAN], r[SIDE];
        UNROLL for (int i = 0; i < SPAN; i++) m[i] = load(in + (SPAN * i + j) * step);
        output_side(m, r);
        UNROLL for (int i = 0; i < SIDE; i++) rows[i][j] = r[i];
    }
    UNROLL for (int i = 0; i < SIDE; i++) {
        output_side(rows[i], y + SIDE * i);
        UNROLL for (int j = 0; j < SIDE; j++) y[SIDE * i + j] += bias;
    }
}

/* y = A' M A + bias of `count` tiles from `first`, their `columns` channels from `begin`; with `which`, the
 * maxima and where they are. */
static void transform_output(const float *M, const grid_t *s, i64 C, i64 begin, i64 columns, i64 first,
                             int count, const float *bias, float *const pixels[][PIXELS], float *y,
                             uint8_t *which) {
    place_t place = place_of(s, first);
    for (int t = 0; t < count; t++, advance(s, &place)) {
        i64 windows[ACROSS * ACROSS];
        windows_of(s, place, 0, windows);
        for (i64 c = begin; c < begin + columns; c += VEC) {
            vec out[PIXELS], add = bias ? load(bias + c) : (vec){0};
            load_output(M + at(t, c - begin, TILES), point_step(TILES, columns), add, out);
            if (which) {
                UNROLL for (int k = 0; k < ACROSS * ACROSS; k++) {
                    if (windows[k] < 0) continue;
                    const vec *corner = out + k / ACROSS * 2 * SIDE + k % ACROSS * 2;
                    vec four[4] = {corner[0], corner[1], corner[SIDE], corner[SIDE + 1]};
                    ivec corners;
                    i64 to = windows[k] * C + c;
                    store(y + to, maximum(four, &corners));
                    store_places(which + to, corners);
                }
            } else
                UNROLL for (int k = 0; k < PIXELS; k++) store(pixels[t][k] + c, out[k]);
        }
    }
}

/* Where the gradient of a tile of the output is: its pixels, or with `which` its windows' values and
 * their places. Zeros of a tile that is nowhere. */
typedef struct {
    float *pixels[PIXELS];
    const float *values[ACROSS * ACROSS];
    const uint8_t *places[ACROSS * ACROSS];
} gradient_t;

static void gradient_of(const float *g, const uint8_t *which, const grid_t *s, i64 C,
                        const place_t *at, float *zeros, gradient_t *tile) {
    i64 windows[ACROSS * ACROSS];
    if (!which) {
        if (at) output_pixels((float *)g, s, C, *at, zeros, tile->pixels);
        else for (int k = 0; k < PIXELS; k++) tile->pixels[k] = zeros;
        return;
    }
    if (at) windows_of(s, *at, 0, windows);
    for (int k = 0; k < ACROSS * ACROSS; k++) {
        if (!at) windows[k] = -1;
        tile->values[k] = windows[k] < 0 ? zeros : g + windows[k] * C;
        tile->places[k] = windows[k] < 0 ? (const uint8_t *)zeros : which + windows[k] * C;
    }
}

/* U = A g A' of `count` tiles from `first`, in strips; sums (C) grows by the tiles' sums. With
 * `which`, g holds one value a window. */
static void transform_gradient(const float *g, const uint8_t *which, const grid_t *s, i64 C,
                               i64 first, int count, i64 room, float *zeros, cell *U,
                               float *sums) {
    place_t place = place_of(s, first);
    i64 step = point_step(room, C);
    for (int t = 0; t < filled(count); t += DEPTH) {
        gradient_t at_tiles[DEPTH];
        for (int k = 0; k < DEPTH; k++, advance(s, &place))
            gradient_of(g, which, s, C, t + k < count ? &place : NULL, zeros, at_tiles + k);
        for (i64 c = 0; c < C; c += VEC) {
            vec rows[DEPTH][SPAN][SIDE], all = load(sums + c);
            UNROLL for (int k = 0; k < DEPTH; k++) {
                const gradient_t *from = at_tiles + k;
                vec sum;
                UNROLL for (int j = 0; j < SIDE; j++) {
                    vec d[SIDE], r[SPAN], total;
                    UNROLL for (int i = 0; i < SIDE; i++) {
                        int w = i / 2 * ACROSS + j / 2, corner = i % 2 * 2 + j % 2;
                        if (which) {
                            ivec corners = load_places(from->places[w] + c);
                            d[i] = (vec)((ivec)load(from->values[w] + c) & (corners == corner));
                        } else d[i] = load(from->pixels[SIDE * i + j] + c);
                        if (i) total += d[i];
                        else total = d[i];
                    }
                    if (j) sum += total;
                    else sum = total;
                    gradient_side(d, r);
                    UNROLL for (int i = 0; i < SPAN; i++) rows[k][i][j] = r[i];
                }
                all += sum;
            }
            store(sums + c, all);
            UNROLL for (int i = 0; i < SPAN; i++) {
                vec r[DEPTH][SPAN];
                UNROLL for (int k = 0; k < DEPTH; k++) gradient_side(rows[k][i], r[k]);
                put_points(r, step, U + deep(t, c, room) + SPAN * i * step);
            }
        }
    }
}

/* G w G' of w, O x I x 3 x 3, as I rows for O columns; or, turned, of the kernel that takes the
 * gradient back, O rows for I columns. Here the 16 columns from `first`. */
static void transform_kernel(const float *w, i64 O, i64 I, int turned, i64 first, cell *U) {
    i64 rows = turned ? O : I;
    for (i64 row = 0; row < rows; row += DEPTH) {
        float w9[DEPTH][9][STRIP];
        cell *out = U + deep(row, first, rows);
        for (int k = 0; k < DEPTH; k++)
            for (int c = 0; c < STRIP; c++) {
                i64 o = turned ? row + k : first + c, i = turned ? first + c : row + k;
                UNROLL for (int j = 0; j < 9; j++) w9[k][j][c] = w[9 * (o * I + i) + (turned ? 8 - j : j)];
            }
        for (int c = 0; c < STRIP; c += VEC) {
            vec at_rows[DEPTH][SPAN][3];
            UNROLL for (int k = 0; k < DEPTH; k++)
                UNROLL for (int j = 0; j < 3; j++) {
                    vec column[3], r[SPAN];
                    UNROLL for (int i = 0; i < 3; i++) column[i] = load(w9[k][3 * i + j] + c);
                    kernel_side(column, r);
                    UNROLL for (int i = 0; i < SPAN; i++) at_rows[k][i][j] = r[i];
                }
            UNROLL for (int i = 0; i < SPAN; i++) {
                vec r[DEPTH][SPAN];
                UNROLL for (int k = 0; k < DEPTH; k++) kernel_side(at_rows[k][i], r[k]);
                put_points(r, apart(I, O), out + SPAN * i * apart(I, O) + DEPTH * c);
            }
        }
    }
}

/* dw = G' D G for the 16 output channels from `first`. */
static void transform_back(const float *D, i64 O, i64 I, i64 first, float *dw) {
    for (i64 i = 0; i < I; i++) {
        float k[9][STRIP];
        for (int c = 0; c < STRIP; c += VEC) {
            const float *d = D + at(i, first + c, I);
            vec rows[3][SPAN];
            UNROLL for (int j = 0; j < SPAN; j++) {
                vec column[SPAN], r[3];
                UNROLL for (int p = 0; p < SPAN; p++) column[p] = load(d + (SPAN * p + j) * apart(I, O));
                back_side(column, r);
                UNROLL for (int p = 0; p < 3; p++) rows[p][j] = r[p];
            }
            UNROLL for (int p = 0; p < 3; p++) {
                vec r[3];
                back_side(rows[p], r);
                UNROLL for (int j = 0; j < 3; j++) store(k[3 * p + j] + c, r[j]);
            }
        }
        for (int c = 0; c < STRIP; c++)
            UNROLL for (int j = 0; j < 9; j++) dw[((first + c) * I + i) * 9 + j] = k[j][c];
    }
}

#ifdef AMX
/* M (rows x PAIR columns) = V (rows x I) U (I x O), at the columns from `o`; asks for U at the next point. */
static void product(const cell *V, const cell *U, int rows, i64 I, i64 O, i64 o, float *M) {
    const cell *u0 = U + at(0, o, I), *u1 = U + at(0, o + STRIP, I);
    written();
    for (int r = 0; r < rows; r += 2 * HIGH) {
        zero_sums();
        for (i64 i = 0; i < I; i += SUMMED) {
            const cell *v = V + wide(r, i, TILES), *b0 = u0 + i * STRIP, *b1 = u1 + i * STRIP;
            add_products(v, v + HIGH * TOGETHER, b0, b1);
            if (r + 2 * HIGH < rows) continue;
            for (int j = 0; j < SUMMED * STRIP; j += 32) {
                __builtin_prefetch(b0 + apart(I, O) + j, 0, 2);
                __builtin_prefetch(b1 + apart(I, O) + j, 0, 2);
            }
        }
        store_sums(M + at(r, 0, TILES), M + at(r, STRIP, TILES));
    }
}

/* Make V's transposed the first factor of products over `count` tiles. */
static void turn(cell *V, int count, i64 room, i64 C) {
    for (int p = 0; p < POINTS; p++)
        for (i64 c = 0; c < C; c += HIGH)
            for (i64 t = 0; t < count; t += FULL) turn_pairs(V + p * point_step(room, C) + deep(t, c, room));
}

/* D (I x O) += V' (I x rows) U (rows x O) at the PAIR of columns from `o`, V and U of `room` rows; V has been
 * turned. `fresh`: = in place of +=. */
static void product_over_tiles(const cell *V, const cell *U, int rows, i64 room, i64 I, i64 O, i64 o,
                               float *D, int fresh) {
    (void)O;
    const cell *u0 = U + deep(0, o, room), *u1 = U + deep(0, o + STRIP, room);
    written();
    for (i64 i = 0; i < I; i += 2 * HIGH) {
        const cell *v0 = V + deep(0, i, room), *v1 = V + deep(0, i + HIGH, room);
        float *d0 = D + at(i, o, I), *d1 = D + at(i, o + STRIP, I);
        if (fresh) zero_sums();
        else load_sums(d0, d1);
        for (i64 r = 0; r < rows * STRIP; r += SUMMED * STRIP) add_products(v0 + r, v1 + r, u0 + r, u1 + r);
        store_sums(d0, d1);
    }
}
#else
static void begin_tiles(void) {}
static void end_tiles(void) {}
static void turn(cell *V, int count, i64 room, i64 C) { (void)V, (void)count, (void)room, (void)C; }

/* M (rows x one vector of columns, or `two`) = V (rows x I) U (I x columns), `height` rows at a time
 * from row r on while more than `rest` are left, the last ones rounded up; V in strips of TILES rows.
 * The last rows ask for the PAIR of columns that comes next. Returns the row that follows. */
INLINE int product_of(const cell *V, const cell *u0, const cell *u1, int r, int rows, int rest, i64 I,
                      float *m0, float *m1, int height, int two) {
    for (; r < rows - rest; r += height) {
        vec sum[ROWS_ALONE][2] = {{{0}}};
        const cell *a0 = u0, *a1 = u1;
        for (i64 first = 0; first < I; first += 8) {
            const cell *v = V + wide(r, first, TILES);
            for (int i = 0; i < 8; i += DEPTH, a0 += DEPTH * STRIP, a1 += DEPTH * STRIP) {
                factors b0 = factors_at(a0), b1 = two ? factors_at(a1) : b0;
                if (PAIR >= STRIP && two && r + height >= rows) {
                    __builtin_prefetch(a0 + PAIR * I, 0, 2);
                    if (PAIR > STRIP) __builtin_prefetch(a1 + PAIR * I, 0, 2);
                }
                UNROLL for (int k = 0; k < height; k++) {
                    factors a = repeat(v + k * STRIP + i);
                    sum[k][0] = multiply_add(a, b0, sum[k][0]);
                    if (two) sum[k][1] = multiply_add(a, b1, sum[k][1]);
                }
            }
        }
        UNROLL for (int k = 0; k < height; k++) {
            store(m0 + (r + k) * STRIP, sum[k][0]);
            if (two) store(m1 + (r + k) * STRIP, sum[k][1]);
        }
    }
    return r;
}

/* The same for the PAIR of columns from `o` of U (I x O). */
static void product(const cell *V, const cell *U, int rows, i64 I, i64 O, i64 o, float *M) {
    const cell *u0 = U + at(0, o, I), *u1 = U + at(0, o + VEC, I);
    float *m1 = M + at(0, VEC, TILES);
    if (o + VEC < O) {
        int r = product_of(V, u0, u1, 0, rows, ROWS > FEW ? FEW : 0, I, M, m1, ROWS, 1);
        if (ROWS > FEW) product_of(V, u0, u1, r, rows, 0, I, M, m1, FEW, 1);
    } else product_of(V, u0, u0, 0, rows, 0, I, M, M, ROWS_ALONE, 0);
}

/* D (I x one vector of columns, or `two`) += V' (I x rows) U (rows x columns), all in strips, V and U
 * of `room` rows; `fresh`: = in place of +=. */
INLINE void product_over_tiles_of(const cell *V, const cell *u0, const cell *u1, int rows, i64 room,
                                  i64 I, float *d0, float *d1, int two, int fresh) {
    for (i64 i = 0; i < I; i += OVER, d0 += OVER * STRIP, d1 += OVER * STRIP) {
        vec sum[OVER][2];
        UNROLL for (int k = 0; k < OVER; k++) {
            sum[k][0] = fresh ? (vec){0} : load(d0 + k * STRIP);
            if (two) sum[k][1] = fresh ? (vec){0} : load(d1 + k * STRIP);
        }
        const cell *v = V + deep(0, i, room), *b0 = u0, *b1 = u1;
        for (int r = 0; r < rows; r += DEPTH) {
            factors c0 = factors_at(b0), c1 = two ? factors_at(b1) : c0;
            UNROLL for (int k = 0; k < OVER; k++) {
                factors a = repeat(v + DEPTH * k);
                sum[k][0] = multiply_add(a, c0, sum[k][0]);
                if (two) sum[k][1] = multiply_add(a, c1, sum[k][1]);
            }
            v += DEPTH * STRIP, b0 += DEPTH * STRIP, b1 += DEPTH * STRIP;
        }
        UNROLL for (int k = 0; k < OVER; k++) {
            store(d0 + k * STRIP, sum[k][0]);
            if (two) store(d1 + k * STRIP, sum[k][1]);
        }
    }
}

/* The same for the PAIR of columns from `o`. */
static void product_over_tiles(const cell *V, const cell *U, int rows, i64 room, i64 I, i64 O, i64 o,
                               float *D, int fresh) {
    const cell *u0 = U + at(0, o, room), *u1 = U + at(0, o + VEC, room);
    float *d0 = D + at(0, o, I), *d1 = D + at(0, o + VEC, I);
    if (o + VEC < O) product_over_tiles_of(V, u0, u1, rows, room, I, d0, d1, 1, fresh);
    else product_over_tiles_of(V, u0, u0, rows, room, I, d0, d0, 0, fresh);
}
#endif

/* y (N x H x W x O) = convolution of x (N x H x W x I) with w (O x I x 3 x 3), plus bias (may be
 * NULL). Turned: x is the gradient of y, N x H x W x O, and y that of x, N x H x W x I.
 * With `which` (may be NULL), the 2 x 2 maxima N x H/2 x W/2 x O stand in place of the convolution
 * itself; `which`, of their shape, is written, or read where turned.
 * Returns 0, or -1 when memory is short. */
int CONV3X3(const float *x, const float *w, const float *bias, i64 N, i64 H, i64 W, i64 I,
                    i64 O, int turned, float *y, uint8_t *which, int threads) {
    grid_t s = grid(N, H, W, which && !turned);
    i64 tiles = tiles_of(&s), blocks = (tiles + TILES - 1) / TILES;
    i64 from = turned ? O : I, to = turned ? I : O;
    cell *U = aligned_alloc(64, POINTS * apart(I, O) * sizeof(cell));
    if (!U) return -1;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (i64 first = 0; first < to; first += STRIP)
            transform_kernel(w, O, I, turned, first, U);
        i64 columns = AT_ONCE(to);
        i64 in = POINTS * point_step(TILES, from) * sizeof(cell), out = POINTS * point_step(TILES, columns);
        i64 size = in + (out + padded(from) + padded(to)) * sizeof(float);
        cell *V = aligned_alloc(64, (size + 63) / 64 * 64);
        float *pixels[TILES][PIXELS];
        float *M = (float *)((char *)V + in), *zeros = M + out, *outside = zeros + padded(from);
        if (V) memset(V, 0, size);
        else {
#pragma omp atomic write
            failed = 1;
        }
        begin_tiles();
#pragma omp for schedule(static)
        for (i64 b = 0; b < blocks; b++) {
            if (!V) continue;
            int count = (int)min64(TILES, tiles - b * TILES);
            if (which && turned)
                transform_windows(x, which, &s, from, b * TILES, count, TILES, zeros, V);
            else transform_input(x, &s, from, b * TILES, count, TILES, 0, zeros, V);
            int pooled = which && !turned;
            for (i64 begin = 0; begin < to; begin += columns) {
                place_t place = place_of(&s, b * TILES), next = place_of(&s, (b + 1) * TILES);
                int last = begin + columns >= to, fetched = 0;
                for (int p = 0; p < POINTS; p++) {
                    for (; fetched < count * (p + 1) / POINTS; fetched++) {
                        if (last && which && turned) fetch_windows(x, which, &s, from, next, 1);
                        else if (last) fetch_pixels(x, &s, from, next, 1);
                        advance(&s, &next);
                        if (pooled) continue;
                        output_pixels(y, &s, to, place, outside, pixels[fetched]);
                        fetch_output(pixels[fetched], begin, columns);
                        advance(&s, &place);
                    }
                    for (i64 o = begin; o < begin + columns; o += PAIR)
                        product(V + p * point_step(TILES, from), U + p * apart(I, O), count, from, to, o,
                                M + p * point_step(TILES, columns) + at(0, o - begin, TILES));
                }
                transform_output(M, &s, to, begin, columns, b * TILES, count, bias, pixels, y,
                                 pooled ? which : NULL);
            }
        }
        end_tiles();
        free(V);
    }
    free(U);
    return failed ? -1 : 0;
}

/* Tiles whose transforms are kept for one product over them: the more, the fewer passes over D. A thread
 * `alone` keeps 3 MiB of them; all threads together, half of what a large D takes, so that both stay in
 * the last cache. Of either LEAST to 128 times DEPTH. Points lie so many rows apart: without a GAP they are an
 * odd number times DEPTH, so that not all points meet in one set of the cache. */
static i64 room_for(i64 I, i64 O, int alone) {
    i64 rows = alone ? 3 * (1 << 18) / (POINTS * (I + O)) : I * O / (2 * (I + O));
    rows = max64(LEAST, min64(rows, 128));
    return GAP ? filled(rows * DEPTH) : (rows | 1) * DEPTH;
}

/* What a gradient of a kernel is computed from, and room for the transforms of `room` tiles. */
typedef struct {
    const float *x, *g;
    const uint8_t *which;
    grid_t grid;
    i64 I, O, room;
    float *zeros;
} gradient_of_kernel_t;

/* V and U of `count` tiles from `first`; `sums` (O) grows by their gradients. */
static void transform_both(const gradient_of_kernel_t *k, i64 first, int count, cell *V, cell *U,
                           float *sums) {
    transform_input(k->x, &k->grid, k->I, first, count, k->room, 1, k->zeros, V);
    turn(V, count, k->room, k->I);
    transform_gradient(k->g, k->which, &k->grid, k->O, first, count, k->room, k->zeros, U, sums);
}

/* What the transforms of a tile read first. In line, as GCC leaves out calls of what only fetches. */
INLINE void fetch_both(const gradient_of_kernel_t *k, place_t at) {
    fetch_pixels(k->x, &k->grid, k->I, at, 1);
    if (k->which) fetch_windows(k->g, k->which, &k->grid, k->O, at, 0);
    else fetch_pixels(k->g, &k->grid, k->O, at, 0);
}

/* D += V' U of `count` tiles, at one point and for one PAIR of output channels: the product `number`.
 * `fresh`: of the first tiles, D = V' U. */
static void product_at(const gradient_of_kernel_t *k, i64 number, int count, const cell *V,
                       const cell *U, float *D, int fresh) {
    i64 across = (k->O + PAIR - 1) / PAIR, p = number / across, o = number % across * PAIR;
    product_over_tiles(V + p * point_step(k->room, k->I), U + p * point_step(k->room, k->O), count, k->room, k->I,
                       k->O, o, D + p * apart(k->I, k->O), fresh);
}

/* Gradients of the kernel, dw (O x I x 3 x 3), and of the bias, db (O), from x and g = dL/dy, of the
 * maxima with `which` (may be NULL).
 *
 * A small D is there once for each of several parts of the tiles, which threads take as they come. A
 * large one is there once: all threads transform a block of tiles, then each multiplies at its points.
 * Either way the threads change no sum's order, so no bit. */
int CONV3X3_GRADIENT(const float *x, const float *g, const uint8_t *which, i64 N, i64 H,
                             i64 W, i64 I, i64 O, float *dw, float *db, int threads) {
    gradient_of_kernel_t k = {x, g, which, grid(N, H, W, which != NULL), I, O, 0, NULL};
    i64 tiles = tiles_of(&k.grid), values = POINTS * apart(I, O);
    int alone = values <= SMALL;
    i64 room = room_for(padded(I), O, alone), products = POINTS * ((O + PAIR - 1) / PAIR);
    i64 parts = alone ? min64(16, 1 + tiles / (4 * room / DEPTH)) : 1;
    i64 groups = alone ? 1 : (room + GROUP - 1) / GROUP, size = values + groups * O;
    i64 of_x = POINTS * point_step(room, I), space = of_x + POINTS * point_step(room, O);
    i64 blocks = alone ? min64(threads, parts) : 1;
    cell *transforms = aligned_alloc(64, (blocks * space * sizeof(cell) + 63) / 64 * 64);
    i64 numbers = parts * size + padded(I) + O;
    float *sums = aligned_alloc(64, numbers * sizeof(float));
    if (!transforms || !sums) {
        free(transforms);
        free(sums);
        return -1;
    }
    k.room = room, k.zeros = sums + parts * size;
    /* Without tiles nothing else writes D. */
    for (i64 part = 0; part < parts; part++)
        for (i64 j = tiles ? values : 0; j < size; j++) sums[part * size + j] = 0;
    for (i64 j = parts * size; j < numbers; j++) sums[j] = 0;
#pragma omp parallel num_threads(threads)
    {
        begin_tiles();
#pragma omp for schedule(static)
        for (i64 part = 0; part < (alone ? parts : 0); part++) {
            cell *V = transforms + thread() * space, *U = V + of_x;
            float *D = sums + part * size;
            i64 begin = tiles * part / parts, end = tiles * (part + 1) / parts;
            for (i64 t = begin; t < end; t += room) {
                int count = (int)min64(room, end - t);
                transform_both(&k, t, count, V, U, D + values);
                place_t next = place_of(&k.grid, t + count);
                i64 fetched = 0, coming = min64(room, end - t - count);
                for (i64 j = 0; j < products; j++) {
                    for (; fetched < coming * (j + 1) / products; fetched++, advance(&k.grid, &next))
                        fetch_both(&k, next);
                    product_at(&k, j, count, V, U, D, t == begin);
                }
            }
        }
        for (i64 t = 0; t < (alone ? 0 : tiles); t += room) {
            cell *V = transforms, *U = V + of_x;
            int count = (int)min64(room, tiles - t);
#pragma omp for schedule(static)
            for (i64 j = 0; j < (count + GROUP - 1) / GROUP; j++) {
                i64 row = j * GROUP;
                transform_both(&k, t + row, (int)min64(GROUP, count - row), V + row * STRIP,
                               U + row * STRIP, sums + values + j * O);
            }
#pragma omp for schedule(static)
            for (i64 j = 0; j < products; j++) product_at(&k, j, count, V, U, sums, t == 0);
        }
        end_tiles();
#pragma omp for schedule(static)
        for (i64 j = 0; j < size; j++)
            for (i64 part = 1; part < parts; part++) sums[j] += sums[part * size + j];
#pragma omp for schedule(static)
        for (i64 first = 0; first < O; first += STRIP) transform_back(sums, O, I, first, dw);
    }
    memset(db, 0, O * sizeof(float));
    for (i64 j = 0; j < groups * O; j++) db[j % O] += sums[values + j];
    free(transforms);
    free(sums);
    return 0;
}
