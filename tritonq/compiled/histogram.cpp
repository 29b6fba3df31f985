// Counting values by the leading bits of a float, with their range; see tritonq/reference/histogram.py.
#include <cstring>

#include "common.h"

namespace {

// Each thread counts into tables in turn: a run of equal values (a ReLU's zeros) would wait for each of its increments.
constexpr int kTables = 4;
// A thread's table holds 32-bit counts, so that it is emptied after this many values at the latest.
constexpr int64_t kSpan = int64_t(1) << 31;
constexpr uint32_t kMagnitude = 0x7fffffffu;

// The bins of `FloatPrefixBins`: a value's prefix is its magnitude's bits shifted right by `shift`.
struct Bins {
    int32_t shift, first, per_side, infinite;
};

// Bins of a block of values, counted from the middle one: into `position`. Not finite: the bin behind the last.
inline void positions(const float* x, int64_t count, const Bins& bins, int32_t* position, float& low, float& high) {
    const int32_t last = 2 * bins.per_side + 1;
    float smallest = low, largest = high;
#pragma omp simd reduction(min : smallest) reduction(max : largest)
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        const int32_t prefix = static_cast<int32_t>((bits & kMagnitude) >> bins.shift);
        int32_t distance = prefix - (bins.first - 1);
        distance = distance < 0 ? 0 : distance > bins.per_side ? bins.per_side : distance;
        const bool finite = prefix < bins.infinite;
        position[i] = finite ? bins.per_side + ((bits >> 31) ? -distance : distance) : last;
        const float least = finite ? x[i] : kInfinity, most = finite ? x[i] : -kInfinity;
        smallest = least < smallest ? least : smallest;
        largest = most > largest ? most : largest;
    }
    low = smallest, high = largest;
}

}  // namespace

extern "C" {

// Adds to `counts`, 2 per_side + 1 of them, and widens `low` and `high` by the finite values. Returns how many are not.
int64_t prefix_counts(
    const float* x, int64_t count, int shift, int first, int per_side, int infinite, int64_t* counts, float* low,
    float* high) {
    const Bins bins{shift, first, per_side, infinite};
    const int64_t size = 2 * per_side + 2;
    int64_t nonfinite = 0;
    float smallest = *low, largest = *high;
    for (int64_t start = 0; start < count; start += kSpan) {
        const int64_t end = start + kSpan < count ? start + kSpan : count;
#pragma omp parallel if (count > kParallelFrom) reduction(min : smallest) reduction(max : largest)
        {
            std::vector<uint32_t> tables(kTables * size);
            int32_t position[kChunk];
#pragma omp for schedule(static)
            for (int64_t block = start; block < end; block += kChunk) {
                const int64_t values = block + kChunk < end ? kChunk : end - block;
                positions(x + block, values, bins, position, smallest, largest);
                int64_t i = 0;
                for (; i + kTables <= values; i += kTables)
                    for (int table = 0; table < kTables; table++) tables[table * size + position[i + table]]++;
                for (; i < values; i++) tables[position[i]]++;
            }
#pragma omp critical
            {
                for (int table = 0; table < kTables; table++) {
                    const uint32_t* counted = tables.data() + table * size;
                    for (int64_t bin = 0; bin < size - 1; bin++) counts[bin] += counted[bin];
                    nonfinite += counted[size - 1];
                }
            }
        }
    }
    *low = smallest, *high = largest;
    return nonfinite;
}

}  // extern "C"
