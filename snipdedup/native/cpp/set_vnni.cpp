#define SNIP_SET set_vnni
#define SNIP_SET_TABLE vnni
#include "set.hpp"
