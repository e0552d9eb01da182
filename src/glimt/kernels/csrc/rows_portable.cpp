// Norms, rotation and the cache's writes on any processor: see rows.inc.
#define GLIMT_LANES 4  // SSE2, NEON
#include "rows.inc"

namespace glimt {

void norm_portable(const NormCall& call) { norm(call); }
void rotate_portable(const RotateCall& call) { rotate(call); }
void write_kv_portable(const WriteKvCall& call) { write_kv(call); }

}  // namespace glimt
