#pragma once
#include "half_types.h"
