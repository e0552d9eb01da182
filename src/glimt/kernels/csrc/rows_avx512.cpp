// Norms, rotation and the cache's writes on AVX-512: see rows.inc.
#if defined(__AVX512F__)

#define GLIMT_LANES 16
#include "rows.inc"

namespace glimt {

void norm_avx512(const NormCall& call) { norm(call); }
void rotate_avx512(const RotateCall& call) { rotate(call); }
void write_kv_avx512(const WriteKvCall& call) { write_kv(call); }

}  // namespace glimt

#endif
