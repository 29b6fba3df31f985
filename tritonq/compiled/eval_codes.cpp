// Codes of evaluation and conversion, uint8 and counted from 0; see tritonq/reference/eval_codes.py.
#include "common.h"

// code = round(clip(step, lowest, highest)) + zero, as tritonq/compiled/eval_codes.py declares it. The ends are whole, so
// that steps may be clipped before they are rounded: then none is too large for an integer.
struct CodeRange {
    float lowest, highest;
    int32_t zero;
};

// Ties go to even: that is how processors round to integers unless they are told otherwise.
static inline uint8_t code_of(float step, CodeRange to) {
    return static_cast<uint8_t>(__builtin_irintf(clip(step, to.lowest, to.highest)) + to.zero);
}

namespace {

// Loops over one block each. They take ranges by value: bytes that are written might otherwise be those of the range, as
// far as the compiler knows, and it would read them anew for each element.

void convert_sums(const float* sums, const float* factors, int64_t count, CodeRange to, uint8_t* codes) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) codes[i] = code_of(sums[i] * factors[i], to);
}

bool are_below(const float* sums, int64_t count, float reach) {
    int reached = 0;
#pragma omp simd reduction(| : reached)
    for (int64_t i = 0; i < count; i++) reached |= !(std::fabs(sums[i]) < reach);
    return !reached;
}

bool convert_values(
    const float* x, int64_t count, float factor, bool divides, float lowest, float highest, CodeRange to, uint8_t* codes) {
    int beyond = 0;
#pragma omp simd reduction(| : beyond)
    for (int64_t i = 0; i < count; i++) {
        const float step = divides ? x[i] / factor : x[i] * factor, whole = __builtin_rintf(step);
        beyond |= !(whole >= lowest && whole <= highest);
        // A NaN has no integer.
        codes[i] = code_of(step == step ? step : 0.0f, to);
    }
    return !beyond;
}

struct Summand {
    float start, ratio;
};

void add_codes(
    const uint8_t* a, const uint8_t* b, int64_t count, Summand first, Summand second, float fixed, CodeRange to,
    uint8_t* codes) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const float inner = multiply_add(static_cast<float>(b[i]) - second.start, second.ratio, fixed);
        codes[i] = code_of(multiply_add(static_cast<float>(a[i]) - first.start, first.ratio, inner), to);
    }
}

void multiply_codes(
    const uint8_t* a, const uint8_t* b, int64_t count, float zero_a, float zero_b, float ratio, float fixed, CodeRange to,
    uint8_t* codes) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const float whole = (static_cast<float>(a[i]) - zero_a) * (static_cast<float>(b[i]) - zero_b);
        codes[i] = code_of(whole * ratio + fixed, to);
    }
}

constexpr int64_t kBlock = 4096;

// Elements of the block that begins at `start`.
int64_t in_block(int64_t start, int64_t count, int64_t block) { return count - start < block ? count - start : block; }

}  // namespace

extern "C" {

// Codes of sums · factors; `row` repeats the channels' factors, and channels lie side by side. With `checks`, returns
// whether the size of every sum is below `reach`.
int eval_codes_of_sums(
    const float* sums, int64_t count, const float* row, int64_t width, int checks, float reach, const CodeRange* to,
    uint8_t* codes) {
    int reached = 0;
#pragma omp parallel for schedule(static) reduction(| : reached) if (count > kParallelFrom)
    for (int64_t start = 0; start < count; start += width) {
        const int64_t size = in_block(start, count, width);
        if (checks) reached |= !are_below(sums + start, size, reach);
        convert_sums(sums + start, row, size, *to, codes + start);
    }
    return !reached;
}

// Codes of x · factor, or of x / factor where `divides`. Returns whether all steps, rounded and not clipped, lie within
// lowest..highest, which no NaN does.
int eval_codes_of_values(
    const float* x, int64_t count, float factor, int divides, float lowest, float highest, const CodeRange* to,
    uint8_t* codes) {
    int beyond = 0;
#pragma omp parallel for schedule(static) reduction(| : beyond) if (count > kParallelFrom)
    for (int64_t start = 0; start < count; start += kBlock) {
        const int64_t size = in_block(start, count, kBlock);
        beyond |= !convert_values(x + start, size, factor, divides, lowest, highest, *to, codes + start);
    }
    return !beyond;
}

// (code - zero) · scale.
void eval_values(const uint8_t* codes, int64_t count, float scale, float zero, float* x) {
#pragma omp parallel for simd schedule(static) if (count > kParallelFrom)
    for (int64_t i = 0; i < count; i++) x[i] = (static_cast<float>(codes[i]) - zero) * scale;
}

// Codes of fma(a - start_a, ratio_a, fma(b - start_b, ratio_b, fixed)).
void eval_codes_of_sum(
    const uint8_t* a, const uint8_t* b, int64_t count, float start_a, float start_b, float ratio_a, float ratio_b,
    float fixed, const CodeRange* to, uint8_t* codes) {
    const Summand first{start_a, ratio_a}, second{start_b, ratio_b};
#pragma omp parallel for schedule(static) if (count > kParallelFrom)
    for (int64_t start = 0; start < count; start += kBlock) {
        const int64_t size = in_block(start, count, kBlock);
        add_codes(a + start, b + start, size, first, second, fixed, *to, codes + start);
    }
}

// Codes of (a - zero_a)(b - zero_b) ratio + fixed. `a` has images of `pixels` · `channels`, channels side by side; `b` one
// value for each channel of each image. (One pixel: `b` is like `a`.)
void eval_codes_of_product(
    const uint8_t* a, int64_t count, int64_t pixels, int64_t channels, const uint8_t* b, float zero_a, float zero_b,
    float ratio, float fixed, const CodeRange* to, uint8_t* codes) {
    const int64_t width = channels < kBlock ? channels : kBlock;
#pragma omp parallel for schedule(static) collapse(2) if (count > kParallelFrom)
    for (int64_t row = 0; row < count / channels; row++) {
        for (int64_t start = 0; start < channels; start += width) {
            const int64_t size = in_block(start, channels, width), at = row * channels + start;
            const uint8_t* gate = b + row / pixels * channels + start;
            multiply_codes(a + at, gate, size, zero_a, zero_b, ratio, fixed, *to, codes + at);
        }
    }
}

// table[code].
void eval_look_up(const uint8_t* codes, int64_t count, const uint8_t* table, uint8_t* results) {
#pragma omp parallel for schedule(static) if (count > kParallelFrom)
    for (int64_t i = 0; i < count; i++) results[i] = table[codes[i]];
}

}  // extern "C"
