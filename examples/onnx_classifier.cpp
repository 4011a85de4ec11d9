// The class of an image by a file of "raygkd export --format onnx", with ONNX Runtime alone.
//
//   g++ -std=c++17 onnx_classifier.cpp -I $ORT/include -L $ORT/lib -lonnxruntime -o onnx_classifier
//   ./onnx_classifier student.onnx image.ppm
//
// The image is a binary PPM file that has the size of the model's input.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

// pixels in 0..1, as (channels, height, width)
std::vector<float> read_ppm(const std::string& path, int64_t height, int64_t width) {
    std::ifstream file(path, std::ios::binary);
    std::string kind;
    int64_t columns = 0, rows = 0, most = 0;
    if (!(file >> kind >> columns >> rows >> most) || kind != "P6" || most != 255)
        throw std::runtime_error(path + " is not a binary PPM file with 8 bits");
    if (columns != width || rows != height)
        throw std::runtime_error(path + " must have " + std::to_string(width) + " x " +
                                 std::to_string(height) + " pixels");
    file.get();
    std::vector<unsigned char> bytes(3 * height * width);
    if (!file.read(reinterpret_cast<char*>(bytes.data()), bytes.size()))
        throw std::runtime_error(path + " is cut off");
    std::vector<float> pixels(bytes.size());
    for (int64_t place = 0; place < height * width; ++place)
        for (int64_t channel = 0; channel < 3; ++channel)
            pixels[channel * height * width + place] = bytes[3 * place + channel] / 255.0f;
    return pixels;
}

int main(int count, char** arguments) try {
    if (count != 3) throw std::runtime_error("usage: onnx_classifier MODEL.onnx IMAGE.ppm");
    Ort::Env environment;
    Ort::SessionOptions options;
    // an 8-bit file needs this on x86 without VNNI, whose sums overflow; elsewhere it costs time
    // options.AddConfigEntry("session.x64quantprecision", "1");
    Ort::Session session(environment, arguments[1], options);

    auto shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
    shape[0] = 1;  // any number of images
    auto pixels = read_ppm(arguments[2], shape[2], shape[3]);
    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto images = Ort::Value::CreateTensor<float>(memory, pixels.data(), pixels.size(),
                                                  shape.data(), shape.size());
    const std::array inputs{"images"}, outputs{"logits"};
    auto found = session.Run(Ort::RunOptions{}, inputs.data(), &images, 1, outputs.data(), 1);

    const float* logits = found[0].GetTensorData<float>();
    const auto classes = found[0].GetTensorTypeAndShapeInfo().GetElementCount();
    std::cout << std::max_element(logits, logits + classes) - logits << '\n';

    Ort::AllocatorWithDefaultOptions allocator;
    const auto facts =
        session.GetModelMetadata().LookupCustomMetadataMapAllocated("raygkd", allocator);
    std::cout << (facts ? facts.get() : "no class names") << '\n';
} catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
}
