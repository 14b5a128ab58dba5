// The table of kernels of one instruction set; included by one unit a set.
#include "common.hpp"
#include "cosines.hpp"
#include "encode.hpp"
#include "lists.hpp"

#define SNIP_TEXT(x) #x
#define SNIP_NAME(x) SNIP_TEXT(x)

namespace snip {
const Kernels SNIP_SET_TABLE = {
    SNIP_NAME(SNIP_SET_TABLE), SNIP_SET::products, SNIP_SET::hits,    SNIP_SET::assign,
    SNIP_SET::dots,            SNIP_SET::widen,    SNIP_SET::whole,   SNIP_SET::project,
    SNIP_SET::finish,          SNIP_SET::orthonormal, SNIP_SET::norms, SNIP_SET::cosines,
    SNIP_SET::table,           SNIP_SET::hashes,   SNIP_SET::decode,  SNIP_SET::common_lengths,
};
}  // namespace snip
