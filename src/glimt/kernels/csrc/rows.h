// Norms, rotation and the cache's writes of each instruction set; see NormCall, RotateCall and
// WriteKvCall.
#pragma once

#include "kernels.h"

namespace glimt {

void norm_portable(const NormCall& call);
void rotate_portable(const RotateCall& call);
void write_kv_portable(const WriteKvCall& call);
void norm_avx2(const NormCall& call);
void rotate_avx2(const RotateCall& call);
void write_kv_avx2(const WriteKvCall& call);
void norm_avx512(const NormCall& call);
void rotate_avx512(const RotateCall& call);
void write_kv_avx512(const WriteKvCall& call);

}  // namespace glimt
