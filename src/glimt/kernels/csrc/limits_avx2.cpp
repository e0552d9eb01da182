// The limits of AVX2: see limits.h.
#include "limits.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace glimt {
namespace {

constexpr int kNumSums = 10;  // latency 4 or 5 on two pipelines

uint64_t read(const uint8_t* data, int64_t num_bytes) {
    const int64_t part = num_bytes / 4;
    __m256i sums[4] = {};
    for (int64_t at = 0; at < part; at += 64)
        for (int stream = 0; stream < 4; ++stream) {
            const uint8_t* line = data + stream * part + at;
            _mm_prefetch(reinterpret_cast<const char*>(line + 2048), _MM_HINT_T0);
            const auto* halves = reinterpret_cast<const __m256i*>(line);
            sums[stream] = _mm256_add_epi64(sums[stream], _mm256_loadu_si256(halves));
            sums[stream] = _mm256_add_epi64(sums[stream], _mm256_loadu_si256(halves + 1));
        }
    const __m256i total =
        _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
    return static_cast<uint64_t>(_mm256_extract_epi64(total, 0) + _mm256_extract_epi64(total, 1) +
                                 _mm256_extract_epi64(total, 2) + _mm256_extract_epi64(total, 3));
}

// bfloat16 is widened and multiplied as float32 here.
void multiply_floats(int64_t rounds) {
    __m256 sums[kNumSums];
    __m256 factor = _mm256_set1_ps(0.5f);
    __asm__ volatile("" : "+x"(factor));
    for (auto& sum : sums) sum = factor;
    for (int64_t round = 0; round < rounds; ++round)
        for (auto& sum : sums) sum = _mm256_fmadd_ps(sum, factor, factor);
    for (auto& sum : sums) __asm__ volatile("" : : "x"(sum));
}

void multiply_ints(int64_t rounds) {
    __m256i sums[kNumSums];
    __m256i bytes = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
    for (auto& sum : sums) sum = _mm256_setzero_si256();
    for (int64_t round = 0; round < rounds; ++round)
        for (auto& sum : sums) {
            __asm__ volatile("" : "+x"(bytes));  // or the product would be computed once
            const __m256i pairs = _mm256_maddubs_epi16(bytes, bytes);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
        }
    for (auto& sum : sums) __asm__ volatile("" : : "x"(sum));
}

}  // namespace

LimitLoops avx2_limits() {
    return {read, multiply_floats, multiply_ints, kNumSums * 8 * 2, kNumSums * 32 * 2};
}

}  // namespace glimt

#else

namespace glimt {

LimitLoops avx2_limits() { return {}; }

}  // namespace glimt

#endif
