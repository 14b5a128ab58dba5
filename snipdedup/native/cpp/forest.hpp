#pragma once

#include <cstddef>
#include <cstdint>

namespace snip {

// Take edges in `order` (null: as they are); list those that connect two components in `chosen`
// (null: not), and return their number. `parent` points from each node to a smaller one of its
// component, from the smallest to itself.
template <class Number>
std::size_t kruskal(const std::int64_t *start, const std::int64_t *end, const std::int64_t *order,
                    std::size_t edges, Number *parent, std::int64_t *chosen);

}  // namespace snip
