/* Gradients of a 3 x 3 convolution with padding 1 of whose output only the 2 x 2 maxima went on.
 *
 * Of four values of the output's gradient three are zero then, and where ReLU or dropout cut a maximum,
 * so is the fourth. The sums over the others, as they stand,
 *
 *     dw[o, a, b] += g * x[r + a - 1, c + b - 1]        dx[r + a - 1, c + b - 1] += g * w[o, a, b]
 *
 * for each g of channel o at row r and column c, with all input channels, take 9 multiplications a
 * window and pair of channels, and fewer where g is zero. Winograd's take 16, and their transforms.
 *
 * LANES input channels are worked on at a time. x is N x H x W x I, I a multiple of LANES; g and `which`
 * are N x H/2 x W/2 x O, O a multiple of 16.
 */
#include "vectors.h"

#define TAPS 9
#define KERNEL (TAPS * LANES)
#if VEC == 16 || defined(__ARM_NEON)
#define GROUP 2 /* registers of a pixel at a time, so that those of 12 pixels are all there */
#else
#define GROUP 1
#endif
#define WINDOWS 32 /* of a block, at most: the bits of a word; its pixels stay in the innermost cache */
#define ROW ((2 * WINDOWS + 3) * LANES) /* from a row of its pixels to the next; no power of two */
#define FEW 8    /* parts of the images, with sums of their own, whatever the number of threads; */
#define PARTS 16 /* of many images so many */

typedef struct {
    i64 H, W, I, O, down, across; /* down x across windows */
} shape_t;

/* Windows of a block: whole rows, or a part of one. */
typedef struct {
    i64 top, left, high, wide;
} block_t;

static inline ivec load_ints(const void *p) { return *(const ivec *)p; }
static inline void store_ints(void *p, ivec v) { *(ivec *)p = v; }

/* The sign bits of a register's values. */
INLINE uint32_t signs(ivec v) {
#if VEC == 16
    return _mm512_movepi32_mask((__m512i)v);
#elif VEC == 8
    return (uint32_t)_mm256_movemask_ps((__m256)v);
#else
    uint32_t all = 0;
    for (int k = 0; k < VEC; k++) all |= (uint32_t)(v[k] < 0) << k;
    return all;
#endif
}

/* Copy LANES channels of the pixels that a block's windows touch; zeros outside of the image. */
static void copy_block(const float *x, const shape_t *s, const block_t *b, float *to) {
    i64 first = b->left == 0, last = min64(2 * b->wide + 2, s->W - 2 * b->left + 1);
    for (i64 r = 2 * b->top - 1; r < 2 * (b->top + b->high) + 1; r++, to += ROW) {
        if (r < 0 || r >= s->H) {
            memset(to, 0, (2 * b->wide + 2) * LANES * sizeof *to);
            continue;
        }
        const float *from = x + (r * s->W + 2 * b->left - 1) * s->I;
        if (first) memset(to, 0, LANES * sizeof *to);
        for (i64 c = first; c < last; c++)
            UNROLL for (int j = 0; j < LANES; j += VEC)
                store(to + c * LANES + j, load(from + c * s->I + j));
        if (last < 2 * b->wide + 2) memset(to + last * LANES, 0, LANES * sizeof *to);
    }
}

/* And back to dx; two rows and two columns belong to blocks before, too. */
static void copy_back(const float *pixels, const shape_t *s, const block_t *b, float *dx) {
    i64 first = b->left == 0, last = min64(2 * b->wide + 2, s->W - 2 * b->left + 1);
    for (i64 k = 0; k < 2 * b->high + 2; k++, pixels += ROW) {
        i64 r = 2 * b->top - 1 + k;
        if (r < 0 || r >= s->H) continue;
        float *to = dx + (r * s->W + 2 * b->left - 1) * s->I;
        for (i64 c = first; c < last; c++) {
            int more = (k < 2 && b->top) || (c < 2 && b->left);
            UNROLL for (int j = 0; j < LANES; j += VEC) {
                vec before = more ? load(to + c * s->I + j) : (vec){0};
                store(to + c * s->I + j, before + load(pixels + c * LANES + j));
            }
        }
    }
}

/* D (9 x LANES) += the sum of g times pixels over the windows whose bits are in `left`; each one's g, and
 * where its pixels are, lie `step` apart. */
static void add_to_kernel(uint32_t left, const float *g, const int32_t *at, i64 step, const float *pixels,
                          float *D) {
    for (int j = 0; j < REGS; j += GROUP, pixels += GROUP * VEC, D += GROUP * VEC) {
        vec sum[TAPS][GROUP];
        UNROLL for (int t = 0; t < TAPS; t++)
            UNROLL for (int v = 0; v < GROUP; v++) sum[t][v] = load(D + t * LANES + v * VEC);
        for (uint32_t rest = left; rest; rest &= rest - 1) {
            i64 k = __builtin_ctz(rest) * step;
            const float *p = pixels + at[k];
            vec factor = splat(g[k]);
            UNROLL for (int t = 0; t < TAPS; t++)
                UNROLL for (int v = 0; v < GROUP; v++)
                    sum[t][v] += factor * load(p + t / 3 * ROW + t % 3 * LANES + v * VEC);
        }
        UNROLL for (int t = 0; t < TAPS; t++)
            UNROLL for (int v = 0; v < GROUP; v++) store(D + t * LANES + v * VEC, sum[t][v]);
    }
}

