// Write minus infinity where a mask is true.

#pragma once

#include <cstdint>

#include "isa.h"

IPU_DECLARE_LOOP(void, hide_f32, const bool* hidden, float* scores, int64_t count)
