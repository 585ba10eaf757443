/* Passes over memory that PyTorch makes one by one, made together.
 *
 * Plain C on float32, called through ctypes; no Python or torch headers. It is compiled once for
 * each instruction set (see setup.py) and knows only the width of a vector register.
 *
 * Layout: activations are N x C x S, row-major. Channels-last images and dense activations are the
 * matrix case, S = 1 and N = number of pixels; contiguous images have S = H*W.
 *
 * Determinism: work is cut into items that depend on the shape alone, and their results are merged
 * in order. The bits do not depend on the number of threads.
 */
#include <math.h>

#include "bfloat16.h"
#include "vectors.h"

#if defined(BFLOAT16) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define BLOCK 64          /* rows summed in float, in cache, before they join the double sums */
#define STRIP 128         /* channels of one work item */
#define CHUNKS 32         /* at most so many work items along the rows */
#define FOLD 512          /* elementwise passes run over rows of at least so many values */
#define WIDE 1024         /* of a longer row they take a part at a time, for all rows, */
#define NEAR (1 << 18)    /* where there are at most so many values, 1 MiB, and memory is no limit */
#define PIECE (1 << 12)   /* values of one work item of a pass without channels */
#define DRAWN (1 << 9)    /* values whose draws are made at a time */
#define SMALL (1 << 15)   /* values: up to here a second thread costs more time than it saves */
#define LARGE (1 << 22)   /* values, 16 MiB: outputs from here on are streamed past the caches */

#define FAR (1 << 18)     /* values of a parameter: from here on no cache holds it for a step */
#if defined(__aarch64__)
#define FLUSH (1u << 24)  /* of FPCR: denormals that are read, and that are written */
#else
#define FLUSH 0x8040u     /* the same of MXCSR */
#endif
#define FETCHED 256       /* values: so far before it is read, it is asked for */

#define SIMD _Pragma("omp simd") /* GCC need not ask whether the vectors overlap */
#define EACH_REG _Pragma("GCC unroll 8") for (int k = 0; k < REGS; k++)

/* What dropout does: value i of a batch, whose values begin at `first`, is dropped where its draw,
 * 16 bits of word (first + i) / 4 of the words that belong to `key`, is below `threshold`; the others
 * are multiplied by `scale`. With a threshold of 0 nothing is done. */
typedef struct {
    uint64_t key;
    i64 first;
    int32_t threshold;
    float scale;
} drops_t;

/* `count` draws from draw `first` of `key` on: SplitMix64 (Steele, Lea and Flood 2014, figure 14),
 * whose words are functions of their place, so that any thread, or process, can make its own. */
static const uint16_t *draw(uint64_t key, i64 first, i64 count, uint16_t *draws) {
    typedef uint64_t __attribute__((may_alias)) word_t;
    word_t *words = (word_t *)draws;
    uint64_t base = key + (uint64_t)(first / 4 + 1) * 0x9e3779b97f4a7c15u;
    i64 size = (first % 4 + count + 3) / 4;
    SIMD
    for (i64 i = 0; i < size; i++) {
        uint64_t z = base + (uint64_t)i * 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        words[i] = z ^ z >> 31;
    }
    return draws + first % 4;
}

/* ReLU, then dropout with those draws, or without: h = max(z, 0) * (draw >= threshold ? scale : 0).
 * Arithmetic, not selection, so that NaN and infinity stay visible. */
static void relu_drop(const float *z, const uint16_t *draws, int32_t threshold, float scale,
                      float *h, i64 size) {
    i64 i = 0;
    for (; i + VEC <= size; i += VEC) {
        vec v = load(z + i);
        v = (vec)((ivec)v & ~(v <= 0.0f));
        if (draws) {
            ivec drawn = __builtin_convertvector(*(const hvec *)(draws + i), ivec);
            v *= (vec)((ivec)splat(scale) & (drawn >= threshold));
        }
        store(h + i, v);
    }
    for (; i < size; i++) {
        float v = z[i] <= 0.0f ? 0.0f : z[i];
        h[i] = draws ? v * (draws[i] >= threshold ? scale : 0.0f) : v;
    }
}

/* The same of values `at` to `at` + size of a batch, whose draws are made here. */
static void relu_dropout(const float *z, const drops_t *drops, i64 at, float *h, i64 size) {
    uint16_t words[DRAWN + 4] __attribute__((aligned(64)));
    if (!drops->threshold) relu_drop(z, NULL, 0, 1.0f, h, size);
    else
        for (i64 i = 0; i < size; i += DRAWN) {
            i64 count = min64(DRAWN, size - i);
            const uint16_t *draws = draw(drops->key, drops->first + at + i, count, words);
            relu_drop(z + i, draws, drops->threshold, drops->scale, h + i, count);
        }
}

/* g where ReLU of y let pass, else 0: where its gradient goes. */
static inline vec passed(vec g, vec y) { return (vec)((ivec)g & ~(y <= 0.0f)); }

