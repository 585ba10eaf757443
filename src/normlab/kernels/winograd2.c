/* Convolutions by F(2 x 2, 3 x 3): 4/9 of the multiplications.
 *
 *     B' = 1  0 -1  0     G = 1    0    0      A' = 1  1  1  0
 *          0  1  1  0         1/2  1/2  1/2         0  1 -1 -1
 *          0 -1  1  0         1/2 -1/2  1/2
 *          0  1  0 -1         0    0    1
 *
 * All matrices hold 0, 1, -1 and 1/2, so rounding stays that of the direct sum, times a small factor.
 */
#include "vectors.h"

#define SIDE 2
#ifndef CONV3X3
#define CONV3X3 normlab_conv3x3_by2
#define CONV3X3_GRADIENT normlab_conv3x3_by2_gradient
#endif

INLINE void input_side(const vec d[4], vec r[4]) {
    r[0] = d[0] - d[2], r[1] = d[1] + d[2], r[2] = d[2] - d[1], r[3] = d[1] - d[3];
}

INLINE void output_side(const vec m[4], vec y[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
}

INLINE void gradient_side(const vec g[2], vec r[4]) {
    r[0] = g[0], r[1] = g[0] + g[1], r[2] = g[0] - g[1], r[3] = -g[1];
}

INLINE void kernel_side(const vec k[3], vec r[4]) {
    r[0] = k[0];
    r[1] = 0.5f * (k[0] + k[1] + k[2]);
    r[2] = 0.5f * (k[0] - k[1] + k[2]);
    r[3] = k[2];
}

INLINE void back_side(const vec d[4], vec k[3]) {
    k[0] = d[0] + 0.5f * (d[1] + d[2]);
    k[1] = 0.5f * (d[1] - d[2]);
    k[2] = 0.5f * (d[1] + d[2]) + d[3];
}

#include "winograd.h"
