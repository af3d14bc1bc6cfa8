"""Stands here so that pytest puts tests/ on the import path, and sets what must stand before anything is imported.

Triton's kernels run in its interpreter where there is no GPU: it decides when a kernel is defined.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# One thread: two workers fill two cores, and experts' products are compared to the last bit, which would otherwise
# depend on how transformers' two implementations divide a sum among threads.
torch.set_num_threads(1)
