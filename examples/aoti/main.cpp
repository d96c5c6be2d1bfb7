// Runs a package that AOTInductor made of an exported program, without Python in the process. On a CPU
// that is graphquant.standalone(program).
//
//   ./run model.pt2 results.pt input.pt [input.pt ...]
//
// Inputs are tensors that torch.save wrote, in the order of the program's arguments; results are a
// tuple that torch.load reads. docs/export/aoti.md shows how both are made.

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: " << argv[0] << " model.pt2 results.pt input.pt [input.pt ...]\n";
    return 2;
  }
  c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const c10::Device device(model.get_metadata().at("AOTI_DEVICE_KEY"));

  std::vector<at::Tensor> inputs;
  for (int i = 3; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    inputs.push_back(torch::jit::pickle_load(bytes).toTensor().to(device));
  }
  std::vector<c10::IValue> results;
  for (const at::Tensor& result : model.run(inputs)) {
    std::cout << result.sizes() << " " << result.dtype() << "\n";
    results.emplace_back(result.cpu());
  }
  const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(results));
  std::ofstream(argv[2], std::ios::binary).write(bytes.data(), bytes.size());
}
