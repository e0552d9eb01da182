// Rounding to four bits on AVX2: see fit.inc.
#if defined(__AVX2__)
#define GLIMT_LANES 8
#include "fit.inc"

namespace glimt {

void fit_avx2(const FitCall& call) { fit(call); }

}  // namespace glimt

#endif
