"""The CPU kernels in C++ and their binding."""
