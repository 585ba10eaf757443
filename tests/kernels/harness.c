/* Every kernel against plain loops in double, on shapes drawn at random; no Python, no PyTorch.
 *
 * test_harness.py compiles it with sanitizers, for each instruction set, and for Arm under an emulator.
 * It prints how many comparisons held, or the first that did not, and then ends with code 1.
 */
#include "kernels.c"

#include <stdio.h>

#define CONV(s)                                                                                    \
    int normlab_conv3x3_by##s(const float *, const float *, const float *, i64, i64, i64, i64, i64, \
                              int, float *, uint8_t *, int);                                       \
    int normlab_conv3x3_by##s##_gradient(const float *, const float *, const uint8_t *, i64, i64,  \
                                         i64, i64, i64, float *, float *, int);
CONV(2)
CONV(4)
CONV(2_bfloat16)
CONV(4_bfloat16)
CONV(2_amx)
CONV(4_amx)
int normlab_conv3x3_pooled_gradients(const float *, const float *, const float *, const uint8_t *, i64, i64,
                                     i64, i64, i64, float *, float *, float *, int);
int normlab_conv_pixels(const float *, const float *, const float *, const float *, const float *, i64,
                        i64, i64, i64, float *, int);
int normlab_conv_pixels_gradient(const float *, const float *, const float *, const float *,
                                 const float *, i64, i64, i64, i64, float *, float *, float *, float *,
                                 int);
int normlab_dense(const float *, const float *, const float *, i64, i64, i64, float *, int);
int normlab_dense_gradients(const float *, const float *, const float *, i64, i64, i64, float *, float *,
                            float *, int);
int normlab_small_dense(const float *, const float *, const float *, i64, i64, i64, float *, int);
int normlab_small_dense_gradients(const float *, const float *, const float *, i64, i64, i64, float *,
                                  float *, float *, int);
int normlab_read(const uint8_t *, const i64 *, const uint8_t *, const i64 *, i64, i64, i64, float *, int);
int normlab_whiten(const float *, const float *, const float *, i64, i64, i64, i64, float *, int);

static int compared, of_amx;

static i64 between(i64 low, i64 high) { return low + rand() % (high - low + 1); }

static void *room(i64 bytes) {
    void *p = malloc(bytes + 1);
    if (!p) abort();
    return p;
}

static float *drawn(i64 size) {
    float *p = room(size * sizeof(float));
    for (i64 i = 0; i < size; i++) p[i] = 2.0f * (float)rand() / (float)RAND_MAX - 1.0f;
    return p;
}

static double *zeros(i64 size) {
    double *p = room(size * sizeof(double));
    for (i64 i = 0; i < size; i++) p[i] = 0.0;
    return p;
}

/* Values may differ by `bound` of the largest. */
static void same(const char *what, const float *ours, const double *expected, i64 size, double bound) {
    double largest = 1e-3, worst = 0.0;
    for (i64 i = 0; i < size; i++) {
        double difference = fabs(ours[i] - expected[i]);
        largest = fmax(largest, fabs(expected[i]));
        if (!(difference <= worst)) worst = difference;
    }
    compared++;
    if (worst <= bound * largest) return;
    printf("%s: off by %g where the largest value is %g\n", what, worst, largest);
    exit(1);
}

typedef struct {
    i64 N, H, W, I, O, padding;
} shape_t;

/* Calls visit(output value, input value, weight) for all that are multiplied with each other. */
#define EACH_PRODUCT(s, body)                                                                      \
    for (i64 n = 0; n < s.N; n++)                                                                  \
        for (i64 r = 0; r < s.H - 2 + 2 * s.padding; r++)                                          \
            for (i64 c = 0; c < s.W - 2 + 2 * s.padding; c++)                                      \
                for (i64 k = 0; k < 9; k++) {                                                      \
                    i64 p = r + k / 3 - s.padding, q = c + k % 3 - s.padding;                      \
                    if (p < 0 || p >= s.H || q < 0 || q >= s.W) continue;                          \
                    i64 at_y = ((n * (s.H - 2 + 2 * s.padding) + r) * (s.W - 2 + 2 * s.padding) + c) * s.O; \
                    i64 at_x = ((n * s.H + p) * s.W + q) * s.I;                                    \
                    for (i64 o = 0; o < s.O; o++)                                                  \
                        for (i64 i = 0; i < s.I; i++) {                                            \
                            i64 Y_ = at_y + o, X = at_x + i, V = (o * s.I + i) * 9 + k;             \
                            body;                                                                  \
                        }                                                                          \
                }

