// Rounding to four bits, on each instruction set; see FitCall.
#pragma once

#include "kernels.h"

namespace glimt {

void fit_portable(const FitCall& call);
void fit_avx2(const FitCall& call);
void fit_avx512(const FitCall& call);

}  // namespace glimt
