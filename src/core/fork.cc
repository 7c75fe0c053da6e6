#include "core/fork.h"

#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

namespace tessera {

namespace {

struct Registry {
  std::mutex mutex;
  std::vector<ForkAware*> members;

  void enter(ForkAware* member) {
    const std::lock_guard lock(mutex);
    members.push_back(member);
  }
  void leave(ForkAware* member) {
    const std::lock_guard lock(mutex);
    members.erase(std::find(members.begin(), members.end(), member));
  }
};

// Never destroyed: objects of static storage may leave after it would be.
Registry& registry();

void before_fork() {
  registry().mutex.lock();
  for (ForkAware* member : registry().members) member->before_fork();
}
void after_fork_in_parent() {
  for (ForkAware* member : registry().members) member->after_fork_in_parent();
  registry().mutex.unlock();
}
void after_fork_in_child() {
  for (ForkAware* member : registry().members) member->after_fork_in_child();
  registry().mutex.unlock();
}

Registry& registry() {
  static Registry* const all = [] {
    if (pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child) != 0) throw std::bad_alloc();
    return new Registry;
  }();
  return *all;
}

}  // namespace

ForkRegistration::ForkRegistration(ForkAware* object) : object_(object) { registry().enter(object); }
ForkRegistration::~ForkRegistration() { registry().leave(object_); }

}  // namespace tessera
