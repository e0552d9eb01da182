// Matrix products on AVX2 with FMA: see linear.inc.
#if defined(__AVX2__)

#include <immintrin.h>

#include "denormals.h"

#define GLIMT_LANES 8
#include "vectors.inc"

namespace glimt {
namespace {

constexpr int kRegisterRows = 6;  // 12 registers of sums, 2 of weights, 1 of x
constexpr int kStreamRows = 4;    // 8 registers of sums
constexpr int64_t kMostStreamed = 8;

// sums + the dots of the four bytes of every word with four bytes of x, all signed.
//
// The instruction wants one side unsigned and adds two products in 16 bits: |w| <= 128 with the
// sign moved to |x| <= 127 gives at most 2 * 128 * 127 = 32512, so nothing saturates.
inline Ints dot_signed(Ints sums, Words w, uint32_t x) {
    const __m256i weights = (__m256i)w, values = _mm256_set1_epi32(static_cast<int>(x));
    const __m256i pairs =
        _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(values, weights));
    return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// The same with bytes 0 … 15 of weights.
inline Ints dot_unsigned(Ints sums, Words w, uint32_t x) {
    const __m256i values = _mm256_set1_epi32(static_cast<int>(x));
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, values);
    return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

}  // namespace
}  // namespace glimt

#define GLIMT_HAS_DOTS
#include "linear.inc"

namespace glimt {

void linear_avx2(const LinearCall& call) { linear(call); }
void mlp_avx2(const MlpCall& call) { mlp(call); }

}  // namespace glimt

#endif
