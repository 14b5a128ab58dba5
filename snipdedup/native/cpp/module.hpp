// What the units that bind kernels for Python share.
#pragma once

#include "arrays.hpp"

namespace snip {

extern const Kernels *kernels;  // of the instruction set in use

void bind_codes(nb::module_ &m);  // products of codes, lists
void bind_rows(nb::module_ &m);   // stored rows, cosines, hashes

}  // namespace snip
