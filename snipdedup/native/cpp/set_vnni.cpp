#if defined(__x86_64__)
#define SNIP_SET set_vnni
#define SNIP_SET_TABLE vnni
#include "set.hpp"
#endif