/* Mean and sum of squared deviations of `count` values, mergeable (Chan, Golub, LeVeque 1979). */
typedef struct {
    double mean[LANES], m2[LANES];
} lanes_t;

static inline void merge(double *mean, double *m2, double count, double mean_b, double m2_b,
                         double count_b) {
    double weight = count_b / (count + count_b), delta = mean_b - *mean;
    *mean += delta * weight;
    *m2 += m2_b + delta * delta * count * weight;
}

/* Moments of LANES columns over at most BLOCK rows, joined to those of `count` earlier rows.
 * Values are taken relative to the first: a constant column has exactly its value as mean and 0 as
 * variance. Two passes, the second in cache: nothing cancels. */
static void block_moments(const float *x, i64 stride, int rows, double count, lanes_t *acc) {
    vec first[REGS], sum[REGS], squares[REGS];
    EACH_REG { first[k] = load(x + k * VEC); sum[k] = squares[k] = (vec){0}; }
    for (int r = 1; r < rows; r++)
        EACH_REG sum[k] += load(x + r * stride + k * VEC) - first[k];
    EACH_REG sum[k] /= (float)rows;
    for (int r = 0; r < rows; r++)
        EACH_REG {
            vec d = load(x + r * stride + k * VEC) - first[k] - sum[k];
            squares[k] += d * d;
        }
    double weight = rows / (count + rows);
    const float *f = (const float *)first, *s = (const float *)sum, *q = (const float *)squares;
    for (int j = 0; j < LANES; j++) {
        double delta = (double)f[j] + s[j] - acc->mean[j];
        acc->mean[j] += delta * weight;
        acc->m2[j] += q[j] + delta * delta * count * weight;
    }
}

/* Sums of g and of g*(x - mean) of LANES columns over at most BLOCK rows. With `slope`, g counts
 * where ReLU let pass. */
static void block_sums(const float *x, const float *g, i64 stride, int rows, const float *mean,
                       const float *slope, const float *shift, lanes_t *acc) {
    vec center[REGS], a[REGS], b[REGS], sum[REGS], product[REGS];
    EACH_REG {
        center[k] = load(mean + k * VEC);
        if (slope) { a[k] = load(slope + k * VEC); b[k] = load(shift + k * VEC); }
        sum[k] = product[k] = (vec){0};
    }
    for (int r = 0; r < rows; r++)
        EACH_REG {
            vec gr = load(g + r * stride + k * VEC);
            vec d = load(x + r * stride + k * VEC) - center[k];
            if (slope) gr = passed(gr, d * a[k] + b[k]);
            sum[k] += gr;
            product[k] += gr * d;
        }
    const float *s = (const float *)sum, *p = (const float *)product;
    for (int j = 0; j < LANES; j++) { acc->mean[j] += s[j]; acc->m2[j] += p[j]; }
}

/* Copy a block narrower than LANES into `pack`, filled up with zeros, so that vectors can read it. */
static const float *packed(const float *x, i64 stride, int rows, int width, float *pack) {
    for (int r = 0; r < rows; r++) {
        memcpy(pack + r * LANES, x + r * stride, width * sizeof(float));
        memset(pack + r * LANES + width, 0, (LANES - width) * sizeof(float));
    }
    return pack;
}

/* What a reduction reads. With `z`, `x` is written first: x = relu_dropout(z). With `g`, sums are
 * taken instead of moments; with `slope` (S = 1), g went through the ReLU of (x - mean)*slope + shift. */
typedef struct {
    float *x;
    const float *z, *g, *mean, *slope, *shift;
    drops_t drops;
} source_t;

/* Reduce rows [row, end) of columns [left, right) of a matrix `columns` wide into out0 and out1. */
static void reduce_item(const source_t *s, i64 columns, i64 row, i64 end, i64 left, i64 right,
                        double *out0, double *out1) {
    lanes_t acc[STRIP / LANES];
    float pack_x[BLOCK * LANES], pack_g[BLOCK * LANES], pack_vectors[3][LANES] = {{0}};
    memset(acc, 0, sizeof acc);
    for (i64 r = row; r < end; r += BLOCK) {
        int rows = (int)min64(BLOCK, end - r);
        if (s->z) {
            int whole = left == 0 && right == columns;
            for (int i = 0; i < (whole ? 1 : rows); i++) {
                i64 at = (r + i) * columns + left;
                i64 size = whole ? rows * columns : right - left;
                relu_dropout(s->z + at, &s->drops, at, s->x + at, size);
            }
        }
        for (i64 c = left; c < right; c += LANES) {
            lanes_t *a = &acc[(c - left) / LANES];
            const float *x = s->x + r * columns + c, *g = s->g ? s->g + r * columns + c : NULL;
            const float *mean = s->mean ? s->mean + c : NULL;
            const float *slope = s->slope ? s->slope + c : NULL, *shift = slope ? s->shift + c : NULL;
            int width = (int)min64(LANES, right - c);
            i64 stride = columns;
            if (width < LANES) {
                x = packed(x, stride, rows, width, pack_x);
                if (g) {
                    g = packed(g, stride, rows, width, pack_g);
                    mean = memcpy(pack_vectors[0], mean, width * sizeof(float));
                    if (slope) {
                        slope = memcpy(pack_vectors[1], slope, width * sizeof(float));
                        shift = memcpy(pack_vectors[2], shift, width * sizeof(float));
                    }
                }
                stride = LANES;
            }
            if (g) block_sums(x, g, stride, rows, mean, slope, shift, a);
            else block_moments(x, stride, rows, (double)(r - row), a);
        }
    }
    for (i64 c = left; c < right; c++) {
        out0[c] = acc[(c - left) / LANES].mean[(c - left) % LANES];
        out1[c] = acc[(c - left) / LANES].m2[(c - left) % LANES];
    }
}

