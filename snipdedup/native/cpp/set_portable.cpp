#define SNIP_SET set_portable
#define SNIP_SET_TABLE portable
#include "set.hpp"
