/* Vector registers as GCC and Clang spell them, whatever the processor. */
#ifndef NORMLAB_VECTORS_H
#define NORMLAB_VECTORS_H

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__SSE__)
#include <xmmintrin.h>
#endif
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define VEC 16
#elif defined(__AVX__)
#define VEC 8
#else
#define VEC 4
#endif
#define LANES 32 /* channels that are worked on together, in registers */
#define REGS (LANES / VEC)

typedef float vec __attribute__((vector_size(4 * VEC), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * VEC), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(2 * VEC), aligned(2), may_alias));
typedef uint8_t bvec __attribute__((vector_size(VEC), aligned(1), may_alias));
typedef int64_t i64;

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 36")

#ifdef _OPENMP
#include <omp.h>
static inline int thread(void) { return omp_get_thread_num(); }
#else
static inline int thread(void) { return 0; }
#endif
#define PARALLEL_FOR _Pragma("omp parallel for schedule(static) num_threads(threads)")

static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec v) { *(vec *)p = v; }
/* Where maxima were; in two steps, as GCC 12 would widen bytes to four one by one. */
static inline ivec load_places(const uint8_t *p) {
    return __builtin_convertvector(__builtin_convertvector(*(const bvec *)p, hvec), ivec);
}
static inline void store_places(uint8_t *p, ivec at) {
    *(bvec *)p = __builtin_convertvector(at, bvec);
}
/* Eight values, and zeros where a register holds more. */
#if defined(__AVX512F__)
static inline vec load8(const float *p) { return (vec)_mm512_zextps256_ps512(_mm256_loadu_ps(p)); }
#else
static inline vec load8(const float *p) { return load(p); }
#endif
/* x - 0 is x, -0 too, so this is nothing but a broadcast. */
static inline vec splat(float x) { return x - (vec){0}; }

/* The largest of the 2 x 2 values v, the first of equals, or a NaN; `at` is which of them. */
static inline vec maximum(const vec v[4], ivec *at) {
    vec best = v[0];
    *at = (ivec){0};
    for (int k = 1; k < 4; k++) {
        ivec better = (v[k] > best) | (v[k] != v[k]);
        best = (vec)(((ivec)v[k] & better) | ((ivec)best & ~better));
        *at = (((ivec){0} + k) & better) | (*at & ~better);
    }
    return best;
}

/* Past the caches to memory: for outputs that no cache would hold until they are read, this saves
 * reading what is overwritten. `p` is aligned to a register. Ends with `fence`. */
#if defined(__AVX512F__)
static inline void stream(float *p, vec v) { _mm512_stream_ps(p, (__m512)v); }
#define fence() _mm_sfence()
#elif defined(__AVX__)
static inline void stream(float *p, vec v) { _mm256_stream_ps(p, (__m256)v); }
#define fence() _mm_sfence()
#else
static inline void stream(float *p, vec v) { store(p, v); }
#define fence()
#endif

static inline vec root(vec v) {
#if defined(__AVX512F__)
    return (vec)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX__)
    return (vec)_mm256_sqrt_ps((__m256)v);
#else
    for (int k = 0; k < VEC; k++) v[k] = __builtin_sqrtf(v[k]);
    return v;
#endif
}

static inline i64 min64(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 max64(i64 a, i64 b) { return a > b ? a : b; }

#endif