/* Join partial results `parts` x C, each over counts[p] values, into those of part 0. */
static void join(double *a, double *b, const i64 *counts, i64 parts, i64 C, int sums) {
    double count = (double)counts[0];
    for (i64 p = 1; p < parts; p++) {
        for (i64 c = 0; c < C; c++) {
            if (sums) { a[c] += a[p * C + c]; b[c] += b[p * C + c]; }
            else merge(&a[c], &b[c], count, a[p * C + c], b[p * C + c], (double)counts[p]);
        }
        count += (double)counts[p];
    }
}

/* Repeat the first C values of each of `count` vectors of fold*C values. */
static void repeat(float *vectors, int count, i64 C, i64 fold) {
    for (int v = 0; v < count; v++)
        for (i64 f = 1; f < fold; f++)
            memcpy(vectors + (v * fold + f) * C, vectors + v * fold * C, C * sizeof(float));
}

/* The matrix case. Few channels are folded: `fold` rows are read as one long row, whose parts are
 * joined at the end. Returns 0, or -1 when memory is short. */
static int reduce_matrix(const source_t *s, i64 N, i64 C, double *out0, double *out1, int threads) {
    i64 fold = 1;
    while (C < LANES && fold * C % LANES && fold < LANES) fold *= 2;
    i64 columns = fold * C, rows = N / fold, rest = N - rows * fold;
    i64 step = max64((rows + CHUNKS - 1) / CHUNKS, 4 * BLOCK);
    i64 chunks = (rows + step - 1) / step, strips = (columns + STRIP - 1) / STRIP;
    i64 parts = chunks * fold + (rest > 0);
    double *a = malloc(2 * parts * C * sizeof(double) + parts * sizeof(i64)), *b = a + parts * C;
    if (!a) return -1;
    i64 *counts = (i64 *)(b + parts * C);
    source_t wide = *s;
    float *vectors = NULL;
    if (s->g) {
        if (!(vectors = malloc(3 * columns * sizeof(float)))) { free(a); return -1; }
        const float *from[] = {s->mean, s->slope, s->shift};
        int count = s->slope ? 3 : 1;
        for (int v = 0; v < count; v++) memcpy(vectors + v * columns, from[v], C * sizeof(float));
        repeat(vectors, count, C, fold);
        wide.mean = vectors;
        if (s->slope) { wide.slope = vectors + columns; wide.shift = vectors + 2 * columns; }
    }
    PARALLEL_FOR
    for (i64 item = 0; item < chunks * strips; item++) {
        i64 chunk = item / strips, left = item % strips * STRIP;
        reduce_item(&wide, columns, chunk * step, min64(rows, (chunk + 1) * step), left,
                    min64(columns, left + STRIP), a + chunk * columns, b + chunk * columns);
    }
    for (i64 p = 0; p < chunks * fold; p++) counts[p] = min64(step, rows - p / fold * step);
    if (rest) {
        i64 p = parts - 1;
        reduce_item(&wide, C, rows * fold, N, 0, C, a + p * C, b + p * C);
        counts[p] = rest;
    }
    join(a, b, counts, parts, C, s->g != NULL);
    memcpy(out0, a, C * sizeof(double));
    memcpy(out1, b, C * sizeof(double));
    free(vectors);
    free(a);
    return 0;
}

/* Moments, or sums, of one plane of S contiguous values: lanes first, then across them. */
static void reduce_plane(const float *x, const float *g, float mean, i64 S, double *out0,
                         double *out1) {
    lanes_t acc;
    float means[LANES];
    memset(&acc, 0, sizeof acc);
    for (int j = 0; j < LANES; j++) means[j] = mean;
    i64 rows = S / LANES;
    for (i64 r = 0; r < rows; r += BLOCK) {
        int n = (int)min64(BLOCK, rows - r);
        if (g) block_sums(x + r * LANES, g + r * LANES, LANES, n, means, NULL, NULL, &acc);
        else block_moments(x + r * LANES, LANES, n, (double)r, &acc);
    }
    double a = 0, b = 0;
    if (g) {
        for (int j = 0; j < LANES; j++) { a += acc.mean[j]; b += acc.m2[j]; }
        for (i64 i = rows * LANES; i < S; i++) { a += g[i]; b += g[i] * (double)(x[i] - mean); }
    } else {
        for (int j = 0; rows && j < LANES; j++) a += acc.mean[j] - acc.mean[0];
        a = acc.mean[0] + a / LANES;
        for (int j = 0; rows && j < LANES; j++) {
            double d = acc.mean[j] - a;
            b += acc.m2[j] + d * d * rows;
        }
        for (i64 i = rows * LANES; i < S; i++) {
            if (i == 0) a = x[0];
            else merge(&a, &b, (double)i, x[i], 0.0, 1.0);
        }
    }
    *out0 = a;
    *out1 = b;
}

