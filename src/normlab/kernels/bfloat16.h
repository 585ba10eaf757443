/* BFLOAT16 in builds for AVX-512 whose compiler has instructions for it, AVX512-BF16 and AMX. Whether
 * the processor has them is asked when the library is loaded. */
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define BFLOAT16
#endif
