/* A 3 x 3 convolution of pixels: 3 channels in, a multiple of 32 out, no padding.
 *
 * Three channels fill no register, so output channels lie in the registers, and each value of a
 * window is multiplied with all of its weights at once. A window is three runs of nine neighbouring
 * values, one of each image row that it touches. No gradient with respect to pixels.
 *
 * x is N x H x W x 3, y and its gradient N x H-2 x W-2 x O; W is at least 8.
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

/* y = convolution of x with w (O x 3 x 3 x 3), plus bias. Returns 0, or -1 when memory is short. */
int normlab_conv_pixels(const float *x, const float *w, const float *bias, i64 N, i64 H, i64 W,
                        i64 O, float *y, int threads) {
    i64 down = H - 2, across = W - 2, line = 3 * W;
    float *taps = malloc(TAPS * O * sizeof(float));
    if (!taps) return -1;
    for (int t = 0; t < TAPS; t++)
        for (i64 o = 0; o < O; o++) taps[t * O + o] = w[in_kernel(o, t)];
    PARALLEL_FOR
    for (i64 r = 0; r < N * down; r++) {
        const float *row = x + (r / down * H + r % down) * line;
        for (i64 c = 0; c < across; c += WINDOWS) {
            i64 first = min64(c, across - WINDOWS); /* the last ones may be computed twice */
            convolve_windows(row + 3 * first, line, taps, bias, O, y + (r * across + first) * O);
        }
    }
    free(taps);
    return 0;
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

/* Gradients of the kernel, dw (O x 3 x 3 x 3), and of the bias, db (O), from x and g = dL/dy. Partial
 * sums, as many as the shape wants whatever the threads are, so that these change no bit. */
int normlab_conv_pixels_gradient(const float *x, const float *g, i64 N, i64 H, i64 W, i64 O,
                                 float *dw, float *db, int threads) {
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
    for (int t = 0; t < TAPS; t++)
        for (i64 o = 0; o < O; o++) dw[in_kernel(o, t)] = parts[t * O + o];
    memcpy(db, parts + TAPS * O, O * sizeof(float));
    free(parts);
    return 0;
}
