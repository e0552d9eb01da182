// The limits of AVX-512: see limits.h.
#include "limits.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#include "dots.inc"
#include "processor.h"

namespace glimt {
namespace {

constexpr int kNumSums = 12;  // latency 4 or 5 on two pipelines

uint64_t read(const uint8_t* data, int64_t num_bytes) {
    const int64_t part = num_bytes / 4;
    __m512i sums[4] = {};
    for (int64_t at = 0; at < part; at += 128)
        for (int stream = 0; stream < 4; ++stream) {
            const uint8_t* lines = data + stream * part + at;
            _mm_prefetch(reinterpret_cast<const char*>(lines + 2048), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(lines + 2048 + 64), _MM_HINT_T0);
            sums[stream] = _mm512_add_epi64(sums[stream], _mm512_loadu_si512(lines));
            sums[stream] = _mm512_add_epi64(sums[stream], _mm512_loadu_si512(lines + 64));
        }
    const __m512i total =
        _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3]));
    alignas(64) uint64_t words[8];
    _mm512_store_si512(words, total);
    uint64_t sum = 0;
    for (uint64_t word : words) sum += word;
    return sum;
}

// As pairs of bfloat16, which no processor multiplies slower than float32 ...
void multiply_pairs(int64_t rounds) {
    __m512 sums[kNumSums];
    __m512i pairs = _mm512_set1_epi32(0x3f003f00);  // 0.5
    __asm__ volatile("" : "+v"(pairs));
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t round = 0; round < rounds; ++round)
        for (auto& sum : sums) sum = dot_pairs(sum, pairs, pairs);
    for (auto& sum : sums) __asm__ volatile("" : : "v"(sum));
}

// ... or, where there is no such instruction, widened.
void multiply_floats(int64_t rounds) {
    __m512 sums[kNumSums];
    __m512 factor = _mm512_set1_ps(0.5f);
    __asm__ volatile("" : "+v"(factor));
    for (auto& sum : sums) sum = factor;
    for (int64_t round = 0; round < rounds; ++round)
        for (auto& sum : sums) sum = _mm512_fmadd_ps(sum, factor, factor);
    for (auto& sum : sums) __asm__ volatile("" : : "v"(sum));
}

void multiply_ints(int64_t rounds) {
    __m512i sums[kNumSums];
    __m512i bytes = _mm512_set1_epi8(1);
    __asm__ volatile("" : "+v"(bytes));
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    for (int64_t round = 0; round < rounds; ++round)
        for (auto& sum : sums) sum = dot_bytes(sum, bytes, bytes);
    for (auto& sum : sums) __asm__ volatile("" : : "v"(sum));
}

}  // namespace

LimitLoops avx512_limits() {
    constexpr int kOps = kNumSums * 16 * 2;
    if (has_avx512_bf16()) return {read, multiply_pairs, multiply_ints, 2 * kOps, 4 * kOps};
    return {read, multiply_floats, multiply_ints, kOps, 4 * kOps};
}

}  // namespace glimt

#else

namespace glimt {

LimitLoops avx512_limits() { return {}; }

}  // namespace glimt

#endif
