#if defined(__x86_64__)
#define SNIP_SET set_avx2
#define SNIP_SET_TABLE avx2
#include "set.hpp"
#endif
