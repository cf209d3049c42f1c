// A function that can be left in the middle and entered again: a context on a stack of its own.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <new>

// ucontext makes a system call at each switch, which takes most of the time of a block.
#if defined(__x86_64__) && !defined(METAPOOL_HOST_UCONTEXT)
#define METAPOOL_HOST_OWN_SWITCH
#else
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_host {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 256 * 1024;
#else
constexpr size_t kStack = 64 * 1024;
#endif
constexpr size_t kPage = 4096;

// A stack that was in use before may be left with what AddressSanitizer knew of its variables.
inline void forget_variables([[maybe_unused]] char* stack, [[maybe_unused]] size_t top) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack + kStack - top, top);
#endif
}

#ifdef METAPOOL_HOST_OWN_SWITCH
// A stack pointer, above which lie the registers that a called function has to keep.
using Context = void*;

// noipa: the compiler sees no registers in it, and would keep values in those that others change.
__attribute__((naked, noipa)) inline void switch_context(Context* /*from*/, Context* /*to*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov (%rsi), %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp;"
      "pop %rdx; jmp *%rdx");  // processors predict where `ret` goes, and always wrongly here
}

inline void make_context(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);  // the stack is then as after a call
  context = top;
}
#else
using Context = ucontext_t;

inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }

inline void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  makecontext(&context, entry, 0);
}
#endif

// Memory with a page below it that stops the program when a stack overflows. Stacks begin at
// different places of their pages: at the same one they would share a few lines of the cache.
inline char* new_stack(size_t index) {
  void* memory = mmap(nullptr, kPage + kStack + kPage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kPage, PROT_NONE);
  return static_cast<char*>(memory) + kPage + index * 192 % kPage;
}

}  // namespace cuda_host
