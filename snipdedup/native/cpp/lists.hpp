// The nearest centroid of each code, and the lists that the code visits.
//
// With near(c) = 2 x.c - |c|^2 = |x|^2 - |x - c|^2, the home h of x has the largest near. x visits
// c if its distance to the bisector of h and c is at most its radius:
// near(h) - near(c) <= 2 radius |h - c|.
#pragma once

#include "products.hpp"

namespace snip::SNIP_SET {

inline float distance(const Lists &lists, std::size_t a, std::size_t b) {
    if (lists.distances) return lists.distances[a * lists.columns.count + b];
    const std::size_t width = lists.centroids.width;
    const std::int8_t *values = lists.centroids.values;
    const std::int32_t product = dot(values + a * width, values + b * width, width);
    return root((float)(lists.sizes[a] + lists.sizes[b] - 2 * product));
}

// Turn products to near, padding to the least number, and return the largest.
inline std::int32_t nearest(std::int32_t *near, const Lists &lists, std::size_t stride) {
    const std::size_t count = lists.columns.count;
    std::int32_t most = INT32_MIN;
    for (std::size_t c = 0; c < count; c++) {
        near[c] = 2 * near[c] - lists.sizes[c];
        most = near[c] > most ? near[c] : most;
    }
    for (std::size_t c = count; c < stride; c++) near[c] = INT32_MIN;
    return most;
}

typedef std::int32_t GroupInts __attribute__((vector_size(4 * GROUP)));
typedef float GroupFloats __attribute__((vector_size(4 * GROUP)));

inline bool any(GroupInts truths) {
    std::uint64_t parts[GROUP / 2], all = 0;
    std::memcpy(parts, &truths, sizeof truths);
    for (std::uint64_t part : parts) all |= part;
    return all;
}

// Tell whether some of a group reach a limit.
inline bool any_reaches(const std::int32_t *near, std::int32_t limit) {
    GroupInts values;
    std::memcpy(&values, near, sizeof values);
    return any(values >= limit);
}

// Tell whether some of a group are visited. Numbers are below 2^24, so float32 holds them.
inline bool any_visits(const std::int32_t *near, const float *away, std::int32_t most,
                       std::int32_t limit, float twice) {
    GroupInts values;
    GroupFloats distances;
    std::memcpy(&values, near, sizeof values);
    std::memcpy(&distances, away, sizeof distances);
    const GroupFloats gaps = __builtin_convertvector(most - values, GroupFloats);
    return any((values >= limit) & (GroupInts)(gaps <= twice * distances));
}

// `table` is scratch for BLOCK_ROWS rows of near. Ties go to the first centroid. Without `visits`
// only homes are found.
static void assign(const Codes &rows, const Lists &lists, const float *radius, std::int32_t *home,
                   std::int32_t *best, Pairs *visits, std::uint8_t *turned, std::int32_t *table) {
    const std::size_t width = lists.columns.width, count = lists.columns.count;
    const std::size_t stride = (count + PANEL - 1) / PANEL * PANEL;
    turn_rows(rows, width, turned);
    for (std::size_t r = 0; r < rows.count; r += BLOCK_ROWS) {
        for (std::size_t c = 0; c < count; c += BLOCK_GROUPS * GROUP)
            store_block(turned + r * width, width, lists.columns.packed + c * width,
                        starts_of(lists.columns) + c, table + c, stride, ALL);
        for (std::size_t row = r; row < r + BLOCK_ROWS && row < rows.count; row++) {
            std::int32_t *near = table + (row - r) * stride;
            const std::int32_t most = nearest(near, lists, stride);
            std::size_t own = 0;
            while (!any_reaches(near + own, most)) own += GROUP;
            while (near[own] != most) own++;
            home[row] = (std::int32_t)own;
            best[row] = most;
            if (!visits) continue;
            // first as if all centroids were as far as the furthest, then by their own distances
            const float twice = 2 * radius[row];
            const double least = __builtin_ceil(most - (double)twice * lists.widest[own]);
            const std::int32_t limit = least > INT32_MIN ? (std::int32_t)least : INT32_MIN;
            if (visits->size + count > visits->room) visits->grow(visits, count);
            for (std::size_t group = 0; group < count; group += GROUP) {
                const bool whole = group + GROUP <= count;
                if (!(lists.distances && whole
                          ? any_visits(near + group, lists.distances + own * count + group, most,
                                       limit, twice)
                          : any_reaches(near + group, limit)))
                    continue;
                for (std::size_t c = group; c < group + GROUP && c < count; c++) {
                    if (near[c] < limit) continue;
                    if ((float)(most - near[c]) > twice * distance(lists, own, c)) continue;
                    visits->first[visits->size] = (std::int32_t)row;
                    visits->second[visits->size++] = (std::int32_t)c;
                }
            }
        }
    }
}

}  // namespace snip::SNIP_SET
