// Denormal numbers cost a hundred cycles each and mean nothing to a product or a softmax: while a
// guard lives, they count as zero on its thread. Each file that includes it has a copy of its own.
#pragma once

#include <immintrin.h>

namespace glimt {
namespace {

class FlushDenormals {
  public:
    FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kBits); }
    ~FlushDenormals() { _mm_setcsr(before_); }
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

  private:
    static constexpr unsigned kBits = 0x8040;  // of results, and of operands
    const unsigned before_;
};

}  // namespace
}  // namespace glimt
