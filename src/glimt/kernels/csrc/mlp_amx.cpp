// An MLP with AMX tiles: where the second product reads bfloat16, the first one writes the tiles
// that it reads.
#if defined(__x86_64__)
#include "counts.h"
#include "denormals.h"
#include "layout.h"
#include "linear.h"
#include "linear_amx.h"
#include "mlp.h"
#include "threads.h"

namespace glimt {
namespace {

// The inner values of this many rows stay in the last-level cache.
constexpr int64_t kRows = 1024;

struct Joined {
    Work up, down;
};

void joined_part(void* context, int worker, int num_workers) {
    const FlushDenormals flush;
    const auto& work = *static_cast<const Joined*>(context);
    pack_part(work.up.product, worker, num_workers);
    wait_for_all();
    multiply_part(work.up, worker, num_workers);
    wait_for_all();
    multiply_part(work.down, worker, num_workers);
}

// Results fill whole tiles, and these are taken as they are.
bool can_join(const MlpCall& call) {
    const int64_t width = call.down->k;
    const bool is_gated = call.activation == kSiluMul;
    const bool is_whole = width % 32 == 0 && header_of(*call.down).k_padded == width;
    return is_whole && !call.down->quantises_x && (is_gated || !call.up->is_paired);
}

void run_joined(const MlpCall& call, int64_t row, int64_t rows) {
    const LinearCall up = first_product(call, row, rows, nullptr);
    const LinearCall down = second_product(call, row, rows, nullptr);
    Joined work{work_of(up), work_of(down)};
    place_rows(work.up.product, kSlotRows);
    place_rows(work.down.product, kSlotInner);
    place_space({&work.up, &work.down});
    work.up.product.next = &work.down.product;
    run_parallel(joined_part, &work);
}

void run_apart(const MlpCall& call, int64_t row, int64_t rows) {
    const int64_t bytes = rows * call.down->k * int64_t(sizeof(uint16_t));
    auto* inner = static_cast<uint16_t*>(scratch(kSlotInner, bytes));
    linear_amx(first_product(call, row, rows, inner));
    linear_amx(second_product(call, row, rows, inner));
}

}  // namespace

void mlp_amx(const MlpCall& call) {
    if (call.m <= 0) return;
    if (has_float16(*call.up, call.element) || has_float16(*call.down, call.element))
        return mlp_avx512(call);
    const int64_t most = up_to(ceil_div(call.m, ceil_div(call.m, kRows)), 32);
    for (int64_t row = 0; row < call.m; row += most) {
        const int64_t rows = least(most, call.m - row);
        (rows > kFewRows && can_join(call) ? run_joined : run_apart)(call, row, rows);
    }
}

}  // namespace glimt
#endif
