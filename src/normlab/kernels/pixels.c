/* 3 x 3 convolutions of pixels: 3 channels in, a multiple of 32 out, no padding; and whitening.
 *
 * Three channels fill no register, so output channels lie in the registers, and each value of a
 * window is multiplied with all of its weights at once. A window is three runs of nine neighbouring
 * values, one of each image row that it touches. No gradient with respect to pixels.
 *
 * x is N x H x W x 3, y and its gradient N x H-2 x W-2 x O; W is at least 8.
 *
 * And pixels as a network wants them: chosen, moved, mirrored, between 0 and 1.
 */
#include "vectors.h"

#define RUN 9            /* 3 pixels of 3 channels */
#define TAPS 27          /* 3 runs */
#define WINDOWS 6        /* worked on together; neighbours */
#define WIDTH (2 * VEC)  /* output channels of a register block of the convolution */
#define NARROW (VEC == 16 ? 2 : 1) /* registers a tap in the gradient: nine taps must fit */

/* Where in a kernel, O x 3 x 3 x 3, the tap `t` of output channel `o` is: channels come first there. */
static inline i64 in_kernel(i64 o, int t) { return o * TAPS + t % 3 * 9 + t / RUN * 3 + t % RUN / 3; }

static void convolve_windows(const float *x, i64 line, const float *taps, const float *bias, i64 O,
                             float *y) {
    for (i64 o = 0; o < O; o += WIDTH) {
        vec sum[WINDOWS][2];
        for (int p = 0; p < WINDOWS; p++) {
            sum[p][0] = load(bias + o);
            sum[p][1] = load(bias + o + VEC);
        }
        for (int t = 0; t < TAPS; t++) {
            const float *values = x + t / RUN * line + t % RUN, *u = taps + t * O + o;
            vec u0 = load(u), u1 = load(u + VEC);
            for (int p = 0; p < WINDOWS; p++) {
                vec a = splat(values[3 * p]);
                sum[p][0] += a * u0;
                sum[p][1] += a * u1;
            }
        }
        for (int p = 0; p < WINDOWS; p++) {
            store(y + p * O + o, sum[p][0]);
            store(y + p * O + o + VEC, sum[p][1]);
        }
    }
}

/* y = convolution of gamma*x + beta with w (O x 3 x 3 x 3), plus bias; gamma and beta (3) may be NULL.
 * They go through the kernel: gamma*w of x, plus the sum of w*beta. Returns 0, or -1 when memory is
 * short. */
int normlab_conv_pixels(const float *x, const float *w, const float *gamma, const float *beta,
                        const float *bias, i64 N, i64 H, i64 W, i64 O, float *y, int threads) {
    i64 down = H - 2, across = W - 2, line = 3 * W;
    float *taps = malloc((TAPS + 1) * O * sizeof(float)), *add = taps + TAPS * O;
    if (!taps) return -1;
    memcpy(add, bias, O * sizeof(float));
    for (int t = 0; t < TAPS; t++)
        for (i64 o = 0; o < O; o++) {
            float v = w[in_kernel(o, t)];
            taps[t * O + o] = gamma ? v * gamma[t % 3] : v;
            if (beta) add[o] += v * beta[t % 3];
        }
    PARALLEL_FOR
    for (i64 r = 0; r < N * down; r++) {
        const float *row = x + (r / down * H + r % down) * line;
        for (i64 c = 0; c < across; c += WINDOWS) {
            i64 first = min64(c, across - WINDOWS); /* the last ones may be computed twice */
            convolve_windows(row + 3 * first, line, taps, add, O, y + (r * across + first) * O);
        }
    }
    free(taps);
    return 0;
}

#define KINDS 16 /* at most so many whitening filters */
#define KIND_REGS (KINDS / VEC)
#define NEIGHBOURS (12 / KIND_REGS) /* windows worked on together */

/* y, 2K values a window, of `count` neighbouring windows of three rows of `line` values. Reads and
 * writes as if there were NEIGHBOURS at least, and KINDS values from the last one's K-th on. */
static void whiten_windows(const float *x, i64 line, const float *taps, i64 K, i64 count, float *y) {
    for (i64 first = 0; first < count; first += NEIGHBOURS) {
        i64 c = max64(0, min64(first, count - NEIGHBOURS)); /* the last ones may be computed twice */
        vec sum[NEIGHBOURS][KIND_REGS] = {{{0}}};
        for (int t = 0; t < TAPS; t++) {
            const float *values = x + t / RUN * line + t % RUN + 3 * c;
            UNROLL for (int p = 0; p < NEIGHBOURS; p++) {
                vec a = splat(values[3 * p]);
                UNROLL for (int j = 0; j < KIND_REGS; j++)
                    sum[p][j] += a * load(taps + t * KINDS + j * VEC);
            }
        }
        UNROLL for (int p = 0; p < NEIGHBOURS; p++)
            for (int sign = 0; sign < 2; sign++)
                UNROLL for (int j = 0; j < KIND_REGS; j++) {
                    vec s = sign ? -sum[p][j] : sum[p][j];
                    store(y + (2 * (c + p) + sign) * K + j * VEC, (vec)((ivec)s & ~(s <= 0)));
                }
    }
}

/* y (N x H x W x 2K) = ReLU of the convolution of x - mean, N x H x W x 3, padded by a pixel of zeros,
 * with K <= 16 filters w (K x 3 x 3 x 3), and of its negative. Returns 0, or -1 when memory is short. */
