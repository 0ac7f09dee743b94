// What outlives a launch: memory that the emulator knows, findings, counts.
#pragma once
#include "exec.h"

namespace ptx {

struct Poison {
  u64 size;
  std::unique_ptr<u8[]> bytes;
};
struct State {
  std::vector<Region> regions;  // sorted by base
  std::map<u64, Poison> poisons;
  std::map<std::string, Report> reports;
  std::vector<std::string> reportOrder;
  u32 epochCounter = 0, ctaCounter = 0;
  u64 totalSteps = 0, totalLanes = 0;
  double totalSeconds = 0;
};
extern State state;

std::string hex(u64 v);
void run(Launch& l);

}  // namespace ptx
