#pragma once
#include "cpu/dtype.h"
#include "emulator.h"

struct __nv_bfloat162 {
  uint16_t x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {ift::from_float<ift::bf16>(a).raw, ift::from_float<ift::bf16>(b).raw};
}
