"""The published figures of study A, and what study B has beside its table (study_b.py): claims from other hardware, not ours."""

from __future__ import annotations

from dataclasses import dataclass

PARAMETERS_0_5B = 494_032_768  # 136,134,656 of them the embedding, which is the head too
EMBEDDING_0_5B = 136_134_656
KV_BYTES_0_5B = 2 * 24 * 2 * 64 * 2  # a token: K and V, layers, KV heads, head_dim, 16 bits
PARAMETERS_7B = 7_615_616_512
SET_UP_A = "Qwen2.5-0.5B-Instruct, AWQ 4 bits, FP16 KV cache, 4x RTX 4090D (24 GB, 1.0 TB/s, 350 W), max_num_seqs 64"


@dataclass(frozen=True)
class SpeedA:
    """A workload of study A: tokens, its figures of time, and shares of the GPU in percent."""

    workload: str
    tokens_in: int
    tokens_out: int
    ms_per_token: float
    tokens_s: float
    ms_per_1k: float
    gpu: int
    bandwidth: int
    tensor: int


SPEED_A = (
    SpeedA("short", 120, 280, 12.4, 80.6, 12_400, 42, 32, 39),
    SpeedA("summary", 1850, 620, 18.9, 52.9, 18_900, 69, 72, 65),
    SpeedA("json", 310, 1100, 15.3, 65.4, 15_300, 59, 64, 58),
)


@dataclass(frozen=True)
class EnergyA:
    """A level of load of study A. joules_1k, yuan_1k: for 1,000 tokens, at 0.6 yuan a kWh."""

    level: str
    batch: int
    gpu: int
    watts: float
    joules_1k: float
    yuan_1k: float


ENERGY_A = (
    EnergyA("low", 1, 35, 497, 2.18, 0.00036),
    EnergyA("medium", 16, 62, 880, 3.87, 0.00065),
    EnergyA("high", 32, 78, 1108, 4.87, 0.00081),
)
BATCH_A = ((8, 312, 0.3, 1420), (16, 589, 0.8, 1580), (32, 721, 2.1, 1940), (48, 735, 3.7, 2410))  # tok/s, +-GB, P99 ms
MEMORY_A = {"weights": 1.32, "KV cache, batch 16": 3.85, "KV cache, 128K": 8.2, "intermediate": 0.91}  # GB a card
PEAK_GB_A = 12.4  # a card, batch 32 at 128K
GB_PER_1K_A = 2.1
MB_PER_1K_A = 1.07  # a card of four
YUAN_PER_KWH_A = 0.6
PER_WATT_B = (("RTX 4090D", 0.046), ("A100", 0.061), ("4x RTX 4090D", 0.069))  # tokens/s per W
