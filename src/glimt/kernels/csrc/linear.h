// The matrix products of each instruction set; see LinearCall and MlpCall.
#pragma once

#include "kernels.h"

namespace glimt {

void linear_portable(const LinearCall& call);
void mlp_portable(const MlpCall& call);
void linear_avx2(const LinearCall& call);
void mlp_avx2(const MlpCall& call);
void linear_avx512(const LinearCall& call);
void mlp_avx512(const MlpCall& call);
void linear_amx(const LinearCall& call);
void mlp_amx(const MlpCall& call);

}  // namespace glimt