static int reduce(const source_t *s, i64 N, i64 C, i64 S, double *out0, double *out1, int threads) {
    if (S == 1) return reduce_matrix(s, N, C, out0, out1, threads);
    double *a = malloc(2 * N * C * sizeof(double) + N * sizeof(i64)), *b = a + N * C;
    if (!a) return -1;
    i64 *counts = (i64 *)(b + N * C);
    for (i64 n = 0; n < N; n++) counts[n] = S;
    PARALLEL_FOR
    for (i64 p = 0; p < N * C; p++)
        reduce_plane(s->x + p * S, s->g ? s->g + p * S : NULL, s->mean ? s->mean[p % C] : 0.0f, S,
                     a + p, b + p);
    join(a, b, counts, N, C, s->g != NULL);
    memcpy(out0, a, C * sizeof(double));
    memcpy(out1, b, C * sizeof(double));
    free(a);
    return 0;
}

/* Whether rows of `columns` values of an output of `size` are to be streamed past the caches. */
static int streams(const float *y, i64 columns, i64 size) {
    return size >= LARGE && size % VEC == 0 && columns % VEC == 0 &&
           (uintptr_t)y % sizeof(vec) == 0;
}

/* Where ReLU is taken of what is normalised. */
enum { NO_RELU, RELU_AFTER, RELU_BEFORE };

/* y = (x - mean)*a + b, value by value, or ReLU of it, or the same of ReLU of x. */
static void affine_row(const float *x, const float *mean, const float *a, const float *b, int relu,
                       float *y, i64 size, int past) {
    i64 i = 0;
    for (; i + VEC <= size; i += VEC) {
        vec v = load(x + i);
        if (relu == RELU_BEFORE) v = passed(v, v);
        v = (v - load(mean + i)) * load(a + i) + load(b + i);
        if (relu == RELU_AFTER) v = passed(v, v);
        if (past) stream(y + i, v);
        else store(y + i, v);
    }
    if (past) fence();
    for (; i < size; i++) {
        float v = relu == RELU_BEFORE && x[i] <= 0.0f ? 0.0f : x[i];
        v = (v - mean[i]) * a[i] + b[i];
        y[i] = relu == RELU_AFTER && v <= 0.0f ? 0.0f : v;
    }
}

static void affine_plane(const float *x, float mean, float a, float b, float *y, i64 size) {
    for (i64 i = 0; i < size; i++) y[i] = (x[i] - mean) * a + b;
}

/* What the gradient of a value depends on beside x and g:
 *     dx = a*g - b*(x - mean) - c
 * With keep_scale > 0 it goes on through dropout and ReLU, which let pass exactly where x, their
 * output, is not 0. With `slope`, g comes through the ReLU of (x - mean)*slope + shift. */
typedef struct {
    float *mean, *a, *b, *c, *slope, *shift;
    float keep_scale;
} gradient_t;

static void gradient_row(const gradient_t *v, i64 left, const float *x, const float *g, float *dx,
                         i64 size, int past) {
    const float *mean = v->mean + left, *a = v->a + left, *b = v->b + left, *c = v->c + left;
    const float *slope = v->slope ? v->slope + left : NULL, *shift = slope ? v->shift + left : NULL;
    float keep = v->keep_scale;
    i64 i = 0;
    for (; i + VEC <= size; i += VEC) {
        vec xi = load(x + i), gi = load(g + i), d = xi - load(mean + i);
        if (slope) gi = passed(gi, d * load(slope + i) + load(shift + i));
        d = load(a + i) * gi - load(b + i) * d - load(c + i);
        if (keep > 0) d = (vec)((ivec)(d * keep) & (xi != 0.0f));
        if (past) stream(dx + i, d);
        else store(dx + i, d);
    }
    if (past) fence();
    for (; i < size; i++) {
        float d = x[i] - mean[i], gi = slope && d * slope[i] + shift[i] <= 0.0f ? 0.0f : g[i];
        d = a[i] * gi - b[i] * d - c[i];
        dx[i] = keep <= 0 ? d : x[i] != 0.0f ? d * keep : 0.0f;
    }
}

static void gradient_plane(const float *x, const float *g, float mean, float a, float b, float c,
                           float *dx, i64 size) {
    for (i64 i = 0; i < size; i++) dx[i] = a * g[i] - b * (x[i] - mean) - c;
}

