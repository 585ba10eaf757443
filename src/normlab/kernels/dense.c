/* Dense layers of few rows, where reading the weights takes as long as multiplying by them, and small ones.
 *
 * x is N x I, w O x I and y N x O. All three products are one, out (R x K) = a (R x D) b (D x K), for
 * which b's rows lie in registers and a's values are repeated: no matrix is laid out anew but the
 * small x and y. N and O are multiples of DOWN, I one of ACROSS.
 */
#include "vectors.h"

#define DOWN (VEC == 16 ? 8 : 4) /* rows of a block of the product, in registers */
#define ACROSS (2 * VEC)         /* and its columns */
#define DEEP 32                  /* rows of w that all rows of g meet while they are in the cache */
#define AHEAD 96                 /* values: so far before it is read, w is asked for */

/* A block of the product; with `more`, it is added to what is there. The values of a lie `down` apart
 * in a column and `along` in a row; with `far`, its rows come from memory. */
INLINE void block(const float *a, i64 down, i64 along, const float *b, i64 b_row, i64 depth, float *out,
                  i64 out_row, int more, int far) {
    vec sum[DOWN][2];
    UNROLL for (int r = 0; r < DOWN; r++)
        UNROLL for (int j = 0; j < 2; j++)
            sum[r][j] = more ? load(out + r * out_row + j * VEC) : (vec){0};
    for (i64 d = 0; d < depth; d++, a += along, b += b_row) {
        vec b0 = load(b), b1 = load(b + VEC);
        if (far && d % 16 == 0)
            UNROLL for (int r = 0; r < DOWN; r++) __builtin_prefetch(a + r * down + AHEAD);
        UNROLL for (int r = 0; r < DOWN; r++) {
            vec value = splat(a[r * down]);
            sum[r][0] += value * b0;
            sum[r][1] += value * b1;
        }
    }
    UNROLL for (int r = 0; r < DOWN; r++)
        UNROLL for (int j = 0; j < 2; j++) store(out + r * out_row + j * VEC, sum[r][j]);
}

/* y = x w' + bias, by way of y' = w x'. Returns 0, or -1 when memory is short. */
int normlab_dense(const float *x, const float *w, const float *bias, i64 N, i64 I, i64 O, float *y,
                  int threads) {
    i64 room = (N + ACROSS - 1) / ACROSS * ACROSS;
    float *xt = aligned_alloc(64, (I + O) * room * sizeof *xt), *yt = xt + I * room;
    if (!xt) return -1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (i64 first = 0; first < I; first += VEC)
            for (i64 i = first; i < first + VEC; i++)
                for (i64 n = 0; n < room; n++) xt[i * room + n] = n < N ? x[n * I + i] : 0.0f;
#pragma omp for schedule(static)
        for (i64 o = 0; o < O; o += DOWN) {
            for (i64 n = 0; n < room; n += ACROSS)
                block(w + o * I, I, 1, xt + n, room, I, yt + o * room + n, room, 0, 1);
            for (i64 n = 0; n < N; n++)
                for (i64 k = o; k < o + DOWN; k++) y[n * O + k] = yt[k * room + n] + bias[k];
        }
    }
    free(xt);
    return 0;
}

/* dx = g w of the columns from `first` to `end`. */
static void input_gradient(const float *w, const float *g, i64 N, i64 I, i64 O, i64 first, i64 end,
                           float *dx) {
    for (i64 o = 0; o < O; o += DEEP) {
        i64 depth = min64(DEEP, O - o);
        for (i64 i = first; i < end; i += ACROSS) {
            const float *from = w + o * I + i;
            for (i64 d = 0; d < depth; d++)
                for (i64 j = 0; j < ACROSS; j += 16) __builtin_prefetch(from + d * I + AHEAD + j);
            for (i64 n = 0; n < N; n += DOWN)
                block(g + n * O + o, O, 1, from, I, depth, dx + n * I + i, I, o > 0, 0);
        }
    }
}

static void bias_gradient(const float *g, i64 N, i64 O, float *db) {
    for (i64 o = 0; o < O; o++) db[o] = g[o];
    for (i64 n = 1; n < N; n++)
        for (i64 o = 0; o < O; o++) db[o] += g[n * O + o];
}

/* Gradients of x (unless dx is NULL), of w (unless dw is NULL) and of the bias, from g = dL/dy. */
int normlab_dense_gradients(const float *x, const float *w, const float *g, i64 N, i64 I, i64 O,
                            float *dx, float *dw, float *db, int threads) {
    i64 strips = I / ACROSS;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) nowait
        for (i64 part = 0; part < (dx ? threads : 0); part++) {
            i64 first = strips * part / threads * ACROSS, end = strips * (part + 1) / threads * ACROSS;
            input_gradient(w, g, N, I, O, first, end, dx);
        }
#pragma omp for schedule(static)
        for (i64 o = 0; o < (dw ? O : 0); o += DOWN)
            for (i64 i = 0; i < I; i += ACROSS)
                block(g + o, 1, O, x + i, I, N, dw + o * I + i, I, 0, 0);
    }
    bias_gradient(g, N, O, db);
    return 0;
}

/* The same for any N and O, and I a multiple of LANES, where there is so little to multiply that a second
 * thread would not gain what waiting for it takes. */
int normlab_small_dense(const float *x, const float *w, const float *bias, i64 N, i64 I, i64 O, float *y,
                        int threads) {
    (void)threads;
    for (i64 n = 0; n < N; n++)
        for (i64 o = 0; o < O; o++) {
            vec sum[REGS] = {{0}};
            for (i64 i = 0; i < I; i += LANES)
                UNROLL for (int j = 0; j < REGS; j++)
                    sum[j] += load(x + n * I + i + j * VEC) * load(w + o * I + i + j * VEC);
            float all = bias[o];
            for (int j = 1; j < REGS; j++) sum[0] += sum[j];
            UNROLL for (int k = 0; k < VEC; k++) all += sum[0][k];
            y[n * O + o] = all;
        }
    return 0;
}

/* out (R x I) = a b (D x I), where the values of a lie `down` apart in a column and `along` in a row. */
static void small_product(const float *a, i64 down, i64 along, i64 R, i64 D, const float *b, i64 I,
                          float *out) {
    for (i64 r = 0; r < R; r++)
        for (i64 i = 0; i < I; i += LANES) {
            vec sum[REGS] = {{0}};
            for (i64 d = 0; d < D; d++)
                UNROLL for (int j = 0; j < REGS; j++)
                    sum[j] += splat(a[r * down + d * along]) * load(b + d * I + i + j * VEC);
            UNROLL for (int j = 0; j < REGS; j++) store(out + r * I + i + j * VEC, sum[j]);
        }
}

int normlab_small_dense_gradients(const float *x, const float *w, const float *g, i64 N, i64 I, i64 O,
                                  float *dx, float *dw, float *db, int threads) {
    (void)threads;
    if (dx) small_product(g, O, 1, N, O, w, I, dx);
    if (dw) small_product(g, 1, O, O, N, x, I, dw);
    bias_gradient(g, N, O, db);
    return 0;
}
