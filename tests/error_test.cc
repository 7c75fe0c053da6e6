// An error keeps its sentence when callers know the argument under another name.
#include "tessera/error.h"

#include <gtest/gtest.h>

#include <string>

namespace tessera {
namespace {

class Special : public Error {
  using Error::Error;
};

TEST(Error, IsRenamed) {
  try {
    fail<Special>("k", "k: 3", "k >= 4");
  } catch (const Special& e) {
    EXPECT_EQ(e.argument(), "k");
    EXPECT_STREQ(e.what(), "k: got k: 3; allowed: k >= 4");
    const Error renamed = e.renamed("k_cache");
    EXPECT_EQ(renamed.argument(), "k_cache");
    EXPECT_STREQ(renamed.what(), "k_cache: got k: 3; allowed: k >= 4");
  }
  // Words that begin with something else keep all of it.
  EXPECT_STREQ(Error("q", "sequence 2: q: got 1; allowed: 2").renamed("query").what(),
               "query: sequence 2: q: got 1; allowed: 2");
}

}  // namespace
}  // namespace tessera
