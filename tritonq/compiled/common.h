// What the compiled operators share. Arithmetic is that of tritonq.reference, which is the specification.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

// Work below this many elements is done by one thread: waking others takes longer.
constexpr int64_t kParallelFrom = 1 << 15;
// Elements that are summed in float32 before sums go on in float64; they fit the first cache.
constexpr int64_t kChunk = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One rounding where PyTorch's own vector code has one: TRITONQ_FMA says so.
static inline float multiply_add(float a, float b, float c) {
#if TRITONQ_FMA
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// What follows an operation: a ReLU up to `ceiling` (`floor` is 0; without a ReLU both are infinite), and where `rounds`
// a grid, whose steps from zero are lowest..highest. The bounds allow for the ReLU.
struct Tail {
    int32_t rounds;
    float inverse, scale, lowest, highest, floor, ceiling;
};

static inline float clip(float x, float lowest, float highest) {
    x = x < lowest ? lowest : x;
    return x > highest ? highest : x;
}

// The nearest step, ties to even; NaN stays NaN.
static inline float rounded(float y, const Tail& tail) {
    return clip(__builtin_rintf(y * tail.inverse), tail.lowest, tail.highest) * tail.scale;
}

// Whether a gradient passes; without a grid the inverse is 0 and the bounds are infinite.
static inline bool passes(float y, const Tail& tail) {
    const float step = __builtin_rintf(y * tail.inverse);
    return (y > tail.floor) & (y < tail.ceiling) & (step >= tail.lowest) & (step <= tail.highest);
}
