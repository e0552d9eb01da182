// Matrix products on any processor: see linear.inc.
#define GLIMT_LANES 4  // SSE2, NEON
#include "vectors.inc"

namespace glimt {
namespace {

constexpr int kRegisterRows = 3;  // 12 registers of sums
constexpr int kStreamRows = 2;    // 8 registers of sums
constexpr int64_t kMostStreamed = 4;

// Denormals stay as they are: there is no portable way to flush them.
struct FlushDenormals {
    FlushDenormals() {}
};

}  // namespace
}  // namespace glimt

#include "linear.inc"

namespace glimt {

void linear_portable(const LinearCall& call) { linear(call); }
void mlp_portable(const MlpCall& call) { mlp(call); }

}  // namespace glimt