/* How an elementwise pass goes over N x C values: in rows of so many columns that a register and more
 * are full, C values `fold` times side by side; wide rows in equal parts, so that the vectors that
 * every row needs stay in the nearest cache. */
typedef struct {
    i64 fold, columns, rows, width, items, size;
} rows_t;

static rows_t rows_of(i64 N, i64 C, i64 S) {
    i64 fold = S > 1 ? 1 : max64(1, FOLD / C), columns = fold * C, rows = (N + fold - 1) / fold;
    i64 parts = N * C > NEAR ? 1 : (columns + WIDE - 1) / WIDE;
    i64 width = ((columns + parts - 1) / parts + VEC - 1) / VEC * VEC;
    return (rows_t){fold, columns, rows, width, (columns + width - 1) / width * rows, N * C};
}

/* Where `item` begins, in its row and among all values; returns how many it has. */
static inline i64 item_of(const rows_t *s, i64 item, i64 *left, i64 *at) {
    *left = item / s->rows * s->width;
    *at = item % s->rows * s->columns + *left;
    return min64(min64(s->width, s->columns - *left), s->size - *at);
}

/* a and b of y = (x - mean)*a + b; weight and bias may be NULL. */
static void affine_of(const float *var, const float *weight, const float *bias, float eps, i64 C,
                      float *a, float *b) {
    SIMD
    for (i64 c = 0; c < C; c++) {
        a[c] = (weight ? weight[c] : 1.0f) / sqrtf(var[c] + eps);
        b[c] = bias ? bias[c] : 0.0f;
    }
}

/* ---- What Python calls. Every function returns 0, or -1 when memory is short. Those of twenty
 * arguments get them as one struct, which costs Python much less. ---- */

/* y = weight*(x - mean)/sqrt(var + eps) + bias, with ReLU (S = 1) where `relu` says; weight and bias
 * may be NULL. */
int normlab_normalize(const float *x, const float *mean, const float *var, const float *weight,
                      const float *bias, float eps, i64 N, i64 C, i64 S, int relu, float *y,
                      int threads) {
    rows_t rows = rows_of(N, C, S);
    float *center = malloc(3 * rows.columns * sizeof(float));
    float *a = center + rows.columns, *b = a + rows.columns;
    if (!center) return -1;
    if (N * C * S <= SMALL) threads = 1;
    memcpy(center, mean, C * sizeof(float));
    affine_of(var, weight, bias, eps, C, a, b);
    if (S > 1) {
        PARALLEL_FOR
        for (i64 p = 0; p < N * C; p++) {
            i64 c = p % C;
            affine_plane(x + p * S, center[c], a[c], b[c], y + p * S, S);
        }
    } else {
        repeat(center, 3, C, rows.fold);
        int past = streams(y, rows.columns, N * C);
        PARALLEL_FOR
        for (i64 item = 0; item < rows.items; item++) {
            i64 left, at, size = item_of(&rows, item, &left, &at);
            affine_row(x + at, center + left, a + left, b + left, relu, y + at, size, past);
        }
    }
    free(center);
    return 0;
}

/* Which signatures these are: a library of another number, from an older build, is not used. */
int normlab_interface(void) { return 13; }

/* Whether convolutions with products of bfloat16 are here and run on this processor. */
int normlab_bfloat16(void) {
#ifdef BFLOAT16
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 0;
#endif
}

