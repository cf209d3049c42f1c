"""Instructions of the CPU kernels on AArch64, counted in an emulator."""
