// Fake quantization in one pass over memory; see tritonq/reference/fake_quant.py.
#include "common.h"

namespace {

// Values that share a scale and lie side by side are taken in blocks of this size.
constexpr int64_t kBlock = 4096;

// A grid: one entry per channel. `zero` is null where bounds count from zero, else it is added, and taken off again.
struct Channels {
    const float *scale, *inverse, *zero;
    float lowest, highest;
};

// The rounded, unclipped code.
inline float step_of(float x, const Channels& grid, int64_t c) {
    const float step = __builtin_rintf(x * grid.inverse[c]);
    return grid.zero ? step + grid.zero[c] : step;
}

inline void quantize_one(float x, const Channels& grid, int64_t c, float* y, uint8_t* mask) {
    const float step = step_of(x, grid, c), code = clip(step, grid.lowest, grid.highest);
    *y = (grid.zero ? code - grid.zero[c] : code) * grid.scale[c];
    if (mask) *mask = code == step;
}

inline void gradient_of_one(float dy, float x, const Channels& grid, int64_t c, float* dx) {
    const float step = step_of(x, grid, c);
    *dx = (step >= grid.lowest) & (step <= grid.highest) ? dy : 0.0f;
}

// Calls `each(i, c)` for the i-th value in memory, which belongs to channel c of (outer, channels, inner).
template <typename Each>
inline void for_each_value(int64_t outer, int64_t channels, int64_t inner, const Each& each) {
    const bool parallel = outer * channels * inner > kParallelFrom;
    if (inner == 1) {
#pragma omp parallel for schedule(static) if (parallel)
        for (int64_t row = 0; row < outer; row++) {
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) each(row * channels + c, c);
        }
        return;
    }
    const int64_t blocks = (inner + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) if (parallel)
    for (int64_t job = 0; job < outer * channels * blocks; job++) {
        const int64_t row = job / blocks, block = job % blocks, c = row % channels;
        const int64_t first = row * inner + block * kBlock;
        const int64_t last = block + 1 < blocks ? first + kBlock : (row + 1) * inner;
#pragma omp simd
        for (int64_t i = first; i < last; i++) each(i, c);
    }
}

}  // namespace

extern "C" {

// Values on the grid, and where `mask` is not null whether each gradient passes. NaN stays NaN, and blocks its gradient.
void fake_quantize(
    const float* x, int64_t outer, int64_t channels, int64_t inner, const float* scale, const float* inverse,
    const float* zero, float lowest, float highest, float* y, uint8_t* mask) {
    const Channels grid{scale, inverse, zero, lowest, highest};
    if (mask)
        for_each_value(outer, channels, inner, [=](int64_t i, int64_t c) { quantize_one(x[i], grid, c, y + i, mask + i); });
    else
        for_each_value(outer, channels, inner, [=](int64_t i, int64_t c) { quantize_one(x[i], grid, c, y + i, nullptr); });
}

// The gradient where the rounded code of `x` lies within the bounds, else 0.
void fake_quantize_backward(
    const float* dy, const float* x, int64_t outer, int64_t channels, int64_t inner, const float* inverse,
    const float* zero, float lowest, float highest, float* dx) {
    const Channels grid{nullptr, inverse, zero, lowest, highest};
    for_each_value(outer, channels, inner, [=](int64_t i, int64_t c) { gradient_of_one(dy[i], x[i], grid, c, dx + i); });
}

}  // extern "C"