typedef int conv_t(const float *, const float *, const float *, i64, i64, i64, i64, i64, int, float *,
                   uint8_t *, int);
typedef int conv_gradient_t(const float *, const float *, const uint8_t *, i64, i64, i64, i64, i64,
                            float *, float *, int);

static void whitening(void) {
    i64 N = between(1, 3), H = between(1, 9), W = between(1, 30), K = between(1, 16);
    int threads = (int)between(1, 2);
    float *x = drawn(N * H * W * 3), *mean = drawn(3), *w = drawn(K * 27), *y = drawn(N * H * W * 2 * K);
    double *Y = room(N * H * W * 2 * K * sizeof(double));
    normlab_whiten(x, mean, w, N, H, W, K, y, threads);
    for (i64 n = 0; n < N; n++)
        for (i64 r = 0; r < H; r++)
            for (i64 c = 0; c < W; c++)
                for (i64 k = 0; k < K; k++) {
                    double sum = 0;
                    for (i64 i = -1; i < 2; i++)
                        for (i64 j = -1; j < 2; j++)
                            for (i64 a = 0; a < 3; a++) {
                                if (r + i < 0 || r + i >= H || c + j < 0 || c + j >= W) continue;
                                double value = x[((n * H + r + i) * W + c + j) * 3 + a] - mean[a];
                                sum += value * w[k * 27 + a * 9 + (i + 1) * 3 + j + 1];
                            }
                    double *to = Y + ((n * H + r) * W + c) * 2 * K + k;
                    to[0] = sum > 0 ? sum : 0, to[K] = sum < 0 ? -sum : 0;
                }
    same("whitening", y, Y, N * H * W * 2 * K, 2e-6);
    void *all[] = {x, mean, w, y, Y};
    for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) free(all[i]);
}

static void reading(void) {
    i64 N = between(1, 4), B = between(0, 6), H = between(1, 9), W = between(1, 30);
    i64 reach = between(0, (H < W ? H : W) - 1), chosen[6], by[8];
    uint8_t *x = room(N * H * W * 3), mirrored[4];
    float *y = drawn(B * H * W * 3);
    double *Y = zeros(B * H * W * 3);
    for (i64 i = 0; i < N * H * W * 3; i++) x[i] = (uint8_t)between(0, 255);
    for (i64 b = 0; b < B; b++) chosen[b] = between(0, N - 1);
    for (i64 n = 0; n < N; n++) {
        mirrored[n] = (uint8_t)between(0, 1);
        by[2 * n] = between(-reach, reach), by[2 * n + 1] = between(-reach, reach);
    }
    normlab_read(x, chosen, mirrored, by, B, H, W, y, (int)between(1, 2));
    for (i64 b = 0; b < B; b++)
        for (i64 r = 0; r < H; r++)
            for (i64 c = 0; c < W; c++) {
                i64 n = chosen[b], row = llabs(r - by[2 * n]), column = llabs(c - by[2 * n + 1]);
                if (row >= H) row = 2 * (H - 1) - row;
                if (column >= W) column = 2 * (W - 1) - column;
                if (mirrored[n]) column = W - 1 - column;
                for (int k = 0; k < 3; k++)
                    Y[((b * H + r) * W + c) * 3 + k] = x[((n * H + row) * W + column) * 3 + k] / 255.0;
            }
    same("read pixels", y, Y, B * H * W * 3, 1e-7);
    free(x), free(y), free(Y);
}

/* Of whole times `inputs` and `outputs` channels. Sometimes there are many tiles, for several products over
 * them. */
