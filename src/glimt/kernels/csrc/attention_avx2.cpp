// Attention on AVX2: see attention_plain.inc.
#if defined(__AVX2__)
#define GLIMT_LANES 8
#include "attention_plain.inc"

namespace glimt {

void attention_avx2(const AttentionCall& call) { attend_all(call); }

void decode_avx2(const DecodeCall& call) { decode_all(call); }

}  // namespace glimt

#endif
