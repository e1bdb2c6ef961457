"""A straightforward numpy model of sampling, from a row of logits and the parameters to the tokens that may come out.

It uses numpy's own exp in double precision, so where a candidate or the draw stands within rounding of a limit, either
answer is right.

A case is a dict: logits (float32), real (ids from here on are never sampled), temperature, top_k, top_p, min_p,
repetition, presence, frequency, seed, sample_index, min_tokens, bias (id -> bias), allowed, bad_words, stop, prompt,
bitmask (of bools, or None).
"""

import numpy as np

SLACK = 1e-5  # of a weight or of a share: float32 rounding of (logit - max) / temperature and of e^x


def philox(seed, sample_index, position):
    """Philox4x32-10 in plain integers."""
    x = [position, sample_index, 0, 0]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(b >> 32) ^ x[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ x[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x


def uniform(seed, sample_index, position):
    words = philox(seed, sample_index, position)
    return ((words[0] << 32 | words[1]) >> 11 | 1) / 2**53


def edit(case, output):
    """Masks, biases and penalties, in float32."""
    logits = case["logits"][: case["real"]]
    row = np.full_like(logits, -np.inf)
    allowed = [t for t in case["allowed"] if t < case["real"]] if case["allowed"] else slice(None)
    row[allowed] = logits[allowed]
    if case["bitmask"] is not None:
        row[~case["bitmask"][: case["real"]]] = -np.inf
    masked = [
        w[-1] for w in case["bad_words"] if output[len(output) - len(w) + 1 :] == w[:-1] and len(output) >= len(w) - 1
    ]
    if len(output) < case["min_tokens"]:
        masked += case["stop"]
    row[[t for t in masked if t < case["real"]]] = -np.inf
    for token, bias in case["bias"].items():
        if token < case["real"]:
            row[token] += np.float32(bias)
    rp, pp, fp = (np.float32(case[k]) for k in ("repetition", "presence", "frequency"))
    for token in set(case["prompt"]) | set(output):
        if token < case["real"]:
            x = row[token]
            x = x / rp if x > 0 else x * rp
            row[token] = x - fp * np.float32(output.count(token)) - (pp if token in output else np.float32(0))
    return row


def acceptable(case, row, position):
    """The tokens that the draw may give: one, unless something is within rounding of a limit."""
    if not (row > -np.inf).any():
        return {-1}
    order = np.lexsort((np.arange(len(row)), -row))
    order = order[row[order] > -np.inf]
    if case["temperature"] == 0:
        return {int(order[0])}
    temperature = float(np.float32(max(case["temperature"], 0.01)))
    weight = np.exp((row[order].astype(np.float64) - float(row[order[0]])) / temperature)
    filtered = 0 < case["top_k"] < len(row) or case["top_p"] < 1
    if 0 < case["top_k"] < len(row):
        order, weight = order[: case["top_k"]], weight[: case["top_k"]]
    u = uniform(case["seed"], case["sample_index"], position)
    min_p, top_p = float(np.float32(case["min_p"])), float(np.float32(case["top_p"]))
    tokens = set()
    for min_p_limit in {min_p * (1 - SLACK), min_p * (1 + SLACK)} if min_p < 1 else {min_p - SLACK, 1}:
        keep = weight >= min_p_limit
        ids, w = order[keep], weight[keep]
        for limit in {top_p - SLACK, top_p + SLACK} if top_p < 1 else {2}:
            reached = np.cumsum(w) >= limit * w.sum()
            n = int(np.argmax(reached)) + 1 if reached.any() else len(w)
            chosen, chosen_w = ids[:n], w[:n]
            if not filtered:
                by_id = np.argsort(chosen)
                chosen, chosen_w = chosen[by_id], chosen_w[by_id]
            share = np.cumsum(chosen_w) / chosen_w.sum()
            first, last = np.searchsorted(share, [u - SLACK, u + SLACK], side="right")
            tokens.update(int(t) for t in chosen[first : last + 1])
    return tokens
