#include "kernels.h"

namespace glimt {

const Kernels* portable_kernels() { return nullptr; }

}  // namespace glimt
