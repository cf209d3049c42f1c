// All kinds of calls on small maps: a line for each with a checksum of the bits that it writes. The
// lines are the same on every architecture and with every instruction set. Which NaN arithmetic
// gives is the machine's choice, so that all NaN count as one here.
#include <cinttypes>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "../native_calls.h"

namespace {

using namespace metapool;
using namespace metapool::calls;

class Checksum {
 public:
  void add(const char* from, const char* end, DType dtype) {
    switch (dtype) {
      case DType::kFloat64:
        return add<uint64_t>(from, end, uint64_t{0x7ff} << 52);
      case DType::kFloat32:
        return add<uint32_t>(from, end, 0x7f800000u);
      case DType::kFloat16:
        return add<uint16_t>(from, end, 0x7c00u);
      case DType::kBFloat16:
        return add<uint16_t>(from, end, 0x7f80u);
    }
  }
  uint64_t value() const { return value_; }

 private:
  // `infinity` has the bits of the exponent.
  template <typename Bits>
  void add(const char* from, const char* end, Bits infinity) {
    const Bits sign = static_cast<Bits>(uint64_t{1} << (8 * sizeof(Bits) - 1));
    for (; from < end; from += sizeof(Bits)) {
      Bits bits;
      std::memcpy(&bits, from, sizeof(bits));
      const bool is_nan = static_cast<Bits>(bits & ~sign) > infinity;
      value_ = (value_ ^ (is_nan ? sign | infinity | 1u : bits)) * 0x100000001b3u;
      value_ ^= value_ >> 29;
    }
  }

  uint64_t value_ = 0xcbf29ce484222325u;
};

uint64_t of_forward(const Inputs& inputs) {
  const std::vector<char> out = forward(inputs);
  const bool counts = inputs.setup.form == Form::kMoments;
  Checksum checksum;
  checksum.add(out.data(), out.data() + out.size(), counts ? DType::kFloat64 : inputs.setup.dtype);
  return checksum.value();
}

uint64_t of_backward(const Inputs& inputs) {
  const std::vector<char> grads = backward(inputs);
  const size_t of_weights = inputs.setup.form == Form::kMix ? inputs.weights.size() : 0;
  const char* const middle = grads.data() + grads.size() - of_weights;
  Checksum checksum;
  checksum.add(grads.data(), middle, inputs.setup.dtype);
  checksum.add(middle, middle + of_weights, weight_dtype(inputs.setup.dtype));
  return checksum.value();
}

template <typename T>
using Named = std::vector<std::pair<const char*, T>>;

const Named<DType> kDTypes = {{"float32", DType::kFloat32},
                              {"float64", DType::kFloat64},
                              {"float16", DType::kFloat16},
                              {"bfloat16", DType::kBFloat16}};
const Named<Form> kForms = {
    {"mix", Form::kMix}, {"stack", Form::kStack}, {"moments", Form::kMoments}};
const Named<Data> kData = {
    {"ties", Data::kTies}, {"nan", Data::kNan}, {"special", Data::kSpecial}, {"fine", Data::kFine}};
const Named<Candidates> kCandidates = {
    {"squares", kSquares},
    {"strips", kStrips},
    {"largest", kLargest},
    {"single", {max(1, 1), kSkip, avg(1, 1)}},
    {"oblong", {max(3, 5), avg(5, 3), kSkip, max(5, 3), max(5, 5), kSkip}}};
// (N, C, H, W): channels that fill a vector or not, rows beside each other or in strips.
const Named<std::vector<int64_t>> kShapes = {
    {"c17", {2, 17, 9, 13}}, {"wide", {1, 3, 5, 40}}, {"tall", {1, 1, 30, 27}}};

}  // namespace

// With --isas names this machine's instruction sets instead.
int main(int words, char** word) {
  if (words == 2 && std::string(word[1]) == "--isas") {
    for (const std::string& name : isa_names()) std::printf("%s\n", name.c_str());
    return 0;
  }
  int count = 0;
  for (const auto& [dtype, dtype_of] : kDTypes)
    for (const auto& [form, form_of] : kForms)
      for (const auto& [candidates, codes] : kCandidates)
        for (const auto& [shape, sizes] : kShapes)
          for (const auto& [data, data_of] : kData)
            for (const char* layout : {"contiguous", "channels_last", "apart"})
              for (const int64_t stride : {1, 2}) {
                Setup setup;
                bool skips = false;
                for (const int64_t each : codes) skips |= each == kSkip;
                if (stride > 1 && skips) continue;
                setup.why = std::string(dtype) + " " + form + " " + candidates + " " + shape + " " +
                            data + " " + layout + " stride " + std::to_string(stride);
                setup.n = sizes[0];
                setup.c = sizes[1];
                setup.h = sizes[2];
                setup.w = sizes[3];
                setup.dtype = dtype_of;
                setup.form = form_of;
                setup.candidates = codes;
                setup.data = data_of;
                setup.channels_last = layout == std::string("channels_last");
                setup.column_step = layout == std::string("apart") ? 2 : 1;
                setup.stride = stride;
                // What is left goes through its combinations as cases pass by.
                const unsigned bits = static_cast<unsigned>(count++) * 2654435761u >> 28;
                setup.weights_per_n = (bits & 1) != 0;
                setup.weights_per_c = (bits & 2) != 0;
                setup.count_include_pad = (bits & 4) != 0;
                setup.has_values = (bits & 8) != 0 && form_of != Form::kMoments;
                const Inputs inputs(setup);
                std::printf("%s forward %016" PRIx64 "\n", setup.why.c_str(), of_forward(inputs));
                std::printf("%s backward %016" PRIx64 "\n", setup.why.c_str(), of_backward(inputs));
              }
  return 0;
}
