/* winograd2.c with AMX's products of bfloat16, where the compiler has them. */
#include "bfloat16.h"

#ifdef BFLOAT16
#define AMX
#pragma GCC target("avx512bf16,amx-tile,amx-bf16")
#define CONV3X3 normlab_conv3x3_by2_amx
#define CONV3X3_GRADIENT normlab_conv3x3_by2_amx_gradient
#include "winograd2.c"
#endif
