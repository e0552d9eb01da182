// Attention on AVX-512: by pairs of bfloat16 where there are dot products of them, else see
// attention_plain.inc.
#if defined(__AVX512F__)
#define GLIMT_LANES 16
#include "attention_plain.inc"
#include "processor.h"

namespace glimt {

void attention_avx512(const AttentionCall& call) {
    if (has_avx512_bf16())
        attention_avx512_bf16(call);
    else
        attend_all(call);
}

void decode_avx512(const DecodeCall& call) {
    if (has_avx512_bf16())
        decode_avx512_bf16(call);
    else
        decode_all(call);
}

}  // namespace glimt

#endif