static void convolution(conv_t *conv, conv_gradient_t *conv_gradient, i64 inputs, i64 outputs, double bound) {
    shape_t s = {between(1, 3), between(1, 14), between(1, 14), inputs * between(1, 72 / inputs),
                 outputs * between(1, 80 / outputs), 1};
    if (rand() % 4 == 0) s.N = between(4, 12), s.O = outputs * between(1, 96 / outputs);
    i64 xs = s.N * s.H * s.W * s.I, ys = s.N * s.H * s.W * s.O, ws = s.O * s.I * 9;
    i64 h = s.H / 2, w2 = s.W / 2, ms = s.N * h * w2 * s.O;
    int threads = (int)between(1, 2);
    float *x = drawn(xs), *w = drawn(ws), *b = drawn(s.O), *g = drawn(ys), *gm = drawn(ms);
    float *y = drawn(ys), *dx = drawn(xs), *dw = drawn(ws), *db = drawn(s.O), *m = drawn(ms);
    uint8_t *which = room(ms);
    double *Y = zeros(ys), *DX = zeros(xs), *DW = zeros(ws), *DB = zeros(s.O), *M = zeros(ms);
    for (i64 i = 0; i < ys; i++) Y[i] = b[i % s.O];
    EACH_PRODUCT(s, Y[Y_] += (double)x[X] * w[V])
    conv(x, w, b, s.N, s.H, s.W, s.I, s.O, 0, y, NULL, threads);
    same("convolution", y, Y, ys, bound);
    conv(x, w, b, s.N, s.H, s.W, s.I, s.O, 0, m, which, threads);
    float *scattered = drawn(ys);
    for (i64 i = 0; i < ys; i++) scattered[i] = 0.0f;
    for (i64 n = 0; n < s.N; n++)
        for (i64 r = 0; r < h; r++)
            for (i64 c = 0; c < w2; c++)
                for (i64 o = 0; o < s.O; o++) {
                    i64 to = ((n * h + r) * w2 + c) * s.O + o;
                    i64 from = ((n * s.H + 2 * r + which[to] / 2) * s.W + 2 * c + which[to] % 2) * s.O + o;
                    M[to] = Y[from];
                    scattered[from] = gm[to];
                }
    same("convolution, maxima", m, M, ms, bound);
    for (int pooled = 0; pooled < 2; pooled++) {
        const float *grad = pooled ? scattered : g;
        for (i64 i = 0; i < xs; i++) DX[i] = 0;
        for (i64 i = 0; i < ws; i++) DW[i] = 0;
        for (i64 i = 0; i < s.O; i++) DB[i] = 0;
        for (i64 i = 0; i < ys; i++) DB[i % s.O] += grad[i];
        EACH_PRODUCT(s, (DX[X] += (double)grad[Y_] * w[V], DW[V] += (double)grad[Y_] * x[X]))
        conv_gradient(x, pooled ? gm : g, pooled ? which : NULL, s.N, s.H, s.W, s.I, s.O, dw, db, threads);
        same("gradient of the kernel", dw, DW, ws, bound);
        same("gradient of the bias", db, DB, s.O, bound);
        if (s.I % 16) continue;
        conv(pooled ? gm : g, w, NULL, s.N, s.H, s.W, s.I, s.O, 1, dx, pooled ? which : NULL, threads);
        same("gradient of the input", dx, DX, xs, bound);
    }
    void *all[] = {x, w, b, g, gm, y, dx, dw, db, m, which, Y, DX, DW, DB, M, scattered};
    for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) free(all[i]);
}

/* Gradients by way of maxima, of which some have none; wide images, too. */
static void maxima(void) {
    shape_t s = {between(1, 9), between(2, 9), between(2, rand() % 4 ? 9 : 70), 32 * between(1, 2),
                 16 * between(1, 5), 1};
    i64 h = s.H / 2, w2 = s.W / 2, xs = s.N * s.H * s.W * s.I, ys = s.N * s.H * s.W * s.O;
    i64 ws = s.O * s.I * 9, ms = s.N * h * w2 * s.O;
    float *x = drawn(xs), *w = drawn(ws), *g = drawn(ms), *dx = drawn(xs), *dw = drawn(ws), *db = drawn(s.O);
    float *scattered = drawn(ys);
    uint8_t *which = room(ms);
    double *DX = zeros(xs), *DW = zeros(ws), *DB = zeros(s.O);
    for (i64 i = 0; i < ys; i++) scattered[i] = 0.0f;
    for (i64 i = 0; i < ms; i++) {
        i64 o = i % s.O, c = i / s.O % w2, r = i / s.O / w2 % h, n = i / s.O / w2 / h;
        which[i] = (uint8_t)between(0, 3);
        if (rand() % 3 == 0) g[i] = 0.0f;
        scattered[((n * s.H + 2 * r + which[i] / 2) * s.W + 2 * c + which[i] % 2) * s.O + o] = g[i];
        DB[o] += g[i];
    }
    EACH_PRODUCT(s, (DX[X] += (double)scattered[Y_] * w[V], DW[V] += (double)scattered[Y_] * x[X]))
    normlab_conv3x3_pooled_gradients(x, w, g, which, s.N, s.H, s.W, s.I, s.O, rand() % 4 ? dx : NULL, dw, db,
                                     (int)between(1, 2));
    normlab_conv3x3_pooled_gradients(x, w, g, which, s.N, s.H, s.W, s.I, s.O, dx, dw, db, (int)between(1, 2));
    same("gradient of the input, by maxima", dx, DX, xs, 2e-6);
    same("gradient of the kernel, by maxima", dw, DW, ws, 2e-6);
    same("gradient of the bias, by maxima", db, DB, s.O, 2e-6);
    void *all[] = {x, w, g, dx, dw, db, scattered, which, DX, DW, DB};
    for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) free(all[i]);
}

