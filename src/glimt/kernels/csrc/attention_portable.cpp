// Attention on any processor: see attention_plain.inc.
#define GLIMT_LANES 4
#include "attention_plain.inc"

namespace glimt {

void attention_portable(const AttentionCall& call) { attend_all(call); }

void decode_portable(const DecodeCall& call) { decode_all(call); }

}  // namespace glimt
