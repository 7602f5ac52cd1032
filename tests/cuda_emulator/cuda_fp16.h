#pragma once
#include "cpu/dtype.h"
#include "emulator.h"

struct __half2 {
  uint16_t x, y;
};
inline __half2 __floats2half2_rn(float a, float b) {
  return {ift::from_float<ift::fp16>(a).raw, ift::from_float<ift::fp16>(b).raw};
}
inline float2 __half22float2(__half2 pair) {
  return {ift::to_float(ift::fp16{pair.x}), ift::to_float(ift::fp16{pair.y})};
}