static void pixels(void) {
    shape_t s = {between(1, 3), between(3, 12), between(8, 15), 3, 32 * between(1, 3), 0};
    i64 xs = s.N * s.H * s.W * 3, ys = s.N * (s.H - 2) * (s.W - 2) * s.O, ws = s.O * 27;
    float *x = drawn(xs), *w = drawn(ws), *b = drawn(s.O), *g = drawn(ys), *y = drawn(ys);
    float *dw = drawn(ws), *db = drawn(s.O), *gamma = drawn(3), *beta = drawn(3), *dgamma = drawn(3);
    float *dbeta = drawn(3), *scale = rand() % 2 ? gamma : NULL, *shift = rand() % 2 ? beta : NULL;
    double *Y = zeros(ys), *DW = zeros(ws), *DB = zeros(s.O), *DG = zeros(3), *DS = zeros(3);
    for (i64 i = 0; i < ys; i++) Y[i] = b[i % s.O], DB[i % s.O] += g[i];
    for (i64 i = 0; i < 3; i++) gamma[i] = scale ? gamma[i] : 1, beta[i] = shift ? beta[i] : 0;
    EACH_PRODUCT(s, (Y[Y_] += ((double)x[X] * gamma[X % 3] + beta[X % 3]) * w[V],
                     DW[V] += (double)g[Y_] * ((double)x[X] * gamma[X % 3] + beta[X % 3]),
                     DG[X % 3] += (double)g[Y_] * x[X] * w[V], DS[X % 3] += (double)g[Y_] * w[V]))
    normlab_conv_pixels(x, w, scale, shift, b, s.N, s.H, s.W, s.O, y, 2);
    same("convolution of pixels", y, Y, ys, 2e-6);
    normlab_conv_pixels_gradient(x, w, scale, shift, g, s.N, s.H, s.W, s.O, dw, db, dgamma, dbeta, 2);
    same("gradient of gamma", dgamma, DG, 3, 1e-5);
    same("gradient of beta", dbeta, DS, 3, 1e-5);
    same("gradient of a pixels' kernel", dw, DW, ws, 2e-6);
    same("gradient of a pixels' bias", db, DB, s.O, 2e-6);
    void *all[] = {x, w, b, g, y, dw, db, gamma, beta, dgamma, dbeta, Y, DW, DB, DG, DS};
    for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) free(all[i]);
}

/* Dense layers of few rows, and small ones. */
static void rows(int small) {
    i64 N = small ? between(1, 20) : 8 * between(1, 8), O = small ? between(1, 20) : 8 * between(1, 12);
    i64 I = 32 * between(1, 9), threads = between(1, 2);
    float *x = drawn(N * I), *w = drawn(O * I), *b = drawn(O), *g = drawn(N * O), *y = drawn(N * O);
    float *dx = drawn(N * I), *dw = drawn(O * I), *db = drawn(O);
    double *Y = zeros(N * O), *DX = zeros(N * I), *DW = zeros(O * I), *DB = zeros(O);
    for (i64 n = 0; n < N; n++)
        for (i64 o = 0; o < O; o++) {
            double d = g[n * O + o];
            Y[n * O + o] = b[o], DB[o] += d;
            for (i64 i = 0; i < I; i++) {
                Y[n * O + o] += (double)x[n * I + i] * w[o * I + i];
                DX[n * I + i] += d * w[o * I + i], DW[o * I + i] += d * x[n * I + i];
            }
        }
    (small ? normlab_small_dense : normlab_dense)(x, w, b, N, I, O, y, (int)threads);
    (small ? normlab_small_dense_gradients : normlab_dense_gradients)(x, w, g, N, I, O, dx, dw, db, (int)threads);
    same("dense layer", y, Y, N * O, 4e-6);
    same("gradient of a dense layer's input", dx, DX, N * I, 4e-6);
    same("gradient of a dense layer's weights", dw, DW, O * I, 4e-6);
    same("gradient of a dense layer's bias", db, DB, O, 4e-6);
    void *all[] = {x, w, b, g, y, dx, dw, db, Y, DX, DW, DB};
    for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) free(all[i]);
}

