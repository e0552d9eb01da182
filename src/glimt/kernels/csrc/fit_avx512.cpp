// Rounding to four bits on AVX-512: see fit.inc.
#if defined(__AVX512F__)
#define GLIMT_LANES 16
#include "fit.inc"

namespace glimt {

void fit_avx512(const FitCall& call) { fit(call); }

}  // namespace glimt

#endif
