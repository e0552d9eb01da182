// Matrix products on any processor: see linear.inc.
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "layout.h"
#include "linear.h"
#include "mlp.h"
#include "threads.h"

namespace glimt {
namespace {
constexpr int kLanes = 4;  // SSE2, NEON
}
}  // namespace glimt

#include "vectors.inc"

namespace glimt {
namespace {

constexpr int kRegisterRows = 3;  // 12 registers of sums
constexpr int kStreamRows = 2;    // 8 registers of sums
constexpr int64_t kMostStreamed = 4;

// float16 by the bits: its exponent and fraction put into a float32, which is 2^112 times too small.
inline Floats floats_of_halves(const uint16_t* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Words bits = __builtin_convertvector(halves, Words);
    const Floats size = as_floats((bits & 0x7fff) << 13) * 0x1p112f;
    return as_floats(as_words(size) | (bits & 0x8000) << 16);
}

// There is no portable way to say so.
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