/* Three steps of Adam of two parameters, of which one may be too large for the caches. */
static void adapting(void) {
    enum { COUNT = 2 };
    i64 sizes[COUNT] = {between(1, 99), rand() % 8 ? between(1, 9999) : FAR + between(0, 99)};
    double beta1 = 0.9, beta2 = 0.999, eps = 1e-7, rate = 1e-3, *P[COUNT], *M[COUNT], *V[COUNT];
    float *g[COUNT], steps[COUNT] = {0};
    adapted_t all[COUNT];
    for (int k = 0; k < COUNT; k++) {
        i64 size = sizes[k], bytes = (size * (i64)sizeof(float) + 63) / 64 * 64;
        g[k] = drawn(size);
        all[k] = (adapted_t){drawn(size), g[k], aligned_alloc(64, bytes), aligned_alloc(64, bytes),
                             steps + k, size};
        memset(all[k].m, 0, bytes), memset(all[k].v, 0, bytes);
        P[k] = zeros(size), M[k] = zeros(size), V[k] = zeros(size);
        for (i64 i = 0; i < size; i++) P[k][i] = all[k].p[i];
    }
    for (int t = 1; t <= 3; t++) {
        normlab_adam(all, COUNT, beta1, beta2, rate, (float)eps, (int)between(1, 2));
        double corrected = rate * sqrt(1 - power(beta2, t)) / (1 - power(beta1, t));
        for (int k = 0; k < COUNT; k++)
            for (i64 i = 0; i < sizes[k]; i++) {
                double d = g[k][i];
                M[k][i] += (1 - beta1) * (d - M[k][i]), V[k][i] += (1 - beta2) * (d * d - V[k][i]);
                P[k][i] -= corrected * M[k][i] / (sqrt(V[k][i]) + eps);
                g[k][i] = -g[k][i] / 2;
            }
    }
    for (int k = 0; k < COUNT; k++) {
        same("parameter", all[k].p, P[k], sizes[k], 1e-6);
        same("first moment", all[k].m, M[k], sizes[k], 1e-6);
        same("second moment", all[k].v, V[k], sizes[k], 1e-6);
        void *used[] = {all[k].p, all[k].m, all[k].v, g[k], P[k], M[k], V[k]};
        for (size_t i = 0; i < sizeof(used) / sizeof(*used); i++) free(used[i]);
    }
}

/* Batch normalisation and its gradient, behind ReLU and dropout or before ReLU, too. */
static void normalisation(void) {
    i64 N = between(2, 150), C = between(1, 140), S = rand() % 2 ? 1 : between(2, 40), size = N * C * S;
    int behind = S == 1 && rand() % 2, relu = S == 1 && !behind && rand() % 2;
    float *z = drawn(size), *x = drawn(size), *g = drawn(size), *weight = drawn(C), *bias = drawn(C);
    float *mean = drawn(C), *var = drawn(C), *y = drawn(size), *dx = drawn(size), *dw = drawn(C);
    float *db = drawn(C), eps = 1e-3f, scale = 1.25f;
    drops_t drops = {(uint64_t)rand() << 33 ^ (uint64_t)rand(), between(0, 9), 13107, scale};
    double *X = zeros(size), *Y = zeros(size), *MEAN = zeros(C), *VAR = zeros(C), *DX = zeros(size);
    double *DW = zeros(C), *DB = zeros(C), count = (double)(N * S);
    for (i64 i = 0; i < size; i++) {
        _Alignas(8) uint16_t words[8];
        int kept = *draw(drops.key, drops.first + i, 1, words) >= drops.threshold;
        X[i] = !behind ? x[i] : kept && z[i] > 0 ? (double)(z[i] * scale) : 0.0;
    }
    for (i64 i = 0; i < size; i++) MEAN[i / S % C] += X[i] / count;
    for (i64 i = 0; i < size; i++) VAR[i / S % C] += (X[i] - MEAN[i / S % C]) * (X[i] - MEAN[i / S % C]) / count;
    forward_t f = {.x = x, .z = behind ? z : NULL, .drops = drops, .weight = weight, .bias = bias,
                   .eps = eps, .N = N, .C = C, .S = S, .relu = relu, .mean = mean, .var = var, .y = y, .threads = (int)between(1, 2)};
    normlab_forward(&f);
    backward_t b = {.x = x, .g = g, .mean = mean, .var = var, .weight = weight, .bias = bias, .eps = eps,
                    .relu = relu, .keep_scale = behind ? scale : 0.0f, .N = N, .C = C, .S = S, .dx = dx,
                    .weight_grad = dw, .bias_grad = db, .threads = (int)between(1, 2)};
    normlab_gradient(&b);
    for (i64 i = 0; i < size; i++) {
        i64 c = i / S % C;
        double hat = (X[i] - MEAN[c]) / sqrt(VAR[c] + eps), out = weight[c] * hat + bias[c];
        int passes = !relu || y[i] > 0; /* where rounding decides, as it was decided */
        Y[i] = relu && out < 0 ? 0.0 : out;
        DB[c] += passes ? g[i] : 0.0;
        DW[c] += passes ? g[i] * hat : 0.0;
    }
    for (i64 i = 0; i < size; i++) {
        i64 c = i / S % C;
        double sigma = sqrt(VAR[c] + eps), hat = (X[i] - MEAN[c]) / sigma;
        double through = relu && !(y[i] > 0) ? 0.0 : g[i];
        double d = weight[c] / sigma * (through - DB[c] / count - hat * DW[c] / count);
        DX[i] = !behind ? d : X[i] != 0 ? d * scale : 0.0;
    }
    same("mean", mean, MEAN, C, 1e-5);
    same("variance", var, VAR, C, 1e-6);
    same("normalised", y, Y, size, 4e-6);
    same("gradient of gamma", dw, DW, C, 1e-5);
    same("gradient of beta", db, DB, C, 1e-5);
    same("gradient of what is normalised", dx, DX, size, 1e-5);
    void *all[] = {z, x, g, weight, bias, mean, var, y, dx, dw, db, X, Y, MEAN, VAR, DX, DW, DB};
    for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) free(all[i]);
}

