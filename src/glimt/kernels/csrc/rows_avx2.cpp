// Norms, rotation and the cache's writes on AVX2: see rows.inc.
#if defined(__AVX2__)

#define GLIMT_LANES 8
#include "rows.inc"

namespace glimt {

void norm_avx2(const NormCall& call) { norm(call); }
void rotate_avx2(const RotateCall& call) { rotate(call); }
void write_kv_avx2(const WriteKvCall& call) { write_kv(call); }

}  // namespace glimt

#endif
