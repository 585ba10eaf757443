/* Convolutions by F(4 x 4, 3 x 3): 1/4 of the multiplications, and more rounding.
 *
 * The polynomials are taken at 0, +-a, +-b and infinity with a = sqrt(1/2), b = sqrt(2) = 1/a, where
 * rounding is half of what it is at the usual 1 and 2 (docs/benchmarks.md):
 *
 *     B' = 1   0   -5/2   0   1  0    G =  1     0     0      A' = 1   1    1    1    1   0
 *          0  -b    -2    a   1  0       -2/3 -2a/3  -1/3          0   a   -a    b   -b   0
 *          0   b    -2   -a   1  0       -2/3  2a/3  -1/3          0  1/2  1/2   2    2   0
 *          0  -a   -1/2   b   1  0        1/6   b/6   1/3          0  a/2 -a/2   2b  -2b  1
 *          0   a   -1/2  -b   1  0        1/6  -b/6   1/3
 *          0   1     0  -5/2  0  1         0     0     1
 */
#include "vectors.h"

#define SIDE 4
#ifndef CONV3X3
#define CONV3X3 normlab_conv3x3_by4
#define CONV3X3_GRADIENT normlab_conv3x3_by4_gradient
#endif
#define A 0.70710678f
#define B 1.41421356f

INLINE void input_side(const vec d[6], vec r[6]) {
    vec even = d[4] - 2.0f * d[2], odd = A * d[3] - B * d[1];
    vec even_b = d[4] - 0.5f * d[2], odd_b = B * d[3] - A * d[1];
    r[0] = d[0] - 2.5f * d[2] + d[4];
    r[1] = even + odd, r[2] = even - odd;
    r[3] = even_b + odd_b, r[4] = even_b - odd_b;
    r[5] = d[1] - 2.5f * d[3] + d[5];
}

INLINE void output_side(const vec m[6], vec y[4]) {
    vec even = m[1] + m[2], odd = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even + even_b;
    y[1] = A * odd + B * odd_b;
    y[2] = 0.5f * even + 2.0f * even_b;
    y[3] = 0.5f * A * odd + 2.0f * B * odd_b + m[5];
}

INLINE void gradient_side(const vec g[4], vec r[6]) {
    vec even = g[0] + 0.5f * g[2], odd = A * (g[1] + 0.5f * g[3]);
    vec even_b = g[0] + 2.0f * g[2], odd_b = B * (g[1] + 2.0f * g[3]);
    r[0] = g[0];
    r[1] = even + odd, r[2] = even - odd;
    r[3] = even_b + odd_b, r[4] = even_b - odd_b;
    r[5] = g[3];
}

INLINE void kernel_side(const vec k[3], vec r[6]) {
    vec even = (-2.0f / 3) * k[0] - (1.0f / 3) * k[2], odd = (-2.0f / 3 * A) * k[1];
    vec even_b = (1.0f / 6) * k[0] + (1.0f / 3) * k[2], odd_b = (1.0f / 6 * B) * k[1];
    r[0] = k[0];
    r[1] = even + odd, r[2] = even - odd;
    r[3] = even_b + odd_b, r[4] = even_b - odd_b;
    r[5] = k[2];
}

INLINE void back_side(const vec d[6], vec k[3]) {
    vec even = d[1] + d[2], odd = d[1] - d[2], even_b = d[3] + d[4], odd_b = d[3] - d[4];
    k[0] = d[0] - (2.0f / 3) * even + (1.0f / 6) * even_b;
    k[1] = (-2.0f / 3 * A) * odd + (1.0f / 6 * B) * odd_b;
    k[2] = (1.0f / 3) * (even_b - even) + d[5];
}

#include "winograd.h"
