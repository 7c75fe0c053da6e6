// What has locks or threads of its own, and must go on working in a child of fork(): there only the thread that forked
// exists, and whatever another one held stays held.
#pragma once

namespace tessera {

// Handlers run on the thread that forks, and do not throw.
class ForkAware {
 public:
  virtual void before_fork() = 0;           // takes what must not be held by another thread at that moment: short locks
  virtual void after_fork_in_parent() = 0;  // gives it back
  virtual void after_fork_in_child() = 0;   // gives it back, and forgets the threads that are not there

 protected:
  ~ForkAware() = default;
};

// From its making to its end the object's handlers are called: its last member, so that they find it whole.
class ForkRegistration {
 public:
  explicit ForkRegistration(ForkAware* object);
  ~ForkRegistration();
  ForkRegistration(const ForkRegistration&) = delete;
  ForkRegistration& operator=(const ForkRegistration&) = delete;

 private:
  ForkAware* const object_;
};

}  // namespace tessera
