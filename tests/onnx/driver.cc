// Runs models with the custom-op library where there is no Python:
//
//   driver libonnxruntime.so library.so threads [tokens folder]...
//
// Each folder has model.onnx and its float32 inputs x.bin [tokens, H] and scores.bin [tokens, E];
// y.bin [tokens, H] is written there.
#define ORT_API_MANUAL_INIT
#include <dlfcn.h>
#include <onnxruntime_cxx_api.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

namespace {

Ort::Value load(const std::string& path, std::int64_t tokens) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  const std::int64_t shape[]{tokens, static_cast<std::int64_t>(bytes.size()) / 4 / tokens};
  auto value = Ort::Value::CreateTensor<float>(Ort::AllocatorWithDefaultOptions(), shape, 2);
  bytes.copy(static_cast<char*>(value.GetTensorMutableRawData()), bytes.size());
  return value;
}

}  // namespace

int main(int argc, char** argv) try {
  void* runtime = dlopen(argv[1], RTLD_NOW);
  if (!runtime) throw std::runtime_error(dlerror());
  const auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(runtime, "OrtGetApiBase"));
  Ort::InitApi(base()->GetApi(ORT_API_VERSION));
  Ort::Env env;
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(std::atoi(argv[3]));
  options.RegisterCustomOpsLibrary(argv[2]);
  for (int i = 4; i < argc; i += 2) {
    const std::int64_t tokens = std::atoi(argv[i]);
    const std::string folder = argv[i + 1];
    Ort::Session session(env, (folder + "/model.onnx").c_str(), options);
    const Ort::Value inputs[]{load(folder + "/x.bin", tokens), load(folder + "/scores.bin", tokens)};
    const char* const names[]{"x", "scores"};
    const char* const outputs[]{"y"};
    const auto results = session.Run({}, names, inputs, 2, outputs, 1);
    std::ofstream file(folder + "/y.bin", std::ios::binary);
    file.write(static_cast<const char*>(results[0].GetTensorRawData()),
               results[0].GetTensorTypeAndShapeInfo().GetElementCount() * sizeof(float));
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