/* 3 x 4 pixels of LANES channels += the sum of g times w (O x KERNEL) over the channels whose bits are in
 * `left`: first those whose maximum is at the left of the window, then, one pixel on, at its right. */
static void add_to_pixels(const uint32_t *left, i64 words, const float *g, const float *w, float *pixels) {
    for (int j = 0; j < REGS; j += GROUP, pixels += GROUP * VEC, w += GROUP * VEC) {
        vec sum[3][4][GROUP];
        UNROLL for (int r = 0; r < 3; r++)
            UNROLL for (int c = 0; c < 4; c++)
                UNROLL for (int v = 0; v < GROUP; v++)
                    sum[r][c][v] = load(pixels + r * ROW + c * LANES + v * VEC);
        UNROLL for (int side = 0; side < 2; side++)
            for (i64 k = 0; k < words; k++)
                for (uint32_t rest = left[side * words + k]; rest; rest &= rest - 1) {
                    i64 o = 32 * k + __builtin_ctz(rest);
                    const float *p = w + o * KERNEL;
                    vec factor = splat(g[o]);
                    UNROLL for (int t = 0; t < TAPS; t++)
                        UNROLL for (int v = 0; v < GROUP; v++)
                            sum[t / 3][side + t % 3][v] += factor * load(p + t * LANES + v * VEC);
                }
        UNROLL for (int r = 0; r < 3; r++)
            UNROLL for (int c = 0; c < 4; c++)
                UNROLL for (int v = 0; v < GROUP; v++)
                    store(pixels + r * ROW + c * LANES + v * VEC, sum[r][c][v]);
    }
}

/* Room for one thread. Of a block's gradients that are not zero: */
typedef struct {
    float *pixels;        /* copies of pixels of x or dx */
    int32_t *at;          /* WINDOWS x O, where the pixels begin that belong to a maximum */
    uint32_t *of_channel; /* O, which windows have one */
    uint32_t *of_place;   /* WINDOWS x 4 x words of O bits, which channels have one at a place */
} room_t;

static i64 words_of(i64 O) { return (O + 31) / 32; }

/* Find the gradients that are not zero. */
static void find(const float *g, const uint8_t *which, const block_t *b, i64 O, const room_t *to) {
    uint32_t *places = to->of_place;
    memset(to->of_channel, 0, O * sizeof *to->of_channel);
    memset(places, 0, b->high * b->wide * 4 * words_of(O) * sizeof *places);
    int32_t *at = to->at, window = 0;
    for (i64 r = 0; r < b->high; r++)
        for (i64 c = 0; c < b->wide; c++, window++, places += 4 * words_of(O)) {
            int32_t pixel = (int32_t)(2 * (r * ROW + c * LANES));
            for (i64 o = 0; o < O; o += VEC, g += VEC, which += VEC, at += VEC) {
                ivec some = load(g) != 0.0f, place = load_places(which);
                store_ints(to->of_channel + o,
                           load_ints(to->of_channel + o) | (some & ((ivec){0} + (int32_t)(1u << window))));
                store_ints(at, (place >> 1) * ROW + (place & 1) * LANES + pixel);
                uint32_t low = signs(place << 31), high = signs(place << 30), *word = places + o / 32;
                const uint32_t at_place[4] = {~high & ~low, ~high & low, high & ~low, high & low};
                UNROLL for (int k = 0; k < 4; k++)
                    word[k * words_of(O)] |= (signs(some) & at_place[k]) << o % 32;
            }
        }
}

/* Ask for part `k` of `parts` of so many values, which will be needed soon: while sums are in registers,
 * memory is idle. In line, as GCC leaves out calls of what only asks. */
INLINE void fetch(const float *from, i64 values, i64 k, i64 parts, int writes) {
    for (i64 j = values * k / parts / 16; j < values * (k + 1) / parts / 16; j++)
        if (writes) __builtin_prefetch(from + 16 * j, 1, 2);
        else __builtin_prefetch(from + 16 * j, 0, 2);
}

/* Gradients of an image: D (I/LANES x O x KERNEL), that of the kernel, is added to, dx (unless NULL) is
 * written; w is laid out as D. */
