// How weights lie in memory for the kernels, and the packing into it.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace glimt {

// Bytes of a packed matrix, a multiple of 64.
int64_t packed_bytes(const PlainWeight& weight);

// Packs a matrix into `out`, on all threads. is_paired: see Weight.
void pack(const PlainWeight& weight, bool is_paired, void* out);

}  // namespace glimt
