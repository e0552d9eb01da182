// The two products of an MlpCall as calls of their own, for rows begin … begin + count - 1.
//
// inner: [count, call.down->k], where the first leaves what the second takes
#pragma once

#include "kernels.h"

namespace glimt {

LinearCall first_product(const MlpCall& call, int64_t begin, int64_t count, uint16_t* inner);
LinearCall second_product(const MlpCall& call, int64_t begin, int64_t count, const uint16_t* inner);

}  // namespace glimt