static void image_gradients(const float *x, const float *w, const float *g, const uint8_t *which,
                            const shape_t *s, const room_t *room, float *dx, float *D) {
    i64 columns = min64(s->across, WINDOWS), rows = WINDOWS / columns, words = words_of(s->O);
    i64 row = s->W * s->I;
    float *pixels = room->pixels;
    block_t b;
    for (b.top = 0; b.top < s->down; b.top += rows)
        for (b.left = 0; b.left < s->across; b.left += columns) {
            b.high = min64(rows, s->down - b.top), b.wide = min64(columns, s->across - b.left);
            i64 count = b.high * b.wide, first = (b.top * s->across + b.left) * s->O;
            i64 fresh = b.wide == s->across ? 2 * b.high * row : 0; /* pixels that are not of two blocks */
            find(g + first, which + first, &b, s->O, room);
            for (i64 i = 0; i < s->I; i += LANES) {
                float *kernels = D + i * s->O * TAPS;
                copy_block(x + i, s, &b, pixels);
                for (i64 o = 0; o < s->O; o++) {
                    if (!i) fetch(x + (2 * (b.top + b.high) + 1) * row, fresh, o, s->O, 0);
                    add_to_kernel(room->of_channel[o], g + first + o, room->at + o, s->O, pixels,
                                  kernels + o * KERNEL);
                }
                if (!dx) continue;
                memset(pixels, 0, (2 * b.high + 2) * ROW * sizeof *pixels);
                for (i64 k = 0; k < count; k++) {
                    if (!i) fetch(dx + (2 * b.top + 1) * row, fresh, k, count, 1);
                    if (!i) fetch(g + first + count * s->O, count * s->O, k, count, 0);
                    for (i64 half = 0; half < 2; half++)
                        add_to_pixels(room->of_place + (4 * k + 2 * half) * words, words,
                                      g + first + k * s->O, w + i * s->O * TAPS,
                                      pixels + (2 * (k / b.wide) + half) * ROW + 2 * (k % b.wide) * LANES);
                }
                copy_back(pixels, s, &b, dx + i);
            }
        }
}

/* The kernel w (O x I x 3 x 3) of output channel `o` as I/LANES x O x KERNEL. */
static void spread(const float *w, i64 I, i64 O, i64 o, float *out) {
    for (i64 i = 0; i < I; i++)
        for (i64 t = 0; t < TAPS; t++)
            out[(i / LANES * O + o) * KERNEL + t * LANES + i % LANES] = w[(o * I + i) * TAPS + t];
}

/* The other way round, of the sum of D over parts that lie `size` apart. */
static void gather(const float *D, i64 parts, i64 size, i64 I, i64 O, i64 o, float *dw) {
    for (i64 i = 0; i < I; i += LANES) {
        float sum[KERNEL];
        const float *from = D + (i * O + o * LANES) * TAPS;
        for (i64 t = 0; t < KERNEL; t += VEC) {
            vec v = load(from + t);
            for (i64 part = 1; part < parts; part++) v += load(from + part * size + t);
            store(sum + t, v);
        }
        for (i64 k = 0; k < LANES; k++)
            UNROLL for (int t = 0; t < TAPS; t++) dw[(o * I + i + k) * TAPS + t] = sum[t * LANES + k];
    }
}

/* Gradients of x (unless dx is NULL), of the kernel, dw (O x I x 3 x 3), and of the bias, db (O), from
 * the gradient g of the maxima, whose places are `which`. Returns 0, or -1 when memory is short. */
int normlab_conv3x3_pooled_gradients(const float *x, const float *w, const float *g, const uint8_t *which,
                                     i64 N, i64 H, i64 W, i64 I, i64 O, float *dx, float *dw, float *db,
                                     int threads) {
    shape_t s = {H, W, I, O, H / 2, W / 2};
    i64 kernel = O * I * TAPS, parts = max64(min64(N, FEW), min64(N / 4, PARTS)), size = kernel + O;
    i64 windows = s.down * s.across * O, rows = 2 * (WINDOWS / min64(s.across, WINDOWS)) + 2;
    i64 words = O + 4 * WINDOWS * words_of(O), own = rows * ROW + WINDOWS * O + (words + 15) / 16 * 16;
    i64 values = kernel + threads * own + parts * size;
    float *memory = aligned_alloc(64, (values * sizeof *memory + 63) / 64 * 64);
    if (!memory) return -1;
    float *kernels = memory, *sums = memory + kernel + threads * own;
#pragma omp parallel num_threads(threads)
    {
        float *mine = memory + kernel + thread() * own;
        int32_t *at = (int32_t *)(mine + rows * ROW);
        uint32_t *found = (uint32_t *)(at + WINDOWS * O);
        room_t room = {mine, at, found, found + O};
        if (dx) {
#pragma omp for schedule(static)
            for (i64 o = 0; o < O; o++) spread(w, I, O, o, kernels);
        }
#pragma omp for schedule(static)
        for (i64 part = 0; part < parts; part++) {
            float *D = sums + part * size, *bias = D + kernel;
            memset(D, 0, size * sizeof *D);
            for (i64 n = N * part / parts; n < N * (part + 1) / parts; n++) {
                const float *from = g + n * windows;
                i64 image = n * H * W * I;
                for (i64 k = 0; k < windows; k += O)
                    for (i64 o = 0; o < O; o++) bias[o] += from[k + o];
                image_gradients(x + image, kernels, from, which + n * windows, &s, &room,
                                dx ? dx + image : NULL, D);
            }
        }
#pragma omp for schedule(static)
        for (i64 o = 0; o < O; o++) {
            gather(sums, parts, size, I, O, o, dw);
            db[o] = sums[kernel + o];
            for (i64 part = 1; part < parts; part++) db[o] += sums[part * size + kernel + o];
        }
    }
    free(memory);
    return 0;
}