int normlab_whiten(const float *x, const float *mean, const float *w, i64 N, i64 H, i64 W, i64 K,
                   float *y, int threads) {
    i64 width = 3 * W, line = width + 6;
    i64 in = 3 * line + 3 * NEIGHBOURS, out = 2 * K * max64(W, NEIGHBOURS) + KINDS;
    float taps[TAPS * KINDS] = {0};
    int failed = 0;
    for (int t = 0; t < TAPS; t++)
        for (i64 k = 0; k < K; k++) taps[t * KINDS + k] = w[in_kernel(k, t)];
#pragma omp parallel num_threads(threads)
    {
        float *rows = calloc(in + out + width, sizeof(float)), *done = rows + in, *means = done + out;
        if (rows)
            for (i64 i = 0; i < width; i++) means[i] = mean[i % 3];
        else {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (i64 r = 0; r < N * H; r++) {
            if (!rows) continue;
            for (int d = 0; d < 3; d++) {
                float *to = rows + d * line + 3;
                if (r % H + d < 1 || r % H + d > H) memset(to, 0, width * sizeof(float));
                else {
                    const float *from = x + (r + d - 1) * width;
                    for (i64 i = 0; i < width; i++) to[i] = from[i] - means[i];
                }
            }
            whiten_windows(rows, line, taps, K, W, done);
            memcpy(y + r * W * 2 * K, done, W * 2 * K * sizeof(float));
        }
        free(rows);
    }
    return failed ? -1 : 0;
}

/* D (27 x O) and sums (O) grow by those of one row of windows, whose gradients are g. */
static void row_gradient(const float *x, i64 line, const float *g, i64 across, i64 O, float *D,
                         float *sums) {
    for (i64 o = 0; o < O; o += NARROW * VEC)
        for (int run = 0; run < 3; run++) {
            vec sum[RUN][NARROW] = {{{0}}};
            for (i64 c = 0; c < across; c++)
                for (int j = 0; j < NARROW; j++) {
                    vec gc = load(g + c * O + o + j * VEC);
                    for (int k = 0; k < RUN; k++) sum[k][j] += splat(x[run * line + 3 * c + k]) * gc;
                }
            for (int k = 0; k < RUN; k++)
                for (int j = 0; j < NARROW; j++) {
                    float *d = D + (run * RUN + k) * O + o + j * VEC;
                    store(d, load(d) + sum[k][j]);
                }
        }
    for (i64 o = 0; o < O; o += VEC) {
        vec sum = {0};
        for (i64 c = 0; c < across; c++) sum += load(g + c * O + o);
        store(sums + o, load(sums + o) + sum);
    }
}

/* Gradients of the kernel, dw (O x 3 x 3 x 3), of the bias, db (O), and of gamma and beta, dgamma and
 * dbeta (3), from x and g = dL/dy. Partial sums, as many as the shape wants whatever the threads are, so
 * that these change no bit. */
int normlab_conv_pixels_gradient(const float *x, const float *w, const float *gamma, const float *beta,
                                 const float *g, i64 N, i64 H, i64 W, i64 O, float *dw, float *db,
                                 float *dgamma, float *dbeta, int threads) {
    i64 down = H - 2, across = W - 2, line = 3 * W, rows = N * down, size = (TAPS + 1) * O;
    i64 count = min64(16, rows);
    float *parts = calloc(count * size, sizeof(float));
    if (!parts) return -1;
    PARALLEL_FOR
    for (i64 part = 0; part < count; part++) {
        float *D = parts + part * size;
        for (i64 r = rows * part / count; r < rows * (part + 1) / count; r++)
            row_gradient(x + (r / down * H + r % down) * line, line, g + r * across * O, across, O,
                         D, D + TAPS * O);
    }
    for (i64 part = 1; part < count; part++)
        for (i64 j = 0; j < size; j++) parts[j] += parts[part * size + j];
    memcpy(db, parts + TAPS * O, O * sizeof(float));
    double of_gamma[3] = {0}, of_beta[3] = {0};
    for (int t = 0; t < TAPS; t++)
        for (i64 o = 0; o < O; o++) {
            i64 at = in_kernel(o, t);
            float d = parts[t * O + o]; /* of gamma*w */
            of_gamma[t % 3] += d * w[at];
            of_beta[t % 3] += db[o] * w[at];
            dw[at] = (gamma ? d * gamma[t % 3] : d) + (beta ? db[o] * beta[t % 3] : 0);
        }
    for (int c = 0; c < 3; c++) dgamma[c] = (float)of_gamma[c], dbeta[c] = (float)of_beta[c];
    free(parts);
    return 0;
}

/* Where the pixel `i` of `n` is, if the picture goes on behind its edges as in a mirror. */
static inline i64 reflected(i64 i, i64 n) { return i < 0 ? -i : i < n ? i : 2 * n - 2 - i; }

/* y (B x H x W x 3) = pixels / 255 of the images `chosen` (B) of x (N x H x W x 3), mirrored where
 * `mirrored` (N) is 1, then moved down and right `by` (N x 2) pixels, reflected at the edges; less than
 * H and W. Both may be NULL. */
int normlab_read(const uint8_t *x, const i64 *chosen, const uint8_t *mirrored, const i64 *by, i64 B,
                 i64 H, i64 W, float *y, int threads) {
    float scaled[256];
    for (int v = 0; v < 256; v++) scaled[v] = v / 255.0f;
    PARALLEL_FOR
    for (i64 r = 0; r < B * H; r++) {
        i64 n = chosen[r / H], down = by ? by[2 * n] : 0, right = by ? by[2 * n + 1] : 0;
        const uint8_t *from = x + (n * H + reflected(r % H - down, H)) * W * 3;
        float *to = y + r * W * 3;
        for (i64 c = 0; c < W; c++) {
            i64 column = reflected(c - right, W);
            const uint8_t *pixel = from + 3 * (mirrored && mirrored[n] ? W - 1 - column : column);
            for (int k = 0; k < 3; k++) to[3 * c + k] = scaled[pixel[k]];
        }
    }
    return 0;
}
