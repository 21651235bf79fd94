"""Which samples are good enough to train on: duplicates, lengths, and how many of one kind. Pure."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from conf.schema import Quality
from post_training.data.source import Row

PERMUTATIONS, WORDS = 128, 5
"""Of MinHash (Broder 1997): hash functions, and words of a shingle. The estimate's standard error is below 0.045."""


def texts(row: Row) -> Iterator[str]:
    """All texts of a row, in order."""
    for value in row.values():
        if isinstance(value, str):
            yield value
        else:
            for message in value:
                yield message["content"]


def answer_chars(row: Row) -> int:
    """Characters of what is learnt: the shortest of the answers, or the text. For problems, of the question."""
    if "text" in row:
        return len(row["text"])
    if "messages" in row:
        return min(len(m["content"]) for m in row["messages"] if m["role"] == "assistant")
    if "chosen" in row:
        return min(len(row[side][-1]["content"]) for side in ("chosen", "rejected"))
    return len(row["prompt"][-1]["content"])


def whole_chars(row: Row) -> int:
    """Characters of the sample; of a pair, of the longer of its two conversations."""
    if "chosen" not in row:
        return sum(map(len, texts(row)))
    prompt = sum(len(m["content"]) for m in row["prompt"])
    return prompt + max(sum(len(m["content"]) for m in row[side]) for side in ("chosen", "rejected"))


class Seen:
    """Samples seen so far, and whether another is a duplicate of one of them."""

    def __init__(self, quality: Quality) -> None:
        self.exact: dict[bytes, Any] = {}
        self.near: Any = None
        self.threshold = quality.near_threshold
        if quality.dedup == "near":
            from datasketch import MinHashLSH

            # bands that miss little: what they find is compared before it counts
            weights = (0.1, 0.9)  # of false positives and false negatives
            self.near = MinHashLSH(threshold=quality.near_threshold, num_perm=PERMUTATIONS, weights=weights)
            self.sketches: dict[int, Any] = {}
            self.labels: list[str] = []

    def check(self, row: Row, label: str) -> tuple[str, str] | None:
        """("exact" or "near", label of the first sample that this one repeats), or None; then it is remembered."""
        words = " \n ".join(texts(row)).split()
        digest = hashlib.blake2b(" ".join(words).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self.exact:
            return "exact", self.exact[digest]
        if self.near is not None:
            sketch = _sketch(words)
            for number in sorted(self.near.query(sketch)):
                if sketch.jaccard(self.sketches[number]) >= self.threshold:
                    return "near", self.labels[number]
            number = len(self.labels)
            self.near.insert(number, sketch, check_duplication=False)
            self.sketches[number] = sketch
            self.labels.append(label)
        self.exact[digest] = label
        return None


def shingles(words: list[str]) -> set[str]:
    """Each run of WORDS words, in small letters; all words together where there are fewer."""
    small = [word.lower() for word in words]
    return {" ".join(small[i : i + WORDS]) for i in range(max(1, len(small) - WORDS + 1))}


def _sketch(words: list[str]) -> Any:
    from datasketch import MinHash

    sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
    sketch.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in sorted(shingles(words))])
    return sketch


def reasons(
    rows: Iterable[Row], kinds: Iterable[Hashable], quality: Quality, held_out: Iterable[Row] = ()
) -> Iterator[str | None]:
    """For each row in order, why it is dropped; None: it is kept.

    kinds: for each row, what `max_per_category` counts. held_out: rows that training must not repeat; looked at only
    where duplicates are. Of duplicates the first is kept, and the first rows of a kind are.
    """
    counts: Counter[Hashable] = Counter()
    seen = None
    if quality.dedup != "none":
        seen = Seen(quality)
        for row in held_out:
            seen.check(row, "held_out")
    for row, kind in zip(rows, kinds, strict=True):
        reason = _reason(row, quality, seen)
        if reason is None and quality.max_per_category is not None:
            if counts[kind] >= quality.max_per_category:
                reason = "more than data.quality.max_per_category"
            counts[kind] += 1
        yield reason


def _reason(row: Row, quality: Quality, seen: Seen | None) -> str | None:
    if quality.min_chars is not None and answer_chars(row) < quality.min_chars:
        return "shorter than data.quality.min_chars"
    if quality.max_chars is not None and whole_chars(row) > quality.max_chars:
        return "longer than data.quality.max_chars"
    found = seen.check(row, "train") if seen is not None else None
    if found is None:
        return None
    how, label = found
    return f"{how} duplicate of a held-out sample" if label == "held_out" else f"{how} duplicate"


def filters(quality: Quality) -> bool:
    """Whether anything is to be dropped at all."""
    limits = (quality.min_chars, quality.max_chars, quality.max_per_category)
    return quality.dedup != "none" or any(limit is not None for limit in limits)
