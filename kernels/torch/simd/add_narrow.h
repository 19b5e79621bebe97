// Add bfloat16 numbers to float32 sums.

#pragma once

#include <cstdint>

#include "isa.h"

IPU_DECLARE_LOOP(void, add_bf16, const uint16_t* values, float* sums, int64_t count)
