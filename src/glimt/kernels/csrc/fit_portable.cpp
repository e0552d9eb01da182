// Rounding to four bits on any processor: see fit.inc.
#define GLIMT_LANES 4
#include "fit.inc"

namespace glimt {

void fit_portable(const FitCall& call) { fit(call); }

}  // namespace glimt
