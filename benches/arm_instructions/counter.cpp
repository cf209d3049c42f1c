// A plugin of QEMU that counts the instructions which a program executes, and prints the number at
// its end. Packages of QEMU leave the header of plugins out: what is needed of it (version 1) is
// here.
#include <cinttypes>
#include <cstddef>
#include <cstdint>
#include <cstdio>

extern "C" {

using Id = uint64_t;
struct Block;
void qemu_plugin_register_vcpu_tb_trans_cb(Id id, void (*translated)(Id, Block*));
size_t qemu_plugin_tb_n_insns(const Block* block);
void qemu_plugin_register_vcpu_tb_exec_inline(Block* block, int operation, void* number,
                                              uint64_t operand);
void qemu_plugin_register_atexit_cb(Id id, void (*ended)(Id, void*), void* data);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

__attribute__((visibility("default"))) int qemu_plugin_install(Id id, const void*, int, char**) {
  static uint64_t executed = 0;
  constexpr int kAdd = 0;
  qemu_plugin_register_vcpu_tb_trans_cb(id, [](Id, Block* block) {
    qemu_plugin_register_vcpu_tb_exec_inline(block, kAdd, &executed, qemu_plugin_tb_n_insns(block));
  });
  qemu_plugin_register_atexit_cb(
      id, [](Id, void*) { std::fprintf(stderr, "%" PRIu64 "\n", executed); }, nullptr);
  return 0;
}

}  // extern "C"
