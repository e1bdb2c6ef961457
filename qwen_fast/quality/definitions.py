"""What the words of a quality report mean. Every column points to one of these."""

from __future__ import annotations

from .compare import DISTANCES
from .score import METRICS
from .text import BLOCK

DEFINITIONS: dict[str, tuple[str, str]] = {
    "reference": (
        "Reference",
        "The model that the measured one is held against. Where nobody says otherwise, the same checkpoint in float32 on the "
        "CPU or bfloat16 on a GPU, with a 16-bit KV cache, a head as in the checkpoint, and no quantisation while loading.",
    ),
    "perplexity": (
        "Perplexity",
        "e to the mean negative log-probability of the token that follows, over every position but the last of each window; "
        "windows do not overlap, and the first token of each is not predicted. The lower the better; figures of two texts "
        "or two window lengths cannot be compared.",
    ),
    "perplexity_ratio": (
        "Perplexity ratio",
        "The measured model's perplexity over the reference's, on the same positions. 1: none the worse.",
    ),
    "kl": (
        "KL divergence",
        "Of the measured model's next-token distribution from the reference's: the sum over the whole vocabulary of "
        "p_ref ln(p_ref / p), in nats, in float64 from float32 logits. 0: the same distribution. It sees what perplexity cannot: "
        "changes that average out. Mean, median, the divergence that 99 % of the positions do not exceed, and the largest.",
    ),
    "same_top": (
        "Same most likely token",
        "The share of positions where both models' most likely next token is the same: where greedy decoding would agree.",
    ),
    "rms_delta_p": (
        "RMS change of p",
        "Root mean square of the change in the probability that the model gives to the token that follows.",
    ),
    "intervals": (
        "Intervals",
        f"Two-sided 95 %. Of text: bootstrap over blocks of {BLOCK} neighbouring positions, drawn with replacement. Of tasks: paired "
        "bootstrap over rows, drawn with replacement within their task, both models from the same draw; percentiles of the "
        "draws. Of a share of rows by itself: Wilson's. Where no row differs, the bootstrap has nothing to draw: the interval "
        "of the difference is then ± the largest share of differing rows under which none among so many has 2.5 % chance. "
        "A seed makes every interval the same on every machine.",
    ),
    "changes": (
        "Fixed, broken, p",
        "Rows that only the measured model, or only the reference, answers exactly. p: McNemar's exact test, the "
        "two-sided probability of so uneven a split if both were equally likely. With many cells or tasks some p below 0.05 are chance.",
    ),
    "difference": ("Difference", "The measured model's figure less the reference's, in points of a hundred."),
    "bytes": (
        "Weights, KV cache",
        "Bytes of embedding, layers and head as loaded, and of keys and values for each token of context.",
    ),
    "recall_distance": (
        "Recall at a distance",
        "Rows of kind recall, by the tokens between the value and the end of the prompt: buckets from "
        + ", ".join(map(str, DISTANCES))
        + " tokens. Not known: the value stands in the prompt more than once, or not word for word.",
    ),
    **{name: (title[0].upper() + title[1:], f"The share of {text}.") for name, (title, _, _, text) in METRICS.items()},
}  # fmt: skip
