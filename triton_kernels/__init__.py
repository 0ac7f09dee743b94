"""Triton kernels, installed as `deqfuse.triton_kernels`.

Kernels and their launchers only: no policy, no `torch.nn`, no autograd. Each module here but
`tiles`, `launch` and `resource_table` imports triton, so it is loaded when a kernel is first
launched and never by `import deqfuse`; this file itself must stay free of such imports.
docs/explanation/kernels-gpu.md says what each kernel does and which problem it takes.
"""
