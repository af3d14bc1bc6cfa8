"""Tensor maps (CUtensorMap): how Hopper's copy engine is told of a matrix, its address, shape and the box of one copy.

A map is 128 bytes, encoded by the driver on the host and passed to a kernel by value. CUDA driver API, "Tensor Map
Object Management".
"""

import ctypes
from functools import lru_cache
from typing import Any

from lowbit.optional import require

BOX_BYTES = 128  # of a row in one box: what the 128-byte swizzle permutes


@lru_cache(maxsize=4096)
def tensor_map(address: int, rows: int, columns: int, box_rows: int) -> bytes:
    """The map of a matrix [rows, columns]: boxes of box_rows times 128 bytes, swizzled; zeros outside.

    Elements are bytes. The address and the bytes of a row are multiples of 16. Raises RuntimeError with the driver's
    answer.
    """
    driver: Any = require("cuda.bindings.driver", "cuda")
    one = driver.cuuint32_t(1)
    status, encoded = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2,
        address,
        [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
        [driver.cuuint64_t(columns)],
        [driver.cuuint32_t(BOX_BYTES), driver.cuuint32_t(box_rows)],
        [one, one],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(status) != 0:
        raise RuntimeError(f"cuTensorMapEncodeTiled answered {status.name} for [{rows}, {columns}]")
    return ctypes.string_at(encoded.getPtr(), 128)
