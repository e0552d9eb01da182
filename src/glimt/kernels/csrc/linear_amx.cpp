// Matrix products with AMX tiles.
//
// x is copied into tiles of 16 rows by 64 bytes. Weights of bfloat16, and of int8 with rounded x,
// are tiles as they lie; others are first widened to bfloat16 tiles.
#if defined(__x86_64__)
#include "counts.h"
#include "linear_amx.h"

#include <algorithm>

#include "denormals.h"
#include "epilogue.inc"
#include "linear.h"
#include "threads.h"

namespace glimt {
namespace {

// Of a single row tile only the rows that there are: fewer take less time.
TileShapes config_for(const Product& p) {
    TileShapes config;
    if (p.num_row_tiles > 1) return config;
    const auto rows = uint8_t(p.call->m);
    for (int tile : {0, 1, 2, 3, 6}) config.num_rows[tile] = rows;
    if (p.is_split) config.num_rows[4] = config.num_rows[5] = rows;
    return config;
}

Share share_of(const Work& work, int worker, int num_workers) {
    const int over_columns = num_workers / work.workers_over_rows;
    Share share;
    part_of(work.product.num_row_tiles / 2, worker / over_columns, work.workers_over_rows,
            &share.first_pair, &share.last_pair);
    part_of(work.product.num_panels, worker % over_columns, over_columns, &share.first_panel,
            &share.last_panel);
    return share;
}

// Of the ways to give each worker rows and columns, the one whose largest share is smallest.
int workers_over_rows(const Product& p, int workers) {
    int best = 1;
    int64_t smallest = INT64_MAX;
    for (int rows = 1; rows <= workers; ++rows) {
        if (workers % rows) continue;
        const int64_t pairs = ceil_div(p.num_row_tiles / 2, rows);
        const int64_t panels = ceil_div(p.num_panels, workers / rows);
        if (pairs * panels < smallest) {
            smallest = pairs * panels;
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

void work_part(void* context, int worker, int num_workers) {
    const FlushDenormals flush;
    const Work& work = *static_cast<const Work*>(context);
    pack_part(work.product, worker, num_workers);
    wait_for_all();
    multiply_part(work, worker, num_workers);
}

}  // namespace

Work work_of(const LinearCall& call) {
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
    return work;
}

void place_rows(Product& p, int slot) {
    const int64_t rows = p.num_row_tiles * 16;
    const int64_t row_bytes = (p.is_split ? kDigits : 1) * up_to(p.num_k, p.run) * 64;
    p.rows = static_cast<uint8_t*>(scratch(slot, rows * row_bytes));
    const int64_t num_scales = rows * (1 + 2 * p.num_groups);
    p.row_scales = static_cast<float*>(scratch(kSlotScales, num_scales * sizeof(float)));
    p.group_scales = p.row_scales + rows;
    p.group_sums = p.group_scales + rows * p.num_groups;
}

void place_space(std::initializer_list<Work*> works) {
    SpaceBytes bytes{};
    for (const Work* work : works) {
        const Product& p = work->product;
        const SpaceBytes own = p.call->m > kFewRows ? space_for_many(p, work->cut)
                               : p.is_grouped       ? space_for_groups()
                                                    : space_for_few();
        bytes.sums = std::max(bytes.sums, own.sums);
        bytes.wide = std::max(bytes.wide, own.wide);
    }
    const int64_t workers = num_workers();
    auto* sums = static_cast<uint8_t*>(scratch(kSlotSums, workers * bytes.sums));
    auto* wide = static_cast<uint8_t*>(scratch(kSlotWide, workers * bytes.wide));
    for (Work* work : works) {
        work->space = {sums, wide};
        work->space_bytes = bytes;
    }
}

void pack_part(const Product& p, int worker, int num_workers) {
    // Whole tiles where there are enough: neighbouring lines that two workers write are slow.
    const int64_t unit = p.num_row_tiles >= num_workers ? 16 : 1;
    int64_t begin, end;
    part_of(p.num_row_tiles * 16 / unit, worker, num_workers, &begin, &end);
    for (int64_t row = begin * unit; row < end * unit; ++row) pack_row(p, row);
}

void multiply_part(const Work& work, int worker, int num_workers) {
    const Product& p = work.product;
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

void linear_amx(const LinearCall& call) {
    if (has_float16(*call.weight, call.element)) return linear_avx512(call);
    if (call.m <= rows_for_vectors(*call.weight)) return linear_avx512(call);
    if (call.weight->n <= 0) return;
    Work work = work_of(call);
    place_rows(work.product, kSlotRows);
    place_space({&work});
    run_parallel(work_part, &work);
}

}  // namespace glimt
#endif
