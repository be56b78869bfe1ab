"""Graphics cards by their data sheets: what they compute and move in a second, and their memory.

All figures are without sparsity, which the data sheets count twice. The sources are NVIDIA's: the
data sheets "H200 Tensor Core GPU", "H100 Tensor Core GPU" (SXM5), "A100 80GB" (SXM4), "L40S" and
"A40"; "NVIDIA Ada GPU Architecture" for the RTX 4090, whose half precision is that with sums in
fp32; and "Blackwell Architecture Technical Brief" for the B200 of an HGX board.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: How a matrix product is computed: in 16 bits, or in fp32 with TF32's or with full precision.
Precision = Literal["half", "tf32", "fp32"]


@dataclass(frozen=True, slots=True)
class Card:
    """FLOP/s by precision, bytes/s, and the memory in GiB that `nvidia-smi` shows as the total."""

    half: float
    tf32: float
    fp32: float
    bytes_s: float
    memory_gib: float

    def floor_s(self, flops: int, num_bytes: int, precision: Precision) -> float:
        """The least seconds of one operation: those of its computing or of its memory."""
        return max(flops / self.flops_s(precision), num_bytes / self.bytes_s)

    def is_memory_bound(self, flops: int, num_bytes: int, precision: Precision) -> bool:
        return num_bytes / self.bytes_s > flops / self.flops_s(precision)

    def flops_s(self, precision: Precision) -> float:
        return {"half": self.half, "tf32": self.tf32, "fp32": self.fp32}[precision]


CARDS = {
    "H200": Card(989e12, 494e12, 67e12, 4.8e12, 140.4),
    "H100": Card(989e12, 494e12, 67e12, 3.35e12, 79.6),
    "A100": Card(312e12, 156e12, 19.5e12, 2.04e12, 80.0),
    "L40S": Card(362e12, 183e12, 91.6e12, 0.864e12, 45.0),
    "RTX 4090": Card(165e12, 82.6e12, 82.6e12, 1.008e12, 24.0),
    "A40": Card(149.7e12, 74.8e12, 37.4e12, 0.696e12, 45.0),
    "B200": Card(2250e12, 1100e12, 80e12, 8.0e12, 179.1),
}