static void pooling(void) {
    i64 N = between(1, 4), H = between(2, 9), W = between(2, 9), C = between(1, 70), h = H / 2, w = W / 2;
    float *x = drawn(N * H * W * C), *y = drawn(N * h * w * C), *g = drawn(N * h * w * C);
    float *dx = drawn(N * H * W * C);
    double *Y = zeros(N * h * w * C), *DX = zeros(N * H * W * C);
    uint8_t *which = room(N * h * w * C);
    normlab_pool(x, N, H, W, C, y, which, 2);
    normlab_pool_gradient(g, which, N, H, W, C, dx, 2);
    for (i64 i = 0; i < N * h * w * C; i++) {
        i64 c = i % C, q = i / C % w, r = i / C / w % h, n = i / C / w / h, best = 0;
        for (int k = 0; k < 4; k++) {
            i64 from = ((n * H + 2 * r + k / 2) * W + 2 * q + k % 2) * C + c;
            if (!k || x[from] > x[best]) best = from;
        }
        Y[i] = x[best];
        DX[best] = g[i];
    }
    same("maxima", y, Y, N * h * w * C, 0.0);
    same("gradient of maxima", dx, DX, N * H * W * C, 0.0);
    void *all[] = {x, y, g, dx, Y, DX, which};
    for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) free(all[i]);
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 10;
    srand(1);
    for (int i = 0; i < rounds; i++) {
        convolution(normlab_conv3x3_by2, normlab_conv3x3_by2_gradient, 8, 16, 2e-6);
        convolution(normlab_conv3x3_by4, normlab_conv3x3_by4_gradient, 8, 16, 6e-6);
#ifdef BFLOAT16
        if (normlab_bfloat16()) {
            convolution(normlab_conv3x3_by2_bfloat16, normlab_conv3x3_by2_bfloat16_gradient, 8, 16, 2.5e-2);
            convolution(normlab_conv3x3_by4_bfloat16, normlab_conv3x3_by4_bfloat16_gradient, 8, 16, 8e-2);
        }
        if (normlab_amx()) {
            of_amx -= compared;
            convolution(normlab_conv3x3_by2_amx, normlab_conv3x3_by2_amx_gradient, 32, 32, 2.5e-2);
            convolution(normlab_conv3x3_by4_amx, normlab_conv3x3_by4_amx_gradient, 32, 32, 8e-2);
            of_amx += compared;
        }
#endif
        maxima();
        pixels();
        whitening();
        reading();
        rows(0);
        rows(1);
        adapting();
        normalisation();
        pooling();
    }
    printf("%d comparisons held, %d of AMX, vectors of %d\n", compared, of_amx, VEC);
    return 0;
}