/* The same with products in AMX's tiles. Linux gives their registers only to a process that has asked. */
int normlab_amx(void) {
#if defined(EMULATED)
    return normlab_bfloat16();
#elif defined(BFLOAT16) && defined(__linux__)
    enum { REQUEST = 0x1023, TILES = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    static int asked, given;
    if (!asked++)
        given = normlab_bfloat16() && __builtin_cpu_supports("amx-tile") &&
                __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
    return given;
#else
    return 0;
#endif
}

/* Whether denormals are taken for zero, in each of the threads: those that are there already keep what
 * they had when they began. */
int normlab_flush(int on, int threads) {
#if defined(__SSE__)
#pragma omp parallel num_threads(threads)
    _mm_setcsr(on ? _mm_getcsr() | FLUSH : _mm_getcsr() & ~FLUSH);
#elif defined(__aarch64__)
#pragma omp parallel num_threads(threads)
    {
        uint64_t control;
        __asm__ volatile("mrs %0, fpcr" : "=r"(control));
        control = on ? control | FLUSH : control & ~(uint64_t)FLUSH;
        __asm__ volatile("msr fpcr, %0" : : "r"(control));
    }
#else
    (void)on, (void)threads;
#endif
    return 0;
}

/* Batch normalisation in training, of x, N x C x S, into y:
 *     mean, var = moments of x, var biased
 *     y = weight*(x - mean)/sqrt(var + eps) + bias, or with `relu` (S = 1) ReLU of it
 *     running = keep*running + (1 - keep)*batch, the batch's variance times correction
 * With z (S = 1), x = relu_dropout(z) is written first. weight, bias and running_* may be NULL. */
typedef struct {
    float *x;
    const float *z;
    drops_t drops;
    const float *weight, *bias;
    float eps;
    i64 N, C, S;
    int relu;
    float *running_mean, *running_var;
    double keep, correction;
    i64 *batches;
    float *mean, *var, *y;
    int threads;
} forward_t;

int normlab_forward(const forward_t *f) {
    float *mean = f->mean, *var = f->var, *running_mean = f->running_mean;
    float *running_var = f->running_var;
    i64 N = f->N, C = f->C, S = f->S;
    source_t s = {.x = f->x, .z = f->z, .drops = f->drops};
    double *m = malloc(2 * C * sizeof(double)), keep = f->keep, correction = f->correction;
    if (!m) return -1;
    int failed = reduce(&s, N, C, S, m, m + C, N * C * S <= SMALL ? 1 : f->threads);
    for (i64 c = 0; !failed && c < C; c++) {
        mean[c] = (float)m[c];
        var[c] = (float)(m[C + c] / ((double)N * S));
        if (!running_mean) continue;
        running_mean[c] += (float)((1 - keep) * ((double)mean[c] - running_mean[c]));
        running_var[c] += (float)((1 - keep) * (var[c] * correction - running_var[c]));
    }
    if (!failed && f->batches) ++*f->batches;
    free(m);
    if (failed) return -1;
    return normlab_normalize(f->x, mean, var, f->weight, f->bias, f->eps, N, C, S, f->relu, f->y,
                             f->threads);
}

/* h = relu_dropout(z), with nothing behind it. */
int normlab_relu_dropout(const float *z, uint64_t key, i64 first, int32_t threshold, float scale,
                         i64 size, float *h, int threads) {
    drops_t drops = {key, first, threshold, scale};
    PARALLEL_FOR
    for (i64 at = 0; at < size; at += PIECE)
        relu_dropout(z + at, &drops, at, h + at, min64(PIECE, size - at));
    return 0;
}

/* Its gradient, dz = scale*g where h is not 0, from g = dL/dh. */
int normlab_relu_dropout_gradient(const float *h, const float *g, float scale, i64 size, float *dz,
                                  int threads) {
    PARALLEL_FOR
    for (i64 at = 0; at < size; at += PIECE)
        for (i64 i = at; i < min64(at + PIECE, size); i++) dz[i] = h[i] != 0.0f ? g[i] * scale : 0.0f;
    return 0;
}

/* The gradient of normlab_forward, from g = dL/dy:
 *     bias_grad   = sum g
 *     weight_grad = sum g*x_hat
 *     dx = weight/(M*sigma) * (M*g - sum g - x_hat * sum g*x_hat)
 * dx may be NULL. With keep_scale > 0 (S = 1) dx goes on through dropout and ReLU, whose output
 * x is. With `relu` (S = 1) g = dL/dy comes through the ReLU of y. */
typedef struct {
    const float *x, *g, *mean, *var, *weight, *bias;
    float eps;
    int relu;
    float keep_scale;
    i64 N, C, S;
    float *dx, *weight_grad, *bias_grad;
    int threads;
} backward_t;

/* With `sums`, which hold sum g and sum g*(x - mean) of a larger batch, M = `count` is its size and dx
 * is that batch's; else both are those of x, and `own` (2C) gets the sums. */
static int gradient(const backward_t *f, const double *sums, double *own, double count) {
    const float *x = f->x, *g = f->g, *mean = f->mean, *var = f->var, *weight = f->weight;
    float *dx = f->dx, *weight_grad = f->weight_grad, *bias_grad = f->bias_grad, eps = f->eps;
    i64 N = f->N, C = f->C, S = f->S;
    int relu = f->relu, threads = N * C * S <= SMALL ? 1 : f->threads;
    rows_t rows = rows_of(N, C, S);
    i64 columns = rows.columns;
    double per_value = 1.0 / count;
    float *vectors = malloc(6 * columns * sizeof(float));
    if (!vectors) return -1;
    gradient_t v = {vectors, vectors + columns, vectors + 2 * columns, vectors + 3 * columns,
                    relu ? vectors + 4 * columns : NULL, vectors + 5 * columns, f->keep_scale};
    if (relu) affine_of(var, weight, f->bias, eps, C, v.slope, v.shift);
    source_t s = {.x = (float *)x, .g = g, .mean = mean, .slope = v.slope, .shift = v.shift};
    int failed = sums ? 0 : reduce(&s, N, C, S, own, own + C, threads);
    if (!sums) sums = own;
    SIMD
    for (i64 c = 0; c < (failed ? 0 : C); c++) {
        double r = 1.0 / sqrt((double)var[c] + eps), gamma = weight ? weight[c] : 1.0;
        if (bias_grad) {
            bias_grad[c] = (float)sums[c];
            weight_grad[c] = (float)(sums[C + c] * r);
        }
        v.mean[c] = mean[c];
        v.a[c] = (float)(gamma * r);
        v.b[c] = (float)(gamma * r * r * r * sums[C + c] * per_value);
        v.c[c] = (float)(gamma * r * sums[c] * per_value);
    }
    if (!failed && dx && S > 1) {
        PARALLEL_FOR
        for (i64 p = 0; p < N * C; p++) {
            i64 c = p % C;
            gradient_plane(x + p * S, g + p * S, v.mean[c], v.a[c], v.b[c], v.c[c], dx + p * S, S);
        }
    } else if (!failed && dx) {
        repeat(vectors, relu ? 6 : 4, C, rows.fold);
        int past = streams(dx, columns, N * C);
        PARALLEL_FOR
        for (i64 item = 0; item < rows.items; item++) {
            i64 left, at, size = item_of(&rows, item, &left, &at);
            gradient_row(&v, left, x + at, g + at, dx + at, size, past);
        }
    }
    free(vectors);
    return failed ? -1 : 0;
}

int normlab_gradient(const backward_t *f) {
    double *sums = malloc(2 * f->C * sizeof(double));
    int failed = sums ? gradient(f, NULL, sums, (double)f->N * f->S) : -1;
    free(sums);
    return failed;
}

/* ---- Where a batch lies in parts with several processes: these passes end where a message is due,
 * and go on from what it brought. ---- */

/* mean and m2 (C, double): the mean and the sum of squared deviations of x. With z (S = 1),
 * x = relu_dropout(z) is written first. */
int normlab_moments(float *x, const float *z, uint64_t key, i64 first, int32_t threshold,
                    float scale, i64 N, i64 C, i64 S, double *mean, double *m2, int threads) {
    source_t s = {.x = x, .z = z, .drops = {key, first, threshold, scale}};
    return reduce(&s, N, C, S, mean, m2, N * C * S <= SMALL ? 1 : threads);
}

/* sums (2C): sum g and sum g*(x - mean), and from them the gradients of weight and bias. */
int normlab_part_sums(const float *x, const float *g, const float *mean, const float *var,
                      const float *weight, const float *bias, float eps, int relu, i64 N, i64 C,
                      i64 S, double *sums, float *weight_grad, float *bias_grad, int threads) {
    backward_t f = {.x = x, .g = g, .mean = mean, .var = var, .weight = weight, .bias = bias,
                    .eps = eps, .relu = relu, .N = N, .C = C, .S = S, .weight_grad = weight_grad,
                    .bias_grad = bias_grad, .threads = threads};
    return gradient(&f, NULL, sums, 1.0);
}

/* dx of this part, from the sums over all `count` values a channel. */
int normlab_part_gradient(const float *x, const float *g, const float *mean, const float *var,
                          const float *weight, const float *bias, float eps, int relu,
                          float keep_scale, i64 N, i64 C, i64 S, const double *sums, double count,
                          float *dx, int threads) {
    backward_t f = {.x = x, .g = g, .mean = mean, .var = var, .weight = weight, .bias = bias,
                    .eps = eps, .relu = relu, .keep_scale = keep_scale, .N = N, .C = C, .S = S,
                    .dx = dx, .threads = threads};
    return gradient(&f, sums, NULL, count);
}

/* One row of 2 x 2 windows: y = their maxima, which = position (0 to 3) of the first maximum, or
 * of the last NaN, as PyTorch chooses. */
static void pool_row(const float *top, const float *bottom, i64 windows, i64 C, float *y,
                     uint8_t *which) {
    for (i64 w = 0; w < windows; w++) {
        const float *corner[4] = {top + 2 * w * C, top + (2 * w + 1) * C, bottom + 2 * w * C,
                                  bottom + (2 * w + 1) * C};
        i64 c = 0;
        for (; c + VEC <= C; c += VEC) {
            vec v[4];
            ivec at;
            for (int k = 0; k < 4; k++) v[k] = load(corner[k] + c);
            store(y + w * C + c, maximum(v, &at));
            store_places(which + w * C + c, at);
        }
        for (; c < C; c++) {
            int at = 0;
            for (int k = 1; k < 4; k++) {
                float v = corner[k][c];
                if (v > corner[at][c] || v != v) at = k;
            }
            y[w * C + c] = corner[at][c];
            which[w * C + c] = (uint8_t)at;
        }
    }
}

static void pool_row_gradient(const float *g, const uint8_t *which, i64 windows, i64 C, float *top,
                              float *bottom) {
    for (i64 w = 0; w < windows; w++) {
        float *corner[4] = {top + 2 * w * C, top + (2 * w + 1) * C, bottom + 2 * w * C,
                            bottom + (2 * w + 1) * C};
        i64 c = 0;
        for (; c + VEC <= C; c += VEC) {
            ivec gv = (ivec)load(g + w * C + c);
            ivec at = load_places(which + w * C + c);
            for (int k = 0; k < 4; k++) store(corner[k] + c, (vec)(gv & (at == k)));
        }
        for (; c < C; c++)
            for (int k = 0; k < 4; k++)
                corner[k][c] = which[w * C + c] == k ? g[w * C + c] : 0.0f;
    }
}

/* 2 x 2 maxima of x, N x H x W x C; an odd last row or column is left out. */
int normlab_pool(const float *x, i64 N, i64 H, i64 W, i64 C, float *y, uint8_t *which,
                 int threads) {
    i64 h = H / 2, w = W / 2;
    PARALLEL_FOR
    for (i64 r = 0; r < N * h; r++) {
        const float *top = x + (r / h * H + r % h * 2) * W * C;
        pool_row(top, top + W * C, w, C, y + r * w * C, which + r * w * C);
    }
    return 0;
}

int normlab_pool_gradient(const float *g, const uint8_t *which, i64 N, i64 H, i64 W, i64 C,
                          float *dx, int threads) {
    i64 h = H / 2, w = W / 2, line = W * C;
    PARALLEL_FOR
    for (i64 r = 0; r < N * h; r++) {
        float *top = dx + (r / h * H + r % h * 2) * line;
        pool_row_gradient(g + r * w * C, which + r * w * C, w, C, top, top + line);
        if (W % 2) {
            memset(top + 2 * w * C, 0, C * sizeof(float));
            memset(top + line + 2 * w * C, 0, C * sizeof(float));
        }
        if (H % 2 && r % h == h - 1) memset(top + 2 * line, 0, line * sizeof(float));
    }
    return 0;
}

/* A parameter p of `size` values, its gradient, its moments, and how many steps it has made. */
typedef struct {
    float *p;
    const float *g;
    float *m, *v, *steps;
    i64 size;
} adapted_t;

static double power(double x, i64 n) {
    double y = 1;
    for (; n; n /= 2, x *= x)
        if (n % 2) y *= x;
    return y;
}

/* m += keep_m * (g - m),  v += keep_v * (g*g - v),  p -= rate * m / (sqrt(v) + eps)
 *
 * of the values from `first` to `end`. Those that are `far` pass the outer caches by: each is needed once
 * a step, and would push out what is needed sooner. */
static void adapt(const adapted_t *a, i64 first, i64 end, int far, float keep_m, float keep_v, float rate,
                  float eps) {
    float *p = a->p, *m = a->m, *v = a->v;
    const float *g = a->g;
    i64 i = first;
    for (; i + VEC <= end; i += VEC) {
        if (far) {
            __builtin_prefetch(p + i + FETCHED, 0, 0);
            __builtin_prefetch(g + i + FETCHED, 0, 0);
            __builtin_prefetch(m + i + FETCHED, 0, 0);
            __builtin_prefetch(v + i + FETCHED, 0, 0);
        }
        vec gi = load(g + i), mi = load(m + i), vi = load(v + i);
        mi += keep_m * (gi - mi);
        vi += keep_v * (gi * gi - vi);
        if (far) { stream(m + i, mi); stream(v + i, vi); }
        else { store(m + i, mi); store(v + i, vi); }
        store(p + i, load(p + i) - rate * mi / (root(vi) + eps));
    }
    for (; i < end; i++) {
        m[i] += keep_m * (g[i] - m[i]);
        v[i] += keep_v * (g[i] * g[i] - v[i]);
        p[i] -= rate * m[i] / (sqrtf(v[i]) + eps);
    }
    if (far) fence();
}

/* A step of Adam of `count` parameters, each with the correction of its own number of steps. */
int normlab_adam(const adapted_t *all, i64 count, double beta1, double beta2, double rate, float eps,
                 int threads) {
#pragma omp parallel num_threads(threads)
    for (const adapted_t *a = all; a < all + count; a++) {
        i64 t = (i64)*a->steps + 1, items = (a->size + PIECE - 1) / PIECE;
        int far = a->size >= FAR && !(((uintptr_t)a->m | (uintptr_t)a->v) % sizeof(vec));
        float corrected = (float)(rate * sqrt(1 - power(beta2, t)) / (1 - power(beta1, t)));
#pragma omp for schedule(static) nowait
        for (i64 item = 0; item < items; item++)
            adapt(a, item * PIECE, min64((item + 1) * PIECE, a->size), far, (float)(1 - beta1),
                  (float)(1 - beta2), corrected, eps);
    }
    for (i64 k = 0; k < count; k++) ++*all[k].steps;
    return 0;
}

/* Whether v goes before the largest so far: NaN before all, the first of equals. */
static inline int larger(float v, float best) { return best == best && (v > best || v != v); }

/* How many of the N x K logits are largest at their label. */
int normlab_right(const float *logits, const i64 *labels, i64 N, i64 K, i64 *count, int threads) {
    (void)threads;
    *count = 0;
    for (i64 n = 0; n < N; n++, logits += K) {
        i64 best = 0;
        for (i64 k = 1; k < K; k++)
            if (larger(logits[k], logits[best])) best = k;
        *count += best == labels[n];
    }
    return 0;
}
