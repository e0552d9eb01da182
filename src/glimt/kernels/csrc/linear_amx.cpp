// Matrix products with AMX tiles.
//
// x is copied into tiles of 16 rows by 64 bytes. Weights of bfloat16, and of int8 with rounded x,
// are tiles as they lie; others are first widened to bfloat16 tiles.
#if defined(__x86_64__)
#include "linear_amx.h"

#include <algorithm>

#include "epilogue.inc"
#include "linear.h"
#include "mlp.h"
#include "threads.h"

namespace glimt {
namespace {

constexpr int kSlotRows = 0, kSlotScales = 1, kSlotInner = 2, kSlotSums = 3, kSlotWide = 4;

int64_t up_to(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// Of a single row tile only the rows that there are: fewer take less time.
TileShapes config_for(const Product& p) {
    TileShapes config;
    if (p.num_row_tiles > 1) return config;
    const auto rows = uint8_t(p.call->m);
    for (int tile : {0, 1, 2, 3, 6}) config.num_rows[tile] = rows;
    if (p.is_split) config.num_rows[4] = config.num_rows[5] = rows;
    return config;
}

struct Work {
    Product product;
    Cut cut;
    int workers_over_rows;  // the others share the columns
    bool is_streamed;
    Space space;            // of all workers
    SpaceBytes space_bytes; // of each
};

Share share_of(const Work& work, int worker, int num_workers) {
    const int over_columns = num_workers / work.workers_over_rows;
    Share share;
    part_of(work.product.num_row_tiles / 2, worker / over_columns, work.workers_over_rows,
            &share.first_pair, &share.last_pair);
    part_of(work.product.num_panels, worker % over_columns, over_columns, &share.first_panel,
            &share.last_panel);
    return share;
}

void work_part(void* context, int worker, int num_workers) {
    const FlushDenormals flush;
    const Work& work = *static_cast<const Work*>(context);
    const Product& p = work.product;
    for (int64_t row = worker; row < p.num_row_tiles * 16; row += num_workers) pack_row(p, row);
    wait_for_all();
    memory_is_written();
    const TileShapes config = config_for(p);
    configure_tiles(config);
    const Space space{work.space.sums + worker * work.space_bytes.sums,
                      work.space.wide + worker * work.space_bytes.wide};
    if (p.call->m > kFewRows) {
        run_many(p, work.cut, share_of(work, worker, num_workers), space, work.is_streamed);
    } else {
        int64_t begin, end;
        part_of(p.num_panels, worker, num_workers, &begin, &end);
        (p.is_grouped ? run_groups : run_few)(p, space, begin, end);
    }
    _tile_release();
}

// Of the ways to give each worker rows and columns, the one whose largest share is smallest.
int workers_over_rows(const Product& p, int workers) {
    int best = 1;
    int64_t least = INT64_MAX;
    for (int rows = 1; rows <= workers; ++rows) {
        if (workers % rows) continue;
        const int64_t pairs = (p.num_row_tiles / 2 + rows - 1) / rows;
        const int64_t panels = (p.num_panels + workers / rows - 1) / (workers / rows);
        if (pairs * panels < least) {
            least = pairs * panels;
            best = rows;
        }
    }
    return best;
}

// Past the caches only what they could not hold, in whole lines.
bool can_stream(const LinearCall& call) {
    const auto at = reinterpret_cast<uintptr_t>(call.out);
    return call.m * call.out_stride > (2 << 20) && at % 64 == 0 && call.out_stride % 32 == 0;
}

// Up to this many rows the vectors are as fast. Groups of 32 values are too short for tiles: their
// weights must be widened, which takes longer than four passes of the dot product of bytes.
int64_t rows_for_vectors(const Weight& weight) {
    if (weight.format == kBf16) return 4;
    if (weight.format == kInt8) return weight.quantises_x ? 8 : 1;
    if (weight.group >= 64) return weight.quantises_x ? 8 : 1;
    return weight.quantises_x ? 32 : 4;
}

// All of a product but its memory.
Product product_of(const LinearCall& call) {
    const Weight& weight = *call.weight;
    const bool is_few = call.m <= kFewRows;
    Product p{};
    p.call = &call;
    p.header = &header_of(weight);
    p.is_int8 = weight.format == kInt8 && weight.quantises_x;
    p.is_split = weight.format == kInt8 && !p.is_int8 && is_few;
    p.is_grouped = weight.format == kInt4 && weight.group >= 64 && is_few;
    p.is_widened = weight.format != kBf16 && !p.is_int8 && !p.is_split && !p.is_grouped;
    const bool is_bytes = p.is_int8 || p.is_split || (p.is_grouped && weight.quantises_x);
    p.num_k = p.header->k_padded / (is_bytes ? 64 : 32);
    p.num_row_tiles = call.m <= 16 ? 1 : up_to(call.m, 32) / 16;
    p.num_panels = p.header->num_blocks / 2;
    p.num_groups = p.is_grouped ? p.header->k_padded / weight.group : 0;
    return p;
}

// Memory for x in tiles.
void place_rows(Product& p) {
    const int64_t rows = p.num_row_tiles * 16;
    const int64_t row_bytes = (p.is_split ? kDigits : 1) * up_to(p.num_k, p.run) * 64;
    p.rows = static_cast<uint8_t*>(scratch(kSlotRows, rows * row_bytes));
    const int64_t num_scales = rows * (1 + 2 * p.num_groups);
    p.row_scales = static_cast<float*>(scratch(kSlotScales, num_scales * sizeof(float)));
    p.group_scales = p.row_scales + rows;
    p.group_sums = p.group_scales + rows * p.num_groups;
}

void place_space(Work& work, int workers) {
    const Product& p = work.product;
    work.space_bytes = p.call->m > kFewRows ? space_for_many(p, work.cut)
                       : p.is_grouped       ? space_for_groups()
                                            : space_for_few();
    const SpaceBytes& bytes = work.space_bytes;
    work.space.sums = static_cast<uint8_t*>(scratch(kSlotSums, workers * bytes.sums));
    work.space.wide = static_cast<uint8_t*>(scratch(kSlotWide, workers * bytes.wide));
}

}  // namespace

void linear_amx(const LinearCall& call) {
    const Weight& weight = *call.weight;
    if (call.m <= rows_for_vectors(weight)) return linear_avx512(call);
    if (weight.n <= 0) return;
    Work work{};
    Product& p = work.product;
    p = product_of(call);
    p.run = p.num_k;
    if (call.m > kFewRows) {
        work.cut = cut_for(p);
        p.run = work.cut.run;
        work.workers_over_rows = workers_over_rows(p, num_workers());
        work.is_streamed = can_stream(call);
    }
    place_rows(p);
    place_space(work, num_workers());
    run_parallel(work_part, &work);
}

void mlp_amx(const MlpCall& call) {
    if (call.m <= 0) return;
    // The inner values of this many rows stay in the last-level cache.
    constexpr int64_t kRows = 1024;
    const int64_t width = call.down->k, blocks = (call.m + kRows - 1) / kRows;
    const int64_t rows_at_once = up_to((call.m + blocks - 1) / blocks, 32);
    auto* inner = static_cast<uint16_t*>(
        scratch(kSlotInner, std::min(rows_at_once, call.m) * width * int64_t(sizeof(uint16_t))));
    mlp_by_blocks(call, rows_at_once, inner, linear_amx);
}

}  // namespace glimt
#endif
