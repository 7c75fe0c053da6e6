// Images as PNG, by libpng.
#include <cstddef>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <png.h>

#include "tessera/error.h"
#include "tessera/io.h"
#include "tessera/picture.h"

namespace tessera {

std::vector<std::byte> encode_png(const Image& image) {
  static_assert(sizeof(Rgb) == 3);  // as PNG_FORMAT_RGB lays them out
  if (image.width < 1 || image.height < 1 ||
      image.pixels.size() != static_cast<size_t>(image.width) * static_cast<size_t>(image.height)) {
    fail("image", fmt::format("{} x {} with {} pixels", image.width, image.height, image.pixels.size()),
         "sides >= 1 and width * height pixels");
  }
  png_image png{};
  png.version = PNG_IMAGE_VERSION;
  png.width = static_cast<png_uint_32>(image.width);
  png.height = static_cast<png_uint_32>(image.height);
  png.format = PNG_FORMAT_RGB;
  png_alloc_size_t bytes = PNG_IMAGE_PNG_SIZE_MAX(png);
  std::vector<std::byte> out(bytes);
  if (!png_image_write_to_memory(&png, out.data(), &bytes, 0, image.pixels.data(), 0, nullptr)) {
    throw Error("image", std::string("image: PNG: ") + png.message);
  }
  out.resize(bytes);
  return out;
}

void write_png(const std::string& path, const Image& image) { write_file(path, encode_png(image)); }

}  // namespace tessera
