/* winograd4.c with products of bfloat16, where the compiler has them. */
#include "bfloat16.h"

#ifdef BFLOAT16
#pragma GCC target("avx512bf16")
#define CONV3X3 normlab_conv3x3_by4_bfloat16
#define CONV3X3_GRADIENT normlab_conv3x3_by4_bfloat16_gradient
#include "winograd4.c"
#endif
