// Norms, rotation and the cache's writes on any processor: see rows.inc.
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "rows.h"
#include "threads.h"

namespace glimt {
namespace {
constexpr int kLanes = 4;  // SSE2, NEON
}
}  // namespace glimt

#include "rows.inc"

namespace glimt {

void norm_portable(const NormCall& call) { norm(call); }
void rotate_portable(const RotateCall& call) { rotate(call); }
void write_kv_portable(const WriteKvCall& call) { write_kv(call); }

}  // namespace glimt
