// Which instruction sets this processor and system offer.
#pragma once

namespace glimt {

bool has_avx2();    // AVX2, FMA and F16C
bool has_avx512();  // F, BW, DQ, VL and VNNI
bool has_avx512_bf16();  // dot products of pairs of bfloat16
bool has_amx();     // all of avx512, BF16, and tiles of bfloat16 and int8, with the system's leave

// For tests, which reach the kernels for processors without it so: has_avx512_bf16() says no.
void hide_avx512_bf16(bool is_hidden);

}  // namespace glimt
