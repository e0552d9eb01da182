#include "mlp.h"

namespace glimt {

LinearCall first_product(const MlpCall& call, int64_t begin, int64_t count, uint16_t* inner) {
    LinearCall up{};
    up.weight = call.up;
    up.x = call.x + begin * call.x_stride;
    up.bias = call.up_bias;
    up.out = inner;
    up.m = count;
    up.x_stride = call.x_stride;
    up.out_stride = call.down->k;
    up.activation = call.activation;
    up.element = call.element;
    return up;
}

LinearCall second_product(const MlpCall& call, int64_t begin, int64_t count,
                          const uint16_t* inner) {
    LinearCall down{};
    down.weight = call.down;
    down.x = inner;
    down.bias = call.down_bias;
    down.residual = call.residual ? call.residual + begin * call.residual_stride : nullptr;
    down.out = call.out + begin * call.out_stride;
    down.m = count;
    down.x_stride = call.down->k;
    down.residual_stride = call.residual_stride;
    down.out_stride = call.out_stride;
    down.residual_scale = call.residual_scale;
    down.element = call.element;
    return down;
}

}  // namespace glimt
