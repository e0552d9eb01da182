#if defined(__AVX512F__)
#define GLIMT_LANES 16
#include "attention_plain.inc"

namespace glimt {

void attention_avx512(const AttentionCall& call) { attend_all(call); }

void decode_avx512(const DecodeCall& call) { decode_all(call); }

}  // namespace glimt

#endif
